"""Interventions: change sites of a forward pass with hooks, for one request only.

No weight changes. A pass runs inside `Interventions.active`, which hooks the modules that hold the
sites. To hide sources from attention, the results of the affected heads are computed again from
queries, keys and values, because fused kernels take no such mask.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from januslens_server.capture import HiddenSources, rewriting
from januslens_server.capture.hooks import rewriting_result, seeing
from januslens_server.errors import CancelCheck
from januslens_server.graph.weights import attention_patterns
from januslens_server.models.resident import ResidentModel
from januslens_server.models.sites import SiteKey, SiteTap, site_tap
from januslens_server.models.views import AttentionGate
from januslens_server.specs import Add, Noise, Operation, Scale, SetTo, Site, Zero

# Normal values that are drawn at once, and attention probabilities that are computed at once.
DRAWN_AT_ONCE, PATTERN_AT_ONCE = 2**22, 2**24
# torch draws normal values in groups of this many, and an incomplete last group differently.
ROUND = 16
# Key of what the gate of the heads returned, beside those of sites.
GATE = "gate"


@dataclass(frozen=True)
class Source:
    """Another prompt whose pass provides values: its `ids`, and the `positions` that are read."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Intervention:
    """A change of some sites of a model, resolved for one prompt.

    `positions` are those to change, in the order of the request. `units` are heads or neurons; None
    means all. `sources` are the prompts of a patch or mean. The values of `sources` are averaged;
    with `over_positions`, also over their positions. `hidden` are the source positions to block.
    `throughout` means that the tokens which are generated after the prompt change as well.
    """

    keys: tuple[SiteKey, ...]
    positions: tuple[int, ...]
    units: tuple[int, ...] | None
    operation: Operation
    sources: tuple[Source, ...] = ()
    over_positions: bool = False
    hidden: tuple[int, ...] = ()
    throughout: bool = False

    def in_pass(self, start: int, length: int) -> Intervention:
        """Return the change of a generation's pass over `length` tokens from position `start`."""
        if self.throughout:
            return replace(self, positions=tuple(range(start, start + length)))
        return self if start == 0 else replace(self, positions=())


def hidden_sources(interventions: Sequence[Intervention], layer: int) -> HiddenSources | None:
    """Return the sources that interventions hide in a layer, or None."""
    entries = tuple(
        (found.units, frozenset(found.positions), found.hidden)
        for found in interventions
        if found.hidden and (layer, Site.ATTENTION_PATTERN) in found.keys
    )
    return HiddenSources(entries) if entries else None


# Values `[positions, units, ...]` or `[positions, ...]` of the sources of an intervention.
SourceValues = Mapping[tuple[int, SiteKey], torch.Tensor]


@dataclass
class GenerationState:
    """What the interventions of a generation keep between its passes.

    `noise` has the generator of each intervention and site, `seen` the keys and values of all
    positions so far in layers where sources are hidden from generated tokens.
    """

    noise: dict[tuple[int, SiteKey], torch.Generator] = field(default_factory=dict)
    seen: dict[SiteKey, torch.Tensor] = field(default_factory=dict)


