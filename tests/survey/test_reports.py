"""Reports equal a naive count over the results that a client returns for the same prompts."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import correlation, mean, median
from typing import Any

import pytest
from click.testing import CliRunner

import januslens
from januslens import Client, Probe, SweepOver, Trace, zero
from januslens.cli.program import januslens as command
from januslens.surveys.questions import REPORTS

FACTS = [
    ("The capital of Japan is the city of", "Japan", " Tokyo", " Lima"),
    ("The capital of Peru is the city of", "Peru", " Lima", " Paris"),
    ("The capital of France is the city of", "France", " Paris", " Tokyo"),
    ("The currency of Japan is the", "Japan", " yen", " euro"),
    ("Officials in Peru speak", "Peru", " Spanish", " French"),
]
ASKED = [{"prompt": prompt, "target": target} for prompt, _, target, _ in FACTS]
STATES: dict[str, Any] = {"heads": 0, "top_k": 10, "attribution": True}
ALL: dict[str, Any] = {"positions": "all", "heads": 2, "top_neurons": 4, "bottom_neurons": 1}
ETAS, LAYERS = [0.1, 0.3], [2, 3]
HEADS = SweepOver(zero("HEAD_RESULT", positions=-1), by=["layer", "head"])
MLPS = SweepOver(zero("MLP_OUTPUT", positions=-1), by=["layer"])


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[Client]:
    with Client(server_address) as opened:
        yield opened


@pytest.fixture(scope="module")
def out(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The surveys that the reports read."""
    folder = tmp_path_factory.mktemp("surveys")
    client.survey(ASKED, folder / "it's states", **STATES)
    client.survey(ASKED, folder / "units", **ALL)
    client.survey(ASKED, folder / "heads", rpc="intervene", sweep=HEADS)
    client.survey(ASKED, folder / "mlps", rpc="intervene", sweep=MLPS)
    changed = [{"prompt": p, "subject": s, "target": other} for p, s, _, other in FACTS]
    client.survey(changed, folder / "gradients", rpc="gradient_lens", components=0)
    edits = [
        {"prompt": p, "target": o, "probes": probes(i)} for i, (p, _, _, o) in enumerate(FACTS)
    ]
    shifts: dict[str, Any] = {"etas": ETAS, "layers": LAYERS, "gradient_cosine": True}
    client.survey(edits, folder / "edits", rpc="preview_edits", **shifts)
    return folder


def probes(number: int) -> list[Probe]:
    neighbours = [Probe(FACTS[(number + i) % 5][0], label="neighbour") for i in (1, 2)]
    return [Probe(f"Everyone knows this. {FACTS[number][0]}", label="paraphrase"), *neighbours]


@pytest.fixture(scope="module")
def traces(client: Client) -> list[Trace]:
    return [client.trace(prompt, target, **STATES) for prompt, _, target, _ in FACTS]


def found(
    report: januslens.Report, number: int, *keys: str
) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """The rows of a table by some of their columns."""
    rows = records(report, number)
    listed: dict[tuple[Any, ...], Mapping[str, Any]] = {
        tuple(row[key] for key in keys): row for row in rows
    }
    assert len(listed) == len(rows) > 0
    return listed


def records(report: januslens.Report, number: int) -> list[dict[str, Any]]:
    listed: Any = report.tables[number].frame.to_dict("records")
    return list(listed)


def assert_figures(row: Mapping[str, Any], **expected: float) -> None:
    assert {name: float(row[name]) for name in expected} == pytest.approx(
        expected, rel=1e-4, abs=1e-6
    )


