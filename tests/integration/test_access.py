"""Tokens, scopes, quotas and reloads of the callers' file."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from januslens.v1 import models_pb2, trace_pb2
from januslens_server.access.callers import new_token, token_hash
from januslens_server.demo import model_path
from tests.integration.test_starting import ended
from tests.support.calls import SERVICE, Refusal, long_trace, methods, prompt, refusal, started
from tests.support.certificates import replace
from tests.support.metrics import sample
from tests.support.server import ServerProcess, running_server

TEXT = models_pb2.TokenizeRequest(model="one", text="Japan")
TRACE = trace_pb2.TraceRequest(model="one", input=prompt("Japan"), layers=[0])
LIST = models_pb2.ListModelsRequest()


@dataclass
class Access:
    """A server with two models, `one` and `two`, its callers' file and their tokens."""

    server: ServerProcess
    channel: grpc.Channel
    path: Path
    tokens: dict[str, str]

    def write(self, **callers: dict[str, Any]) -> None:
        """Write the file with these callers and their permissions."""
        replace(self.path, granted(self.tokens, callers).encode())

    def refused(self, method: str, request: Message, token: str | None) -> Refusal:
        call = self.started(method, request, token)
        with pytest.raises(grpc.RpcError):
            list(call) if methods()[method].server_streaming else call.result()
        return refusal(call)

    def started(self, method: str, request: Message, token: str | None) -> Any:
        return started(self.channel, method, request, metadata=bearer(token), timeout=30)

    def models(self, caller: str) -> list[str]:
        """Return the names that ListModels returns."""
        answer = self.started("ListModels", LIST, self.tokens[caller]).result()
        return [model.name for model in answer.models]


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


def granted(tokens: dict[str, str], callers: dict[str, dict[str, Any]]) -> str:
    entries = []
    for name, fields in callers.items():
        expires = fields.pop("expires", None)
        token = {"sha256": token_hash(tokens[name]).hex()} | (
            {"expires": expires} if expires else {}
        )
        entries.append({"name": name, "tokens": [token], **fields})
    return yaml.safe_dump({"callers": entries})


USUAL: dict[str, dict[str, Any]] = {
    "root": {},
    "ada": {"models": ["one"], "rpcs": ["Tokenize", "ListModels"]},
    "late": {"expires": date(2020, 1, 1)},
    "none": {"models": []},
    "few": {"quotas": {"requests_per_minute": 3}},
    "one": {"quotas": {"concurrent": 1}},
    "little": {"quotas": {"device_seconds_per_minute": 0.001}},
}


