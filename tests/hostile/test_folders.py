"""Folders that would have code run, files read or memory taken are FAILED before any of it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from januslens.v1 import models_pb2, service_pb2_grpc, trace_pb2
from januslens_server.demo import model_path
from januslens_server.errors import ModelFailed
from januslens_server.models.loader import ModelSource, load
from tests.support.calls import prompt
from tests.support.model_folders import WEIGHTS, healthy, with_configuration
from tests.support.server import running_server

# Beside what is resident: one load may take that much address space.
MEMORY = 4 * 2**30
SECONDS = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return healthy(tmp_path / "model")


def refusal(folder: Path) -> str:
    """The one line that a load fails with, in bounded time and memory."""
    kept = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, kept[1]))
    began = time.monotonic()
    try:
        with pytest.raises(ModelFailed) as failed:
            load(ModelSource("hostile", str(folder)))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)
    assert time.monotonic() - began < SECONDS
    reason = str(failed.value)
    assert "\n" not in reason
    assert len(reason) < 1000
    return reason


def describe(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


HUB = "someone/kernels"


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": HUB},
        {"_attn_implementation": f"paged|{HUB}"},
        {"_attn_implementation_internal": "flash_attention_2"},
        {"attn_implementation": {"": "sdpa", "text_config": HUB}},
        {"text_config": {"_attn_implementation": HUB}},
        {"deep": [{"er": {"experts_implementation": HUB}}]},
        {"experts_implementation": "deepgemm"},
    ],
    ids=str,
)
def test_implementations_come_from_an_allow_list(folder: Path, changes: dict[str, Any]) -> None:
    describe(folder, **changes)
    assert "_implementation" in (reason := refusal(folder))
    assert "must be" in reason


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "quantised by gptq"),
        ({"configuration_files": ["../other.json"]}, "configuration_files selects"),
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights selects"),
        ({"fusion_config": {"fused": True}}, "fusion_config selects"),
        ({"distributed_config": {"tp_size": 2}}, "distributed_config selects"),
    ],
)
def test_keys_that_choose_code_or_files(folder: Path, changes: dict[str, Any], found: str) -> None:
    describe(folder, **changes)
    assert found in refusal(folder)


def test_adapters_and_tokenizer_files_elsewhere(folder: Path) -> None:
    describe(folder, "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"])
    assert "fast_tokenizer_files selects another tokenizer file" in refusal(folder)
    describe(folder, "adapter_config.json", base_model_name_or_path="someone/base")
    assert "got an adapter (adapter_config.json)" in refusal(folder)


KERNELS = """
import sys
def get_kernel(repository, *_, **__):
    print("asked for", repository, file=sys.stderr)
    raise ValueError(repository)
class Anything:
    def __init__(self, *_, **__): pass
