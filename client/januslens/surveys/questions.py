"""The reports over surveys: what each asks, as SQL for DuckDB, and how its answer is drawn.

A query reads views that have the names of a survey's tables. `{vocab_size}` is replaced by the
size of the model's vocabulary. A survey may lack what a query reads: gaps find that out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

import numpy as np

from januslens._charts import CHART, Drawing, ceiling, chart, legend, styled

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Gap:
    """What a table leaves out because the survey does not have it.

    Attributes:
        query: SQL that returns a row for each thing that is missing. The view `requested` has the
            kinds of nodes that the survey was limited to; it is empty for all kinds.
        text: What is left out and what to request; columns of the row are named in braces.
    """

    query: str
    text: str


@dataclass(frozen=True)
class Question:
    """One table of a report.

    Attributes:
        title: What the table has.
        text: What its columns mean, and what it does not show.
        query: The SQL.
        gaps: What the table may leave out.
        draw: Draws the rows of the table; None = it has no figure.
    """

    title: str
    text: str
    query: str
    gaps: tuple[Gap, ...] = ()
    draw: Callable[[pd.DataFrame], Element] | None = None


@dataclass(frozen=True)
class ReportKind:
    """A report.

    Attributes:
        title: What the report is about.
        rpc: The method of the survey that it reads.
        tables: The tables that it reads.
        request: How the survey is requested.
        questions: Its tables.
        measured: Whether it also reads surveys of `intervene`, with the same prompts.
    """

    title: str
    rpc: str
    tables: tuple[str, ...]
    request: str
    questions: tuple[Question, ...]
    measured: bool = False


def _panels(
    frame: pd.DataFrame,
    panel: Sequence[str],
    curve: str,
    value: str,
    ends: tuple[float, float] | None,
    described: str,
) -> Element:
    """Draw a value by layer: a panel for each value of `panel`, a curve for each of `curve`."""
    drawing = Drawing()
    names = list(dict.fromkeys(frame[curve].tolist()))
    if ends is None:
        ends = (0.0, ceiling(frame[value].tolist()))
    width, height = CHART
    groups = frame.groupby(list(panel), sort=False, dropna=False)
    for number, (names_of_panel, rows) in enumerate(groups):
        layers = sorted(set(rows["layer"].tolist()))
        curves = []
        for name in names:
            found = dict(rows.loc[rows[curve] == name, ["layer", value]].to_numpy().tolist())
            curves.append((name, [found.get(layer, np.nan) for layer in layers]))
        at = 10 + number % 4 * (width + 50), 44 + number // 4 * (height + 60)
        title = " ".join(_shown(name) for name in names_of_panel)
        chart(drawing, *at, title, layers, styled(curves), ends, "layer")
    legend(drawing, 10, 18, styled((_shown(name), ()) for name in names))
    return drawing.element(described)


def _shown(name: object) -> str:
    """Return the name of a panel or curve; a whole number without `.0`."""
    return f"{name:g}" if isinstance(name, float) else str(name).replace("_", " ")


def _long(frame: pd.DataFrame, keys: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Return one row for each of the columns `values`, named in `curve`."""
    kept: pd.DataFrame = frame[[*keys, *values]]
    return kept.melt(id_vars=list(keys), var_name="curve", value_name="value")


def _no_nodes(kind: str, text: str) -> Gap:
    """Find out that a survey has no nodes of a kind."""
    query = f"SELECT '{kind}' AS kind WHERE NOT EXISTS (SELECT * FROM nodes WHERE kind = '{kind}')"
    return Gap(query, f"The survey has no {kind} nodes. {text}")


def _not_requested(kinds: Sequence[str], text: str) -> Gap:
    """Find out that kinds of nodes were not requested, which only some models have."""
    listed = ", ".join(f"('{kind}')" for kind in kinds)
    query = f"""
SELECT string_agg(kind, ', ' ORDER BY kind) AS kinds
FROM (VALUES {listed}) AS needed(kind)
WHERE EXISTS (SELECT * FROM requested) AND kind NOT IN (SELECT kind FROM requested)
HAVING count(*) > 0
"""
    return Gap(query, f"{{kinds}} was not requested. {text}")


