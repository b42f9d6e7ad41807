"""Run the `januslens` command against a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import click
import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from januslens import (
    Cancelled,
    Client,
    ErrorDetails,
    Trace,
    head_knockouts,
    load,
    read_effects,
    read_gradient,
    read_trace,
    zero,
)
from januslens.cli.gradient import gradient as gradient_command
from januslens.cli.lookups import neurons as neurons_command
from januslens.cli.lookups import project as project_command
from januslens.cli.options import interruptible, layer_list, matrix_list, position_list
from januslens.cli.program import januslens
from januslens.cli.tables import file_size
from januslens.cli.trace import trace as trace_command
from januslens.v1 import models_pb2
from tests.client.messages import trace_stream
from tests.client.scripted import Script, serving

PROMPT = "The capital of Japan is the city of"
CIRCUIT_SCHEMA = Path(__file__).parents[2] / "docs" / "circuit-graph.schema.json"
PREVIEWED = {"preview", "shift", "eta", "probes"}  # of another verb
CONTEXT = click.Context(januslens)
OPTION = click.Option(["--x"])


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(januslens, arguments, env=environment, catch_exceptions=False)


@pytest.fixture
def demo(server_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server at the command's default address."""
    monkeypatch.setenv("JANUSLENS_SERVER", server_address)


