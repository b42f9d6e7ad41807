"""Interventions: changes of a forward pass, for one request only.

Pass them as `interventions` to `client.trace`, `client.gradient_lens`, `client.activations` and
`client.generate`, or in experiments to `client.intervene`, which measures the effect of each::

    from januslens import patch, steer, zero

    client.trace(prompt, interventions=[zero(heads=[(9, 6)]), steer(3, direction, 4.0)])

A site is a place in the forward pass, such as `HEAD_RESULT`; docs/semantics.md defines each.
Layers, positions, heads, neurons and experts say which values are changed; None means all of them.
Heads and neurons are numbers, or pairs `(layer, number)`, which name their layers as well. All
interventions of a request hold in the same pass. At one site, they apply in the given order. In
`generate`, positions are those of the prompt; None also means every generated token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from numpy.typing import ArrayLike

from januslens.arguments import (
    Layers,
    Positions,
    Prompt,
    checked_text,
    count,
    finite_number,
    input_message,
    layer_numbers,
    position_numbers,
    several,
)
from januslens.results.kinds import SITES, Site
from januslens.results.vectors import tensor_message
from januslens.v1 import intervene_pb2, interventions_pb2

Units = int | Iterable[int | tuple[int, int]]
"""Heads or neurons: numbers, or pairs `(layer, number)`."""


@dataclass(frozen=True)
class Intervention:
    """A change at one site; made by the functions of this module.

    Attributes:
        messages: The change as messages of the contract, one per layer where heads or neurons are
            named with their layers.
    """

    messages: tuple[interventions_pb2.Intervention, ...]


@dataclass(frozen=True)
class Experiment:
    """Interventions that apply to the same pass; `client.intervene` reports their effect.

    Attributes:
        interventions: The interventions; none = only those of `always`.
        label: Label that is returned with the effect.
    """

    interventions: Iterable[Intervention] = ()
    label: str = ""


@dataclass(frozen=True)
class SweepOver:
    """One experiment for each part of an intervention, split along the given axes.

    For example, `SweepOver(zero("HEAD_RESULT"), by=["layer", "head"])` zeroes each head by itself.

    Attributes:
        template: The whole intervention. Its heads or neurons are numbers, not pairs.
        by: The axes: `layer`, `position`, `head`, `neuron` or `source`, one or several of them.
        layer_window: Number of layers that change together around the layer of each experiment,
            within those of the template. An even window has one more layer below than above.
    """

    template: Intervention
    by: str | Iterable[str]
    layer_window: int = 1


def zero(
    site: Site | str | None = None,
    *,
    layers: Layers | None = None,
    positions: Positions | None = None,
    heads: Units | None = None,
    neurons: Units | None = None,
    experts: int | Iterable[int] | None = None,
) -> Intervention:
    """Set values to 0, for example `zero(heads=[(9, 6)])` to knock out head 6 of layer 9.

    Args:
        site: The site; None = HEAD_RESULT for heads, NEURONS for neurons and experts.
        layers: Layers, from 0 or negative from the last; None = every layer that has the site.
        positions: Positions, negative from the end; None or `"all"` = all.
        heads: Heads, or pairs `(layer, head)`; None = all.
        neurons: Neurons, or pairs `(layer, neuron)`; None = all.
        experts: Routed experts whose neurons change; None = all.

    Raises:
        TypeError: An argument has an invalid type.
        ValueError: An argument has a value that no server accepts.
    """
    change = interventions_pb2.Intervention(zero=True)
    return _at(change, site, layers, positions, heads, neurons, experts)


def scale(
    factor: float,
    site: Site | str | None = None,
    *,
    layers: Layers | None = None,
    positions: Positions | None = None,
    heads: Units | None = None,
    neurons: Units | None = None,
    experts: int | Iterable[int] | None = None,
) -> Intervention:
    """Multiply values by a number; the other arguments are those of `zero`.

    Raises:
        TypeError: An argument has an invalid type.
        ValueError: An argument has a value that no server accepts.
    """
    change = interventions_pb2.Intervention(scale=finite_number(factor, "factor"))
    return _at(change, site, layers, positions, heads, neurons, experts)


def set_value(
    value: ArrayLike,
    site: Site | str | None = None,
    *,
    layers: Layers | None = None,
    positions: Positions | None = None,
    heads: Units | None = None,
    neurons: Units | None = None,
    experts: int | Iterable[int] | None = None,
) -> Intervention:
    """Replace values; the other arguments are those of `zero`.

    Args:
        value: An array of the site's shape at one position, over the given heads or neurons, or
            one such array per position.
        site: The site; None = HEAD_RESULT for heads, NEURONS for neurons and experts.
        layers: Layers, from 0 or negative from the last; None = every layer that has the site.
        positions: Positions, negative from the end; None or `"all"` = all.
        heads: Heads, or pairs `(layer, head)`; None = all.
        neurons: Neurons, or pairs `(layer, neuron)`; None = all.
        experts: Routed experts whose neurons change; None = all.

    Raises:
        TypeError: An argument has an invalid type.
        ValueError: An argument has a value that no server accepts.
    """
    change = interventions_pb2.Intervention(set=tensor_message(value))
    return _at(change, site, layers, positions, heads, neurons, experts)


def add(
    vector: ArrayLike,
    site: Site | str | None = None,
    *,
    coefficient: float = 1.0,
    layers: Layers | None = None,
    positions: Positions | None = None,
    heads: Units | None = None,
    neurons: Units | None = None,
    experts: int | Iterable[int] | None = None,
) -> Intervention:
    """Add a vector times a coefficient; the vector is shaped as in `set_value`.

    Raises:
        TypeError: An argument has an invalid type.
        ValueError: An argument has a value that no server accepts.
    """
    added = interventions_pb2.Addition(
        vector=tensor_message(vector), coefficient=finite_number(coefficient, "coefficient")
    )
    change = interventions_pb2.Intervention(add=added)
    return _at(change, site, layers, positions, heads, neurons, experts)


def steer(
    layer: int, vector: ArrayLike, coefficient: float = 1.0, *, positions: Positions | None = None
) -> Intervention:
    """Add a direction `[d_model]` to the residual stream after a layer.

    Raises:
        TypeError: An argument has an invalid type.
        ValueError: An argument has a value that no server accepts.
    """
    return add(
        vector, Site.BLOCK_OUTPUT, coefficient=coefficient, layers=layer, positions=positions
    )


def patch(
    site: Site | str,
    *,
    source: Prompt,
    layers: Layers | None = None,
    positions: Positions | None = None,
    source_positions: Positions | None = None,
    heads: Units | None = None,
    neurons: Units | None = None,
    experts: int | Iterable[int] | None = None,
) -> Intervention:
    """Replace values by those of another prompt, at the same site and in the same layer.

    Args:
        site: The site.
        source: The other prompt; its pass is not changed.
        layers: Layers, from 0 or negative from the last; None = every layer that has the site.
        positions: Positions, negative from the end; None or `"all"` = all.
        source_positions: Positions of the other prompt, one for each of `positions`; None = the
            same. Needed if the prompts have different lengths, unless `positions` are given.
        heads: Heads, or pairs `(layer, head)`; None = all.
        neurons: Neurons, or pairs `(layer, neuron)`; None = all.
        experts: Routed experts whose neurons change; None = all.

    Raises:
        TypeError: An argument has an invalid type.
        ValueError: An argument has a value that no server accepts.
    """
    taken = interventions_pb2.Patch(
        input=input_message(source), positions=position_numbers(source_positions)[0]
    )
    change = interventions_pb2.Intervention(patch=taken)
    return _at(change, site, layers, positions, heads, neurons, experts)


def mean_over(
    prompts: Iterable[Prompt],
    site: Site | str | None = None,
    *,
    layers: Layers | None = None,
    positions: Positions | None = None,
    heads: Units | None = None,
    neurons: Units | None = None,
    experts: int | Iterable[int] | None = None,
) -> Intervention:
    """Replace values by their mean over other prompts (mean ablation).

    If all prompts have as many tokens as that of the request, the mean is taken for each position,
    otherwise over all positions of the prompts but the first. The other arguments are those of
    `zero`.

    Raises:
        TypeError: An argument has an invalid type.
        ValueError: An argument has a value that no server accepts.
    """
    inputs = [input_message(prompt) for prompt in prompts]
    if not inputs:
        raise ValueError("prompts is empty; give at least one prompt")
    change = interventions_pb2.Intervention(mean_over=interventions_pb2.MeanOver(inputs=inputs))
    return _at(change, site, layers, positions, heads, neurons, experts)


def noise(
    standard_deviation: float,
    site: Site | str = Site.EMBEDDING,
    *,
    seed: int = 0,
    layers: Layers | None = None,
    positions: Positions | None = None,
    heads: Units | None = None,
    neurons: Units | None = None,
    experts: int | Iterable[int] | None = None,
) -> Intervention:
    """Add normally distributed noise; the same seed gives the same noise.

    At EMBEDDING and at the positions of the subject, this is the corruption of causal tracing
    (Meng et al., 2022). The other arguments are those of `zero`.

    Raises:
        TypeError: An argument has an invalid type.
        ValueError: An argument has a value that no server accepts.
    """
    drawn = interventions_pb2.Noise(
        standard_deviation=finite_number(standard_deviation, "standard_deviation"),
        seed=count(seed, "seed"),
    )
    change = interventions_pb2.Intervention(noise=drawn)
    return _at(change, site, layers, positions, heads, neurons, experts)


def knock_out_attention(
    *,
    sources: Positions,
    layers: Layers | None = None,
    positions: Positions | None = None,
    heads: Units | None = None,
) -> Intervention:
    """Hide source positions from attention (attention knock-out; Geva et al., 2023).

    Their scores become minus infinity before the softmax, so that the other sources share the
    attention.

    Args:
        sources: The source positions that are hidden, negative from the end.
        layers: Layers, from 0 or negative from the last; None = all.
        positions: The query positions that they are hidden from, negative from the end; None or
            `"all"` = all.
        heads: Heads, or pairs `(layer, head)`; None = all.

    Raises:
        TypeError: An argument has an invalid type.
        ValueError: An argument has a value that no server accepts.
    """
    change = interventions_pb2.Intervention(
        block=True, source_positions=position_numbers(sources)[0]
    )
    return _at(change, Site.ATTENTION_PATTERN, layers, positions, heads, None)


def intervention_messages(
    interventions: Iterable[Intervention],
) -> list[interventions_pb2.Intervention]:
    """Return the messages of several interventions, in order.

    Raises:
        TypeError: One of them is not an `Intervention`.
    """
    given = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    for intervention in given:
        if not isinstance(intervention, Intervention):
            raise TypeError(
                f"invalid intervention {intervention!r}; make it with a function of "
                "januslens.interventions, for example zero(heads=[(9, 6)])"
            )
    return [message for intervention in given for message in intervention.messages]


def counted_from_start(intervention: Intervention, length: int) -> Intervention:
    """Return the same change of a prompt of `length` tokens, without negative positions."""
    messages = []
    for message in intervention.messages:
        counted = interventions_pb2.Intervention()
        counted.CopyFrom(message)
        for positions in (counted.positions, counted.source_positions):
            positions[:] = [p + length if p < 0 else p for p in positions]
        messages.append(counted)
    return Intervention(tuple(messages))


def experiment_message(experiment: Experiment | Intervention) -> intervene_pb2.Experiment:
    """Build the message of one experiment; an intervention is an experiment without a label.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(experiment, Intervention):
        experiment = Experiment([experiment])
    if not isinstance(experiment, Experiment):
        raise TypeError(
            f"invalid experiment {experiment!r}; expected an Experiment or an intervention"
        )
    return intervene_pb2.Experiment(
        label=checked_text(experiment.label, "label"),
        interventions=intervention_messages(experiment.interventions),
    )


