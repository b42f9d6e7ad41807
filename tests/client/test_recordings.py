"""Results are saved to files, and loaded from them with the same messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import januslens
from januslens import Gradient, StreamInterrupted, Trace
from januslens.assemblers import GradientAssembler, TraceAssembler
from januslens.cli.program import januslens as command
from tests.client.messages import gradient_stream, trace_stream


def trace() -> Trace:
    assembler = TraceAssembler()
    for response in trace_stream():
        assembler.feed(response)
    return assembler.result()


def gradient() -> Gradient:
    assembler = GradientAssembler()
    for response in gradient_stream():
        assembler.feed(response)
    return assembler.result()


@pytest.mark.parametrize("result", [trace(), gradient()], ids=["trace", "gradient"])
def test_loaded_result_has_the_saved_messages(result: Trace | Gradient, tmp_path: Path) -> None:
    compact, lines = tmp_path / "result.pb", tmp_path / "result.jsonl"
    result.save(compact)
    lines.write_text("".join(f"{line}\n" for line in result.to_json_lines()))
    for path in (compact, lines):
        loaded = januslens.load(path)
        assert loaded == result
        assert list(loaded.responses) == list(result.responses)
    assert compact.stat().st_size < lines.stat().st_size / 2


def test_file_cut_inside_a_message_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pb"
    trace().save(path)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises((ValueError, StreamInterrupted)):
            januslens.load(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r'cut\.pb" is damaged or cut off'):
        januslens.load(path)


def test_file_cut_between_messages_is_an_interrupted_stream(tmp_path: Path) -> None:
    result, path = trace(), tmp_path / "cut.pb"
    result.save(path)
    last = list(result.responses)[-1].ByteSize()
    path.write_bytes(path.read_bytes()[: -last - 1])
    with pytest.raises(StreamInterrupted):
        januslens.load(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x00\xff", b'{"other": 1}', b"[1]"])
def test_other_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a recording; expected a file that"):
        januslens.load(path)


@pytest.mark.parametrize("name", ["g.graphml", "g.gexf", "g.json"])
def test_exported_graph_is_refused_with_advice(name: str, tmp_path: Path) -> None:
    trace().export(tmp_path / name)
    run = CliRunner().invoke(command, ["open", str(tmp_path / name)])
    assert run.exit_code == 1
    assert "an exported graph is for other programs, so save the trace as well" in run.output


def test_recording_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "newer.pb"
    trace().save(path)
    path.write_bytes(path.read_bytes().replace(b"recording 1 ", b"recording 2 ", 1))
    with pytest.raises(ValueError, match="expected version 1"):
        januslens.load(path)