def test_frequent_heads_and_neurons(client: Client, out: Path) -> None:
    report = januslens.report("units", out / "units")
    shares: dict[Any, list[Any]] = defaultdict(list)
    positive: dict[Any, list[Any]] = defaultdict(list)
    positions = 0
    for prompt, _, target, _ in FACTS:
        trace = client.trace(prompt, target, **ALL)
        positions += len(trace.prompt_tokens)
        parts = {edge.source: edge for edge in trace.edge_list if edge.kind == "PART"}
        for node in trace.node_list:
            if node.kind in ("HEAD_OUTPUT", "MLP_VALUE"):
                unit = (
                    str(node.kind),
                    node.layer,
                    node.head if node.neuron is None else node.neuron,
                )
                shares[unit].append(parts[node.id].share)
                positive[unit].append((node.activation or 0) > 0)
    listed = records(report, 1)
    assert len(listed) == len(shares)
    for row in listed:
        is_head = row["kind"] == "HEAD_OUTPUT"
        unit = (row["kind"], row["layer"], int(row["head" if is_head else "neuron"]))
        frequency = len(shares[unit]) / positions
        assert_figures(row, frequency=frequency, mean_share=mean(shares[unit]))
        if not is_head:
            assert_figures(row, positive=mean(positive[unit]))
            assert len(row["top_tokens"]) == 5
    by_layer = found(report, 0, "kind", "layer")
    for place, counted in by_layer.items():
        counts = [len(s) / positions for u, s in shares.items() if u[:2] == place]
        assert counted["selected"] == len(counts)
        assert counted["over_half"] == sum(count > 0.5 for count in counts)
        assert counted["over_90_percent"] == sum(count > 0.9 for count in counts)


def test_norms_as_filters(out: Path, traces: list[Trace]) -> None:
    report = januslens.report("norms", out / "it's states")
    overlaps: dict[Any, list[float]] = defaultdict(list)
    removed, pairs = Counter[Any](), Counter[Any]()
    for trace in traces:
        for edge in trace.edge_list:
            after = trace.node(edge.target)
            before = trace.node(edge.source)
            if edge.kind != "NORM" or after.kind == "FINAL_NORM":
                continue
            assert before.projection
            assert after.projection
            norm = (str(after.kind), after.layer)
            kept = set(after.projection.top_tokens)
            lost = [token for token in before.projection.top_tokens if token not in kept]
            overlaps[norm].append(1 - len(lost) / 10)
            pairs[norm] += 1
            removed.update((*norm, token.text) for token in lost)
    rows = found(report, 0, "norm", "layer")
    assert set(rows) == set(overlaps)
    for norm, row in rows.items():
        assert_figures(row, overlap=mean(overlaps[norm]), pairs=pairs[norm])
    for lost_token in records(report, 1):
        norm = (lost_token["norm"], lost_token["layer"])
        count = removed[(*norm, lost_token["token"])]
        assert_figures(lost_token, removed=count / pairs[norm])


def test_where_answers_appear(out: Path, traces: list[Trace]) -> None:
    report = januslens.report("answers", out / "it's states")
    ranks: dict[int, list[int]] = defaultdict(list)
    brought = Counter[Any]()
    contributions: dict[Any, list[Any]] = defaultdict(list)
    for trace in traces:
        steps = []  # the target's rank after each component
        for layer in trace.layers:
            for node in layer.node_list:
                if node.kind in ("ATTENTION_OUTPUT", "MLP_OUTPUT"):
                    (edge,) = [
                        e for e in trace.edge_list if e.source == node.id and e.kind == "PART"
                    ]
                    component = "MLP" if node.kind == "MLP_OUTPUT" else "attention"
                    contributions[layer.layer, component].append(edge.logit_contribution)
                if node.kind in ("RESIDUAL_MID", "BLOCK_OUTPUT") and node.layer == layer.layer:
                    assert node.projection
                    assert node.projection.target_rank is not None
                    component = "MLP" if node.kind == "BLOCK_OUTPUT" else "attention"
                    steps.append((layer.layer, component, node.projection.target_rank))
                    if node.kind == "BLOCK_OUTPUT":
                        ranks[layer.layer].append(node.projection.target_rank)
        right = [all(rank == 0 for *_, rank in steps[i:]) for i in range(len(steps))]
        if any(right):
            brought[steps[right.index(True)][:2]] += 1
    for (layer,), row in found(report, 0, "layer").items():
        first = mean(rank == 0 for rank in ranks[layer])
        assert_figures(row, first=first, median_rank=median(ranks[layer]))
    rows = found(report, 1, "layer", "component")
    assert len(rows) == 8
    for place, row in rows.items():
        assert_figures(
            row, brought=brought[place] / 5, mean_contribution=mean(contributions[place])
        )