def _nodes_without(what: str, condition: str, kinds: Sequence[str], text: str) -> Gap:
    """Find out how many nodes of some kinds lack something."""
    listed = ", ".join(f"'{kind}'" for kind in kinds)
    query = f"""
SELECT kind, count(*) AS total, count(*) FILTER (WHERE {condition}) AS missing
FROM nodes
WHERE kind IN ({listed})
GROUP BY kind
HAVING missing > 0
ORDER BY kind
"""
    return Gap(query, f"{{missing}} of {{total}} {{kind}} nodes have no {what}. {text}")


_NO_TOKENS = "coalesce(len(top_token_ids), 0) = 0"

# ---- Heads and neurons by frequency (VISIT 5) ---------------------------------------------------

_FREQUENT = """
SELECT kind, layer, head, expert, neuron,
       count(*) / (SELECT count(*) FROM targets) AS frequency,
       avg(share) AS mean_share,
       CASE WHEN kind = 'MLP_VALUE' THEN avg((activation > 0)::INTEGER) END AS positive,
       CASE WHEN kind = 'MLP_VALUE' THEN any_value(top_tokens) END AS top_tokens,
       CASE WHEN kind = 'MLP_VALUE' THEN any_value(bottom_tokens) END AS bottom_tokens
FROM nodes
WHERE kind IN ('HEAD_OUTPUT', 'MLP_VALUE')
GROUP BY kind, layer, head, expert, neuron
"""
_FREQUENT_UNITS = f"""{_FREQUENT}
ORDER BY frequency DESC, abs(mean_share) DESC, kind, layer, head, expert, neuron
"""
_FREQUENT_BY_LAYER = f"""
SELECT kind, layer,
       count(*) AS selected,
       sum((frequency > 0.5)::INTEGER)::INTEGER AS over_half,
       sum((frequency > 0.9)::INTEGER)::INTEGER AS over_90_percent,
       sum(CASE WHEN frequency > 0.9 THEN mean_share * frequency ELSE 0 END) AS share_of_these
FROM ({_FREQUENT})
GROUP BY kind, layer
ORDER BY kind, layer
"""


def _draw_frequent(frame: pd.DataFrame) -> Element:
    counts = ("selected", "over_half", "over_90_percent")
    rows = _long(frame, ("kind", "layer"), counts)
    rows["value"] = np.log10(rows["value"].astype(float) + 1)
    described = "log10(1 + number) of heads and neurons by how often they are selected"
    return _panels(rows, ("kind",), "curve", "value", None, described)


_UNIT_GAPS = (
    _no_nodes("HEAD_OUTPUT", "Heads are left out; trace HEAD_OUTPUT and ATTENTION_CONCAT."),
    _no_nodes("MLP_VALUE", "Neurons are left out; trace MLP_VALUE, MLP_SUM and MLP_OUTPUT."),
    _nodes_without(
        "sum in the survey",
        "sum IS NULL",
        ["HEAD_OUTPUT"],
        "Their shares are left out; trace ATTENTION_CONCAT as well.",
    ),
    _nodes_without(
        "sum in the survey",
        "sum IS NULL",
        ["MLP_VALUE"],
        "Their shares are left out; trace MLP_SUM and MLP_OUTPUT as well.",
    ),
)

_UNITS = ReportKind(
    title="Heads and neurons by how often they are selected",
    rpc="trace",
    tables=("nodes", "targets"),
    request='client.survey(prompts, out, positions="all", node_kinds=["HEAD_OUTPUT", '
    '"ATTENTION_CONCAT", "MLP_VALUE", "MLP_SUM", "MLP_OUTPUT"])',
    questions=(
        Question(
            "Heads and neurons by layer",
            "`selected` is the number of heads or neurons that were selected at least once, "
            "`over_half` and `over_90_percent` the number of those selected in more than that part "
            "of the traced positions. `share_of_these` is the mean share that the last ones "
            "together have of their sum. Where all heads are selected, their frequency is 1 and "
            "shows nothing. The figure has log10(1 + number).",
            _FREQUENT_BY_LAYER,
            _UNIT_GAPS,
            _draw_frequent,
        ),
        Question(
            "The most frequent ones",
            "`frequency` is the fraction of the traced positions where the head or neuron was "
            "selected, `mean_share` its mean share of the sum where it was, and `positive` the "
            "fraction of these with a positive activation. The tokens are those of the neuron's "
            "value; with a negative activation it promotes the bottom ones.",
            _FREQUENT_UNITS,
            (
                *_UNIT_GAPS,
                _nodes_without(
                    "projection",
                    _NO_TOKENS,
                    ["MLP_VALUE"],
                    "Their tokens are left out; trace with projections and `top_k` above 0.",
                ),
            ),
        ),
    ),
)

