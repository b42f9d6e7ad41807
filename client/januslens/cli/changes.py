"""Options that describe changes of the forward pass, for `intervene` and `generate`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import click

from januslens.cli.options import Number, layer_list, position_list, unit_list
from januslens.interventions import (
    Experiment,
    Intervention,
    knock_out_attention,
    mean_over,
    patch,
    scale,
    zero,
)
from januslens.results.kinds import Site

Pairs = list[tuple[int, int]]


def _pairs(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[Pairs, ...]:
    """Parse lists of layer.number: `9.6,9.9` is [(9, 6), (9, 9)]."""
    return tuple(unit_list(ctx, param, value) for value in values)


_OPTIONS = (
    click.option(
        "--zero-heads",
        multiple=True,
        callback=_pairs,
        metavar="LAYER.HEAD,...",
        help="Zero these heads together, for example 9.6,9.9 (repeatable).",
    ),
    click.option(
        "--zero-neurons",
        multiple=True,
        callback=_pairs,
        metavar="LAYER.NEURON,...",
        help="Zero these neurons together (repeatable).",
    ),
    click.option("--zero", "zeroed", is_flag=True, help="Zero the values at --site."),
    click.option(
        "--scale", "factor", type=Number(), metavar="FACTOR", help="Scale the values at --site."
    ),
    click.option(
        "--patch-from",
        metavar="PROMPT",
        help="Replace the values at --site by those of this prompt.",
    ),
    click.option(
        "--mean-over",
        "averaged",
        multiple=True,
        metavar="PROMPT",
        help="Replace the values at --site by their mean over these prompts (repeatable).",
    ),
    click.option(
        "--hide",
        callback=position_list,
        metavar="POSITIONS",
        help="Hide these source positions from attention.",
    ),
    click.option(
        "--site",
        type=click.Choice([site.name for site in Site][1:], case_sensitive=False),
        help="Place that is changed; default: HEAD_RESULT for heads, NEURONS for neurons "
        "and experts, otherwise BLOCK_OUTPUT.",
    ),
    click.option(
        "--layers", callback=layer_list, help="Layers to change, for example 0-3,7; default: all."
    ),
    click.option(
        "--positions",
        callback=position_list,
        help="Positions to change, for example -1,3; default: all.",
    ),
    click.option(
        "--heads", callback=layer_list, help="Heads to change, for example 0-3,7; default: all."
    ),
    click.option(
        "--neurons", callback=layer_list, help="Neurons to change, for example 0-3,7; default: all."
    ),
    click.option(
        "--experts",
        callback=layer_list,
        help="Routed experts whose neurons change, for example 0-3,7; default: all.",
    ),
)


@dataclass(frozen=True)
class Changes:
    """The changes that the options describe; the methods raise ValueError if they do not fit.

    `zero_heads` and `zero_neurons` have one list of (layer, number) for each such option. The other
    options describe a single change: what is done at a site, and where.
    """

    zero_heads: tuple[Pairs, ...]
    zero_neurons: tuple[Pairs, ...]
    zeroed: bool
    factor: float | None
    patch_from: str | None
    averaged: tuple[str, ...]
    hide: Any
    site: str | None
    layers: list[int] | None
    positions: Any
    heads: list[int] | None
    neurons: list[int] | None
    experts: list[int] | None

    def knock_outs(self) -> list[Experiment]:
        """Return an experiment for each list of heads and neurons to zero."""
        at = self.positions
        heads = [
            Experiment([zero(heads=pairs, positions=at)], _without("head", pairs))
            for pairs in self.zero_heads
        ]
        neurons = [
            Experiment([zero(neurons=pairs, positions=at)], _without("neuron", pairs))
            for pairs in self.zero_neurons
        ]
        return heads + neurons

    def at_site(self, swept: Collection[str] = ()) -> Intervention | None:
        """Return the change at the site, or None; `swept` are the axes that will split it."""
        self._check_single()
        if self.hide is not None:
            if any(place is not None for place in (self.site, self.neurons, self.experts)):
                raise ValueError(
                    "--hide takes no --site, --neurons or --experts; it changes attention"
                )
            return knock_out_attention(
                sources=self.hide, layers=self.layers, positions=self.positions, heads=self.heads
            )
        site = self.site or self._default_site(swept)
        where: dict[str, Any] = {
            "layers": self.layers,
            "positions": self.positions,
            "heads": self.heads,
            "neurons": self.neurons,
            "experts": self.experts,
        }
        if self.patch_from is not None:
            return patch(site, source=self.patch_from, **where)
        if self.averaged:
            return mean_over(self.averaged, site, **where)
        if self.factor is not None:
            return scale(self.factor, site, **where)
        return zero(site, **where) if self.zeroed else None

    def together(self) -> list[Intervention]:
        """Return all changes as interventions of one pass."""
        listed = [change for one in self.knock_outs() for change in one.interventions]
        at_site = self.at_site()
        return listed if at_site is None else [*listed, at_site]

    def _check_single(self) -> None:
        """Refuse several changes at the site, and a place at which nothing is changed."""
        changes = {
            "--zero": self.zeroed,
            "--scale": self.factor is not None,
            "--patch-from": self.patch_from is not None,
            "--mean-over": bool(self.averaged),
            "--hide": self.hide is not None,
        }
        given = [name for name, is_given in changes.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; give only one of them")
        listed = self.zero_heads or self.zero_neurons
        places = {
            "--site": self.site,
            "--layers": self.layers,
            "--positions": None if listed else self.positions,
            "--heads": self.heads,
            "--neurons": self.neurons,
            "--experts": self.experts,
        }
        unused = [name for name, place in places.items() if place is not None]
        if unused and not given:
            raise ValueError(
                f"{unused[0]} is given without a change there; give one, such as --zero"
            )

    def _default_site(self, swept: Collection[str]) -> Site:
        if self.heads is not None or "head" in swept:
            return Site.HEAD_RESULT
        named = self.neurons is not None or self.experts is not None
        by_neuron = named or "neuron" in swept
        return Site.NEURONS if by_neuron else Site.BLOCK_OUTPUT


def _without(unit: str, pairs: Sequence[tuple[int, int]]) -> str:
    return f"without {unit} " + ", ".join(f"{layer}.{number}" for layer, number in pairs)


def with_changes(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `Changes` to a command, which receives them as `changes`."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        described = {field.name: kwargs.pop(field.name) for field in fields(Changes)}
        command(*args, changes=Changes(**described), **kwargs)

    decorated: Callable[..., None] = run
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