def test_gradients_by_segment_and_layer(client: Client, out: Path) -> None:
    report = januslens.report("gradients", out / "gradients")
    norms: dict[Any, list[float]] = defaultdict(list)
    ranks: dict[int, list[int]] = defaultdict(list)
    for prompt, subject, _, other in FACTS:
        gradient = client.gradient_lens(prompt, other, subject=subject, components=0)
        for segment in gradient.segments:
            norms[str(segment.kind), segment.segment, segment.layer].append(segment.mean_vjp_norm)
        for matrix in gradient.of_kind("FF2"):
            (last,) = [
                c for c in matrix.components if c.position == len(gradient.prompt_tokens) - 1
            ]
            ranks[matrix.layer].append(981 - last.target_ranks[0])
    rows = found(report, 0, "kind", "segment", "layer")
    assert set(rows) == set(norms)
    for key, row in rows.items():
        assert_figures(row, mean_vjp_norm=mean(norms[key]), prompts=len(norms[key]))
    promoted = found(report, 1, "kind", "layer")
    for layer, values in ranks.items():
        row = promoted["FF2", layer]
        assert_figures(row, median_rank=median(values), first=mean(v == 0 for v in values))
    assert_figures(promoted["FF2", 3], part_of_last=1)  # no other position has a gradient there


def test_edits_by_layer_and_strength(client: Client, out: Path) -> None:
    report = januslens.report("edits", out / "edits")
    figures: dict[Any, list[Any]] = defaultdict(list)
    cosines: dict[int, list[float]] = defaultdict(list)
    for number, (prompt, _, _, other) in enumerate(FACTS):
        previews = client.preview_edits(
            prompt, other, probes=probes(number), etas=ETAS, layers=LAYERS, gradient_cosine=True
        )
        for cell in previews.cells[:: len(ETAS)]:
            assert cell.gradient_cosine is not None
            cosines[cell.layer].append(cell.gradient_cosine)
        for cell in previews.cells:
            paraphrase, *neighbours = cell.probes
            unchanged = mean(p.predicted_after == p.predicted_before for p in neighbours)
            gain = cell.edited.log_probability_after - cell.edited.log_probability_before
            read = (cell.edited.rank_after == 0, paraphrase.rank_after == 0, unchanged, gain)
            figures[cell.layer, round(cell.strength, 3)].append(read)
    rows = found(report, 0, "layer", "strength")
    assert len(rows) == 4
    for (layer, strength), row in rows.items():
        success, paraphrases, specificity, gain = map(
            mean, zip(*figures[layer, round(strength, 3)], strict=True)
        )
        assert_figures(row, success=success, paraphrases=paraphrases, specificity=specificity)
        assert_figures(row, mean_gain_nats=gain)
    agreement = found(report, 1, "layer")
    assert set(agreement) == {(layer,) for layer in LAYERS}
    for layer, values in cosines.items():
        row = agreement[layer,]
        assert_figures(row, mean_cosine=mean(values), lowest=min(values), highest=max(values))
        assert_figures(row, facts=len(FACTS), positive=mean(value > 0 for value in values))