# ---- Norms as filters (VISIT 4) -----------------------------------------------------------------

_NORMS = """
SELECT edges.prompt, after.layer, after.kind AS norm, before.top_tokens AS tokens_before,
       after.top_tokens AS tokens_after, before.top_token_ids AS ids_before,
       after.top_token_ids AS ids_after
FROM edges
JOIN nodes AS before ON before.prompt = edges.prompt AND before.id = edges.source
JOIN nodes AS after ON after.prompt = edges.prompt AND after.id = edges.target
WHERE edges.kind = 'NORM' AND len(before.top_token_ids) > 0 AND len(after.top_token_ids) > 0
      AND after.kind != 'FINAL_NORM'
"""
_OVERLAPS = f"""
SELECT norm, layer, count(*) AS pairs,
       avg(len(list_intersect(ids_before, ids_after)) / len(ids_before)) AS overlap,
       avg((ids_before[1] = ids_after[1])::INTEGER) AS same_first
FROM ({_NORMS})
GROUP BY norm, layer
ORDER BY norm, layer
"""
_REMOVED = f"""
WITH norms AS ({_NORMS}), removed AS (
    SELECT norm, layer, unnest(list_filter(ids_before, lambda id: NOT list_contains(ids_after, id)))
           AS token_id FROM norms
), named AS (
    SELECT DISTINCT unnest(ids_before) AS token_id, unnest(tokens_before) AS token FROM norms
), pairs AS (
    SELECT norm, layer, count(*) AS pairs FROM norms GROUP BY norm, layer
)
SELECT norm, layer, token, count(*) / any_value(pairs) AS removed
FROM removed JOIN named USING (token_id) JOIN pairs USING (norm, layer)
GROUP BY norm, layer, token_id, token
QUALIFY row_number() OVER (PARTITION BY norm, layer ORDER BY removed DESC, token_id) <= 5
ORDER BY norm, layer, removed DESC, token_id
"""


def _draw_overlaps(frame: pd.DataFrame) -> Element:
    rows = _long(frame, ("norm", "layer"), ("overlap", "same_first"))
    described = "Overlap of the top tokens before and after a norm, by layer"
    return _panels(rows, ("norm",), "curve", "value", (0, 1), described)


_NORM_GAPS = (
    _not_requested(
        ["ATTENTION_INPUT", "MLP_INPUT"],
        "The norms before these are left out, if the model has them; trace these kinds, and "
        "BLOCK_INPUT, RESIDUAL_MID and BLOCK_OUTPUT.",
    ),
    _not_requested(
        ["ATTENTION_SUM", "ATTENTION_OUTPUT", "MLP_SUM", "MLP_OUTPUT"],
        "Norms after attention or the MLP are left out, if the model has them; trace these kinds.",
    ),
    _nodes_without(
        "node before the norm in the survey",
        "id NOT IN (SELECT target FROM edges WHERE edges.prompt = nodes.prompt)",
        ["ATTENTION_INPUT", "MLP_INPUT"],
        "These norms are left out; trace BLOCK_INPUT, RESIDUAL_MID and BLOCK_OUTPUT as well.",
    ),
    Gap(
        f"""
SELECT after.kind AS kind, count(*) AS total,
       count(*) FILTER (WHERE before.bare OR after.bare) AS missing
FROM edges
JOIN (SELECT *, {_NO_TOKENS} AS bare FROM nodes) AS before
    ON before.prompt = edges.prompt AND before.id = edges.source
JOIN (SELECT *, {_NO_TOKENS} AS bare FROM nodes) AS after
    ON after.prompt = edges.prompt AND after.id = edges.target
WHERE edges.kind = 'NORM' AND after.kind != 'FINAL_NORM'
GROUP BY after.kind
HAVING missing > 0
ORDER BY after.kind
""",
        "{missing} of {total} norms of {kind} have no top tokens and are left out. Trace with "
        "projections and `top_k` above 0.",
    ),
)