def decorator(*_, **__): return lambda decorated: decorated
use_kernel_forward_from_hub = use_kernelized_func = decorator
def __getattr__(_name): return Anything
"""


def test_no_kernel_is_fetched_where_the_package_is_installed(tmp_path: Path) -> None:
    """A stand-in for `kernels`, of a release that transformers accepts, reports every request."""
    from transformers.utils import import_utils

    release = getattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    site, described = tmp_path / "site", tmp_path / "site" / f"kernels-{release}.dist-info"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(KERNELS)
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {release}")
    program = (
        "from januslens_server.models.loader import ModelSource, load\n"
        f"load(ModelSource('demo', {str(model_path())!r}))\n"
        "import transformers\n"
        "print('available:', transformers.utils.is_kernels_available())\n"
    )
    paths = os.pathsep.join([str(site), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "available: False\n"
    assert "asked for" not in ran.stderr


def layers(count: int) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        describe(folder, n_layer=count)
        return "n_layer is too large" if count > 10_000 else "the weights hold 52 tensors"

    return bomb


def labels(folder: Path) -> str:
    describe(folder, num_labels=10**9)
    return "num_labels is too large"


def nested_counts(folder: Path) -> str:
    describe(folder, attention_types=[[["global"], 10**9]])
    return "attention_types is too large"


def named_labels(folder: Path) -> str:
    describe(folder, id2label={str(i): "x" * 20 for i in range(200_000)})
    return "config.json is too large: expected at most"


def wide(folder: Path) -> str:
    describe(folder, n_embd=2**16, n_head=1)
    return "config.json describes"


def long_contexts(folder: Path) -> str:
    describe(folder, n_positions=10**12)
    return "config.json describes"


def nested(folder: Path) -> str:
    (folder / "config.json").write_text('{"a":' * 100_000)
    return "config.json is not a valid JSON file"


def no_object(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return "expected an object in config.json"


def no_layers(folder: Path) -> str:
    describe(folder, n_layer=0)
    return "expected at least one layer"


def header(folder: Path, size: int, text: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + text)


def header_of_gigabytes(folder: Path) -> str:
    header(folder, 4 * 2**30, b"{}")
    return "its header claims 4294967296 bytes"


def tensors(**entries: list[int]) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        described = {
            name: {
                "dtype": "F32",
                "shape": [max(0, end - start) // 4],
                "data_offsets": [start, end],
            }
            for name, (start, end) in entries.items()
        }
        text = json.dumps(described).encode()
        header(folder, len(text), text + bytes(64))
        return "is not a valid safetensors file"

    return bomb


def one_tensor_too_large(folder: Path) -> str:
    """A sparse file whose one tensor takes 1 GiB once it is read."""
    name, end = "transformer.wte.weight", 2**30
    text = json.dumps({name: {"dtype": "F32", "shape": [end // 4], "data_offsets": [0, end]}})
    header(folder, len(text), text.encode())
    os.truncate(folder / WEIGHTS, 8 + len(text) + end)
    return f"the tensor {name} alone holds {end // 4}"


def fifo(name: str) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        return f"expected a regular file, got {name}" if name != "config.json" else "config.json"

    return bomb


def device(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    return "tokenizer.json is a link out of the folder, to /dev/zero"


def link(name: str) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        outside = folder.parent / name
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)
        return f"{name} is a link out of the folder"

    return bomb


def merges_of_a_gigabyte(folder: Path) -> str:
    os.truncate(folder / "tokenizer.json", 2**30)
    return "tokenizer.json is too large: expected at most"


def index(name: object) -> Callable[[Path], str]:
    def bomb(folder: Path) -> str:
        shutil.copy(folder / WEIGHTS, folder.parent / WEIGHTS)
        text = json.dumps({"weight_map": {"a": name}})
        (folder / "model.safetensors.index.json").write_text(text)
        return "model.safetensors.index.json"

    return bomb


BOMBS = {
    "10^4 layers": layers(10**4),
    "10^5 layers": layers(10**5),
    "10^9 layers": layers(10**9),
    "10^9 labels": labels,
    "counts in lists": nested_counts,
    "200,000 names of labels": named_labels,
    "wide": wide,
    "10^12 positions": long_contexts,
    "nested JSON": nested,
    "no object": no_object,
    "no layers": no_layers,
    "a header of gigabytes": header_of_gigabytes,
    "overlapping offsets": tensors(a=[0, 32], b=[16, 64]),
    "offsets out of range": tensors(a=[0, 2**40]),
    "offsets backwards": tensors(a=[64, 0]),
    "one tensor of 1 GiB": one_tensor_too_large,
    "FIFO for config.json": fifo("config.json"),
    "FIFO for tokenizer.json": fifo("tokenizer.json"),
    "FIFO for weights": fifo(WEIGHTS),
    "FIFO beside the weights": fifo("other.safetensors"),
    "device": device,
    "link to a tokenizer elsewhere": link("tokenizer.json"),
    "link to weights elsewhere": link(WEIGHTS),
    "merges of a gigabyte": merges_of_a_gigabyte,
    "index with a path": index(f"../{WEIGHTS}"),
    "index with an absolute path": index("/etc/passwd"),
    "index of a pickle": index("pytorch_model.bin"),
    "index with no name": index(7),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=list(BOMBS))
def test_bombs(folder: Path, bomb: Callable[[Path], str]) -> None:
    expected = bomb(folder)
    assert expected in refusal(folder)


def test_links_within_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted(healthy(tmp_path / "model").iterdir())):
        shutil.move(path, blobs / str(i))
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert load(ModelSource("tiny", str(snapshot))).view.facts.n_layers == 4


def test_weights_of_half_the_size_are_not_allocated(folder: Path) -> None:
    """Within the factor, the first wrong shape is named as before."""
    path = folder / WEIGHTS
    found = load_file(path)
    found["transformer.ln_f.weight"] = torch.ones(3)
    save_file(found, path, {"format": "pt"})
    assert "of shape [128], got [3]" in refusal(folder)


def test_the_other_model_serves_beside_a_hostile_one(tmp_path: Path) -> None:
    hostile = with_configuration(tmp_path / "hostile", n_layer=10**9)
    flags = ["--model", f"hostile={hostile}", "--model", f"healthy={model_path()}"]
    with running_server(*flags) as server, grpc.insecure_channel(server.address) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        states = {m.name: m.state for m in stub.ListModels(models_pb2.ListModelsRequest()).models}
        assert states == {
            "hostile": models_pb2.Model.STATE_FAILED,
            "healthy": models_pb2.Model.STATE_READY,
        }
        request = trace_pb2.TraceRequest(model="healthy", input=prompt("Japan"), layers=[0])
        assert list(stub.Trace(request))[-1].HasField("summary")
    assert [line for line in server.lines if "hostile FAILED" in line]
    assert "Traceback" not in server.log