def test_layers_and_positions_are_parsed_from_lists_and_ranges() -> None:
    assert layer_list(CONTEXT, OPTION, "0-2,7") == [0, 1, 2, 7]
    assert layer_list(CONTEXT, OPTION, "3") == [3]
    assert position_list(CONTEXT, OPTION, "-1,3") == [-1, 3]
    assert position_list(CONTEXT, OPTION, "all") == "all"
    assert matrix_list(CONTEXT, OPTION, "ff1, Q") == ["FF1", "Q"]
    assert layer_list(CONTEXT, OPTION, None) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trace"], "Missing argument 'PROMPT'"),
        (["gradient", "x"], "Missing option '--target'"),
        (["trace", "x", "--layers", "3-1"], "is not a list of layers such as 0-3,7"),
        (["trace", "x", "--layers", "-3--1"], "is not a list of layers such as 0-3,7"),
        (
            ["trace", "x", "--positions", "last"],
            "is neither a list of positions such as -1,3 nor 'all'",
        ),
        (["trace", "x", "--lens", "sharp"], "'sharp' is not one of"),
        (["trace", "x", "--heads", "-1"], "not in the range"),
        (["trace", "x", "--target", ""], "target is empty; give at least one character"),
        (["gradient", "x", "--target", "y", "--matrices", "ff3"], "FF1"),
        (["gradient", "x", "--target", "y", "--preview"], "--preview needs --lr"),
        (["trace", "x", "--colour", "red"], "No such option"),
        (["trace", "x", "--timeout", "nan"], "not a finite number"),
        (["trace", "x", "--timeout", "0"], "less than 0.001"),
        (["gradient", "x", "--target", "y", "--lr", "nan"], "not a finite number"),
        (["gradient", "x", "--target", "y", "--eta", "inf"], "not a finite number"),
        (["introspect"], "No such command"),
        (["project", "absent.npy"], "does not exist"),
        (["neurons", "x", "--limit", "0"], "not in the range"),
        (["neurons", ""], "token is empty; give at least one character"),
        (["models", "--token", "ä"], "invalid token; expected printable ASCII characters"),
        (["ui", "--token", "ä"], "invalid token; expected printable ASCII characters"),
        (["models", "--server", "a\udcff"], "invalid address: character 1 is the lone surrogate"),
        (["models", "--server", "http://h:5"], "expects host:port, not a URL; give 'h:5'"),
        (["models", "--server", "https://h"], "give 'h:50051' with secure=True (--secure)"),
        (["models", "--server", "h:50051000"], "expected a port of at most 65535"),
        (["trace", "a\udcff"], "invalid prompt: character 1 is the lone surrogate"),
        (["trace", "x", "--client-key", __file__], "--client-certificate is missing"),
        (["project", __file__], "unsupported file 'test_cli.py'; expected .npy or .safetensors"),
    ],
)
def test_wrong_usage_exits_with_2_and_one_line_with_a_hint(
    arguments: list[str], words: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    line, hint = result.stderr.splitlines()
    assert line.startswith("januslens: ")
    assert words in line
    assert hint.startswith("try 'januslens")


def test_unreachable_server_exits_with_1() -> None:
    result = run("models", "--server", "127.0.0.1:1")
    assert result.exit_code == 1
    line, hint = result.stderr.splitlines()
    assert "no answer from 127.0.0.1:1" in line
    assert line.endswith("(is januslens-server running there?)")
    assert hint.startswith("set the address with --server or JANUSLENS_SERVER")


def test_a_port_that_is_missing_is_named_in_the_error() -> None:
    result = run("models", "--server", "127.0.0.1", "--timeout", "20")
    assert result.exit_code == 1
    assert "the address has no port, for which gRPC uses 443; give host:port" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        (["--server", "h:1", "models"], "'januslens trace --server ...'"),
        (["admin", "--server", "h:1", "unload", "x"], "'januslens admin load --server ...'"),
    ],
)
def test_an_option_before_its_command_is_explained(arguments: list[str], example: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.endswith(f"give --server after the command, such as {example}\n")


def test_a_model_that_makes_no_progress_is_not_waited_for_without_end() -> None:
    model = models_pb2.Model(name="x", state=models_pb2.Model.STATE_LOADING, loaded_fraction=0.5)
    with serving(Script(pages=[models_pb2.ListModelsResponse(models=[model])])) as address:
        load = ["admin", "load", "x", "/x", "--server", address, "--stall-timeout"]
        result = run(*load, "0.3")
    assert result.exit_code == 1
    waited, error = result.stderr.splitlines()  # one line for all polls, without a terminal
    assert waited == "x LOADING: 50 %"
    assert "no progress of loading 'x' for 0.3 s (50 %)" in error
    assert "'januslens admin unload x'" in result.stderr


def test_help_and_version_end_with_0() -> None:
    assert run("--help").exit_code == 0
    assert run("trace", "--help").exit_code == 0
    assert run("--version").output.startswith("januslens ")


@pytest.mark.parametrize(
    ("command", "verb", "own"),
    [
        (
            trace_command,
            Client.trace,
            {"rows", "details", "html", "out", "export", "export_format", "estimate"},
        ),
        (gradient_command, Client.gradient_lens, {"rows", "html", "out", "estimate", *PREVIEWED}),
        (project_command, Client.project, {"file", "name"}),
        (neurons_command, Client.find_neurons, {"written"}),
    ],
)
def test_every_option_is_an_argument_of_the_verb(
    command: click.Command, verb: object, own: set[str]
) -> None:
    import inspect

    connection = {"server", "token", "secure", "timeout", "as_json", "resume"}
    connection |= {"root_certificates", "client_certificate", "client_key"}
    connection |= {"literal", "no_special_tokens", "system", "user", "assistant"}  # of the prompt
    options = {parameter.name for parameter in command.params} - own - connection
    assert options <= set(inspect.signature(verb).parameters)  # type: ignore[arg-type]


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([PROMPT, "--target", "Tokyo"], "expected a single token, such as ' Tokyo'"),
        (["word " * 200], "expected at most 96, the context of demo, got more"),
    ],
)
def test_an_error_of_the_server_says_what_it_accepts(arguments: list[str], words: str) -> None:
    result = run("trace", *arguments)
    assert result.exit_code == 1
    assert words in result.stderr