_NORMS_REPORT = ReportKind(
    title="Norms as filters",
    rpc="trace",
    tables=("edges", "nodes"),
    request='client.survey(prompts, out, node_kinds=["BLOCK_INPUT", "ATTENTION_INPUT", '
    '"ATTENTION_SUM", "ATTENTION_OUTPUT", "RESIDUAL_MID", "MLP_INPUT", "MLP_SUM", "MLP_OUTPUT", '
    '"BLOCK_OUTPUT"], top_k=10)',
    questions=(
        Question(
            "Overlap before and after each norm",
            "`overlap` is the mean fraction of the top tokens before the norm that are top tokens "
            "after it as well, `same_first` the fraction of pairs with the same first token. "
            "`norm` is the node after the norm. The lens applies the final norm to both, so that a "
            "low overlap shows what the weights of the norm change, and not its scaling. The final "
            "norm itself is left out, because its overlap is 1 by definition.",
            _OVERLAPS,
            _NORM_GAPS,
            _draw_overlaps,
        ),
        Question(
            "Tokens most often removed",
            "`removed` is the fraction of pairs in which the token is a top token before the norm "
            "but not after it; five tokens for each norm.",
            _REMOVED,
            _NORM_GAPS,
        ),
    ),
)

# ---- Where answers appear -----------------------------------------------------------------------

_RANKS = """
SELECT layer, count(*) AS positions,
       avg((target_rank = 0)::INTEGER) AS first,
       avg((target_rank < 10)::INTEGER) AS in_top_10,
       median(target_rank) AS median_rank,
       avg(target_probability) AS mean_probability
FROM nodes
WHERE kind = 'BLOCK_OUTPUT' AND target_rank IS NOT NULL
GROUP BY layer
ORDER BY layer
"""
_BRINGERS = """
WITH states AS (
    SELECT prompt, position, layer, kind, target_rank,
           2 * layer + (kind = 'BLOCK_OUTPUT')::INTEGER AS place
    FROM nodes
    WHERE kind IN ('RESIDUAL_MID', 'BLOCK_OUTPUT') AND target_rank IS NOT NULL
), decided AS (
    SELECT prompt, position, coalesce(max(place) FILTER (target_rank > 0), -1) AS last_wrong
    FROM states GROUP BY prompt, position
), first AS (
    SELECT states.prompt, states.position, states.layer,
           CASE WHEN kind = 'RESIDUAL_MID' THEN 'attention'
                WHEN count(*) FILTER (kind = 'RESIDUAL_MID') OVER () = 0 THEN 'block'
                ELSE 'MLP' END AS component
    FROM states JOIN decided USING (prompt, position)
    WHERE place > last_wrong
    QUALIFY row_number() OVER (PARTITION BY prompt, position ORDER BY place) = 1
), brought AS (
    SELECT layer, component, count(*) AS brought FROM first GROUP BY layer, component
), contributed AS (
    SELECT layer, CASE WHEN kind = 'MLP_OUTPUT' THEN 'MLP' ELSE 'attention' END AS component,
           avg(logit_contribution) AS mean_contribution,
           avg((logit_contribution > 0)::INTEGER) AS positive
    FROM nodes
    WHERE kind IN ('ATTENTION_OUTPUT', 'MLP_OUTPUT') AND logit_contribution IS NOT NULL
    GROUP BY ALL
)
SELECT layer, component,
       coalesce(brought, 0) / (SELECT count(*) FROM decided) AS brought,
       mean_contribution, positive
FROM contributed FULL JOIN brought USING (layer, component)
ORDER BY layer, component
"""


def _draw_ranks(frame: pd.DataFrame) -> Element:
    rows = frame.assign(model="answers")
    rows = _long(rows, ("model", "layer"), ("first", "in_top_10", "mean_probability"))
    described = "How often the target is first or among ten, and its probability, by layer"
    return _panels(rows, ("model",), "curve", "value", (0, 1), described)


def _draw_bringers(frame: pd.DataFrame) -> Element:
    rows = frame.assign(figure="fraction of positions that it brings the target to")
    described = "The component from which the target remains first, by layer"
    return _panels(rows, ("figure",), "component", "brought", None, described)


