"""All hostile models and attacks at once, under a memory limit, beside a model that serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from januslens.v1 import common_pb2, models_pb2, service_pb2_grpc
from januslens_server.demo import model_path
from tests.architectures.cases import Case
from tests.hostile.test_folders import BOMBS, LENGTHS, SIZES, describe
from tests.hostile.test_gguf_files import FILES
from tests.loading import test_lora as loras
from tests.loading import test_quantized as quantised_weights
from tests.loading.folders import saved
from tests.soak.test_hostile_peers import (
    ATTACKS,
    LIMITS,
    SECONDS,
    Target,
    served,
)
from tests.support.calls import started, timeless
from tests.support.health_checks import health_checked
from tests.support.model_folders import healthy
from tests.support.server import running_server

# Data of the process: its heap, all private mappings and stacks.
LIMIT = 3 * 2**30
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def hostile_models(root: Path) -> dict[str, Path]:
    """Return every hostile folder and GGUF file by the name of its model."""
    root.mkdir()
    models: dict[str, Path] = {}
    for i, bomb in enumerate(BOMBS.values()):
        folder = models[f"bomb-{i}"] = healthy(root / str(i) / "model")
        bomb(folder)
    for i, (family, changes) in enumerate(LENGTHS.values()):
        folder = models[f"length-{i}"] = root / f"length-{i}"
        saved(Case(family, "plain", SIZES[family]), folder)
        describe(folder, **changes)
    for i, (scheme, described, tensors, _) in enumerate(quantised_weights.BROKEN.values()):
        source, _ = quantised_weights.quantised(scheme, root / f"quantised-{i}")
        settings = quantised_weights.SCHEMES[scheme][2] | described
        quantised_weights.describe(source, quantization_config=settings)
        quantised_weights.change(source, **tensors)
        models[f"quantised-{i}"] = Path(source.location)
    for i, write in enumerate(FILES.values()):
        path = models[f"gguf-{i}"] = root / f"{i}.gguf"
        write(path)
    # What is no folder with a regular config.json or regular file is refused before the start.
    return {n: m for n, m in models.items() if m.is_file() or (m / "config.json").is_file()}


def hostile_loras(root: Path) -> dict[str, Path]:
    """Return every hostile LoRA folder by the name of its model, for `loras.LLAMA`."""
    root.mkdir()
    pairs = loras.pairs_of(loras.LLAMA)
    found = [
        loras.write(root / f"{i}", change(pairs), **changes)
        for i, (changes, change, _) in enumerate(loras.BROKEN.values())
    ]
    for bomb in (loras.fifo, loras.link, loras.gigabyte, loras.header_of_gigabytes):
        found.append(loras.write(root / bomb.__name__, pairs))
        weights = found[-1] / "adapter_model.safetensors"
        weights.unlink()
        bomb(weights)
    return {f"lora-{folder.name}": folder for folder in found}


@contextmanager
def traced(target: Target) -> Iterator[list[bytes]]:
    """Trace the healthy model again and again while the block runs; yields the last results."""
    last: list[bytes] = []
    stop = threading.Event()
    failures: list[Exception] = []

    def trace_until_stopped() -> None:
        try:
            with target.channel() as channel:
                while not stop.is_set():
                    answers = started(channel, "Trace", target.trace(4), timeout=120)
                    last[:] = [timeless(message) for message in answers]
        except grpc.RpcError as error:
            failures.append(error)

    thread = threading.Thread(target=trace_until_stopped)
    thread.start()
    try:
        yield last
    finally:
        stop.set()
        thread.join()
    assert failures == []


def endless_templates(target: Target) -> None:
    """Keep eight conversations open whose template never ends."""
    chat = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="Hi")])
    request = models_pb2.TokenizeRequest(model="endless", chat=chat)
    with target.channel() as channel:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            calls = [started(channel, "Tokenize", request, timeout=300) for _ in range(8)]
            for call in calls:
                assert call.exception().code() is grpc.StatusCode.FAILED_PRECONDITION


def test_one_model_serves_beside_every_hostile_one_under_a_memory_limit(tmp_path: Path) -> None:
    adapted = hostile_loras(tmp_path / "loras")
    hostile: dict[str, object] = {
        **hostile_models(tmp_path / "models"),
        **{name: f"base+lora={folder}" for name, folder in adapted.items()},
    }
    endless = healthy(tmp_path / "endless")
    describe(endless, "tokenizer_config.json", chat_template=ENDLESS)
    base = saved(loras.LLAMA, tmp_path / "base").location
    serving = {"healthy": model_path(), "endless": endless, "base": base}
    sources: dict[str, object] = {**serving, **hostile}
    flags = [part for item in sources.items() for part in ("--model", "=".join(map(str, item)))]
    limits = ("prlimit", f"--data={LIMIT}")
    with running_server(
        *flags,
        *LIMITS,
        "--health-port",
        "0",
        within=limits,
        until="model healthy READY",
        seconds=300,
    ) as server:
        target = Target("limited", server, None, None, None, model="healthy")
        with traced(target) as results:
            server.wait_for("ready", 900)
        while_loading = list(results)
        assert while_loading
        with grpc.insecure_channel(server.address) as channel:
            stub = service_pb2_grpc.IntrospectionServiceStub(channel)
            models = stub.ListModels(models_pb2.ListModelsRequest()).models
        states = {model.name: model.state for model in models}
        ready, failed = models_pb2.Model.STATE_READY, models_pb2.Model.STATE_FAILED
        assert states == {**dict.fromkeys(hostile, failed), **dict.fromkeys(serving, ready)}
        with health_checked(server.health_address) as checks, traced(target) as results:
            for attack in (*ATTACKS.values(), endless_templates):
                attack(target)
                served(target)
        print(f"{checks}; {len(hostile)} models")
        assert max(checks.own) < 5
        assert results == while_loading
    failures = [line for line in server.lines if " FAILED: " in line]
    assert len(failures) == len(hostile)
    assert "Traceback" not in server.log