@pytest.fixture(scope="module")
def access(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    path = tmp_path_factory.mktemp("access") / "callers.yaml"
    tokens = {name: new_token() for name in [*USUAL, "new"]}
    path.write_text(granted(tokens, {name: dict(fields) for name, fields in USUAL.items()}))
    models = [f"--model={name}={model_path()}" for name in ("one", "two")]
    with (
        running_server("--callers", str(path), *models) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield Access(server, channel, path, tokens)


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("shown", [None, "", "wrong", "late"])
def test_missing_and_wrong_tokens_are_unauthenticated(
    access: Access, method: str, shown: str | None
) -> None:
    token = access.tokens.get(shown, shown) if shown else shown
    empty = methods()[method].input_type._concrete_class()
    answer = access.refused(method, empty, token)
    assert answer.code is grpc.StatusCode.UNAUTHENTICATED
    assert (answer.reason, answer.info.domain) == ("UNAUTHENTICATED", "januslens")
    assert answer.retry_after is None
    assert ("expired on 2020-01-01" in answer.text) == (shown == "late")


@pytest.mark.parametrize("header", ["Basic YTpi", "Bearer", "token", "Bearer " + "x" * 4000])
def test_other_authorization_headers_are_unauthenticated(access: Access, header: str) -> None:
    call = started(access.channel, "Tokenize", TEXT, metadata=(("authorization", header),))
    assert call.exception() is not None
    assert refusal(call).code is grpc.StatusCode.UNAUTHENTICATED


def test_the_scheme_is_case_insensitive(access: Access) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        metadata = (("authorization", f"{scheme} {access.tokens['ada']}"),)
        assert started(access.channel, "Tokenize", TEXT, metadata=metadata).result().tokens


def test_a_request_without_a_token_is_not_parsed(access: Access) -> None:
    raw: Any = access.channel.unary_unary(SERVICE + "Tokenize")
    call = raw.future(b"\xff\xff\xff", timeout=30)
    assert call.exception() is not None
    assert refusal(call).code is grpc.StatusCode.UNAUTHENTICATED


def test_an_rpc_outside_the_scope_is_denied(access: Access) -> None:
    ada = access.tokens["ada"]
    assert access.started("Tokenize", TEXT, ada).result().tokens
    answer = access.refused("Trace", TRACE, ada)
    assert answer.code is grpc.StatusCode.PERMISSION_DENIED
    assert (answer.reason, answer.text) == ("PERMISSION_DENIED", "caller 'ada' may not call Trace")
    assert list(access.started("Trace", TRACE, access.tokens["root"]))


def test_a_model_outside_the_scope_is_denied_and_hidden(access: Access) -> None:
    """The error does not reveal whether the model exists."""
    for name in ("two", "three"):
        request = models_pb2.TokenizeRequest(model=name, text="Japan")
        answer = access.refused("Tokenize", request, access.tokens["ada"])
        assert answer.code is grpc.StatusCode.PERMISSION_DENIED
        assert answer.text == f"model {name!r} is not permitted: expected one of one"
    nothing = access.refused("Tokenize", TEXT, access.tokens["none"])
    assert nothing.code is grpc.StatusCode.PERMISSION_DENIED
    assert "two" not in nothing.text


def test_an_empty_name_selects_the_only_model_in_scope(access: Access) -> None:
    request = models_pb2.TokenizeRequest(text="Japan")
    assert access.started("Tokenize", request, access.tokens["ada"]).result().tokens
    assert access.refused("Tokenize", request, access.tokens["root"]).fields == ["model"]
    answer = access.refused("Tokenize", request, access.tokens["none"])
    assert answer.code is grpc.StatusCode.PERMISSION_DENIED


def test_list_models_shows_what_the_caller_may_use(access: Access) -> None:
    assert access.models("root") == ["one", "two"]
    assert access.models("ada") == ["one"]
    assert access.models("none") == []


def test_health_needs_no_token_but_reflection_does(access: Access) -> None:
    health: Any = health_pb2_grpc.HealthStub(access.channel)
    request = health_pb2.HealthCheckRequest(service="januslens.ready")
    assert health.Check(request, timeout=30).status == health_pb2.HealthCheckResponse.SERVING
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(access.channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")

    def ask(token: str | None) -> Any:
        return reflection.ServerReflectionInfo(iter([question]), metadata=bearer(token), timeout=30)

    (answer,) = ask(access.tokens["ada"])
    assert answer.list_services_response.service
    with pytest.raises(grpc.RpcError) as refused:
        list(ask(None))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def assert_spent(answer: Refusal, caller: str, quota: str) -> None:
    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (answer.reason, answer.info.domain) == ("QUOTA_SPENT", "januslens")
    assert answer.retry_after is not None
    assert answer.retry_after > 0
    failure = answer.detail(error_details_pb2.QuotaFailure)
    assert failure is not None
    (violation,) = failure.violations
    assert (violation.subject, violation.description) == (f"caller:{caller}", f"at most {quota}")


def test_every_call_counts_against_the_rate(access: Access) -> None:
    few = access.tokens["few"]
    for request in (TEXT, LIST, TEXT):
        method = "ListModels" if request is LIST else "Tokenize"
        assert access.started(method, request, few).result()
    assert_spent(access.refused("Trace", TRACE, few), "few", "3 requests a minute")


def test_concurrent_requests_are_counted_until_they_end(access: Access) -> None:
    one = access.tokens["one"]
    long = long_trace(20)
    long.model = "one"
    running = access.started("Trace", long, one)
    next(running)
    assert_spent(access.refused("Tokenize", TEXT, one), "one", "1 concurrent requests")
    running.cancel()
    deadline = time.monotonic() + 20
    while access.started("Tokenize", TEXT, one).exception() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_device_seconds_are_charged(access: Access) -> None:
    little = access.tokens["little"]
    assert list(access.started("Trace", TRACE, little))
    answer = access.refused("Trace", TRACE, little)
    assert_spent(answer, "little", "0.001 device seconds a minute")
    assert access.started("Tokenize", TEXT, little).result().tokens  # takes none of them


def test_an_unknown_method_is_unimplemented_for_authenticated_callers(access: Access) -> None:
    call: Any = access.channel.unary_unary(SERVICE + "Nope")
    with pytest.raises(grpc.RpcError) as refused:
        call(b"", timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_file_is_reloaded_on_change_and_on_sighup(access: Access) -> None:
    def outcome(caller: str) -> Any:
        call = access.started("Tokenize", TEXT, access.tokens[caller])
        return grpc.StatusCode.OK if call.exception() is None else call.code()

    assert outcome("new") is grpc.StatusCode.UNAUTHENTICATED
    access.write(new={}, root={})
    access.server.process.send_signal(signal.SIGHUP)
    access.server.wait_for("callers reloaded: 2 from")
    assert outcome("new") is grpc.StatusCode.OK
    assert outcome("ada") is grpc.StatusCode.UNAUTHENTICATED
    replace(access.path, b"callers: [{name: ada, tokns: []}]")
    access.server.process.send_signal(signal.SIGHUP)
    access.server.wait_for("callers not reloaded: ")
    assert sample(access.server, "januslens_reload_failed", file="callers") == 1
    assert outcome("new") is grpc.StatusCode.OK
    access.write(**{name: dict(fields) for name, fields in USUAL.items()})
    while outcome("new") is grpc.StatusCode.OK:  # within a second, and before the test's timeout
        pass
    assert outcome("ada") is grpc.StatusCode.OK
    assert sample(access.server, "januslens_reload_failed", file="callers") == 0


def test_calls_are_counted_by_caller(access: Access) -> None:
    labels = {"caller": "root", "grpc_method": "Trace"}
    names = ("requests", "tokens", "device_seconds")

    def counts() -> list[float]:
        return [sample(access.server, f"januslens_caller_{n}_total", **labels) for n in names]

    before = counts()
    request = trace_pb2.TraceRequest(model="one", input=prompt("Japan"), layers=[0])
    first, *_ = access.started("Trace", request, access.tokens["root"])
    deadline = time.monotonic() + 30
    while (now := counts())[0] == before[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    grown = [a - b for a, b in zip(now, before, strict=True)]
    assert grown[:2] == [1, len(first.header.prompt_tokens)]
    assert grown[2] > 0


def test_an_idle_server_notices_a_revoked_caller(access: Access) -> None:
    reloads = access.server.log.count("callers reloaded: 1 from")
    access.write(root={})
    deadline = time.monotonic() + 20
    while access.server.log.count("callers reloaded: 1 from") == reloads:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    access.write(**{name: dict(fields) for name, fields in USUAL.items()})
    access.server.wait_for(f"callers reloaded: {len(USUAL)} from")


def test_the_log_has_no_token(access: Access) -> None:
    access.refused("Tokenize", TEXT, "a-wrong-secret")
    access.server.wait_for("Tokenize UNAUTHENTICATED")
    for secret in ("a-wrong-secret", *access.tokens.values()):
        assert secret not in access.server.log


def test_make_token_prints_a_valid_file_entry() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "januslens_server", "--make-token", "eve"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    token, entry = made.stdout.strip(), yaml.safe_load(made.stderr)
    assert entry == {"callers": [{"name": "eve", "tokens": [{"sha256": token_hash(token).hex()}]}]}
    assert token not in made.stderr


def test_an_invalid_file_ends_the_server_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "callers.yaml"
    path.write_text("callers: 3")
    status, (line,) = ended("--port=0", "--metrics-port=0", f"--callers={path}")
    assert status == 1
    assert line == f"januslens-server: cannot serve: {path}: invalid callers: expected a list"