_ANSWERS = ReportKind(
    title="Where answers appear",
    rpc="trace",
    tables=("nodes",),
    request='client.survey(prompts, out, node_kinds=["ATTENTION_OUTPUT", "RESIDUAL_MID", '
    '"MLP_OUTPUT", "BLOCK_OUTPUT"])',
    questions=(
        Question(
            "Rank of the target after each layer",
            "What the lens reads in the residual after the layer: how often the target is first "
            "and among the first ten, its median rank (0 = first) and its mean probability. The "
            "lens is known to be unreliable in early layers, so a low rank there does not show "
            "that the model has the answer.",
            _RANKS,
            (
                _no_nodes("BLOCK_OUTPUT", "The table is empty; trace BLOCK_OUTPUT."),
                _nodes_without(
                    "rank of the target",
                    "target_rank IS NULL",
                    ["BLOCK_OUTPUT"],
                    "They are left out; trace with projections.",
                ),
            ),
            _draw_ranks,
        ),
        Question(
            "What brings the target to the first rank",
            "`brought` is the fraction of the positions for which the target is first from the "
            "residual after this component onwards; the rest of the positions never have it first "
            "at the end. `mean_contribution` is the mean direct contribution to the target's "
            "logit, in logits, and `positive` the fraction where it is above 0. A component that "
            "prepares the answer for a later one has no direct contribution.",
            _BRINGERS,
            (
                _no_nodes("BLOCK_OUTPUT", "`brought` is empty; trace BLOCK_OUTPUT."),
                Gap(
                    """
SELECT 'RESIDUAL_MID' AS kind
WHERE EXISTS (SELECT * FROM requested)
    AND NOT EXISTS (SELECT * FROM requested WHERE kind = 'RESIDUAL_MID')
    AND NOT EXISTS (
        SELECT * FROM nodes WHERE kind = 'ATTENTION_OUTPUT' AND contains(sum, '/BLOCK_OUTPUT')
    )
""",
                    "RESIDUAL_MID was not requested. `brought` does not distinguish attention and "
                    "MLP of a layer; trace RESIDUAL_MID, which all models but those with parallel "
                    "blocks have.",
                ),
                _nodes_without(
                    "rank of the target",
                    "target_rank IS NULL",
                    ["RESIDUAL_MID", "BLOCK_OUTPUT"],
                    "They are left out of `brought`; trace with projections.",
                ),
                _no_nodes(
                    "ATTENTION_OUTPUT",
                    "The contributions of attention are left out; trace ATTENTION_OUTPUT, and its "
                    "sums RESIDUAL_MID and BLOCK_OUTPUT.",
                ),
                _no_nodes(
                    "MLP_OUTPUT",
                    "The contributions of MLPs are left out; trace MLP_OUTPUT and BLOCK_OUTPUT.",
                ),
                _nodes_without(
                    "direct contribution",
                    "logit_contribution IS NULL",
                    ["ATTENTION_OUTPUT", "MLP_OUTPUT"],
                    "They are left out of `mean_contribution`; trace their sums RESIDUAL_MID and "
                    "BLOCK_OUTPUT as well, and request direct contributions.",
                ),
            ),
            _draw_bringers,
        ),
    ),
)

# ---- Gradients (Backward Lens) ------------------------------------------------------------------

_SEGMENTS = """
SELECT kind, segment, layer, count(*) AS prompts, avg(mean_vjp_norm) AS mean_vjp_norm,
       avg(mean_vjp_norm / nullif(largest, 0)) AS relative_norm
FROM (
    SELECT *, max(mean_vjp_norm) OVER (PARTITION BY prompt, kind) AS largest FROM segments
)
GROUP BY kind, segment, layer
ORDER BY kind, segment, layer
"""
_LAST_COMPONENTS = """
SELECT kind, layer,
       CASE WHEN promoted_end = 'BOTTOM' THEN {vocab_size} - 1 - target_ranks[1]
            ELSE target_ranks[1] END AS rank,
       part
FROM (
    SELECT components.*, token_count - len(losses.target_token_ids) AS last_position,
           size / nullif(sum(size) OVER (PARTITION BY prompt, kind, layer, expert), 0) AS part
    FROM components JOIN prompts USING (prompt) JOIN losses USING (prompt)
)
WHERE position = last_position
"""
_PROMOTED = f"""
SELECT kind, layer, count(rank) AS prompts, median(rank) AS median_rank,
       avg((rank = 0)::INTEGER) AS first, avg((rank < 10)::INTEGER) AS in_top_10,
       avg(part) AS part_of_last
FROM ({_LAST_COMPONENTS})
GROUP BY kind, layer
ORDER BY kind, layer
"""


