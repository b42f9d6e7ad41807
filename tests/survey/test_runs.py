"""Surveys are resumed after kills, refuse what does not belong to them, and list failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import januslens
from januslens.cli.program import januslens as command
from januslens.surveys import runner
from januslens.v1 import models_pb2
from tests.client.messages import trace_stream
from tests.client.scripted import Script, serving
from tests.support.surveys import contents, killed_after, prompts_file, running_survey

COUNTRIES = ("Japan", "Peru", "France", "Spain", "Italy", "Kenya", "Chile", "Cuba")
PROMPTS = [f"The capital of {COUNTRIES[i % 8]} is the city of" for i in range(48)]
OPTIONS: dict[str, Any] = {"node_kinds": ["BLOCK_OUTPUT", "HEAD_OUTPUT"], "top_k": 2}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompts_file(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", PROMPTS)


def test_killed_survey_has_the_rows_of_an_uninterrupted_one(
    server_address: str, file: Path, tmp_path: Path
) -> None:
    with januslens.Client(server_address) as client:
        client.survey(file, tmp_path / "whole", **OPTIONS)
        for results in (8, 17):
            with running_survey(server_address, file, tmp_path / "killed", OPTIONS) as process:
                assert killed_after(process, results, seconds=0)
        survey = client.survey(file, tmp_path / "killed", **OPTIONS)
    assert survey.complete
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_part_without_its_last_file_is_computed_again(
    server_address: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PART_PROMPTS", 16)
    with januslens.Client(server_address) as client:
        client.survey(file, tmp_path / "out", **OPTIONS)
        before = contents(tmp_path / "out")
        first, *_, last = sorted((tmp_path / "out/prompts").glob("*.parquet"))
        for table, part in (("prompts", first), ("prompts", last), ("edges", last)):
            (tmp_path / "out" / table / part.name).unlink()
        (tmp_path / "out/nodes/.part-00000000.parquet").write_bytes(b"unfinished")
        client.survey(file, tmp_path / "out", **OPTIONS)
    assert contents(tmp_path / "out") == before
    assert not list(tmp_path.glob("out/*/.*"))


def test_finished_survey_sends_nothing(server_address: str, file: Path, tmp_path: Path) -> None:
    seen: list[januslens.SurveyProgress] = []
    with januslens.Client(server_address) as client:
        for _ in range(2):
            client.survey(file, tmp_path / "out", on_progress=seen.append, **OPTIONS)
    assert len(seen) == len(PROMPTS)
    assert (seen[-1].done, seen[-1].failed, seen[-1].total) == (48, 0, 48)
    assert seen[-1].seconds_left == 0
    parts = sorted((tmp_path / "out/prompts").glob("*.parquet"))
    numbers = [n for part in parts for n in pq.read_table(part)["prompt"].to_pylist()]
    assert sorted(numbers) == list(range(48))


@pytest.mark.parametrize(
    ("prompts", "options", "different"),
    [
        (PROMPTS[:5], OPTIONS | {"top_k": 3}, "another request"),
        (PROMPTS[:4], OPTIONS, "another input"),
        (PROMPTS[:5], OPTIONS | {"rpc": "generate"}, "generate_request"),
    ],
)
def test_other_survey_in_the_folder_is_refused(
    server_address: str,
    tmp_path: Path,
    prompts: list[str],
    options: dict[str, Any],
    different: str,
) -> None:
    with januslens.Client(server_address) as client:
        client.survey(PROMPTS[:5], tmp_path / "out", **OPTIONS)
        before = contents(tmp_path / "out")
        with pytest.raises((ValueError, TypeError), match=different):
            client.survey(prompts, tmp_path / "out", **options)
        client.survey(tmp_path / "out/input.jsonl", tmp_path / "out", **OPTIONS)
    assert contents(tmp_path / "out") == before


def test_folder_with_other_files_is_refused(server_address: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with (
        januslens.Client(server_address) as client,
        pytest.raises(FileExistsError, match="has other files; give an empty folder"),
    ):
        client.survey(PROMPTS, tmp_path)


def test_second_writer_is_refused(server_address: str, tmp_path: Path) -> None:
    with januslens.Client(server_address) as client:

        def write_as_well(_: januslens.SurveyProgress) -> None:
            with pytest.raises(BlockingIOError, match="another process writes to the survey"):
                client.survey(PROMPTS[:1], tmp_path / "out", **OPTIONS)

        survey = client.survey(PROMPTS[:1], tmp_path / "out", on_progress=write_as_well, **OPTIONS)
    assert survey.complete


def test_failures_are_listed_and_sent_again(server_address: str, tmp_path: Path) -> None:
    lines = [*PROMPTS[:3], "capital " * 500]
    with januslens.Client(server_address) as client:
        for again in (False, True):
            survey = client.survey(
                lines, tmp_path / "out", retry_failures=again, rpc="generate", max_new_tokens=1
            )
            (failure,) = survey.dataset("failures").to_table().to_pylist()
            assert (failure["prompt"], failure["reason"]) == (3, "INVALID_REQUEST")
            assert "tokens" in failure["message"]
            assert survey.manifest["results"] == 3
            assert survey.complete


def test_survey_stops_if_its_first_prompts_all_fail(server_address: str, tmp_path: Path) -> None:
    with (
        januslens.Client(server_address) as client,
        pytest.raises(januslens.InvalidRequest, match="layers"),
    ):
        client.survey(PROMPTS, tmp_path / "out", layers=[99])
    survey = januslens.Survey.open(tmp_path / "out")
    assert not survey.complete
    assert 20 <= survey.dataset("failures").count_rows() < len(PROMPTS)


def test_lost_server_ends_the_survey_after_the_patience(tmp_path: Path) -> None:
    with (
        januslens.Client("127.0.0.1:1") as client,
        pytest.raises(januslens.Unavailable, match=r"no answer from 127\.0\.0\.1:1"),
    ):
        client.survey(PROMPTS, tmp_path / "out", patience=0)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"promt": "A"}', "line 2: unknown key 'promt'; expected prompt, messages"),
        ('{"prompt": ""', "line 2: Expecting"),
        ("{}", "line 2: no prompt and no messages given"),
        ("7", "line 2: invalid prompt 7; expected a text or an object"),
        ('{"prompt": "A", "target": ""}', "line 2: target is empty"),
        ('{"prompt": "A", "labels": {"x": [1]}}', r"line 2: invalid label x=\[1\]"),
        ('{"prompt": "A", "labels": {"x": NaN}}', "line 2: invalid number NaN; expected a finite"),
        ('{"prompt": "A", "labels": {"x": 1e999}}', "line 2: invalid label x=inf; expected a"),
        ('{"prompt": "A", "probes": [{"text": "B"}]}', "line 2: invalid probe {'text': 'B'}; exp"),
        ('{"prompt": "A", "id": 7}', "line 2: invalid id 7; expected a text"),
        ('{"prompt": "A"}', "line 2: the prompt has no target; give one, or a loss for all"),
    ],
)
def test_invalid_line_is_named_before_anything_is_sent(
    tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "A", "target": "B"}}\n{line}\n')
    with (
        januslens.Client("127.0.0.1:1") as client,
        pytest.raises(ValueError, match=message),
    ):
        client.survey(file, tmp_path / "out", rpc="gradient_lens")


def test_command_writes_a_survey(server_address: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"The capital of Japan is the city of"\n{"prompt": "A", "target": "A B C D"}\n')
    sweep = tmp_path / "sweep.json"
    sweep.write_text(
        '{"sweep": {"template": {"site": "SITE_HEAD_RESULT", "zero": true}, "by_head": true}}'
    )
    arguments = ["survey", str(file), "--out", str(tmp_path / "out"), "--server", server_address]
    run = CliRunner().invoke(command, [*arguments, "--rpc", "intervene", "--request", f"@{sweep}"])
    assert run.exit_code == 0, run.output
    assert f"1 results in {tmp_path / 'out'}: baselines, effects" in run.output
    assert "1 prompts failed; --retry-failures sends them again:" in run.output
    survey = januslens.Survey.open(tmp_path / "out")
    assert survey.dataset("effects").count_rows() == 4  # a row for each head
    (tmp_path / "out/prompts").joinpath("part-00000000.parquet").unlink()
    again = CliRunner().invoke(command, arguments)  # with the request of the survey to resume
    assert again.exit_code == 0, again.output
    assert survey.dataset("effects").count_rows() == 4
    wrong = CliRunner().invoke(command, [*arguments, "--request", '{"depth": 3}'])
    assert wrong.exit_code == 2
    assert 'no field named "depth"' in wrong.output


@pytest.mark.parametrize(
    ("states", "flags", "message"),
    [
        ({"bad": "FAILED", "good": "READY"}, [], ""),
        ({"other": "READY", "good": "READY"}, ["--model", "good"], ""),
        ({"other": "READY", "good": "READY"}, [], "no model given: expected one of other, good"),
        ({"good": "READY"}, ["--model", "absent"], "the server has no model 'absent'"),
        ({}, [], "no model given: expected one of no model"),
        (
            {"good": "READY"},
            ["--model", "good", "--request", '{"model": "other"}'],
            "--model is good, but the request is for other",
        ),
    ],
    ids=["one of two serves", "named", "several serve", "absent", "none", "two names"],
)
def test_the_model_is_named_or_the_only_one_that_serves(
    states: dict[str, str], flags: list[str], message: str, tmp_path: Path
) -> None:
    file = prompts_file(tmp_path / "prompts.jsonl", ["The capital of Japan"])
    models = [
        models_pb2.Model(name=name, state=models_pb2.Model.State.Value(f"STATE_{state}"))
        for name, state in states.items()
    ]
    script = Script(responses=trace_stream(), pages=[models_pb2.ListModelsResponse(models=models)])
    with serving(script) as address:
        arguments = ["survey", str(file), "--out", str(tmp_path / "out"), "--server", address]
        run = CliRunner().invoke(command, [*arguments, *flags])
    assert message in run.output
    assert (run.exit_code == 0) == (message == "")
    if not message:
        assert januslens.Survey.open(tmp_path / "out").manifest["model"]["name"] == "good"
