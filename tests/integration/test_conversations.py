"""Conversations through the wire: the client, the command, and a model without a template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

import januslens
from januslens.cli.program import januslens as command
from januslens.interventions import mean_over, patch
from januslens.v1 import common_pb2, models_pb2, service_pb2_grpc
from tests.loading.test_chat_templates import (
    END,
    PLAIN,
    conversation,
    expected_ids,
    folder_with,
)
from tests.support.server import running_server

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is Tokyo?"},
]
ASKED = conversation("Where is Tokyo?", system="Be brief.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_with(tmp_path_factory.mktemp("chat") / "model", PLAIN)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with running_server("--model", f"chat={folder}") as server:
        yield server.address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[januslens.Client]:
    with januslens.Client(address) as connected:
        yield connected


def test_conversation_is_tokenized_traced_and_differentiated_alike(
    client: januslens.Client, folder: Path
) -> None:
    tokens = client.tokenize(messages=MESSAGES)
    assert [token.id for token in tokens] == expected_ids(folder, ASKED)
    assert {token.message for token in tokens} == {0, 1, None}
    trace = client.trace(messages=MESSAGES, layers=[0])
    assert list(trace.prompt_tokens) == tokens
    gradient = client.gradient_lens(messages=MESSAGES, target=" Paris", subject="Tokyo", layers=[0])
    assert list(gradient.prompt_tokens) == tokens
    plain = client.trace([token.id for token in tokens], layers=[0])
    assert plain.target() == trace.target()
    preview = client.preview_edit(
        januslens.Chat(MESSAGES), " Paris", januslens.ForwardShift(layer=1, eta=0.1)
    )
    same = client.preview_edit(
        [token.id for token in tokens], " Paris", januslens.ForwardShift(layer=1, eta=0.1)
    )
    assert preview.edited == same.edited
    estimates = [
        client.estimate_trace(messages=MESSAGES),
        client.estimate_trace([t.id for t in tokens]),
    ]
    assert estimates[0].flops == estimates[1].flops


def test_last_message_is_continued(client: januslens.Client, folder: Path) -> None:
    answer = {"role": "assistant", "content": "The city of"}
    chat = januslens.Chat([*MESSAGES, answer], continue_final_message=True)
    asked = conversation("Where is Tokyo?", "The city of", system="Be brief.", continues=True)
    assert [token.id for token in client.tokenize(messages=chat)] == expected_ids(folder, asked)


def test_command_takes_messages_as_options_and_as_a_file(
    address: str, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(MESSAGES))

    def listed(*arguments: str) -> list[int]:
        called = ["tokenize", "--server", address, "--json", *arguments]
        result = CliRunner().invoke(command, called, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return [token.get("id", 0) for token in json.loads(result.stdout)["tokens"]]

    said = ("--system", "Be brief.", "--user", "Where is Tokyo?")
    assert listed(*said) == listed("--messages", str(file)) == expected_ids(folder, ASKED)
    continued = conversation("Where is Tokyo?", "In", system="Be brief.", continues=True)
    assert listed(*said, "--assistant", "In") == expected_ids(folder, continued)
    told = ("--user", "Where is Tokyo?", "--assistant", "In Japan", "--user", "And Paris?")
    turns = conversation("Where is Tokyo?", "In Japan", "And Paris?")
    assert listed(*told) == expected_ids(folder, turns)


def test_table_of_a_conversation_names_the_messages(address: str) -> None:
    called = ["tokenize", "--server", address, "--user", "Tokyo"]
    result = CliRunner().invoke(command, called, catch_exceptions=False)
    assert "message" in result.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trace", "x", "--user", "y"], "both given"),
        (["tokenize"], "Missing argument 'TEXT'"),
        (["trace", "--system", "x"], "--system is given without --user"),
        (["trace", "--assistant", "x"], "expected them to alternate"),
        (["trace", "--user", "x", "--user", "y", "--user", "z"], "expected them to alternate"),
        (["trace", "--user", "x", "--literal"], "do not apply to conversations"),
        (["trace", "--user", "x", "--messages", "-"], "give only one"),
        (["trace", "--messages", "-"], "not valid JSON"),
    ],
)
def test_wrong_use_of_the_options_exits_with_2(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(command, arguments, input="{", catch_exceptions=False)
    assert result.exit_code == 2
    assert words in result.stderr


def test_contents_stay_ordinary_text_on_the_wire(client: januslens.Client) -> None:
    tokens = client.tokenize(messages=[{"role": "user", "content": f"a{END}b"}])
    assert b"".join(token.raw for token in tokens if token.message == 0).decode() == f"a{END}b"
    (end,) = client.tokenize(END)
    assert end.id not in {token.id for token in tokens if token.message == 0}


def test_model_without_a_template_is_a_failed_precondition(server_address: str) -> None:
    with (
        januslens.Client(server_address) as demo,
        pytest.raises(januslens.NoChatTemplate) as refused,
    ):
        demo.trace(messages=MESSAGES)
    assert refused.value.code == "FAILED_PRECONDITION"
    assert refused.value.reason == "NO_CHAT_TEMPLATE"


@pytest.mark.parametrize("name", ["text", "with_special_tokens", "literal"])
def test_other_fields_beside_a_chat_are_refused(address: str, name: str) -> None:
    chat = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="x")])
    request = models_pb2.TokenizeRequest(chat=chat, text="x")
    if name != "text":
        request = models_pb2.TokenizeRequest(chat=chat, **{name: True})  # type: ignore[arg-type]
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Tokenize(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(refused.value.details()).startswith(f"{name}: ")


def test_interventions_take_values_from_a_limited_number_of_conversations(
    client: januslens.Client,
) -> None:
    def means(different: int) -> list[januslens.Intervention]:
        asked = [
            januslens.Chat([{"role": "user", "content": f"Question {i % different}"}])
            for i in range(64)
        ]
        return [mean_over(asked, "EMBEDDING")] * 3

    assert client.estimate_activations("Tokyo", interventions=means(2)).flops > 0
    with pytest.raises(januslens.InvalidRequest, match="too many conversations") as caught:
        client.estimate_activations(
            "Tokyo",
            interventions=[
                *means(64),
                patch("EMBEDDING", source=januslens.Chat(MESSAGES), positions=0),
            ],
        )
    assert caught.value.field_violations[0].field.endswith("interventions[3].patch.input.chat")