def _draw_segments(frame: pd.DataFrame) -> Element:
    described = "Mean length of the VJPs by segment of the prompt and layer"
    return _panels(frame, ("kind",), "segment", "relative_norm", (0, 1), described)


def _draw_promoted(frame: pd.DataFrame) -> Element:
    rows = _long(frame, ("kind", "layer"), ("first", "in_top_10", "part_of_last"))
    described = "How often the target is the first promoted token at the last position, by layer"
    return _panels(rows, ("kind",), "curve", "value", (0, 1), described)


_GRADIENTS = ReportKind(
    title="Gradients by segment and layer",
    rpc="gradient_lens",
    tables=("components", "losses", "matrices", "prompts", "segments"),
    request='client.survey(prompts, out, rpc="gradient_lens", components=0, lens="NORMALIZED"), '
    "where each prompt has a target and a subject",
    questions=(
        Question(
            "VJPs by segment of the prompt",
            "`mean_vjp_norm` is the mean length of the VJPs at the positions of the segment. "
            "`relative_norm` first divides it by the largest value of the same prompt and kind of "
            "matrix, so that prompts with large losses do not outweigh the others; the figure "
            "has it. In the last layer, only the last position has a gradient of FF1, FF2, Q or O.",
            _SEGMENTS,
            (
                Gap(
                    """
SELECT count(*) AS total, count(*) FILTER (WHERE subject IS NULL) AS missing
FROM prompts
HAVING missing > 0
""",
                    "{missing} of {total} prompts have no subject and are left out. Give each "
                    "prompt a `subject`.",
                ),
            ),
            _draw_segments,
        ),
        Question(
            "Rank of the target at the promoted end",
            "For the component of the last position of the prompt: the rank of the target at the "
            "end that a descent step promotes (0 = promoted most). For matrices whose input is "
            "projected, no end is promoted, and the rank is that from the top. `part_of_last` is "
            "the mean part of the sizes of all components that this one has.",
            _PROMOTED,
            (
                Gap(
                    """
SELECT total, total - found AS missing
FROM (SELECT sum(component_count)::BIGINT AS total FROM matrices),
     (SELECT count(*) AS found FROM components)
WHERE found < total
""",
                    "{missing} of {total} components are not in the survey. `part_of_last` is the "
                    "part of those that are, and a prompt counts only where that of its last "
                    "position is; request all with `components=0`.",
                ),
                Gap(
                    f"""
SELECT kind, count(*) AS total, count(*) FILTER (WHERE rank IS NULL) AS missing
FROM ({_LAST_COMPONENTS})
GROUP BY kind
HAVING missing > 0
ORDER BY kind
""",
                    "{missing} of {total} components of the last position of {kind} have no "
                    "projection, and their ranks are left out.",
                ),
            ),
            _draw_promoted,
        ),
    ),
)

# ---- Edits (Backward Lens 7) --------------------------------------------------------------------

_EDITS = """
WITH grouped AS (
    SELECT prompt, layer, strength,
           avg((rank_after = 0)::INTEGER) FILTER (probe IS NULL) AS success,
           avg((rank_after = 0)::INTEGER) FILTER (label = 'paraphrase') AS paraphrases,
           avg((predicted_after_token_id = predicted_before_token_id)::INTEGER)
               FILTER (label = 'neighbour') AS specificity,
           avg(log_probability_after - log_probability_before) FILTER (probe IS NULL) AS gain,
           avg(kl_bits) FILTER (label = 'neighbour') AS neighbour_kl
    FROM edits
    GROUP BY prompt, layer, strength
)
SELECT layer, strength, count(*) AS facts, avg(success) AS success,
       avg(paraphrases) AS paraphrases, avg(specificity) AS specificity,
       avg(gain) AS mean_gain_nats, avg((gain > 0)::INTEGER) AS raised,
       avg(neighbour_kl) AS neighbour_kl_bits
FROM grouped
GROUP BY layer, strength
ORDER BY layer, strength
"""


_AGREEMENT = """
WITH shifts AS (
    SELECT prompt, layer, any_value(gradient_cosine * sign(strength)) AS cosine
    FROM edits
    WHERE gradient_cosine IS NOT NULL
    GROUP BY prompt, layer
)
SELECT layer, count(*) AS facts, avg(cosine) AS mean_cosine, min(cosine) AS lowest,
       max(cosine) AS highest, avg((cosine > 0)::INTEGER) AS positive
FROM shifts
GROUP BY layer
ORDER BY layer
"""


