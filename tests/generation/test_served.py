"""Generate through the wire: the client's results, errors, resuming, fairness, and the command."""

from __future__ import annotations

import json
import math

import grpc
import pytest
from click.testing import CliRunner

import januslens
from januslens.cli.program import januslens as command
from januslens.interventions import scale, zero
from januslens.v1 import common_pb2, generation_pb2, service_pb2_grpc

PROMPT = "The capital of Japan is the city of"


@pytest.fixture
def client(server_address: str) -> januslens.Client:
    return januslens.Client(server_address)


def test_generation_has_text_probabilities_and_layers(client: januslens.Client) -> None:
    made = client.generate(PROMPT, layers="all", top_k=3)
    assert made.text == " Tokyo."
    assert made.finish_reason == "end_of_sequence"
    assert len(made) == 3
    assert [token.id for token in made.prompt_tokens] == made.ids_before(0)
    first = made.tokens[0]
    assert first.top[0][0].text == " Tokyo"
    assert math.exp(first.log_probability) == pytest.approx(first.top[0][1], abs=1e-6)
    assert [read.layer for read in first.layers] == [0, 1, 2, 3]
    last = first.layers[-1]
    assert (last.rank, last.top[0].text) == (0, " Tokyo")
    assert last.probability == pytest.approx(first.top[0][1], abs=1e-4)
    ranked = [read.layer for read in first.layers if read.rank == 0]
    assert first.decided in ranked
    assert all(read.rank == 0 for read in first.layers if read.layer >= (first.decided or 0))


def test_frame_has_one_row_per_token(client: januslens.Client) -> None:
    frame = client.generate(PROMPT, layers=[0, 3]).to_pandas()
    assert list(frame["token"]) == [" Tokyo", ".", "<|endoftext|>"]
    assert {"log_probability", "entropy_bits", "decided", "rank_0", "rank_3"} <= set(frame.columns)
    assert "decided" not in client.generate(PROMPT).to_pandas()


def test_trace_and_gradient_of_a_generated_token(client: januslens.Client) -> None:
    made = client.generate(PROMPT, layers=[3])
    trace = made.trace(1, layers=[3])
    target = trace.target()
    assert target.target.text == "."
    assert target.position == len(made.prompt_tokens)
    reported = made.tokens[1].log_probability
    assert math.log(target.target_probability) == pytest.approx(reported, abs=1e-4)
    other = made.trace(0, " Paris", layers=[3]).target()
    assert other.target.text == " Paris"
    gradient = made.gradient(0, layers=[3])
    assert gradient.loss == pytest.approx(-made.tokens[0].log_probability, abs=1e-4)
    assert made.trace(layers=[3]).target().target.text == "<|endoftext|>"
    with pytest.raises(IndexError, match="no generated token 3"):
        made.trace(3)


def test_explanation_of_a_logged_text_has_its_trace_and_largest_difference(
    client: januslens.Client,
) -> None:
    made = client.generate(PROMPT, temperature=3.0, seed=5, max_new_tokens=4)
    ids = [token.token.id for token in made]
    reported = [token.log_probability for token in made]
    found = client.explain(PROMPT, ids, token=1, log_probabilities=reported, layers=[3])
    assert list(found.log_probabilities) == pytest.approx(reported, abs=1e-4)
    assert found.largest_difference is not None
    assert found.largest_difference < 1e-4
    assert [token.id for token in found.tokens] == ids
    assert found.trace.target().target.id == ids[1]
    assert found.trace.target().position == len(made.prompt_tokens)
    wrong = client.explain(made.ids_before(0), ids, log_probabilities=[0.5 - r for r in reported])
    assert wrong.largest_difference is not None
    assert wrong.largest_difference > 0.5
    assert client.explain(PROMPT, " Tokyo.").largest_difference is None
    with pytest.raises(ValueError, match="expected 4, one per token"):
        client.explain(PROMPT, ids, log_probabilities=[0.0])
    with pytest.raises(IndexError, match="no token 4"):
        client.explain(PROMPT, ids, token=4)
    with pytest.raises(ValueError, match="completion is empty"):
        client.explain(PROMPT, [])


async def test_asynchronous_generation_explains_its_tokens(server_address: str) -> None:
    async with januslens.AsyncClient(server_address) as client:
        made = await client.generate(PROMPT)
        trace = await made.trace(0, layers=[3])
        assert trace.target().target.text == " Tokyo"


