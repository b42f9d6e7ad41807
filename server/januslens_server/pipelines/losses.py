"""From a loss spec to the tokens that run, the function that is differentiated and its targets."""

from __future__ import annotations

from dataclasses import dataclass

from januslens_server.errors import InvalidRequest
from januslens_server.lens.losses import (
    Loss,
    logit_difference,
    negative_log_likelihood,
    suppression_divergence,
)
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.inputs import (
    check_ids,
    read_prompt,
    read_single_target,
    read_target,
)
from januslens_server.results import Token
from januslens_server.specs import GradientLensSpec, KlDivergence, LogitDifference

# Every component reports the rank of every suppressed token.
MAX_SUPPRESSED = 256


@dataclass(frozen=True)
class Objective:
    """`tokens` run through the model; the first `prompt_length` are the prompt's own.

    `targets` are the tokens whose ranks are reported.
    """

    tokens: list[Token]
    prompt_length: int
    targets: tuple[int, ...]
    loss: Loss


def read_objective(model: ResidentModel, spec: GradientLensSpec) -> Objective:
    """Raises `InvalidRequest` for targets or prompts that this model cannot take."""
    if isinstance(spec.loss, KlDivergence):
        suppressed = _read_suppressed(model, spec.loss)
        tokens = read_prompt(model, spec.prompt)
        return Objective(tokens, len(tokens), suppressed, suppression_divergence(suppressed))
    if isinstance(spec.loss, LogitDifference):
        preferred = read_single_target(model, spec.loss.preferred, "logit_difference.preferred")
        other = read_single_target(model, spec.loss.other, "logit_difference.other")
        tokens = read_prompt(model, spec.prompt)
        loss = logit_difference(preferred, other)
        return Objective(tokens, len(tokens), (preferred, other), loss)
    targets = read_target(model, spec.loss.target, "nll.target")
    prompt = read_prompt(model, spec.prompt, room=len(targets) - 1)
    forced = [model.vocabulary.token(token_id) for token_id in targets[:-1]]
    return Objective(prompt + forced, len(prompt), targets, negative_log_likelihood(targets))


def _read_suppressed(model: ResidentModel, loss: KlDivergence) -> tuple[int, ...]:
    field = "kl.suppressed.ids"
    check_ids(model, loss.suppressed, field)
    if len(loss.suppressed) > MAX_SUPPRESSED:
        raise InvalidRequest(
            field, f"expected at most {MAX_SUPPRESSED} token ids, got {len(loss.suppressed)}"
        )
    if not loss.suppressed:
        raise InvalidRequest(field, "expected at least one token id, got none")
    if len(set(loss.suppressed)) >= model.view.facts.vocab_size:
        raise InvalidRequest(
            field, "expected to leave at least one token, got the whole vocabulary"
        )
    return tuple(dict.fromkeys(loss.suppressed))