def _no_probes(label: str, columns: str) -> Gap:
    """Find out how many prompts have no probes with a label."""
    query = f"""
SELECT count(*) AS total, count(*) FILTER (WHERE NOT probed) AS missing
FROM (SELECT coalesce(bool_or(label = '{label}'), false) AS probed FROM edits GROUP BY prompt)
HAVING missing > 0
"""
    text = (
        f"{{missing}} of {{total}} prompts have no probe labelled `{label}`, and are left out of "
        f"{columns}. Give each prompt such `probes`."
    )
    return Gap(query, text)


def _draw_edits(frame: pd.DataFrame) -> Element:
    rows = _long(frame, ("strength", "layer"), ("success", "paraphrases", "specificity"))
    described = "Success, paraphrases and specificity of edits, by strength and layer"
    return _panels(rows, ("strength",), "curve", "value", (0, 1), described)


def _draw_agreement(frame: pd.DataFrame) -> Element:
    rows = frame.assign(figure="cosine of shift and descent step")
    rows = _long(rows, ("figure", "layer"), ("mean_cosine", "lowest", "highest"))
    described = "Cosine of forward-pass shifts and descent steps, by layer"
    return _panels(rows, ("figure",), "curve", "value", (-1, 1), described)


_EDITS_REPORT = ReportKind(
    title="Edits by layer and strength",
    rpc="preview_edits",
    tables=("edits",),
    request='client.survey(prompts, out, rpc="preview_edits", learning_rates=[0.1, 0.3]), where '
    'each prompt has a target, and probes with the labels "paraphrase" and "neighbour"',
    questions=(
        Question(
            "Success, paraphrases and specificity",
            "`success` is the fraction of facts whose edited prompt predicts the target, "
            "`paraphrases` the mean fraction of the probes labelled `paraphrase` that do, and "
            "`specificity` that of the probes labelled `neighbour` whose prediction is unchanged. "
            "`mean_gain_nats` is what the edit adds to the target's log-probability, `raised` the "
            "fraction of facts where it adds something, and `neighbour_kl_bits` the mean KL "
            "divergence of the neighbours' predictions. Each edit is previewed alone.",
            _EDITS,
            (
                _no_probes("paraphrase", "`paraphrases`"),
                _no_probes("neighbour", "`specificity` and `neighbour_kl_bits`"),
            ),
            _draw_edits,
        ),
        Question(
            "Agreement of shifts with the gradient",
            "The cosine of a forward-pass shift with a positive eta and of a descent step on the "
            "same matrix: 1 = the same direction, 0 = orthogonal. `mean_cosine` is the mean over "
            "the facts, with the lowest and the highest, and `positive` the fraction above 0. The "
            "size of the shift does not matter. A shift that agrees with the gradient may be too "
            "small or too large to succeed.",
            _AGREEMENT,
            (
                Gap(
                    """
SELECT count(*) AS total, count(*) FILTER (WHERE gradient_cosine IS NULL) AS missing
FROM (SELECT DISTINCT prompt, layer, strength, gradient_cosine FROM edits)
HAVING missing > 0
""",
                    "{missing} of {total} edits have no cosine and are left out. Preview "
                    "forward-pass shifts, with `etas` and `gradient_cosine=True`; a descent step "
                    "has no cosine.",
                ),
            ),
            _draw_agreement,
        ),
    ),
)

# ---- Estimated and measured effects -------------------------------------------------------------

