"""Interventions: change sites of a forward pass with hooks, for one request only.

No weight changes. A pass runs inside `Interventions.active`, which hooks the modules that hold the
sites. To hide sources from attention, the results of the affected heads are computed again from
queries, keys and values, because fused kernels take no such mask.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from januslens_server.capture import HiddenSources, NeuronChange, Overlay, overlaid, rewriting
from januslens_server.capture.hooks import rewriting_result, seeing
from januslens_server.errors import CancelCheck
from januslens_server.graph.weights import attention_patterns
from januslens_server.models.expert_overlays import ExpertOverlay, NeuronOverlay
from januslens_server.models.resident import ResidentModel
from januslens_server.models.site_taps import SiteTap
from januslens_server.models.sites import SiteKey, site_experts, site_shape, site_tap
from januslens_server.models.views import AttentionGate
from januslens_server.specs import Add, Noise, Operation, Scale, SetTo, Site, Zero
from januslens_server.transfer import to_device

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

    `positions` are those to change, in the order of the request. `units` are heads or neurons, and
    `experts` those whose neurons change; None means all. If all `keys` have experts, they are
    listed. `sources` are the prompts of a patch or mean. The values of `sources` are averaged;
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
    experts: tuple[int, ...] | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the changed values at one position, given that of the site."""
        if self._of_experts(len(whole)):
            experts, neurons = whole
            return (
                experts if self.experts is None else len(self.experts),
                neurons if self.units is None else len(self.units),
            )
        return whole if self.units is None else (len(self.units), *whole[1:])

    def chosen(self, values: torch.Tensor) -> torch.Tensor:
        """Return the changed ones of a site's `values` `[pos, ...]`."""
        of_experts = self._of_experts(values.dim() - 1)
        if of_experts and self.experts is not None:
            values = values[:, list(self.experts)]
        if self.units is None:
            return values
        return values[:, :, list(self.units)] if of_experts else values[:, list(self.units)]

    def _of_experts(self, dimensions: int) -> bool:
        return self.keys[0][1] is Site.NEURONS and dimensions == 2

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
        self._expert_noise: dict[tuple[int, SiteKey], torch.Tensor] = {}
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

    def neuron_change(self, layer: int) -> NeuronChange | None:
        """Return what changes the neurons of a layer's experts, or None."""
        key = (layer, Site.NEURONS)
        if key not in self._by_key or site_experts(self._model, key) is None:
            return None
        return partial(self._changed_expert, key)

    def over_edits(self, overlays: Sequence[Overlay]) -> list[Overlay]:
        """Return overlays of edited matrices that also know the changes of experts' neurons."""
        return [
            replace(overlay, neuron_change=self.neuron_change(overlay.layer))
            if isinstance(overlay, ExpertOverlay)
            else overlay
            for overlay in overlays
        ]

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
                elif site_experts(self._model, key) is not None:
                    hooks.enter_context(overlaid([self._neuron_overlay(key)]))
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
            positions = [position - self._start for position in intervention.positions]
            index = [to_device(positions, values.device)]
            if intervention.units is not None:
                index[0] = index[0][:, None]
                index.append(to_device(intervention.units, values.device))
            old = changed[tuple(index)]
            changed[tuple(index)] = self._result(number, key, old)
        return changed

    def _neuron_overlay(self, key: SiteKey) -> NeuronOverlay:
        """Return the overlay that changes the neurons of a layer's experts.

        Noise is drawn here, so that it does not depend on which experts the router chooses.
        """
        experts = site_experts(self._model, key)
        if experts is None:
            raise ValueError(f"layer {key[0]} has no experts; expected a mixture")
        numbers: set[int] = set()
        for number, found in self._by_key[key]:
            numbers.update(range(experts.count) if found.experts is None else found.experts)
            if isinstance(found.operation, Noise):
                self._expert_noise[number, key] = self._noise(number, key, found.operation.seed)
        return NeuronOverlay(experts, sorted(numbers), partial(self._changed_expert, key))

    def _changed_expert(
        self, key: SiteKey, expert: int, positions: torch.Tensor, neurons: torch.Tensor
    ) -> torch.Tensor:
        """Return a copy of an expert's neurons `[n, d_mlp]` at `positions` with all changes."""
        changed = neurons.clone()
        for number, found in self._by_key[key]:
            self._check_cancelled()
            count = site_shape(self._model, key, self._length)[0]
            numbers = range(count) if found.experts is None else found.experts
            if expert not in numbers:
                continue
            at = [position - self._start for position in found.positions]
            wanted = to_device(at, positions.device)
            rows, places = _matches(positions, wanted)
            own = partial(_of_expert, len(wanted), places, numbers.index(expert))
            index = [rows]
            if found.units is not None:
                index = [rows[:, None], to_device(found.units, positions.device)]
            old = changed[tuple(index)]
            changed[tuple(index)] = self._result(number, key, old, own)
        return changed

    def _result(
        self,
        number: int,
        key: SiteKey,
        old: torch.Tensor,
        own: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> torch.Tensor:
        """Return what an intervention makes of `old` values.

        `own` returns those values of an operation's tensor that belong to `old`.
        """
        intervention, taken = self._interventions[number], self._taken.get((number, key))
        match intervention.operation:
            case Zero():
                return torch.zeros_like(old)
            case Scale(factor):
                new = old.float() * factor
            case SetTo(array):
                new = own(torch.from_numpy(array).to(old.device))
            case Add(array, coefficient):
                new = old.float() + coefficient * own(torch.from_numpy(array).to(old.device))
            case Noise(deviation, seed):
                drawn = self._expert_noise.get((number, key))
                drawn = self._noise(number, key, seed) if drawn is None else drawn
                new = old.float() + deviation * own(drawn.to(old.device))
            case _:
                if taken is None:
                    raise ValueError("no values of another pass; expected those of a patch or mean")
                new = own(taken.to(old.device))
        new = new.to(old.dtype).expand_as(old)
        if isinstance(intervention.operation, Add | Noise):  # -0.0 plus 0.0 would be 0.0
            return torch.where(new == old, old, new)
        return new

    def _noise(self, number: int, key: SiteKey, seed: int) -> torch.Tensor:
        """Draw the normal noise of the values that an intervention changes."""
        found = self._interventions[number]
        shape = torch.Size(site_shape(self._model, key, self._length))
        drawn = self._drawn(self._generator(number, key, seed), found.positions, shape)
        return found.chosen(drawn)

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

        gate = self._model.view.attention(layer).gate
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
        attention = self._model.view.attention(layer)
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


def _of_expert(
    positions: int, places: torch.Tensor, column: int, values: torch.Tensor
) -> torch.Tensor:
    """Return those of an operation's values `[positions or 1, experts, neurons]` for one expert.

    `values` may lack the first dimension. `places` are the positions that the result has.
    """
    return values.expand(positions, *values.shape[-2:])[places, column]


def _matches(positions: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the `positions` that are `wanted`, and where `wanted` has each."""
    size = int(torch.cat([positions, wanted]).max()) + 1
    place = torch.full((size,), -1, device=positions.device)
    place[wanted] = torch.arange(len(wanted), device=positions.device)
    found = place[positions]
    rows = torch.where(found >= 0)[0]
    return rows, found[rows]


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