def test_estimated_and_measured_effects(client: Client, out: Path, traces: list[Trace]) -> None:
    report = januslens.report("estimates", out / "it's states", out / "heads", out / "mlps")
    estimates: dict[Any, list[Any]] = defaultdict(list)
    effects: dict[Any, list[float]] = defaultdict(list)
    for trace, (prompt, _, target, _) in zip(traces, FACTS, strict=True):
        for kind, sweep in (("HEAD_OUTPUT", HEADS), ("MLP_OUTPUT", MLPS)):
            measured = client.intervene(prompt, target=target, sweep=sweep)
            before = measured.before[0].logit
            for effect in measured.effects:
                (node,) = [
                    node
                    for node in trace.node_list
                    if (node.kind, node.layer, node.head) == (kind, effect.layer, effect.head)
                ]
                (edge,) = [e for e in trace.edge_list if e.source == node.id and e.kind == "PART"]
                for key in ((kind,), (kind, effect.layer)):
                    estimates[key].append((edge.logit_contribution, edge.attribution))
                    effects[key].append(before - effect.after[0].logit)
    for number, keys in enumerate((("kind",), ("kind", "layer"))):
        rows = found(report, number, *keys)
        assert set(rows) == {key for key in effects if len(key) == number + 1}
        for key, row in rows.items():
            direct, first_order = zip(*estimates[key], strict=True)
            assert_figures(
                row,
                parts=len(effects[key]),
                r_contribution=correlation(direct, effects[key]),
                r_attribution=correlation(first_order, effects[key]),
                mean_size=mean(map(abs, effects[key])),
            )


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("units", ["units"]),
        ("norms", ["it's states"]),
        ("answers", ["it's states"]),
        ("gradients", ["gradients"]),
        ("edits", ["edits"]),
        ("estimates", ["it's states", "heads", "mlps"]),
    ],
)
def test_report_of_a_complete_survey_leaves_nothing_out(
    out: Path, name: str, folders: list[str]
) -> None:
    report = januslens.report(name, *(out / folder for folder in folders))
    assert [table.left_out for table in report.tables] == [(), ()]


ONE = [{"prompt": FACTS[0][0], "target": FACTS[0][2]}]
# What a survey of one prompt lacks, and what the two tables of a report say about it.
GAPS: dict[str, tuple[str, dict[str, Any], tuple[list[str], list[str]]]] = {
    "heads without their sum": (
        "estimates",
        {"node_kinds": ["HEAD_OUTPUT", "MLP_OUTPUT", "BLOCK_OUTPUT"], "heads": 0}
        | {"attribution": True},
        (["80 of 80 measured effects of HEAD_OUTPUT", "Trace ATTENTION_CONCAT as well"],) * 2,
    ),
    "heads that are not selected": (
        "estimates",
        {"heads": 1, "attribution": True},
        (["60 of 80 measured effects of HEAD_OUTPUT", "with `heads=0` for all heads"],) * 2,
    ),
    "attributions": (
        "estimates",
        {"heads": 0},
        (
            [
                "80 of 80 measured effects of HEAD_OUTPUT",
                "20 of 20 measured effects of MLP_OUTPUT",
                "`attribution=True`",
            ],
        )
        * 2,
    ),
    "heads": (
        "units",
        {"node_kinds": ["MLP_VALUE", "MLP_OUTPUT"]},
        (["no HEAD_OUTPUT nodes", "trace HEAD_OUTPUT and ATTENTION_CONCAT"],) * 2,
    ),
    "shares and tokens": (
        "units",
        {"node_kinds": ["HEAD_OUTPUT", "MLP_VALUE"], "projections": False, "heads": 1}
        | {"top_neurons": 2, "bottom_neurons": 1},
        (
            ["4 of 4 HEAD_OUTPUT nodes have no sum", "12 of 12 MLP_VALUE nodes have no sum"],
            ["12 of 12 MLP_VALUE nodes have no projection"],
        ),
    ),
    "norms": (
        "norms",
        {"node_kinds": ["MLP_INPUT", "RESIDUAL_MID"], "top_k": 0, "bottom_k": 1},
        (
            [
                "ATTENTION_INPUT was not requested",
                "ATTENTION_OUTPUT, ATTENTION_SUM, MLP_OUTPUT",
                "4 of 4 norms of MLP_INPUT have no top tokens",
            ],
        )
        * 2,
    ),
    "states before norms": (
        "norms",
        {"node_kinds": ["MLP_INPUT", "ATTENTION_INPUT", "BLOCK_INPUT", "BLOCK_OUTPUT"]},
        (["4 of 4 MLP_INPUT nodes have no node before the norm", "trace BLOCK_INPUT"],) * 2,
    ),
    "states": (
        "answers",
        {"node_kinds": ["BLOCK_OUTPUT", "ATTENTION_OUTPUT"]},
        (
            [],
            [
                "RESIDUAL_MID was not requested",
                "no MLP_OUTPUT nodes",
                "4 of 4 ATTENTION_OUTPUT nodes have no direct contribution",
            ],
        ),
    ),
    "ranks": (
        "answers",
        {"projections": False},
        (
            ["4 of 4 BLOCK_OUTPUT nodes have no rank of the target"],
            ["4 of 4 RESIDUAL_MID nodes have no rank of the target"],
        ),
    ),
    "components and subjects": (
        "gradients",
        {"components": 1},
        (
            ["1 of 2 prompts have no subject"],
            ["components are not in the survey", "request all with `components=0`"],
        ),
    ),
    "probes": (
        "edits",
        {"etas": [0.1], "layers": [3]},
        (
            ["1 of 1 prompts have no probe labelled `paraphrase`", "`neighbour`"],
            ["1 of 1 edits have no cosine"],
        ),
    ),
}


