"""Estimated memory of models, free memory of devices, and refusal of models that do not fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from januslens_server.errors import ModelFailed
from januslens_server.lens import unembedding
from januslens_server.models.device_memory import (
    available,
    free_for_requests,
    free_memory,
    own_groups,
    total_memory,
    used_bytes,
    watched_devices,
)
from januslens_server.models.loader import load
from januslens_server.models.placement import CHUNKS_AT_WORK, MemoryNeed, memory_needed, place
from tests.architectures.cases import CASES, MIXTURES, SHARED_EXPERTS, Case
from tests.architectures.tiny_models import plain
from tests.loading.folders import room_for, saved, weight_bytes
from tests.support.forked import printed

GIB = 2**30
TIED = Case("gpt2", "tied", {"tie_word_embeddings": True})
UNTIED = next(case for case in CASES if case.id == "llama-grouped")
MIXTURE = next(case for case in MIXTURES if case.id == "mixtral-window")
DENSE_FIRST = next(case for case in SHARED_EXPERTS if case.family == "glm4_moe")


def skeleton(case: Case, data_type: torch.dtype) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(case.config(), dtype=data_type)


@pytest.mark.parametrize("case", [TIED, UNTIED], ids=["tied", "untied"])
def test_float32_needs_its_weights_and_on_a_gpu_no_copies(case: Case) -> None:
    need = memory_needed(skeleton(case, torch.float32), 1000, 0)
    buffers = sum(b.numel() * 4 for b in skeleton(case, torch.float32).buffers())
    assert need.weights == weight_bytes(case) + buffers
    assert (need.lens, need.work) == (0, CHUNKS_AT_WORK * 1000)
    assert need.on("cuda:0").total == need.weights + need.work


def test_half_types_need_float32_copies_of_the_head_and_of_a_block() -> None:
    """In the mixture the first block is dense and smaller than the second."""
    for case in (UNTIED, DENSE_FIRST):
        network: Any = plain(case)
        need = memory_needed(skeleton(case, torch.bfloat16), 1000, 0)
        assert (need.lens, need.packed) == (4 * network.lm_head.weight.numel(), 0)
        last = sum(4 * parameter.numel() for parameter in network.model.layers[-1].parameters())
        assert need.work == CHUNKS_AT_WORK * 1000 + last
    assert last > 2 * sum(4 * p.numel() for p in network.model.layers[0].parameters())


@pytest.mark.parametrize("case", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_cpu_multiplies_by_one_copy_of_a_float32_head(case: Case, tmp_path: Path) -> None:
    model = load(saved(case, tmp_path / "model"))
    head = model.network.get_output_embeddings().get_parameter("weight")
    embedding = model.network.get_input_embeddings().get_parameter("weight")
    unembedding = model.view.lens.unembedding
    copied = sum(4 * block.matrix.numel() for block in unembedding.blocks)
    assert copied == memory_needed(skeleton(case, torch.float32), 1000, 0).packed
    assert unembedding.rows(torch.tensor(7)).equal(head[7])
    assert (embedding.data_ptr() == head.data_ptr()) == (case is TIED)


def test_a_model_that_does_not_fit_is_refused_with_both_figures(tmp_path: Path) -> None:
    source = saved(TIED, tmp_path / "model")
    with pytest.raises(ModelFailed) as refused:
        load(replace(source, limits={"cpu": 200 * 2**20}))
    reason = str(refused.value)
    assert re.search(r"\(weights .* KiB, lens .* KiB, work 256\.0 MiB, row cache ", reason)
    assert "but only 200.0 MiB on cpu is available" in reason


def test_caches_count_before_loading_and_are_named_in_the_refusal(tmp_path: Path) -> None:
    source = replace(saved(TIED, tmp_path / "model"), row_cache_bytes=2**16)
    need = memory_needed(skeleton(TIED, torch.float32), source.chunk_bytes, source.row_cache_bytes)
    assert load(replace(source, limits={"cpu": need.total})).provenance.device == "cpu"
    with pytest.raises(
        ModelFailed, match=r"row cache 64\.0 KiB, neuron index .* KiB\), but only "
    ) as at:
        load(replace(source, limits={"cpu": need.total - 1}))
    assert f"not enough memory: the model needs {need}, but only" in str(at.value)


@pytest.mark.parametrize("limit", [2**16, 2**40], ids=["limited", "all rows"])
@pytest.mark.parametrize("case", [TIED, UNTIED, MIXTURE], ids=lambda case: case.id)
def test_caches_stay_below_their_estimate(case: Case, limit: int, tmp_path: Path) -> None:
    """Full, and not far below."""
    source = saved(case, tmp_path / "model")
    need = memory_needed(skeleton(case, torch.float32), 1000, limit)
    model = load(replace(source, chunk_bytes=1000, row_cache_bytes=limit))
    assert need.rows / 4 <= model.rows._logits.nbytes <= need.rows
    layers = range(model.view.facts.n_layers)
    index = [vars(model.neurons.layer(layer)).values() for layer in layers]
    held = sum(column.nbytes for columns in index for column in columns)
    assert need.neurons / 4 <= held <= need.neurons


def test_a_gpu_keeps_no_rows_and_no_index() -> None:
    need = memory_needed(skeleton(UNTIED, torch.float32), 1000, 2**16)
    assert min(need.rows, need.neurons) > 0
    assert need.on("cpu") == need
    assert need.on("cuda:0") == MemoryNeed(need.weights, 0, need.work)


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_gpu_that_multiplies_by_bfloat16_needs_no_copy_of_the_head(
    multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(unembedding, "has_float32_sums", lambda _device: multiplies)
    config = UNTIED.config()
    head = 4 * config.vocab_size * config.hidden_size
    need = memory_needed(skeleton(UNTIED, torch.bfloat16), 1000, 2**16)
    assert need.lens == head
    assert need.on("cuda:0").lens == (0 if multiplies else head)
    assert need.on("cuda:0").total == need.weights + need.on("cuda:0").lens + need.work
    assert memory_needed(skeleton(UNTIED, torch.float16), 1000, 0).on("cuda:0").lens == head


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """Two GPUs of 80 GiB to the code, the second with 30 GiB free; torch holds 3 GiB of each."""
    free = {0: (50 * GIB, 80 * GIB), 1: (30 * GIB, 80 * GIB)}
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "mem_get_info": lambda device: free[torch.device(device).index],
        "memory_reserved": lambda _device: 3 * GIB,
        "memory_allocated": lambda _device: 2 * GIB,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return free


@pytest.mark.usefixtures("two_gpus")
def test_requests_may_take_the_free_memory_of_the_gpu_that_has_least() -> None:
    # Memory that torch keeps without using it is free, and 1 GiB stays in reserve.
    assert free_for_requests("cuda:0") == 50 * GIB
    assert free_for_requests("cuda:1") == 30 * GIB
    assert free_for_requests("auto") == 30 * GIB


@pytest.mark.usefixtures("two_gpus")
def test_a_model_too_large_for_one_gpu_is_split_by_layers() -> None:
    deep = replace(UNTIED, name="deep", settings=UNTIED.settings | {"num_hidden_layers": 12})
    network = skeleton(deep, torch.float32)
    need = memory_needed(network, 1000, 0)
    part = need.on("cuda:0").beside_weights + int(0.7 * need.weights)
    room = {"cuda:0": part, "cuda:1": part, "cpu": 0}
    placed = place(network, need, "auto", room, None)
    assert set(placed.values()) == {0, 1}
    layers = [number for name, number in placed.items() if ".layers." in name]
    assert layers == sorted(layers)
    assert place(network, need, "auto", room | {"cuda:1": need.total}, None) == {"": "cuda:1"}


def test_free_memory_is_the_limit_by_default(tmp_path: Path) -> None:
    free = available("cpu", {})
    assert free is not None
    assert 2**28 < free < 2**50
    assert load(saved(TIED, tmp_path / "model")).provenance.device == "cpu"


def test_a_split_that_needs_the_disk_needs_a_folder(tmp_path: Path) -> None:
    source = replace(saved(TIED, tmp_path / "model"), device="auto", limits=room_for(TIED, 0.5))
    with pytest.raises(
        ModelFailed, match=r"only \d+\.\d MiB on cpu is available; .* offload to a folder"
    ):
        load(source)
    assert "disk" in load(replace(source, offload_dir=tmp_path)).provenance.device


def test_auto_does_not_split_a_model_that_fits(tmp_path: Path) -> None:
    source = replace(saved(TIED, tmp_path / "model"), device="auto", offload_dir=tmp_path)
    if not torch.cuda.is_available():
        assert load(source).provenance.device == "cpu"


def files(folder: Path, texts: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"memory.{name}").write_text(text)


VERSIONS = {
    1: (
        "5:cpu:/x\n4:memory,misc:/pod/server\n",
        Path("memory/pod/server"),
        ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
        str(2**63 - 4096),
    ),
    2: (
        "0::/pod/server\n",
        Path("pod/server"),
        ("max", "current", "inactive_file"),
        "max",
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_free_memory_is_limited_by_the_tightest_cgroup(version: int, tmp_path: Path) -> None:
    own, folder, (limit, used, inactive), none = VERSIONS[version]
    mapped = psutil.Process().memory_info().shared
    (tmp_path / "own").write_text(own)
    inner, outer = tmp_path / folder, (tmp_path / folder).parent
    statistics = f"anon 5\n{inactive} {mapped + 300_000_000}\nactive_file 0\n"
    files(inner, {limit: none, used: "900000000", "stat": statistics})
    files(outer, {limit: "2000000000", used: "900000000", "stat": statistics})
    groups = own_groups(tmp_path, tmp_path / "own")
    left = 2_000_000_000 - 900_000_000 + 300_000_000
    assert abs(free_memory(groups) - left) < 50_000_000  # pages mapped since
    assert total_memory("cpu", groups) == 2_000_000_000
    files(inner, {limit: "1000000000"})
    assert abs(free_memory(groups) - (left - 1_000_000_000)) < 50_000_000
    files(inner, {limit: "1000"})
    assert free_memory(groups) == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_container_sees_its_own_cgroup_at_the_top(version: int, tmp_path: Path) -> None:
    """The path names folders of the host, which do not exist in the container."""
    own, folder, (limit, *_), _ = VERSIONS[version]
    (tmp_path / "own").write_text(own)
    top = tmp_path / folder.parent.parent
    files(top, {limit: "3000000"})
    assert total_memory("cpu", own_groups(tmp_path, tmp_path / "own")) == 3_000_000


def test_without_cgroups_free_memory_is_that_of_the_machine(tmp_path: Path) -> None:
    groups = own_groups(tmp_path, tmp_path / "absent")
    assert total_memory("cpu", groups) == psutil.virtual_memory().total
    assert 0 < free_memory(groups) < psutil.virtual_memory().available


def test_ulimit_of_the_process_limits_free_memory() -> None:
    """`ulimit -v` and `ulimit -d`."""
    program = (
        "import resource, sys; from januslens_server.models.device_memory import free_memory;"
        "limit = getattr(resource, sys.argv[1]); size = 3 * 2**30;"
        "resource.setrlimit(limit, (size, size)); print(free_memory())"
    )
    for limit in ("RLIMIT_DATA", "RLIMIT_AS"):
        assert 0 <= int(printed(program, limit)) < 3 * 2**30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_memory_is_reported_by_kind() -> None:
    assert watched_devices("auto")[:2] == ["cpu", "cuda:0"]
    before = used_bytes("cuda:0", "allocated")
    kept = torch.zeros(2**20, device="cuda:0")
    assert used_bytes("cuda:0", "allocated") - before == kept.numel() * 4
    assert used_bytes("cuda:0", "reserved") >= used_bytes("cuda:0", "allocated")
    assert 0 < used_bytes("cuda:0", "available") < used_bytes("cuda:0", "total")


def test_cpu_server_does_not_initialise_gpus() -> None:
    """Reading a GPU's memory would use some of it."""
    assert watched_devices("cpu") == ["cpu"]