@pytest.mark.usefixtures("demo")
def test_a_trace_is_written_as_a_page_too(tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    result = run("trace", PROMPT, "--html", str(page), "--rows", "1")
    assert result.exit_code == 0
    assert f"wrote {page}" in result.stderr
    text = page.read_text(encoding="utf-8")
    assert "<title>The capital of Japan is the city of · Januslens</title>" in text
    assert text.count('data-stream="trace"') >= 6  # header, four layers, summary
    assert text.count('data-stream="overview"') >= 6


@pytest.mark.usefixtures("demo")
def test_page_of_all_positions_needs_no_overview_request(tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    run("trace", "The capital of", "--positions", "all", "--html", str(page))
    assert 'data-stream="overview"' not in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("demo")
def test_trace_is_exported_for_circuit_tracer(tmp_path: Path) -> None:
    file = tmp_path / "circuit.json"
    result = run("trace", PROMPT, "--export", str(file), "--export-format", "circuit-tracer")
    assert result.exit_code == 0
    assert f"wrote {file}" in result.stderr
    graph = json.loads(file.read_text())
    jsonschema.validate(graph, json.loads(CIRCUIT_SCHEMA.read_text()))
    into = {link["target"] for link in graph["links"]}
    known = {node["node_id"] for node in graph["nodes"]}
    assert into < known
    assert {link["source"] for link in graph["links"]} == known - {graph["qParams"]["clickedId"]}


def test_unknown_extension_of_an_export_is_a_usage_error(tmp_path: Path) -> None:
    result = run("trace", PROMPT, "--export", str(tmp_path / "graph.dot"))
    assert result.exit_code == 2
    assert "no graph format has the extension '.dot'" in result.stderr


def test_a_page_and_json_exclude_each_other(tmp_path: Path) -> None:
    result = run("trace", PROMPT, "--json", "--html", str(tmp_path / "trace.html"))
    assert result.exit_code == 2
    assert "--json and --html are both given; give only one of them" in result.stderr


@pytest.mark.parametrize("command", [["trace", "--html"], ["activations", "--out"]])
def test_a_file_in_a_missing_folder_is_refused_before_the_request(
    command: list[str], tmp_path: Path
) -> None:
    unused = ["--server", "127.0.0.1:1"]  # no server answers there
    result = run(*command, str(tmp_path / "nowhere" / "file"), PROMPT, *unused)
    assert result.exit_code == 2
    assert "nowhere' does not exist" in result.stderr


@pytest.mark.usefixtures("demo")
def test_a_page_that_cannot_be_written_is_an_error() -> None:
    full = run("trace", PROMPT, "--html", "/dev/full")
    assert full.exit_code == 1
    assert "No space left on device" in full.stderr


@pytest.mark.usefixtures("demo")
def test_the_trace_shows_where_tokyo_comes_from() -> None:
    result = run("trace", PROMPT)
    assert result.exit_code == 0
    text = result.stdout
    assert re.search(r"target +␣Tokyo after ␣of \(7\): the model's own prediction", text)
    assert re.search(r"Ranked first from layer \d's (attention|MLP) onwards", text)
    assert re.search(r"L\d head \d adds most: \+[\d.]+ to its logit, reading ␣Japan \(3\)", text)
    emergence = text[text.index("␣Tokyo in the residual stream") : text.index("Heads that")]
    ranks = [int(rank) for rank in re.findall(r"  (\d+)  (?:0\.\d{3}|\de-\d\d)", emergence)]
    assert len(ranks) == 9
    assert ranks[0] > 100
    assert ranks[-1] == 0
    assert re.search(r"\+[\d.]+ +[\d.]+ % +L\d head \d +␣Japan \(3\) 0\.\d\d", text)
    assert re.search(r"\+[\d.]+ +[\d.]+ % +L\d neuron \d+ +\+[\d.]+ +\S", text)
    assert "Where the logit comes from" in text
    assert max(len(line) for line in text.splitlines()) <= 110


@pytest.mark.usefixtures("demo")
def test_the_trace_in_detail_shows_every_layer() -> None:
    result = run("trace", PROMPT, "--details", "--rows", "2", "--layers", "2-3")
    assert result.exit_code == 0
    for title in ("Layer 2: attention heads", "Layer 3: MLP neurons"):
        assert title in result.stdout
    assert "Layer 1:" not in result.stdout


@pytest.mark.usefixtures("demo")
def test_many_positions_are_shown_as_a_heat_map_first() -> None:
    result = run("trace", PROMPT, "--positions", "all", "--rows", "1")
    assert result.exit_code == 0
    assert "Residual stream after each layer" in result.stdout
    assert result.stdout.count("in the residual stream, layer by layer") == 3
    note = " ".join(result.stdout.split())
    assert "shows 1 of 4 layers, at even distances (see --rows)" in note
    assert "shows 2 of 8 positions, the last ones (see --rows)" in note


@pytest.mark.usefixtures("demo")
def test_saved_traces_are_compared_without_a_server(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("japan.jtr", "peru.jtr")]
    prompts = (PROMPT, "The capital of Peru is the big city of")
    for file, prompt in zip(files, prompts, strict=True):
        assert run("trace", prompt, "--target", " Tokyo", "--out", file).exit_code == 0
    page = tmp_path / "page.html"
    result = run("compare", *files, "--rows", "3", "--html", str(page))
    assert result.exit_code == 0
    table = result.stdout.split("that differ most\n")[1]
    rows = re.findall(r"^ *([+-]\S+) +([+-]\S+) +([+-]\S+)  L\d", table, re.MULTILINE)
    assert len(rows) == 3
    for before, after, change in rows:
        assert float(after) - float(before) == pytest.approx(float(change), abs=0.011)
    changes = [abs(float(change)) for _, _, change in rows]
    assert changes == sorted(changes, reverse=True)
    assert page.stat().st_size > 100_000
    wrong = tmp_path / "wrong.jtr"
    assert run("gradient", PROMPT, "--target", " Paris", "--out", str(wrong)).exit_code == 0
    refused = run("compare", files[0], str(wrong))
    assert refused.exit_code == 1
    assert "has no trace; expected a file of `trace --out`" in refused.stderr


@pytest.mark.usefixtures("demo")
def test_models_fit_in_a_narrow_terminal() -> None:
    narrow = run("models", COLUMNS="80").stdout
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80
    wide = run("models", COLUMNS="200").stdout
    assert {"GPT2LMHeadModel", "READY", "982"} <= set(re.findall(r"\w+", narrow))
    assert len(wide.splitlines()) == 3


@pytest.mark.usefixtures("demo")
def test_folded_steps_keep_the_sum_of_the_contributions() -> None:
    def steps(rows: int) -> list[str]:
        shown = run("trace", PROMPT, "--rows", str(rows)).stdout
        return shown.split("layer by layer\n")[1].split("rank 0 is the top")[0].splitlines()[2:]

    def added(lines: list[str]) -> float:
        return sum(
            float(number) for line in lines for number in re.findall(r" ([+-]\d+\.\d\d)$", line)
        )

    folded, whole = steps(1), steps(100)
    assert len(whole) == 9  # the embedding, and attention and MLP of four layers
    assert [line.split()[:3] for line in folded] == [
        ["0", "input", "␣of"],
        ["0-2", "6", "steps"],
        ["3", "+", "attention"],
        ["+", "MLP", "␣Tokyo"],
    ]
    assert added(folded) == pytest.approx(added(whole), abs=0.05)


@pytest.mark.usefixtures("demo")
def test_another_target_and_another_prompt() -> None:
    result = run("trace", PROMPT, "--target", " Paris")
    assert re.search(
        r"␣Paris after ␣of \(7\): rank \d+, probability \S+; the model predicts ␣Tokyo",
        result.stdout,
    )
    assert re.search(r"Best rank \d+ after .*; final rank \d+", result.stdout)


@pytest.mark.usefixtures("demo")
def test_rows_limit_every_table_of_a_gradient_but_not_its_page(tmp_path: Path) -> None:
    page = tmp_path / "gradient.html"
    options = ("--target", " Paris", "--subject", " Japan", "--neurons", "3", "--spectrum", "2")
    limited = ("--matrices", "ff2", "--rows", "1", "--html", str(page))
    result = run("gradient", PROMPT, *options, *limited)
    assert result.exit_code == 0
    whole = page.read_text(encoding="utf-8")
    assert whole.count('data-stream="gradient"') >= 6  # header, four layers, summary
    sections = result.stdout.split("\n\n")[1:]
    for section in sections:
        rows = re.findall(r"^ +\d+  .*|^L\d+ neuron.*|^FF2 +\d.*", section, re.MULTILINE)
        assert len(rows) == 1, section
    assert len(sections) == 5
    note = " ".join(result.stdout.split())
    assert "shows 1 of 4 layers with the largest components (see --rows)" in note
    assert "shows 2 of 8 positions with the largest components (see --rows)" in note


def test_file_sizes_are_in_powers_of_1024() -> None:
    sizes = [file_size(count) for count in (0, 1023, 1024, 1536 * 1024, 3 * 2**30)]
    assert sizes == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "3.0 GiB"]


@pytest.mark.usefixtures("demo")
def test_gradient_output_names_the_promoted_end() -> None:
    result = run("gradient", PROMPT, "--target", " Paris", "--verify", "--subject", " Japan")
    assert result.exit_code == 0
    text = result.stdout
    assert "the model predicts ␣Tokyo" in text
    imprint, shift = text.index("FF1: tokens of x"), text.index("FF2: tokens of δ")
    assert shift < imprint
    assert "↑ the token that a descent step promotes most (the bottom token of δ)" in text
    assert "a descent step promotes rank 0 most" in text
    # ␣Paris, which this matrix promotes most, has rank 0.
    assert re.search(r"^ +3  ␣of \(7\) .* ␣Paris .* 0$", text[shift:], re.MULTILINE)
    assert "↑␣Paris" in text[shift:]
    assert "↓␣" in text[shift:]
    assert re.search(r"FF2 against autograd: relative error at most .* passed\)", text)
    assert "By segment of the prompt" in text
    assert "last subject token" in text
    assert max(len(line) for line in text.splitlines()) <= 110


@pytest.mark.usefixtures("demo")
def test_the_gradient_shows_neurons_and_spectrum() -> None:
    result = run(
        "gradient", PROMPT, "--target", " Paris", "--neurons", "2", "--lr", "0.01",
        "--spectrum", "1", "--matrices", "ff2", "--layers", "3", "--rows", "1",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "The neurons of FF2 that a step changes most" in result.stdout
    assert "Spectrum of FF2's gradient" in result.stdout
    assert "tokens of x" not in result.stdout


@pytest.mark.usefixtures("demo")
def test_the_gradient_shows_where_those_of_attention_are_largest() -> None:
    result = run("gradient", PROMPT, "--target", " Paris", "--attention", "--matrices", "q")
    table = result.stdout.split("Where the gradients of attention are largest")[1]
    assert "dL/ds" in table
    assert "␣of (7)" in table


@pytest.mark.usefixtures("demo")
def test_the_gradient_previews_edits() -> None:
    result = run(
        "gradient", PROMPT, "--target", " Paris", "--layers", "3", "--matrices", "ff2",
        "--preview", "--lr", "0.001", "--shift", "3", "--eta", "0.15", "--probe", "Japan is",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "Effect of a descent step with learning rate 0.001" in result.stdout
    shifted = result.stdout[result.stdout.index("Effect of a forward shift of layer 3 by 0.15") :]
    assert re.search(r"the edited prompt +␣Paris .* ␣Tokyo → ␣Paris", shifted)
    assert "Japan is" in shifted


@pytest.mark.usefixtures("demo")
def test_edits_prints_a_grid_for_each_prompt(server_address: str) -> None:
    probe = "The capital of Peru is the city of"
    found = run(
        *("edits", PROMPT, "--target", " Paris", "--lr", "0.5,1", "--layers", "0,3"),
        *("--probe", probe),
    )
    with Client(server_address) as client:
        grid = client.preview_edits(
            PROMPT, " Paris", learning_rates=[0.5, 1], layers=[0, 3], probes=[probe]
        )
    rows = [line.split() for line in found.stdout.splitlines() if line.strip()[:1] in ("0", "3")]
    ranks = [[int(row[2]), int(row[4])] for row in rows]
    expected = [
        [(cell.edited, *cell.probes)[prompt].rank_after for cell in grid.cells if cell.layer == at]
        for prompt in (0, 1)
        for at in (0, 3)
    ]
    assert ranks == expected
    shown = run(
        *("edits", PROMPT, "--target", " Paris", "--eta", "0.1", "--layers", "3"),
        *("--gradient-cosine", "--probe", probe),
    )
    with Client(server_address) as client:
        (cell,) = client.preview_edits(
            PROMPT, " Paris", etas=[0.1], layers=[3], gradient_cosine=True
        ).cells
    lines = [line.split() for line in shown.stdout.splitlines()]
    edited, probed = [cells for cells in lines if cells[:1] == ["3"]]
    assert edited[-1] == f"{cell.gradient_cosine:.3g}"
    assert len(probed) == len(edited) - 1  # the cosine is not that of a probe
    wrong = run("edits", PROMPT, "--target", " Paris", "--lr", "high")
    assert (wrong.exit_code, "is not a list of numbers" in wrong.stderr) == (2, True)


@pytest.mark.usefixtures("demo")
def test_models_and_tokens() -> None:
    result = run("models")
    assert re.search(r"demo +READY", result.stdout)
    result = run("tokenize", " Tokyo\n")
    assert "␣Tokyo" in result.stdout
    assert "⏎" in result.stdout
    assert "20 54 6f 6b 79 6f" in result.stdout


@pytest.mark.usefixtures("demo")
def test_the_neurons_that_write_a_token() -> None:
    result = run("neurons", " Tokyo", "--limit", "3", "--layers", "2-3")
    assert result.exit_code == 0
    assert re.search(
        r"found +\d+ neurons have it among the top 64 tokens of the value vector, 3 shown",
        result.stdout,
    )
    assert "Neurons that promote ␣Tokyo" in result.stdout
    rows = re.findall(r"^ *(\d+)  \+\d\.\d\d  L[23] neuron \d+ ", result.stdout, re.MULTILINE)
    assert len(rows) == 3
    assert [int(rank) for rank in rows] == sorted(int(rank) for rank in rows)
    assert max(len(line) for line in result.stdout.splitlines()) <= 110
    suppressed = run("neurons", " Tokyo", "--suppressed", "--limit", "1").stdout
    assert re.search(r"^ +0  -\d\.\d\d  L\d neuron \d+ .* ␣Tokyo  ", suppressed, re.MULTILINE)
    assert "rank (from the bottom)" in suppressed
    answer = json.loads(run("neurons", " Tokyo", "--limit", "1", "--json").stdout)
    assert len(answer["neurons"]) == 1
    several = run("neurons", "Tokyo Paris")
    assert several.exit_code == 1
    assert "expected a single token" in several.stderr


@pytest.mark.usefixtures("demo")
def test_vectors_from_files(tmp_path: Path) -> None:
    vectors = np.eye(2, 128, dtype=np.float32)
    np.save(tmp_path / "v.npy", vectors)
    save_file({"probe": vectors, "other": vectors[:1]}, tmp_path / "v.safetensors")
    from_npy = run("project", str(tmp_path / "v.npy"), "--lens", "raw")
    named = run("project", str(tmp_path / "v.safetensors"), "--name", "probe", "--lens", "raw")
    assert from_npy.exit_code == 0
    assert from_npy.stdout == named.stdout
    unnamed = run("project", str(tmp_path / "v.safetensors"))
    assert unnamed.exit_code == 2
    assert "v.safetensors has 2 tensors; choose one with --name: other, probe" in unnamed.stderr
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    refused = run("project", str(tmp_path / "objects.npy"))
    assert refused.exit_code == 2
    assert "objects.npy holds no array of numbers" in refused.stderr
    (tmp_path / "v.txt").write_text("1 2")
    assert run("project", str(tmp_path / "v.txt")).exit_code == 2


@pytest.mark.usefixtures("demo")
def test_json_is_the_stream() -> None:
    result = run("trace", PROMPT, "--json", "--top-k", "2")
    trace = read_trace(result.stdout.splitlines())
    assert list(trace.to_json_lines()) == result.stdout.splitlines()
    assert trace.target().target.text == " Tokyo"
    result = run("gradient", PROMPT, "--target", " Paris", "--layers", "3", "--json")
    assert read_gradient(result.stdout.splitlines()).header.targets[0].text == " Paris"
    assert json.loads(run("models", "--json").stdout)["models"][0]["name"] == "demo"
    assert list(json.loads(run("tokenize", "a", "--json").stdout)) == ["provenance", "tokens"]


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize("command", ["trace", "gradient"])
def test_estimate_prints_the_cost_without_running(command: str) -> None:
    asked = (command, PROMPT, "--target", " Paris", "--layers", "0,1", "--estimate")
    shown = run(*asked).stdout
    for row in (
        r"^device +\d.* s *$",
        r"^memory +up to \d.* in addition to the weights *$",
        "would be admitted",
    ):
        assert re.search(row, shown, re.MULTILINE)
    assert "Tokyo" not in shown
    answer = json.loads(run(*asked, "--json").stdout)
    assert answer["admissible"] is True
    assert answer["seconds"] > 0


@pytest.mark.usefixtures("demo")
def test_refused_request_exits_with_1() -> None:
    result = run("trace", PROMPT, "--model", "absent")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "absent" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_ends_with_130_and_cancels_the_call() -> None:
    script = Script(responses=trace_stream()[:2], hangs=True)
    with serving(script) as address:
        process = subprocess.Popen(
            [sys.executable, "-c", "from januslens.cli import main; main()",
             "trace", "x", "--server", address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert script.called.wait(30)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == 130
        assert script.left.wait(10)
    assert stdout == ""
    assert "Traceback" not in stderr


def test_ctrl_c_ends_a_call_even_if_its_exception_is_lost() -> None:
    cancelled = threading.Event()

    def call() -> None:
        with interruptible(cancelled.set):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                assert cancelled.wait(10)  # as compiled code at times does
            raise Cancelled("the call was cancelled", ErrorDetails("CANCELLED"))

    with pytest.raises(KeyboardInterrupt) as ended:
        call()
    assert isinstance(ended.value.__cause__, Cancelled)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_cut_stream_ends_with_1() -> None:
    with serving(Script(responses=trace_stream()[:2])) as address:
        result = run("trace", "x", "--server", address)
    assert result.exit_code == 1
    assert "without its summary" in result.stderr


def test_terminal_control_sequences_in_tokens_are_escaped() -> None:
    responses = trace_stream()
    for token in responses[1].layer.tokens:
        token.text = "\x1b[31m\u202e"
    with serving(Script(responses=responses)) as address:
        result = run("trace", "x", "--server", address)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\u202e" not in result.stdout
    assert "<U+001B>[31m<U+202E>" in result.stdout


def test_a_terminal_without_unicode_gets_escapes() -> None:
    with serving(Script(responses=trace_stream())) as address:
        done = subprocess.run(
            [sys.executable, "-c", "from januslens.cli import main; main()",
             "trace", "x", "--server", address],
            check=False, capture_output=True, env={"PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u2423" in done.stdout


def test_files_are_written_although_the_reader_of_the_output_has_ended(
    server_address: str, tmp_path: Path
) -> None:
    files = [tmp_path / "trace.html", tmp_path / "trace.januslens"]
    reader, output = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", "from januslens.cli import main; main()",
         "trace", PROMPT, "--html", files[0], "--out", files[1], "--server", server_address],
        check=False, stdout=output, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(output)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stderr.splitlines()] == [
        str(f) for f in reversed(files)
    ]
    trace = load(files[1])
    assert isinstance(trace, Trace)
    assert trace.target().predicted.text == " Tokyo"


@pytest.mark.usefixtures("demo")
def test_intervene_prints_a_heat_map_of_a_sweep(server_address: str) -> None:
    found = run("intervene", PROMPT, "--zero", "--sweep", "layer,head", "--target", " Tokyo")
    with Client(server_address) as client:
        sweep = head_knockouts(client, PROMPT, " Tokyo")
    lines = found.stdout.splitlines()
    start = lines.index("change of the logit of ␣Tokyo")
    printed = [[float(cell) for cell in line.split()[2:]] for line in lines[start + 3 :]]
    assert printed == pytest.approx(sweep.logit_effects[::-1], abs=0.011)


@pytest.mark.usefixtures("demo")
def test_intervene_lists_experiments_with_their_labels(server_address: str) -> None:
    found = run("intervene", PROMPT, "--zero-heads", "3.0,3.1", "--zero-neurons", "2.7")
    with Client(server_address) as client:
        heads = client.intervene(PROMPT, experiments=[zero(heads=[(3, 0), (3, 1)])])
    (line,) = (line for line in found.stdout.splitlines() if "without head 3.0, 3.1" in line)
    effect = heads.effects[0].after[0].logit - heads.before[0].logit
    assert float(line.split()[6]) == pytest.approx(effect, abs=0.011)
    assert "without neuron 2.7" in found.stdout


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize(
    "arguments",
    [
        ("trace", PROMPT, "--layers", "2-3"),
        ("gradient", PROMPT, "--target", " Paris", "--layers", "3"),
        ("intervene", PROMPT, "--zero-heads", "3.0", "--zero", "--sweep", "layer"),
        ("generate", PROMPT, "--max-new-tokens", "4"),
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_open_prints_what_the_saving_command_printed(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "result.pb"
    made = run(*arguments, "--out", str(file))
    assert f"wrote {file}" in made.stderr
    assert run("open", str(file)).stdout == made.stdout
    page = tmp_path / "page.html"
    opened = run("open", str(file), "--json", "--html", str(page))
    assert "</html>" in page.read_text(encoding="utf-8")
    lines = tmp_path / "result.jsonl"
    lines.write_text(opened.stdout)
    assert run("open", str(lines)).stdout == made.stdout


def test_open_refuses_other_files(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("notes")
    found = run("open", str(other))
    assert (found.exit_code, "is not a recording" in found.stderr) == (1, True)
    assert run("open", str(tmp_path / "missing.pb")).exit_code == 2


@pytest.mark.usefixtures("demo")
def test_intervene_prints_json_and_estimates() -> None:
    change = ["--patch-from", PROMPT, "--corrupt", "3", "--sweep", "layer,position"]
    lines = run("intervene", PROMPT, *change, "--json").stdout.splitlines()
    effects = read_effects(lines)
    assert effects.effects[0].label == "noise alone"
    assert effects.axes == ("layer", "position")
    restored = effects.effects[-1].after[0]  # the last position after the last layer
    assert restored.logit == pytest.approx(effects.before[0].logit, abs=1e-3)
    assert "would be admitted" in run("intervene", PROMPT, *change, "--estimate").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --zero-heads, or a change such as --zero"),
        (["--zero", "--scale", "2"], "--zero and --scale are given; give only one of them"),
        (["--sweep", "layer"], "--sweep has nothing to split"),
        (["--zero", "--sweep", "lines"], "is not a list of layer, position"),
        (["--zero-heads", "3"], "is not a list of layer.number such as 9.6,9.9"),
        (["--hide", "2", "--site", "QUERY"], "--hide takes no --site"),
        (["--hide", "2", "--experts", "1"], "--hide takes no --site"),
        (["--experts", "1"], "--experts is given without a change there"),
        (["--zero", "--figure", "logit_difference"], "needs --other"),
    ],
)
def test_intervene_refuses_changes_that_do_not_fit(arguments: list[str], words: str) -> None:
    found = run("intervene", PROMPT, *arguments)
    assert (found.exit_code, words in " ".join(found.stderr.split())) == (2, True)
