"""Resolve the interventions of a request against a model and a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from januslens_server.errors import CancelCheck, InvalidRequest, never_cancelled
from januslens_server.models.interventions import Intervention, Source
from januslens_server.models.resident import ResidentModel
from januslens_server.models.sites import (
    AFTER_LAYERS,
    BEFORE_LAYERS,
    READ_ONLY,
    SITES_WITH_HEADS,
    SiteKey,
    site_experts,
    site_keys,
    site_shape,
)
from januslens_server.pipelines.hidden_sources import Block, blocks_of, check_sources_left
from januslens_server.pipelines.inputs import missing_site, read_experts, read_layers, read_prompt
from januslens_server.specs import (
    Add,
    BlockSources,
    Chat,
    InterventionSpec,
    MeanOver,
    PatchFrom,
    Prompt,
    SetTo,
    Site,
    Vectors,
)

# Maximum number of conversations that interventions take values from. Each one may run the chat
# template for a second.
MAX_CONVERSATIONS = 64


class OtherPrompts:
    """The other prompts of a request, each of which is tokenized once."""

    def __init__(
        self, model: ResidentModel, check_cancelled: CancelCheck = never_cancelled
    ) -> None:
        """`check_cancelled` is called before each prompt and each intervention."""
        self._model = model
        self.check_cancelled = check_cancelled
        self._ids: dict[Prompt, tuple[int, ...]] = {}

    def ids(self, prompt: Prompt, field: str) -> tuple[int, ...]:
        """Return the token ids of a prompt.

        Raises `InvalidRequest` for an invalid prompt, and for more than `MAX_CONVERSATIONS`
        different conversations.
        """
        if prompt not in self._ids:
            read = sum(isinstance(known, Chat) for known in self._ids)
            if isinstance(prompt, Chat) and read >= MAX_CONVERSATIONS:
                raise InvalidRequest(
                    f"{field}.chat",
                    f"too many conversations: expected at most {MAX_CONVERSATIONS} different ones "
                    "in all interventions; send some as token ids",
                )
            tokens = read_prompt(
                self._model, prompt, field=field, check_cancelled=self.check_cancelled
            )
            self._ids[prompt] = tuple(token.id for token in tokens)
        return self._ids[prompt]


def read_interventions(
    model: ResidentModel,
    specs: Sequence[InterventionSpec],
    length: int,
    prompt_length: int | None = None,
    field: str = "interventions",
    *,
    numbered: bool = True,
    others: OtherPrompts | None = None,
    generating: bool = False,
) -> tuple[Intervention, ...]:
    """Resolve interventions for a pass over `length` tokens.

    Negative positions count from the end of the first `prompt_length` tokens, by default of all.
    `others` has prompts that the request has already named. The template of a sweep is not
    `numbered`; whether it leaves a source depends on how it is split. With `generating`, those
    without positions also apply to the tokens that are generated after the prompt.

    Raises `InvalidRequest` with the path of the field for sites, layers, positions, heads, shapes
    and prompts that do not fit.
    """
    others = others or OtherPrompts(model)
    resolved = []
    for i, spec in enumerate(specs):
        others.check_cancelled()
        path = f"{field}[{i}]" if numbered else field
        reader = _Reader(model, spec, length, prompt_length or length, path, others, generating)
        resolved.append(reader.read())
    if numbered:
        check_sources_left(model, numbered_blocks(resolved, field), others.check_cancelled)
    return tuple(resolved)


def numbered_blocks(interventions: Sequence[Intervention], field: str) -> list[Block]:
    """Return the interventions of a list `field` that hide sources."""
    return blocks_of((f"{field}[{i}]", found) for i, found in enumerate(interventions))


class _Reader:
    """Resolves one intervention; `field` is its path in the request."""

    def __init__(
        self,
        model: ResidentModel,
        spec: InterventionSpec,
        length: int,
        prompt_length: int,
        field: str,
        others: OtherPrompts,
        generating: bool,
    ) -> None:
        self._others = others
        self._throughout = generating and not spec.positions
        self._model = model
        self._spec = spec
        self._length = length
        self._prompt_length = prompt_length
        self._field = field

    def read(self) -> Intervention:
        spec = self._spec
        keys = self._keys()
        positions = self._positions(spec.positions, "positions")
        resolved = Intervention(
            keys=keys,
            positions=positions or tuple(range(self._length)),
            units=self._units(keys),
            experts=self._experts(keys),
            operation=spec.operation,
            throughout=self._throughout,
        )
        match spec.operation:
            case SetTo(values):
                values = self._in_all_streams(values)
                self._check_shape(resolved, values, "set")
                return replace(resolved, operation=SetTo(values))
            case Add(vector, coefficient):
                vector = self._in_all_streams(vector)
                self._check_shape(resolved, vector, "add.vector")
                return replace(resolved, operation=Add(vector, coefficient))
            case PatchFrom(prompt, at):
                return replace(resolved, sources=(self._patch(resolved, prompt, at),))
            case MeanOver(prompts):
                return self._mean(resolved, prompts)
            case BlockSources():
                hidden = self._positions(spec.sources, "source_positions")
                return replace(resolved, hidden=hidden or tuple(range(self._length)))
        return resolved

    def _keys(self) -> tuple[SiteKey, ...]:
        site, layers = self._spec.site, self._spec.layers
        if site in READ_ONLY:
            names = ", ".join(other.name for other in Site if other not in READ_ONLY)
            raise self._invalid("site", f"{site.name} can only be read; expected one of {names}")
        blocked = isinstance(self._spec.operation, BlockSources)
        if blocked != (site is Site.ATTENTION_PATTERN):
            raise self._invalid(
                "block" if blocked else "site",
                "block applies to ATTENTION_PATTERN, which has no other operation",
            )
        if site in BEFORE_LAYERS + AFTER_LAYERS and layers:
            raise self._invalid("layers", f"{site.name} has no layer; leave layers empty")
        asked = read_layers(self._model, layers, f"{self._field}.layers")
        keys = site_keys(self._model, site, asked)
        if self._spec.experts and not layers:  # leave out dense layers between mixtures
            keys = [key for key in keys if site_experts(self._model, key)] or keys
        lacking = set(asked) - {layer for layer, _ in keys}
        if lacking and site not in BEFORE_LAYERS and (layers or not keys):
            raise missing_site(self._model, site, min(lacking), f"{self._field}.site")
        return tuple(keys)

    def _positions(self, positions: Sequence[int], name: str) -> tuple[int, ...]:
        """Return positions counted from the start, in the order of the request."""
        if name == "source_positions" and self._spec.site is not Site.ATTENTION_PATTERN:
            raise self._invalid(name, "only ATTENTION_PATTERN has sources; leave it empty")
        return _counted(
            positions, self._prompt_length, self._length, f"{self._field}.{name}", "the prompt"
        )

    def _units(self, keys: Sequence[SiteKey]) -> tuple[int, ...] | None:
        """Return the heads or neurons to change, or None for all."""
        spec = self._spec
        if spec.sources and spec.site is not Site.ATTENTION_PATTERN:
            raise self._invalid(
                "source_positions", "only ATTENTION_PATTERN has sources; leave it empty"
            )
        if spec.heads and spec.site not in SITES_WITH_HEADS:
            raise self._invalid("heads", f"{spec.site.name} has no heads; leave heads empty")
        if spec.neurons and spec.site is not Site.NEURONS:
            raise self._invalid("neurons", "only NEURONS has neurons; leave neurons empty")
        chosen, name = (spec.heads, "heads") if spec.heads else (spec.neurons, "neurons")
        if not chosen:
            return None
        axis = 0 if spec.heads else -1
        count = min(site_shape(self._model, key, self._length)[axis] for key in keys)
        for unit in chosen:
            if unit >= count:
                raise self._invalid(
                    name, f"{spec.site.name} has no {name[:-1]} {unit}; expected 0 to {count - 1}"
                )
        if len(set(chosen)) < len(chosen):
            raise self._invalid(name, f"{name} are repeated; send each once")
        return chosen

    def _experts(self, keys: Sequence[SiteKey]) -> tuple[int, ...] | None:
        """Return the experts whose neurons change, or None if some layers have none."""
        mixtures = {key[0]: site_experts(self._model, key) for key in keys}
        dense = [layer for layer, found in mixtures.items() if found is None]
        if not self._spec.experts:
            counts = {found.count for found in mixtures.values() if found is not None}
            return tuple(range(counts.pop())) if len(counts) == 1 and not dense else None
        if dense and len(dense) < len(keys):
            raise self._invalid(
                "experts", f"layer {dense[0]} has no experts; name only layers that have some"
            )
        return read_experts(self._model, self._spec.experts, keys, f"{self._field}.experts")

    def _in_all_streams(self, values: Vectors) -> Vectors:
        """Repeat values of one residual stream for each, if the model has several."""
        facts = self._model.view.facts
        one = self._spec.site in {Site.EMBEDDING, Site.BLOCK_OUTPUT} and values.ndim > 0
        if facts.n_streams > 1 and one and values.shape[-1] == facts.d_model:
            return np.tile(values, facts.n_streams)
        return values

    def _check_shape(self, resolved: Intervention, values: Vectors, name: str) -> None:
        """Check that a tensor has the site's shape, at one position or at each of several."""
        for key in resolved.keys:
            shape = resolved.shape(site_shape(self._model, key, self._length))
            each = (len(resolved.positions), *shape)
            if values.shape == each and self._throughout:
                raise self._invalid(
                    f"{name}.shape",
                    f"the tensor has values for {len(resolved.positions)} positions, but generated "
                    f"tokens change as well; send shape {list(shape)}, or name the positions",
                )
            if values.shape not in (shape, each):
                raise self._invalid(
                    f"{name}.shape",
                    f"the tensor has shape {list(values.shape)}; expected {list(shape)}, or "
                    f"{list(each)} for {len(resolved.positions)} positions of {key[1].name}",
                )

    def _patch(self, resolved: Intervention, prompt: Prompt, at: Sequence[int]) -> Source:
        field = f"{self._field}.patch"
        if self._throughout:
            raise self._invalid(
                "positions",
                "the other prompt has no values for generated tokens; name positions of the prompt",
            )
        ids = self._others.ids(prompt, f"{field}.input")
        length = len(ids)
        positions = _counted(at, length, length, f"{field}.positions", "the other prompt")
        if positions and len(positions) != len(resolved.positions):
            raise InvalidRequest(
                f"{field}.positions",
                f"{len(positions)} positions given for {len(resolved.positions)} positions to "
                "change; send as many",
            )
        if not positions and not self._spec.positions and length != self._length:
            raise InvalidRequest(
                f"{field}.input",
                f"the other prompt has {length} tokens and this one {self._length}; name the "
                "positions of both",
            )
        positions = positions or resolved.positions
        if max(positions) >= length:
            raise InvalidRequest(
                f"{field}.input",
                f"the other prompt has {length} tokens and no position {max(positions)}; name its "
                "positions",
            )
        return Source(ids, positions)

    def _mean(self, resolved: Intervention, prompts: Sequence[Prompt]) -> Intervention:
        field = f"{self._field}.mean_over.inputs"
        if not prompts:
            raise InvalidRequest(field, "no prompts given; send at least one")
        read = [self._others.ids(prompt, f"{field}[{i}]") for i, prompt in enumerate(prompts)]
        if all(len(ids) == self._length for ids in read) and not self._throughout:
            return replace(resolved, sources=tuple(Source(ids, resolved.positions) for ids in read))
        for i, ids in enumerate(read):
            if len(ids) < 2:
                raise InvalidRequest(
                    f"{field}[{i}]",
                    "the mean leaves out the first position; expected at least 2 tokens",
                )
        sources = tuple(Source(ids, tuple(range(1, len(ids)))) for ids in read)
        return replace(resolved, sources=sources, over_positions=True)

    def _invalid(self, name: str, description: str) -> InvalidRequest:
        return InvalidRequest(f"{self._field}.{name}", description)


def _counted(
    positions: Sequence[int], prompt_length: int, length: int, field: str, of: str
) -> tuple[int, ...]:
    """Return positions counted from the start; negative ones count from `prompt_length`."""
    for position in positions:
        if not -prompt_length <= position < length:
            raise InvalidRequest(
                field,
                f"position {position} is outside {of}; expected {-prompt_length} to {length - 1}",
            )
    counted = tuple(p + prompt_length if p < 0 else p for p in positions)
    if len(set(counted)) < len(counted):
        raise InvalidRequest(field, "positions are repeated; send each once")
    return counted