def test_estimate_names_the_cost(client: januslens.Client) -> None:
    few = client.estimate_generate(PROMPT, max_new_tokens=2)
    many = client.estimate_generate(PROMPT, max_new_tokens=60, layers="all")
    assert few.admissible
    assert many.flops > few.flops
    assert many.projected_vectors == 60 * 4


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"sampling": generation_pb2.Sampling(temperature=-1)}, "sampling.temperature"),
        ({"sampling": generation_pb2.Sampling(temperature=math.nan)}, "sampling.temperature"),
        ({"sampling": generation_pb2.Sampling(temperature=math.inf)}, "sampling.temperature"),
        ({"sampling": generation_pb2.Sampling(top_p=1.5)}, "sampling.top_p"),
        ({"sampling": generation_pb2.Sampling(top_p=math.nan)}, "sampling.top_p"),
        ({"stop": ["x", ""]}, "stop[1]"),
        ({"stop": ["x" * 1025]}, "stop[0]"),
        ({"top_k": 1001}, "top_k"),
        ({"reading": generation_pb2.LayerReading(layers=[4])}, "reading.layers"),
        ({"reading": generation_pb2.LayerReading(top_k=101)}, "reading.top_k"),
    ],
)
def test_invalid_field_is_refused_by_name(
    server_address: str, fields: dict[str, object], field: str
) -> None:
    request = generation_pb2.GenerateRequest(
        input=common_pb2.Input(prompt="Japan"),
        **fields,  # type: ignore[arg-type]
    )
    with grpc.insecure_channel(server_address) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Generate(request))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(refused.value.details()).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_new_tokens": 0}, ValueError),
        ({"temperature": -1.0}, ValueError),
        ({"temperature": "hot"}, TypeError),
        ({"top_p": 1.5}, ValueError),
        ({"seed": 2**64}, ValueError),
        ({"stop": ["x", ""]}, ValueError),
        ({"layers": []}, ValueError),
    ],
)
def test_invalid_argument_is_refused_before_it_is_sent(
    client: januslens.Client, options: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        client.generate("x", **options)  # type: ignore[arg-type]


def test_interventions_change_the_answer_and_the_traces_of_its_tokens(
    client: januslens.Client,
) -> None:
    knocked_out = [zero("MLP_OUTPUT", layers=0), zero(heads=[(0, 1)], positions=[-1, -3])]
    plain, changed = client.generate(PROMPT), client.generate(PROMPT, interventions=knocked_out)
    assert changed.text != plain.text
    for number, made in enumerate(changed):
        traced = changed.trace(number, layers=[3]).target()
        assert traced.target == made.token
        assert math.log(traced.target_probability) == pytest.approx(made.log_probability, abs=1e-4)
        assert changed.gradient(number, layers=[3]).loss == pytest.approx(
            -made.log_probability, abs=1e-4
        )
    unchanged = changed.trace(0, layers=[3], interventions=()).target()
    assert math.log(unchanged.target_probability) != pytest.approx(
        changed.tokens[0].log_probability
    )
    estimate = client.estimate_generate(PROMPT, interventions=knocked_out)
    assert estimate.admissible


def test_interrupted_generation_has_the_tokens_received(client: januslens.Client) -> None:
    with client.stream_generate(PROMPT) as stream:
        for event in stream:
            if isinstance(event, januslens.GeneratedToken):
                break
        stream.close()
        with pytest.raises(januslens.GenerationInterrupted) as cut:
            stream.result()
    assert isinstance(cut.value.partial, januslens.Generation)
    assert cut.value.partial.text == " Tokyo"


def test_command_prints_the_text_and_the_deciding_layers(server_address: str) -> None:
    arguments = ["generate", PROMPT, "--server", server_address]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    text, *rest = result.stdout.splitlines()
    plain = "".join(c for c in text if c not in "⁰¹²³⁴⁵⁶⁷⁸⁹")
    assert plain == " Tokyo.<|endoftext|>"
    assert text != plain
    assert any("the model ended the text" in line for line in rest)


def test_command_prints_json_lines(server_address: str) -> None:
    arguments = ["generate", PROMPT, "--server", server_address, "--json", "--read", "none"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert "header" in lines[0]
    assert lines[1]["generated"]["token"]["text"] == " Tokyo"
    assert lines[-1]["summary"]["finishReason"] == "end_of_sequence"


def test_command_generates_under_interventions(
    server_address: str, client: januslens.Client
) -> None:
    changes = ["--zero-heads", "0.1,2.0", "--scale", "0.5", "--site", "mlp_output", "--layers", "1"]
    found = CliRunner().invoke(
        command, ["generate", PROMPT, *changes, "--server", server_address, "--json"]
    )
    made = [json.loads(line) for line in found.stdout.splitlines()][1:-1]
    knocked_out = zero(heads=[(0, 1), (2, 0)])
    expected = client.generate(
        PROMPT, interventions=[knocked_out, scale(0.5, "MLP_OUTPUT", layers=1)]
    )
    assert [one["generated"]["token"]["text"] for one in made] == [
        one.token.text for one in expected
    ]
    assert [one["generated"]["logProbability"] for one in made] == pytest.approx(
        [one.log_probability for one in expected], abs=1e-5
    )
    plain = client.generate(PROMPT)
    assert expected.tokens[0].log_probability != pytest.approx(plain.tokens[0].log_probability)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "1"], "--layers is given without a change"),
        (["--positions", "-1"], "--positions is given without a change"),
        (["--zero", "--scale", "2"], "--zero and --scale are given"),
        (["--zero", "--read", "x"], "is not a list of layers"),
    ],
)
def test_command_refuses_changes_that_do_not_fit(
    server_address: str, options: list[str], words: str
) -> None:
    found = CliRunner().invoke(command, ["generate", PROMPT, *options, "--server", server_address])
    assert found.exit_code == 2
    assert words in found.stderr


def test_command_estimates(server_address: str) -> None:
    arguments = ["generate", PROMPT, "--server", server_address, "--estimate"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "Tokyo" not in result.stdout
