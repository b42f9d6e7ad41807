"""Generate: continue a prompt token by token, and read the layers at each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from januslens_server import telemetry
from januslens_server.errors import CancelCheck
from januslens_server.lens.extremes import highest
from januslens_server.lens.projection import outcomes
from januslens_server.models.decoding import Decoder, Sampler
from januslens_server.models.resident import ResidentModel
from januslens_server.models.runner import generation_changes
from januslens_server.pipelines.metrics import StageClock
from januslens_server.pipelines.resolve import ResolvedGenerate
from januslens_server.results import (
    FinishReason,
    GeneratedToken,
    GenerationEvent,
    GenerationHeader,
    GenerationSummary,
    LayerOutcome,
    Token,
)
from januslens_server.transfer import to_host


def generate(request: ResolvedGenerate, check_cancelled: CancelCheck) -> Iterator[GenerationEvent]:
    """Yield the header, then each token when it is drawn, then the summary.

    Raises whatever `check_cancelled` raises, which is called before every block of every pass.
    """
    clock = StageClock("Generate")
    clock.add("tokenize", request.seconds)
    model, spec = request.model, request.spec
    yield GenerationHeader(model.provenance, request.tokens)

    ids: Sequence[int] = [token.id for token in request.tokens]
    with clock.stage("sources"):
        changes = generation_changes(model, request.interventions, check_cancelled)
    decoder = Decoder(model, request.layers, check_cancelled, changes)
    sampler = Sampler(spec.sampling)
    stop = _StopTexts(spec.stop)
    generated, finished = 0, None
    while finished is None:
        made = _step(request, decoder, sampler, ids, clock, check_cancelled)
        ids = [made.token.id]
        generated += 1
        finished = _finished(request, made.token, stop, generated)
        yield made
    yield GenerationSummary(generated, clock.times(), finished)


def _step(
    request: ResolvedGenerate,
    decoder: Decoder,
    sampler: Sampler,
    ids: Sequence[int],
    clock: StageClock,
    check_cancelled: CancelCheck,
) -> GeneratedToken:
    """Feed tokens and draw the next one. Between two steps only the cache is kept."""
    model, spec = request.model, request.spec
    with clock.stage("forward" if len(ids) > 1 else "generate"):
        logits, outputs = decoder.feed(ids)
        chosen = sampler.draw(logits)
    with clock.stage("project"):
        top_k = 0 if spec.reading is None else spec.reading.top_k
        layers = _layers(model, request.layers, outputs, chosen, top_k, check_cancelled)
        return _token(model, logits, chosen, spec.top_k, layers)


def _finished(
    request: ResolvedGenerate, token: Token, stop: _StopTexts, generated: int
) -> FinishReason | None:
    """Return why the generation ends after a token, or None."""
    if token.id in request.model.end_ids:
        return FinishReason.END_OF_SEQUENCE
    if stop.completed_by(token.raw):
        return FinishReason.STOP_TEXT
    if generated < request.max_new_tokens:
        return None
    full = request.max_new_tokens < request.spec.max_new_tokens
    return FinishReason.MAX_POSITIONS if full else FinishReason.MAX_NEW_TOKENS


class _StopTexts:
    """Finds texts in the bytes of a growing text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [text.encode() for text in texts]
        self._longest = max(map(len, self._texts), default=0)
        self._tail = b""

    def completed_by(self, added: bytes) -> bool:
        """Append bytes; return whether the text now contains one of the texts."""
        text = self._tail + added
        self._tail = text[max(0, len(text) - self._longest + 1) :] if self._longest else b""
        return any(sought in text for sought in self._texts)


def _token(
    model: ResidentModel,
    logits: torch.Tensor,
    chosen: int,
    top_k: int,
    layers: Sequence[LayerOutcome],
) -> GeneratedToken:
    """Return a token with the figures of the distribution that `logits` `[vocab]` give."""
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    # A token that the model excludes has the logit minus infinity, and adds 0 to the entropy.
    nats = -torch.where(probabilities > 0, probabilities * log_probabilities, 0.0).sum()
    _, top_ids = highest(logits[None], top_k)
    own, entropy, ids, listed = to_host(
        log_probabilities[chosen], nats / math.log(2), top_ids[0], probabilities[top_ids[0]]
    )
    return GeneratedToken(
        token=model.vocabulary.token(chosen),
        log_probability=float(own),
        entropy_bits=float(entropy),
        top_ids=ids.tolist(),
        top_probabilities=listed.tolist(),
        layers=layers,
    )


def _layers(
    model: ResidentModel,
    layers: Sequence[int],
    outputs: torch.Tensor,
    chosen: int,
    top_k: int,
    check_cancelled: CancelCheck,
) -> list[LayerOutcome]:
    """Project the outputs `[layers, d_model]` of layers, and report on the chosen token."""
    if not layers:
        return []
    telemetry.VECTORS_PROJECTED.inc(len(layers))
    found = outcomes(model.view.lens, outputs, chosen, top_k, check_cancelled)
    columns = (found.ranks, found.log_probabilities, found.top_ids)
    rows = zip(layers, *(column.tolist() for column in columns), strict=True)
    return [
        LayerOutcome(layer, rank, math.exp(log_probability), log_probability, top_ids)
        for layer, rank, log_probability, top_ids in rows
    ]
