"""Activations of the demo; the expected values are those of the plain Hugging Face model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from januslens import (
    ActivationsInterrupted,
    ActivationsSummary,
    AsyncClient,
    Client,
    InvalidRequest,
    ProtocolViolation,
    Site,
    SiteTensor,
)
from januslens.assemblers import ActivationsAssembler
from januslens.cli.program import januslens as januslens_command
from januslens.v1 import activations_pb2, common_pb2, sites_pb2
from januslens_server.demo import model_path
from tests.reference.interventions import HookedModel, Values

PROMPT = "The capital of Japan is the city of"
# ROUTER and MIXER_OUTPUT are sites of other models.
OTHERS = (Site.UNSPECIFIED, Site.ROUTER, Site.MIXER_OUTPUT)
EVERY_SITE = [site for site in Site if site not in OTHERS]


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[Client]:
    with Client(server_address) as client:
        yield client


@pytest.fixture(scope="module")
def expected(client: Client) -> Values:
    network = AutoModelForCausalLM.from_pretrained(
        model_path(), dtype=torch.float32, attn_implementation="eager"
    )
    return HookedModel(network).run([token.id for token in client.tokenize(PROMPT)])


def test_every_site_equals_that_of_the_plain_model(client: Client, expected: Values) -> None:
    found = client.activations(PROMPT, sites=EVERY_SITE)
    assert {(str(tensor.site), tensor.layer) for tensor in found.tensors} == set(expected)
    for tensor in found.tensors:
        values = expected[str(tensor.site), tensor.layer].numpy()
        assert tensor.numpy().shape == values.shape
        assert len(tensor.dimensions) == values.ndim
        np.testing.assert_allclose(tensor.numpy(), values, rtol=1e-4, atol=1e-5)


def test_layers_positions_and_heads_are_chosen(client: Client, expected: Values) -> None:
    found = client.activations(
        PROMPT, sites=["head_result", "LOGITS"], layers=[1, 3], positions=[-1, 2], heads=[3, 0]
    )
    last = len(found.prompt_tokens) - 1
    assert found.positions == (2, last)
    assert [tensor.name for tensor in found.tensors] == ["HEAD_RESULT.1", "HEAD_RESULT.3", "LOGITS"]
    chosen = expected["HEAD_RESULT", 3].numpy()[[2, last]][:, [0, 3]]
    np.testing.assert_allclose(found.array("HEAD_RESULT", 3), chosen, rtol=1e-4, atol=1e-5)
    assert found.stack("HEAD_RESULT").shape == (2, *chosen.shape)
    assert found.array("LOGITS").shape == expected["LOGITS", None].numpy()[[2, last]].shape


def test_an_absent_tensor_is_named_with_those_that_were_read(client: Client) -> None:
    found = client.activations(PROMPT, layers=[1, 2])
    for site, layer in (("BLOCK_OUTPUT", 3), ("BLOCK_OUTPUT", None), ("LOGITS", None)):
        with pytest.raises(KeyError, match=r"expected one of BLOCK_OUTPUT\.1, BLOCK_OUTPUT\.2"):
            found.array(site, layer)
    with pytest.raises(ValueError, match="unknown value 'RESIDUAL'"):
        found.array("RESIDUAL", 1)


def test_saved_tensors_are_read_by_safetensors_bit_for_bit(client: Client, tmp_path: Path) -> None:
    found = client.activations(PROMPT, sites=["BLOCK_OUTPUT", "LOGITS"], layers=[1, 2])
    found.save(tmp_path / "activations.safetensors")
    saved = load_file(tmp_path / "activations.safetensors")
    assert set(saved) == {"BLOCK_OUTPUT.1", "BLOCK_OUTPUT.2", "LOGITS", "positions"}
    for tensor in found.tensors:
        assert np.array_equal(saved[tensor.name].numpy(), tensor.numpy())
    assert saved["positions"].tolist() == list(found.positions)


def test_bfloat16_is_saved_as_bfloat16(tmp_path: Path) -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assembler = ActivationsAssembler()
    for message in _stream([values.view(torch.int16).numpy().tobytes()], [3, 4]):
        assembler.feed(message)
    assembler.result().save(tmp_path / "bfloat16.safetensors")
    saved = load_file(tmp_path / "bfloat16.safetensors")["BLOCK_OUTPUT.1"]
    assert saved.dtype == torch.bfloat16
    assert torch.equal(saved, values)
    assert np.array_equal(assembler.result().array("BLOCK_OUTPUT"), values.float().numpy())


def test_frames_have_a_row_for_each_position_and_head(client: Client) -> None:
    found = client.activations(PROMPT, sites=["VALUE", "BLOCK_OUTPUT"], layers=1, positions=[1, 4])
    values = found.to_pandas("VALUE")
    assert values.index.names == ["position", "kv_head"]
    assert np.array_equal(
        values.to_numpy()[values.index.get_loc((4, 2))], found.array("VALUE")[1, 2]
    )
    outputs = found.to_pandas("BLOCK_OUTPUT", 1)
    assert outputs.index.tolist() == [1, 4]
    assert np.array_equal(outputs.to_numpy()[1], found.array("BLOCK_OUTPUT")[1])


def test_tensors_arrive_one_by_one(client: Client, server_address: str) -> None:
    with client.stream_activations(PROMPT, layers=[0, 1]) as stream:
        events = list(stream)
    assert [event.layer for event in events if isinstance(event, SiteTensor)] == [0, 1]
    assert isinstance(events[-1], ActivationsSummary)

    async def asked() -> NDArray[Any]:
        async with AsyncClient(server_address) as other:
            return (await other.activations(PROMPT, layers=[1])).array("BLOCK_OUTPUT")

    assert np.array_equal(asyncio.run(asked()), stream.result().array("BLOCK_OUTPUT", 1))


def test_a_site_that_the_model_lacks_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="ROUTER"):
        client.activations(PROMPT, sites="ROUTER", layers=[0])
    with pytest.raises(ValueError, match="sites is empty"):
        client.activations(PROMPT, sites=[])


def test_the_cost_is_estimated_without_running(client: Client) -> None:
    cost = client.estimate_activations(PROMPT, sites=["BLOCK_OUTPUT"], layers=[1])
    found = client.activations(PROMPT, sites=["BLOCK_OUTPUT"], layers=[1])
    assert cost.admissible
    assert cost.stream_bytes >= len(found.tensors[0].tensor.data)


def test_notebooks_show_the_sites_and_their_dimensions(client: Client) -> None:
    shown = client.activations(PROMPT, sites=["KEY"], layers=[0, 2])._repr_html_()
    assert "KEY" in shown
    assert "kv_head 4" in shown


def test_command_prints_the_shapes_and_writes_the_tensors(
    server_address: str, tmp_path: Path, expected: Values
) -> None:
    file = tmp_path / "activations.safetensors"
    arguments = "--site head_result --site LOGITS --layers 2 --positions -1".split()
    arguments += ["--server", server_address, "--out", str(file)]
    done = CliRunner().invoke(januslens_command, ["activations", PROMPT, *arguments])
    assert done.exit_code == 0, done.output
    assert "HEAD_RESULT.2" in done.stdout
    assert "position, head, d_head" in done.stdout
    saved = load_file(file)
    torch.testing.assert_close(saved["LOGITS"][0], expected["LOGITS", None][-1])
    assert f"wrote {file}" in done.stderr


def test_command_estimates_the_cost(server_address: str) -> None:
    done = CliRunner().invoke(
        januslens_command, ["activations", PROMPT, "--estimate", "--server", server_address]
    )
    assert done.exit_code == 0, done.output
    assert "would be admitted" in done.stdout


def _stream(pieces: list[bytes], shape: list[int]) -> list[activations_pb2.ActivationsResponse]:
    """A stream with one bfloat16 tensor in pieces."""
    messages = [activations_pb2.ActivationsResponse()]
    messages[0].header.request_id = "r"
    offset = 0
    for piece in pieces:
        message = activations_pb2.ActivationsResponse()
        message.tensor.site = sites_pb2.SITE_BLOCK_OUTPUT
        message.tensor.layer, message.tensor.offset = 1, offset
        message.tensor.shape.extend(shape)
        message.tensor.piece.data_type = common_pb2.DATA_TYPE_BFLOAT16
        message.tensor.piece.shape.append(len(piece) // 2)
        message.tensor.piece.data = piece
        offset += len(piece) // 2
        messages.append(message)
    messages.append(activations_pb2.ActivationsResponse())
    messages[-1].summary.messages = len(pieces)
    for sequence, message in enumerate(messages):
        message.sequence = sequence
    return messages


def test_pieces_are_joined_in_order() -> None:
    data = bytes(range(24))
    assembler = ActivationsAssembler()
    events = [assembler.feed(message) for message in _stream([data[:8], data[8:]], [3, 4])]
    assert [type(event).__name__ for event in events] == [
        "ActivationsHeader",
        "NoneType",
        "SiteTensor",
        "ActivationsSummary",
    ]
    assert assembler.result().tensor("BLOCK_OUTPUT").tensor.data == data


def test_a_missing_piece_violates_the_contract() -> None:
    header, first, _second, summary = _stream([bytes(8), bytes(16)], [3, 4])
    assembler = ActivationsAssembler()
    for message in (header, first):
        assembler.feed(message)
    with pytest.raises(ActivationsInterrupted):
        assembler.result()
    summary.sequence = 2
    with pytest.raises(ProtocolViolation, match=r"before the end of BLOCK_OUTPUT\.1"):
        assembler.feed(summary)