# `measured` has the effects of all surveys of experiments, with `kind`.
_NODE_OF = """
measured LEFT JOIN nodes ON nodes.prompt = measured.prompt AND nodes.kind = measured.kind
    AND nodes.layer = measured.layer AND nodes.position = measured.read_position
    AND nodes.head IS NOT DISTINCT FROM measured.head
    AND nodes.neuron IS NOT DISTINCT FROM measured.neuron
    AND nodes.expert IS NULL
"""
_PAIRS = f"""
SELECT nodes.kind, nodes.layer, nodes.logit_contribution AS contribution, nodes.attribution,
       -measured.logit_effect AS effect
FROM {_NODE_OF}
WHERE nodes.logit_contribution IS NOT NULL AND nodes.attribution IS NOT NULL
"""
_FIGURES = """
       count(*) AS parts,
       corr(contribution, effect) AS r_contribution,
       corr(attribution, effect) AS r_attribution,
       avg((sign(contribution) = sign(effect))::INTEGER) AS sign_contribution,
       avg((sign(attribution) = sign(effect))::INTEGER) AS sign_attribution,
       avg(abs(effect)) AS mean_size
"""
_BY_LAYER = f"""
SELECT kind, layer, {_FIGURES}
FROM ({_PAIRS})
GROUP BY kind, layer
ORDER BY kind, layer
"""
_BY_KIND = f"""
SELECT kind, {_FIGURES}
FROM ({_PAIRS})
GROUP BY kind
ORDER BY kind
"""


def _unpaired(condition: str, what: str, advice: str) -> Gap:
    """Find out how many measured effects have no estimates."""
    query = f"""
SELECT measured.kind AS kind, count(*) AS total, count(*) FILTER (WHERE {condition}) AS missing,
       CASE measured.kind WHEN 'HEAD_OUTPUT' THEN 'ATTENTION_CONCAT'
           WHEN 'MLP_VALUE' THEN 'MLP_SUM and MLP_OUTPUT'
           WHEN 'ATTENTION_OUTPUT' THEN 'RESIDUAL_MID and BLOCK_OUTPUT'
           ELSE 'BLOCK_OUTPUT' END AS sums
FROM {_NODE_OF}
GROUP BY measured.kind
HAVING missing > 0
ORDER BY measured.kind
"""
    text = f"{{missing}} of {{total}} measured effects of {{kind}} are left out: {what}. {advice}"
    return Gap(query, text)


_ESTIMATE_GAPS = (
    _unpaired(
        "nodes.id IS NULL",
        "the traces have no node for them",
        "Trace {kind} and {sums} at the last position, with `heads=0` for all heads.",
    ),
    _unpaired(
        "nodes.id IS NOT NULL AND nodes.sum IS NULL",
        "the traces do not have the sum that the node is a part of",
        "Trace {sums} as well.",
    ),
    _unpaired(
        "nodes.sum IS NOT NULL AND (nodes.logit_contribution IS NULL OR nodes.attribution IS NULL)",
        "the traces have no direct contribution or no attribution of them",
        "Trace with `attribution=True`.",
    ),
)


def _draw_estimates(frame: pd.DataFrame) -> Element:
    curves = ("r_contribution", "r_attribution")
    rows = _long(frame, ("kind", "layer"), curves)
    described = "Correlation of both estimates with the measured effect, by kind and layer"
    return _panels(rows, ("kind",), "curve", "value", (-1, 1), described)


_ESTIMATES = ReportKind(
    title="Estimated and measured effects",
    rpc="trace",
    tables=("nodes",),
    request="client.survey(prompts, out, heads=0, attribution=True), and for the same prompts "
    'client.survey(prompts, out, rpc="intervene", sweep=SweepOver(zero("HEAD_RESULT", '
    'positions=-1), by=["layer", "head"])) or the same with another site',
    questions=(
        Question(
            "By kind of part",
            "The measured effect of a part is what zeroing it at the last position takes from the "
            "target's logit; `mean_size` is the mean of its absolute value. `r_contribution` and "
            "`r_attribution` are Pearson's correlations of the effect with the part's direct "
            "contribution and with its attribution, and `sign_contribution` and `sign_attribution` "
            "how often the signs agree. A correlation does not show that an estimate has the right "
            "size.",
            _BY_KIND,
            _ESTIMATE_GAPS,
        ),
        Question(
            "By kind and layer",
            "The same within each layer. A layer with few parts has unsteady correlations.",
            _BY_LAYER,
            _ESTIMATE_GAPS,
            _draw_estimates,
        ),
    ),
    measured=True,
)

REPORTS: Mapping[str, ReportKind] = {
    "units": _UNITS,
    "norms": _NORMS_REPORT,
    "answers": _ANSWERS,
    "gradients": _GRADIENTS,
    "edits": _EDITS_REPORT,
    "estimates": _ESTIMATES,
}


def lines() -> Iterator[str]:
    """Yield the name and the title of each report."""
    width = max(map(len, REPORTS))
    yield from (f"{name:{width}}  {kind.title}" for name, kind in REPORTS.items())
