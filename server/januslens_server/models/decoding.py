"""Run a model token by token with its key-value cache, and draw tokens from its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from januslens_server import telemetry
from januslens_server.capture import End, Tap, capturing, interruptible
from januslens_server.capture.hooks import rows
from januslens_server.errors import CancelCheck
from januslens_server.models.failures import check_pass
from januslens_server.models.interventions import Interventions
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import changed, head_at
from januslens_server.specs import Sampling
from januslens_server.transfer import to_device


class Decoder:
    """A growing sequence of tokens, with its key-value cache, which is freed with it.

    A model without a cache runs the whole sequence again for each token, and a model with LongRoPE
    once when its rotation changes.

    Between two calls no hook is left on the model, so that other requests may run.
    """

    def __init__(
        self,
        model: ResidentModel,
        layers: Sequence[int],
        check: CancelCheck,
        changes: Callable[[int, int], Interventions | None] = lambda _start, _length: None,
    ) -> None:
        """Read the outputs of `layers`; `check` is called before every block and may raise.

        `changes` returns the interventions of a pass, given its first position and its length.
        """
        self._model = model
        self._changes = changes
        self._check = check
        blocks = model.view.blocks
        last = len(blocks) - 1
        self._layers = layers
        self._taps = {i: Tap(blocks[i].module, End.OUTPUT) for i in {*layers, last}}
        self._last = last
        self._cache: Any = None
        self._argument = model.view.cache_argument
        self._rotation_changes = rotation_changes(model.network.config)
        self._ids: list[int] = []

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens; return the next token's logits `[vocab]` and the layers' outputs.

        Both are at the last position. The outputs are `[layers, d_model]`. Logits are the model's
        own, in float32.

        Raises:
            NotFinite: The residual or the logits are infinite or NaN.
        """
        model = self._model
        modules = [block.module for block in model.view.blocks]
        before = len(self._ids)
        self._ids += ids
        if any(before <= length < len(self._ids) for length in self._rotation_changes):
            self._cache = None
        fed = self._ids if self._cache is None else ids
        telemetry.TOKENS.labels(model.name).inc(len(fed))
        named = {self._argument: self._cache} if self._argument is not None else {}
        with (
            changed(self._changes(len(self._ids) - len(fed), len(fed))),
            capturing(self._taps, self._check, modules, _last_row) as outputs,
            head_at(model, (len(fed) - 1,), len(fed)),
            interruptible(self._check, len(fed)),
        ):
            passed: Any = model.network(
                input_ids=to_device([fed], model.device),
                use_cache=self._argument is not None,
                **named,
            )
        if self._argument is not None:
            self._cache = passed[self._argument]
        logits: torch.Tensor = passed.logits[0, -1:]
        check_pass(outputs[self._last].to(model.device), logits)
        read = [outputs[layer].to(model.device) for layer in self._layers]
        width = model.view.facts.stream_width
        return logits[0].float(), torch.cat(read) if read else logits.new_empty(0, width)


def _last_row(_layer: int, output: torch.Tensor) -> torch.Tensor:
    """Return the last position `[1, d_model]` as a copy, so that the others are freed."""
    return rows(output)[-1:].clone()


def rotation_changes(config: PreTrainedConfig) -> frozenset[int]:
    """Return the lengths beyond which LongRoPE rotates the keys of all positions differently.

    Cached keys have the rotation of a shorter sequence. Dynamic rotations change beyond the model's
    context, which no sequence exceeds.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    by_layer_type = [parameters, *(own for own in parameters.values() if isinstance(own, dict))]
    return frozenset(
        own["original_max_position_embeddings"]
        for own in by_layer_type
        if own.get("rope_type") == "longrope"
    )


class Sampler:
    """Draws tokens from logits, as a function of a seed.

    Uniform numbers come from numpy's PCG64. Each draw takes one, and finds the token at that place
    of the cumulative distribution.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._uniform = np.random.Generator(np.random.PCG64(sampling.seed))

    def draw(self, logits: torch.Tensor) -> int:
        """Return a token id, given the logits `[vocab]` of all tokens."""
        sampling = self._sampling
        if sampling.temperature == 0:
            return int(logits.argmax())
        scaled = logits.double() / sampling.temperature
        ids = None
        if 0 < sampling.top_k < len(scaled):
            scaled, ids = scaled.topk(sampling.top_k)
        elif 0 < sampling.top_p < 1:
            scaled, ids = scaled.sort(descending=True, stable=True)
        cumulative = scaled.softmax(-1).cumsum(-1).cpu().numpy()
        if 0 < sampling.top_p < 1:  # the fewest that reach top_p
            cumulative = cumulative[: int(np.searchsorted(cumulative, sampling.top_p)) + 1]
        place = self._uniform.random() * cumulative[-1]
        index = min(int(np.searchsorted(cumulative, place, side="right")), len(cumulative) - 1)
        return index if ids is None else int(ids[index])