@pytest.mark.parametrize("lacking", GAPS)
def test_report_says_what_it_leaves_out(
    client: Client, out: Path, tmp_path: Path, lacking: str
) -> None:
    name, options, expected = GAPS[lacking]
    rpc = REPORTS[name].rpc
    asked = [*ONE, ONE[0] | {"subject": "Japan"}] if rpc == "gradient_lens" else ONE
    asked = ASKED if name == "estimates" else asked
    folders = [client.survey(asked, tmp_path / "lacking", rpc=rpc, **options).path]
    if name == "estimates":
        folders += [out / "heads", out / "mlps"]
    report = januslens.report(name, *folders)
    for table, parts in zip(report.tables, expected, strict=True):
        said = " ".join(table.left_out)
        assert all(part in said for part in parts), said
        assert bool(parts) == bool(said)


def test_page_and_terminal_say_what_a_report_leaves_out(client: Client, tmp_path: Path) -> None:
    client.survey(ONE, tmp_path / "bare", projections=False)
    page = tmp_path / "page.html"
    run = CliRunner().invoke(
        command, ["report", "answers", str(tmp_path / "bare"), "--html", str(page)]
    )
    assert run.exit_code == 0, run.output
    printed = " ".join(run.output.split())
    assert "left out: 4 of 4 BLOCK_OUTPUT nodes have no rank of the target" in printed
    text = page.read_text()
    assert "<b>Left out: </b>4 of 4 BLOCK_OUTPUT nodes" in text
    assert "out of <code>brought</code>; trace with projections" in text
    assert "`" not in text.split("<summary>SQL")[0]


def test_command_prints_a_report_and_writes_its_page(out: Path, tmp_path: Path) -> None:
    page = tmp_path / "answers.html"
    run = CliRunner().invoke(
        command, ["report", "answers", str(out / "it's states"), "--html", str(page)]
    )
    assert run.exit_code == 0, run.output
    assert "Rank of the target after each layer" in run.output
    text = page.read_text()
    assert "<svg" in text
    assert "demo" in text
    assert "<script" not in text
    for table in januslens.report("answers", out / "it's states").tables:
        assert table.figure is not None
        assert ET.fromstring(table.figure).tag.endswith("svg")  # noqa: S314 - our own figure


def test_queries_run_in_duckdb_alone(out: Path) -> None:
    import duckdb

    report = januslens.report("answers", out / "it's states")
    with duckdb.connect() as connection:
        path = str(out / "it's states/nodes/*.parquet").replace("'", "''")
        connection.sql(f"CREATE VIEW nodes AS FROM '{path}'")
        alone = connection.sql(report.tables[0].query).df()
    assert alone.equals(report.tables[0].frame)


@pytest.mark.parametrize(
    ("name", "folders", "message"),
    [
        ("other", ["units"], "unknown report 'other'; expected one of units, norms, answers"),
        ("answers", ["gradients"], "has results of gradient_lens; answers reads those of trace"),
        ("answers", ["units", "units"], "2 surveys given; answers reads one"),
        ("estimates", ["units"], "1 surveys given; estimates reads a survey of traces and"),
        ("estimates", ["units", "gradients"], "has another input than"),
        ("estimates", ["units", "units"], "has other experiments; expected a sweep of zero"),
    ],
)
def test_survey_without_the_rows_of_a_report_is_refused(
    out: Path, name: str, folders: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        januslens.report(name, *(out / folder for folder in folders))


def test_every_report_is_documented() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "surveys.md").read_text()
    assert all(f"| `{name}` |" in guide for name in REPORTS)
