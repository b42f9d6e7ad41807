"""Previews of edits, projections, tokens and models in a notebook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from januslens._notebook import cells
from januslens._notebook.elements import Child, document, element, literal, note, table

if TYPE_CHECKING:
    from januslens._results.edits import EditPreview
    from januslens._results.models import Model
    from januslens._results.neurons import FoundNeurons
    from januslens._results.projection import Projection
    from januslens._results.tokens import Token


def preview_html(preview: EditPreview) -> str:
    """One row a prompt, before and after."""
    rows = (
        (
            literal(effect.label) if effect.label else "the edited prompt",
            cells.tokens([effect.target]),
            cells.probability_bar(effect.probability_before),
            cells.probability_bar(effect.probability_after),
            f"{effect.rank_before} → {effect.rank_after}",
            element(
                "span",
                cells.tokens([effect.predicted_before]),
                " → ",
                cells.tokens([effect.predicted_after]),
            ),
            f"{effect.kl_bits:.3g}",
        )
        for effect in (preview.edited, *preview.probes)
    )
    headings = ("prompt", "target", "before", "after", ">rank", "prediction", ">KL, bits")
    return document(
        table("What the edit would do", headings, rows),
        note("before, after: the target's probability; KL: how far the whole distribution moves"),
    )


def neurons_html(found: FoundNeurons) -> str:
    """One row a neuron."""
    verb = "suppress" if found.suppressed else "promote"
    rows = (
        (
            str(hit),
            cells.rank(hit.rank),
            cells.signed(hit.logit),
            cells.tokens(_written(hit.value, found.suppressed), [found.token]),
        )
        for hit in found.neurons
    )
    title = f"{len(found.neurons)} of {found.total} neurons that {verb} {found.token}"
    end = "bottom" if found.suppressed else "top"
    return document(
        table(title, ("neuron", ">rank", ">logit", f"the value's {end} tokens"), rows),
        note(f"rank 0 being the {end}"),
    )


def _written(value: Projection, suppressed: bool) -> tuple[Token, ...]:
    return value.bottom_tokens if suppressed else value.top_tokens


def projections_html(projections: Iterable[Projection]) -> str:
    """One row a vector."""
    rows = (
        (
            str(row),
            cells.tokens(read.top_tokens),
            cells.tokens(read.bottom_tokens),
            f"{read.entropy_bits:.2f}",
            cells.rank(read.target_rank),
        )
        for row, read in enumerate(projections)
    )
    headings = (">row", "top", "bottom", ">entropy, bits", ">target's rank")
    return document(table("Logit lens", headings, rows))


def tokens_html(tokens: Iterable[Token]) -> str:
    """One row a token."""
    rows = (
        (str(place), str(token.id), literal(str(token)), literal(token.raw.hex(" ")))
        for place, token in enumerate(tokens)
    )
    return document(table("Tokens", (">position", ">id", "token", "bytes"), rows))


def models_html(models: Iterable[Model]) -> str:
    """One row a model: its state, sizes and what its self-check found."""
    headings = (
        "model",
        "state",
        "architecture",
        ">layers",
        ">heads",
        ">d_model",
        ">d_mlp",
        ">vocab",
        ">context",
        "checks",
    )
    return document(table("Models", headings, map(_model_row, models)))


def _model_row(model: Model) -> tuple[Child, ...]:
    sizes = (
        model.n_layers,
        model.n_heads,
        model.d_model,
        model.d_mlp,
        model.vocab_size,
        model.max_positions,
    )
    broken = [guarantee.name for guarantee in model.guarantees if not guarantee.held]
    checks = f"failed: {', '.join(broken)}" if broken else f"{len(model.guarantees)} held"
    return (
        literal(model.name),
        model.state,
        model.provenance.architecture,
        *(str(size) if size else "" for size in sizes),
        literal(model.state_reason or checks),
    )