class Interventions:
    """The changes of one pass over `length` tokens of a prompt or of a generation."""

    def __init__(
        self,
        model: ResidentModel,
        interventions: Sequence[Intervention],
        length: int,
        taken: SourceValues,
        check_cancelled: CancelCheck,
        from_layer: int = -1,
        start: int = 0,
        state: GenerationState | None = None,
    ) -> None:
        """Change layers from `from_layer` on. The pass may run several copies of the prompt.

        Positions then count through all copies. `taken` has the values that patches and means
        insert, by number of the intervention. `check_cancelled` is called before each change of a
        site, and may raise to stop the pass. The passes of a generation share a `state`; `start` is
        the position of the first token of the pass.
        """
        self._model = model
        self._interventions = interventions
        self._length = length
        self._taken = taken
        self._start = start
        self._state = state
        self._check_cancelled = check_cancelled
        self._by_key: dict[SiteKey, list[tuple[int, Intervention]]] = {}
        for number, intervention in enumerate(interventions):
            for key in intervention.keys if intervention.positions else ():
                if key[0] < from_layer:
                    continue
                self._by_key.setdefault(key, []).append((number, intervention))

    def __bool__(self) -> bool:
        """Whether the pass is changed at all."""
        return bool(self._by_key)

    def sites(self, layer: int) -> frozenset[Site]:
        """Return the sites that change in a layer."""
        return frozenset(site for at, site in self._by_key if at == layer)

    def hidden_sources(self, layer: int) -> HiddenSources | None:
        """Return the sources that are hidden in a layer, or None."""
        return hidden_sources(self._interventions, layer)

    @contextmanager
    def active(self, sites: Collection[Site] = frozenset(Site)) -> Iterator[None]:
        """Change these sites of the model's forward passes inside the context."""
        with ExitStack() as hooks:
            for key in sorted(self._by_key):  # hooks of one module run in the order of the sites
                layer, site = key
                if site not in sites:
                    continue
                if site is Site.ATTENTION_PATTERN:
                    self._hide(hooks, layer)
                elif site is Site.ROUTER:
                    router = site_tap(self._model, key).tap.module
                    hooks.enter_context(rewriting_result(router, partial(self._rerouted, key)))
                else:
                    found = site_tap(self._model, key)
                    rewrite = partial(self._rewritten, key, found)
                    in_place = site is Site.RESIDUAL_MID
                    hooks.enter_context(rewriting(found.tap, rewrite, in_place=in_place))
            yield

    def _rewritten(self, key: SiteKey, site: SiteTap, tapped: torch.Tensor) -> torch.Tensor:
        return site.replaced(tapped, self.changed(key, site.values(tapped)))

    def _rerouted(self, key: SiteKey, router: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Run a router again with changed logits in place of the result of its linear map."""
        with _LinearResult(self.changed(key, output[0])):
            return router.forward(*args)

    def changed(self, key: SiteKey, values: torch.Tensor) -> torch.Tensor:
        """Return a copy of `values` `[pos, ...]` with all interventions on a site applied."""
        changed = values.clone()
        for number, intervention in self._by_key[key]:
            self._check_cancelled()
            index = [torch.tensor(intervention.positions, device=values.device) - self._start]
            if intervention.units is not None:
                index[0] = index[0][:, None]
                index.append(torch.tensor(intervention.units, device=values.device))
            old = changed[tuple(index)]
            changed[tuple(index)] = self._result(number, key, index, old, changed.shape[1:])
        return changed

    def _result(
        self,
        number: int,
        key: SiteKey,
        index: list[torch.Tensor],
        old: torch.Tensor,
        shape: torch.Size,
    ) -> torch.Tensor:
        intervention, taken = self._interventions[number], self._taken.get((number, key))
        match intervention.operation:
            case Zero():
                return torch.zeros_like(old)
            case Scale(factor):
                new = old.float() * factor
            case SetTo(array):
                new = torch.from_numpy(array).to(old.device)
            case Add(array, coefficient):
                new = old.float() + coefficient * torch.from_numpy(array).to(old.device)
            case Noise(deviation, seed):
                generator = self._generator(number, key, seed)
                drawn = self._drawn(generator, intervention.positions, shape).to(old.device)
                new = old.float() + deviation * (drawn if len(index) == 1 else drawn[:, index[1]])
            case _:
                if taken is None:
                    raise ValueError("no values of another pass; expected those of a patch or mean")
                new = taken.to(old.device)
        new = new.to(old.dtype).expand_as(old)
        if isinstance(intervention.operation, Add | Noise):  # -0.0 plus 0.0 would be 0.0
            return torch.where(new == old, old, new)
        return new

    def _generator(self, number: int, key: SiteKey, seed: int) -> torch.Generator:
        """Return a new generator, or in a generated token's pass that of the pass before."""
        if self._state is None:
            return torch.Generator().manual_seed(seed)
        if self._start == 0:
            self._state.noise[number, key] = torch.Generator().manual_seed(seed)
        return self._state.noise[number, key]

    def _drawn(
        self, generator: torch.Generator, positions: Sequence[int], shape: torch.Size
    ) -> torch.Tensor:
        """Return the rows `[pos, *shape]` of normal noise for a whole pass.

        Equal to rows of `torch.randn` for all positions, but drawn in blocks of rows up to the last
        one that is needed.
        """
        wanted = (torch.tensor(positions) - self._start) % self._length
        last = ROUND * (int(wanted.max()) // ROUND + 1)
        rows = max(1, DRAWN_AT_ONCE // shape.numel() // ROUND) * ROUND
        found = torch.empty(len(wanted), *shape)
        end = 0
        while end < min(last, self._length):
            self._check_cancelled()
            start, end = end, min(end + rows, last)
            if self._length - end < ROUND:
                end = self._length
            drawn = torch.randn(end - start, *shape, generator=generator)
            inside = (wanted >= start) & (wanted < end)
            found[inside] = drawn[wanted[inside] - start]
        return found

    def _hide(self, hooks: ExitStack, layer: int) -> None:
        """Recompute the results of heads, without the sources that are hidden from them."""
        seen: dict[Site | str, torch.Tensor] = {}

        def see(site: Site, found: SiteTap, tapped: torch.Tensor) -> None:
            seen[site] = found.values(tapped)

        def see_gate(gate: AttentionGate, tapped: torch.Tensor) -> None:
            seen[GATE] = gate(tapped, self._model.view.facts.n_heads)

        gate = self._model.view.parts(layer).attention.gate
        if gate is not None:
            hooks.enter_context(seeing(gate.linear.output, partial(see_gate, gate)))

        for site in (Site.QUERY, Site.KEY, Site.VALUE):
            found = site_tap(self._model, (layer, site))
            hooks.enter_context(seeing(found.tap, partial(see, site, found)))
        result = site_tap(self._model, (layer, Site.HEAD_RESULT))
        rewrite = partial(self._without_hidden, layer, seen, result)
        hooks.enter_context(rewriting(result.tap, rewrite))

    def _without_hidden(
        self,
        layer: int,
        seen: Mapping[Site | str, torch.Tensor],
        site: SiteTap,
        tapped: torch.Tensor,
    ) -> torch.Tensor:
        hidden = self.hidden_sources(layer)
        if hidden is None:
            return tapped
        attention = self._model.view.parts(layer).attention
        results = site.values(tapped)
        rotation = None
        if attention.rotation is not None:
            rotation = attention.rotation(self._start + self._length).to(results.device)
        changed = results.clone()
        sources = self._start + self._length
        at_once = max(1, PATTERN_AT_ONCE // (attention.n_heads * sources))
        for copy, own in hidden.by_copy(sources).items():
            rows = slice(copy * self._length, (copy + 1) * self._length)
            query = seen[Site.QUERY][rows]
            key, value = (
                self._from_first(layer, site, seen[site][rows]) for site in (Site.KEY, Site.VALUE)
            )
            values = value.float().repeat_interleave(attention.n_heads // value.shape[1], dim=1)
            affected = sorted({p for _, queries, _ in own.entries for p in queries})
            for first in range(0, len(affected), at_once):
                self._check_cancelled()
                positions = affected[first : first + at_once]
                at = [position - self._start for position in positions]
                pattern = attention_patterns(
                    query[at], key, positions, rotation, attention.scoring, own
                )
                mixed = torch.einsum("phs,she->phe", pattern, values)
                if GATE in seen:
                    mixed = mixed * seen[GATE][rows][at]
                mixed = mixed.to(results.dtype)
                mask = own.mask(positions, pattern.shape[1], pattern.shape[2], pattern.device)
                at = [rows.start + row for row in at]
                changed[at] = torch.where(mask.any(-1)[:, :, None], mixed, results[at])
        return site.replaced(tapped, changed)

    def _from_first(self, layer: int, site: Site, values: torch.Tensor) -> torch.Tensor:
        """Return the keys or values of all positions so far, given those of this pass."""
        state, blocks = self._state, self._by_key[layer, Site.ATTENTION_PATTERN]
        if state is None or not any(found.throughout for _, found in blocks):
            return values
        if self._start:
            values = torch.cat([state.seen[layer, site], values])
        state.seen[layer, site] = values
        return values


class _LinearResult(TorchFunctionMode):
    """Replaces the result of linear maps inside the context."""

    def __init__(self, result: torch.Tensor) -> None:
        super().__init__()
        self._result = result

    def __torch_function__(
        self,
        function: Any,
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is functional.linear:
            return self._result
        return function(*args, **(kwargs or {}))