_AXES = ("layer", "position", "head", "neuron", "source")


def sweep_message(sweep: SweepOver) -> intervene_pb2.Sweep:
    """Build the message of a sweep.

    Raises:
        TypeError: An argument has an invalid type.
        ValueError: There are no axes, one is unknown, or the template names heads by layer.
    """
    if not isinstance(sweep, SweepOver):
        raise TypeError(f"invalid sweep {sweep!r}; expected a SweepOver")
    messages = intervention_messages([sweep.template])
    if len(messages) != 1:
        raise ValueError(
            "the template of the sweep has heads or neurons in several layers; "
            "give numbers instead of pairs, and layers"
        )
    axes = [sweep.by] if isinstance(sweep.by, str) else list(sweep.by)
    if not axes or not set(axes) <= set(_AXES):
        raise ValueError(f"invalid by {axes}; expected one or several of {', '.join(_AXES)}")
    return intervene_pb2.Sweep(
        template=messages[0],
        layer_window=count(sweep.layer_window, "layer_window"),
        **{f"by_{axis}": True for axis in axes},
    )


def _at(
    change: interventions_pb2.Intervention,
    site: Site | str | None,
    layers: Layers | None,
    positions: Positions | None,
    heads: Units | None,
    neurons: Units | None,
    experts: int | Iterable[int] | None = None,
) -> Intervention:
    """Say where a change happens."""
    if heads is not None and neurons is not None:
        raise ValueError("heads and neurons are both given; give only one of them")
    if heads is not None and experts is not None:
        raise ValueError("heads and experts are both given; give only one of them")
    if site is None and heads is None and neurons is None and experts is None:
        raise ValueError("no site given; give a site, heads, neurons or experts")
    if site is None:
        site = Site.NEURONS if heads is None else Site.HEAD_RESULT
    change.site = SITES.number(Site.of(site))
    change.positions.extend(position_numbers(positions)[0])
    if experts is not None:
        numbers = [count(number, "experts") for number in several(experts, "experts")]
        if not numbers:
            raise ValueError("experts is empty; give at least one entry, or None for all")
        change.experts.extend(numbers)
    units, name = (neurons, "neurons") if heads is None else (heads, "heads")
    return Intervention(tuple(_by_layer(change, layers, units, name)))


def _by_layer(
    change: interventions_pb2.Intervention,
    layers: Layers | None,
    units: Units | None,
    name: str,
) -> Iterator[interventions_pb2.Intervention]:
    """Yield one message, or one per layer if the heads or neurons name their layers."""
    listed = [] if units is None else list(several(units, name, "integers or pairs"))
    if units is not None and not listed:
        raise ValueError(f"{name} is empty; give at least one entry, or None for all")
    pairs = [unit for unit in listed if isinstance(unit, tuple) and len(unit) == 2]
    if pairs and (layers is not None or len(pairs) != len(listed)):
        raise ValueError(
            f"invalid {name} {listed}; expected numbers, or pairs (layer, number) without layers"
        )
    if not pairs:
        change.layers.extend(layer_numbers(layers))
        getattr(change, name).extend(count(number, name) for number in listed)
        yield change
        return
    for layer in dict.fromkeys(layer for layer, _number in pairs):
        part = interventions_pb2.Intervention()
        part.CopyFrom(change)
        part.layers.extend(layer_numbers(layer))
        numbers = (number for of_layer, number in pairs if of_layer == layer)
        getattr(part, name).extend(count(number, name) for number in numbers)
        yield part
