"""A LoRA folder is served beside its base: as if it were merged, with one copy of the weights."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from januslens.v1 import gradient_lens_pb2
from januslens_server.config import ServerSettings
from januslens_server.errors import ModelFailed
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.lora import load_lora
from januslens_server.models.matrices import Linear
from januslens_server.models.registry import Registry
from januslens_server.models.resident import ResidentModel
from januslens_server.pipelines.gradient_lens import gradient_lens
from januslens_server.pipelines.resolve import resolve_gradient_lens
from januslens_server.pipelines.self_check import checked
from januslens_server.results import NAMED_KINDS, GradientMatrix, MatrixKind, ModelState, Token
from januslens_server.rpc.encode import GradientLensEncoder
from januslens_server.specs import GradientLensSpec, NegativeLogLikelihood
from tests.architectures.cases import CASES, Case
from tests.architectures.tiny_models import plain
from tests.loading.folders import saved

BY_ID = {case.id: case for case in CASES}
LLAMA, GPT2 = BY_ID["llama-grouped"], BY_ID["gpt2-plain"]
FALCON = BY_ID["falcon-groups, two norms"]
RANK, ALPHA, TARGET = 3, 5.0, 7
MODULES = {
    "llama": ("q_proj", "v_proj", "o_proj", "down_proj"),
    "gpt2": ("c_attn", "c_fc"),
    "falcon": ("query_key_value", "dense_h_to_4h"),
}
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def pairs_of(case: Case) -> Pairs:
    """Draw A `[rank, d_in]` and B `[d_out, rank]` for the case's modules."""
    torch.manual_seed(1)
    found = {}
    for name, module in plain(case).named_modules():
        if name.endswith(MODULES[case.family]):
            d_out, d_in = module.weight.shape
            if isinstance(module, Conv1D):
                d_out, d_in = d_in, d_out
            found[name] = (0.2 * torch.randn(RANK, d_in), 0.2 * torch.randn(d_out, RANK))
    return found


def write(folder: Path, pairs: Pairs, **changes: Any) -> Path:
    """Write a LoRA folder as PEFT does."""
    folder.mkdir()
    described = {
        "peft_type": "LORA",
        "base_model_name_or_path": "nobody/never-fetched",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
        "lora_dropout": 0.1,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(described | changes))
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def merged(case: Case, pairs: Pairs, scale: float = ALPHA / RANK) -> Any:
    """The plain model with the LoRA merged into its weights."""
    network = copy.deepcopy(plain(case))
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            module = network.get_submodule(name)
            change = scale * (b @ a)
            module.weight += change.T if isinstance(module, Conv1D) else change
    return network


def tuned(case: Case, folder: Path, **changes: Any) -> tuple[ResidentModel, ResidentModel, Pairs]:
    """Load a base and a LoRA over it."""
    pairs = pairs_of(case)
    base = load(saved(case, folder / "base"))
    return base, load_lora("tuned", write(folder / "lora", pairs, **changes), base), pairs


@pytest.mark.parametrize("case", [LLAMA, GPT2, FALCON], ids=lambda case: case.id)
def test_logits_and_weights_equal_those_of_the_merged_model(case: Case, tmp_path: Path) -> None:
    base, model, pairs = tuned(case, tmp_path)
    expected, prompt = merged(case, pairs), torch.tensor([case.prompt])
    with torch.inference_mode():
        logits = expected(prompt).logits
        torch.testing.assert_close(model.network(prompt).logits, logits, rtol=1e-5, atol=1e-5)
        unchanged = plain(case)(prompt).logits
        torch.testing.assert_close(base.network(prompt).logits, unchanged, rtol=1e-5, atol=1e-5)
        assert (logits - unchanged).abs().max() > 0.1
    # The flow graph reads weights: all of a map's, or the part of a fused one.
    names = {id(module): name for name, module in model.network.named_modules()}
    seen = set()
    for block in model.view.known.values():
        for matrix in block.matrices.values():
            assert isinstance(matrix, Linear)
            weight = expected.get_submodule(names[id(matrix.module)]).weight
            whole = weight if isinstance(matrix.module, Conv1D) else weight.T
            wanted = matrix.select(whole)
            torch.testing.assert_close(matrix.weight, wanted, rtol=1e-5, atol=1e-6)
            seen.add(names[id(matrix.module)])
    assert set(pairs) <= seen


def test_the_base_and_its_loras_share_one_copy_of_the_weights(tmp_path: Path) -> None:
    base, model, _ = tuned(LLAMA, tmp_path)
    own, others = dict(base.network.named_parameters()), dict(model.network.named_parameters())
    assert own.keys() == others.keys()
    assert all(others[name] is parameter for name, parameter in own.items())
    assert model.view.lens is base.view.lens
    assert model.vocabulary is base.vocabulary
    assert model.provenance.lora == (
        "rank 3 on down_proj, o_proj, q_proj, v_proj, over the model llama"
    )
    assert model.provenance.revision != base.provenance.revision


def sent_components(matrix: GradientMatrix) -> list[gradient_lens_pb2.Component]:
    """Return the components of a matrix as a client receives them."""
    encoder = GradientLensEncoder("r1", lambda token_id: Token(token_id, "", b""))
    responses = map(gradient_lens_pb2.GradientLensResponse.FromString, encoder.encode(matrix))
    return [part for response in responses for part in response.matrix.components]


@pytest.mark.parametrize("case", [LLAMA, GPT2], ids=lambda case: case.id)
def test_factors_of_a_and_b_are_their_gradients(case: Case, tmp_path: Path) -> None:
    _, model, pairs = tuned(case, tmp_path)
    leaves = gradients(case, pairs)
    spec = GradientLensSpec(
        tuple(case.prompt),
        NegativeLogLikelihood((TARGET,)),
        matrices=NAMED_KINDS,
        components=0,
        include_factors=True,
        verify=True,
    )
    names = {id(module): name for name, module in model.network.named_modules()}
    sums: dict[str, np.ndarray] = {}
    columns: dict[str, list[np.ndarray]] = {}
    for event in gradient_lens(resolve_gradient_lens(model, spec), lambda: None):
        if not isinstance(event, GradientMatrix):
            continue
        assert event.verification is not None
        assert event.verification.held
        name = names[id(model.view.matrix((event.layer, event.kind, None)).module)]
        if name not in pairs:
            assert event.lora is None
            continue
        parts, lora = event.components, event.lora
        assert lora is not None
        assert parts.inputs is not None
        assert parts.vjps is not None
        assert lora.a_vjps is not None
        assert lora.b_inputs is not None
        a, b = lora.a_vjps.T @ parts.inputs, parts.vjps.T @ lora.b_inputs
        assert lora.a_norm == pytest.approx(np.linalg.norm(a), rel=1e-4)
        assert lora.b_norm == pytest.approx(np.linalg.norm(b), rel=1e-4)
        assert (lora.rank, lora.scale) == (RANK, ALPHA / RANK)
        factors = (parts.inputs, parts.vjps, lora.a_vjps, lora.b_inputs)
        for sent, *rows in zip(sent_components(event), *factors, strict=True):
            assert [row.tobytes() for row in rows] == [
                found.data for found in (sent.input, sent.vjp, sent.lora_a_vjp, sent.lora_b_input)
            ]
        sums[name] = sums.get(name, 0) + a  # a fused module has three parts
        columns.setdefault(name, []).append(b)
    assert sums.keys() == pairs.keys()
    for name, (a_gradient, b_gradient) in leaves.items():
        found = np.concatenate(columns[name])
        for own, wanted in ((sums[name], a_gradient), (found, b_gradient)):
            assert np.linalg.norm(own - wanted) <= 1e-5 * np.linalg.norm(wanted), name


def gradients(case: Case, pairs: Pairs) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Compute dL/dA and dL/dB by autograd, on a plain model with the LoRA in hooks."""
    network = copy.deepcopy(plain(case))
    leaves = {
        name: (a.clone().requires_grad_(), b.clone().requires_grad_())
        for name, (a, b) in pairs.items()
    }
    for name, (a, b) in leaves.items():

        def added(
            _module: nn.Module,
            inputs: tuple[torch.Tensor, ...],
            output: torch.Tensor,
            a: torch.Tensor = a,
            b: torch.Tensor = b,
        ) -> torch.Tensor:
            change = torch.einsum("...i,ri,or->...o", inputs[0], a, b)
            return output + ALPHA / RANK * change

        network.get_submodule(name).register_forward_hook(added)
    logits = network(torch.tensor([case.prompt])).logits[0, -1]
    (-logits.log_softmax(-1)[TARGET]).backward()
    return {
        name: (a.grad.numpy(), b.grad.numpy())
        for name, (a, b) in leaves.items()
        if a.grad is not None and b.grad is not None
    }


def test_scale_follows_the_patterns_and_the_root_of_the_rank(tmp_path: Path) -> None:
    changes = {"use_rslora": True, "alpha_pattern": {"layers.1.mlp.down_proj": 2.0}}
    _, model, _ = tuned(LLAMA, tmp_path, **changes)
    found = {}
    for layer in (0, 1):
        for kind in (MatrixKind.Q, MatrixKind.FF2, MatrixKind.K):
            matrix = model.view.matrix((layer, kind, None))
            assert isinstance(matrix, Linear)
            if matrix.lora is not None:
                found[layer, kind] = matrix.lora.scale
    root = RANK**0.5
    assert found == {
        (0, MatrixKind.Q): ALPHA / root,
        (1, MatrixKind.Q): ALPHA / root,
        (0, MatrixKind.FF2): ALPHA / root,
        (1, MatrixKind.FF2): 2.0 / root,
    }


def test_both_models_pass_the_self_check_and_serve(tmp_path: Path) -> None:
    """The LoRA is listed before its base, which loads first."""
    source = saved(LLAMA, tmp_path / "base")
    folder = write(tmp_path / "lora", pairs_of(LLAMA))
    sources = [ModelSource("tuned", "llama", lora=folder), source]
    registry = Registry(sources, checked, lambda _: None)
    registry.load_all()
    assert [status.state for status in registry.statuses()] == [ModelState.READY] * 2
    assert [status.loaded_fraction for status in registry.statuses()] == [1.0, 1.0]
    assert registry.get("tuned").provenance.lora.startswith("rank 3 on ")
    assert registry.get("llama").provenance.lora == ""


def test_a_lora_without_its_base_is_failed(tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", pairs_of(LLAMA))
    base = ModelSource("base", str(tmp_path / "none"))
    registry = Registry([base, ModelSource("tuned", "base", lora=folder)], checked, lambda _: None)
    registry.load_all()
    assert "its base, the model 'base', is not served" in registry.status("tuned").reason


def test_setting_names_a_configured_base() -> None:
    texts: Any = ["base=/models/c++/base", "tuned=base+lora=/loras/tuned"]
    settings = ServerSettings(models=texts)
    assert [str(model) for model in settings.models] == texts
    assert settings.models[1].lora == Path("/loras/tuned")
    with pytest.raises(ValueError, match="changes 'base', which is not configured; add --model"):
        ServerSettings(models=texts[1:])


def extended(pairs: Pairs, name: str, a: list[int], b: list[int]) -> Pairs:
    return pairs | {name: (torch.zeros(a), torch.zeros(b))}


BROKEN: dict[str, tuple[dict[str, Any], Callable[[Pairs], Pairs], str]] = {
    "another kind": ({"peft_type": "IA3"}, dict, "describes 'IA3': expected LORA"),
    "DoRA": (
        {"use_dora": True}, dict, "not read: use_dora: DoRA also changes the lengths of a weight's"
    ),
    "whole modules": (
        {"modules_to_save": ["lm_head"]}, dict,
        "not read: modules_to_save: whole modules were trained with it; merge the LoRA",
    ),
    "biases": ({"bias": "all"}, dict, "trains biases; merge the LoRA into the model's weights"),
    "embeddings": (
        {"target_modules": ["embed_tokens"]},
        lambda p: p | {"model.embed_tokens": (torch.zeros(3, 120), torch.zeros(32, 3))},
        "changes 'model.embed_tokens', which is not a linear map",
    ),
    "a changed base": ({"init_lora_weights": "pissa"}, dict, "changes the base's weights"),
    "another rank": ({"r": 4}, dict, "expected rank 4"),
    "a rank of 10^9": ({"r": 10**9}, dict, "expected rank 1e+09, at most 4096"),
    "a rank beyond floats": ({"r": 10**400}, dict, "invalid r 1000"),
    "an alpha beyond floats": ({"lora_alpha": 10**400}, dict, "invalid lora_alpha 1000"),
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, dict, "settings that are not read: auto_map"),
    "a rank of text": ({"r": "3"}, dict, "invalid r '3'"),
    "an infinite alpha": ({"lora_alpha": float("inf")}, dict, "invalid lora_alpha inf"),
    "a slow expression": ({"rank_pattern": {"(a+)+$": 8}}, dict, "invalid rank_pattern"),
    "thousands of patterns": (
        {"alpha_pattern": {f"layer{i}": 1 for i in range(20_000)}}, dict, "at most 16384"
    ),
    "an unknown module": (
        {}, lambda p: extended(p, "model.layers.9.mlp.up_proj", [3, 32], [40, 3]),
        "not a linear map in a block of the base 'llama'; merge the LoRA",
    ),
    "the output head": (
        {}, lambda p: extended(p, "lm_head", [3, 32], [120, 3]), "changes 'lm_head', which is no"
    ),
    "another width": (
        {}, lambda p: extended(p, "model.layers.0.mlp.up_proj", [3, 33], [40, 3]),
        "has A [3, 33] and B [40, 3] for a map of 32 inputs and 40 outputs",
    ),
    "values that are NaN": (
        {}, lambda p: p | {"model.layers.0.mlp.up_proj": (torch.full((3, 32), torch.nan),
        torch.zeros(40, 3))}, "infinite or NaN",
    ),
    "no weights": ({}, lambda _: {}, "has no weights"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ResidentModel:
    return load(saved(LLAMA, tmp_path_factory.mktemp("base")))


def test_names_in_the_folder_are_neither_fetched_nor_evaluated(
    base: ResidentModel, tmp_path: Path
) -> None:
    changes = {
        "base_model_name_or_path": "https://127.0.0.1:1/base",
        "target_modules": "(a+)+$",
        "exclude_modules": "(.*)*x",
        "auto_mapping": {"base_model_class": "os", "parent_library": "os"},
        "revision": "../../..",
    }
    model = load_lora("tuned", write(tmp_path / "lora", pairs_of(LLAMA), **changes), base)
    assert model.provenance.lora.startswith("rank 3")


def test_thousands_of_modules_and_patterns_are_compared_in_seconds(
    base: ResidentModel, tmp_path: Path
) -> None:
    pairs = {f"layers.{i}.x": (torch.zeros(3, 1), torch.zeros(1, 3)) for i in range(2000)}
    patterns = {f"{i}.x": 1 for i in range(10_000)}
    folder = write(tmp_path / "lora", pairs, alpha_pattern=patterns)
    began = time.monotonic()
    with pytest.raises(ModelFailed, match=r"changes 'layers\.0\.x'"):
        load_lora("tuned", folder, base)
    assert time.monotonic() - began < 10


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return "is not a regular file"


def link(path: Path) -> str:
    path.symlink_to("/etc/passwd")
    return "outside the folder"


def header_of_gigabytes(path: Path) -> str:
    path.write_bytes((4 * 2**30).to_bytes(8, "little") + b"{}")
    return "but a header of 4294967296 bytes"


def gigabyte(path: Path) -> str:
    path.touch()
    os.truncate(path, 2**30)
    return "is too large" if path.suffix == ".json" else "expected fewer than its base"


@pytest.mark.parametrize(
    ("name", "bomb"),
    [
        ("adapter_config.json", fifo),
        ("adapter_config.json", link),
        ("adapter_config.json", gigabyte),
        ("adapter_model.safetensors", fifo),
        ("adapter_model.safetensors", link),
        ("adapter_model.safetensors", gigabyte),
        ("adapter_model.safetensors", header_of_gigabytes),
        ("beside.bin", fifo),
    ],
)
def test_files_that_block_or_are_elsewhere_are_refused(
    name: str, bomb: Callable[[Path], str], base: ResidentModel, tmp_path: Path
) -> None:
    folder = write(tmp_path / "lora", pairs_of(LLAMA))
    (folder / name).unlink(missing_ok=True)
    expected = bomb(folder / name)
    with pytest.raises(ModelFailed) as refused:
        load_lora("tuned", folder, base)
    assert expected in str(refused.value)


@pytest.mark.parametrize("broken", BROKEN)
def test_folders_that_do_not_fit_are_refused(
    broken: str, base: ResidentModel, tmp_path: Path
) -> None:
    changes, change, reason = BROKEN[broken]
    folder = write(tmp_path / "lora", change(pairs_of(LLAMA)), **changes)
    with pytest.raises(ModelFailed) as refused:
        load_lora("tuned", folder, base)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_weights_and_missing_files_are_refused(base: ResidentModel, tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", pairs_of(LLAMA))
    path = folder / "adapter_model.safetensors"
    save_file({"base_model.model.lm_head.weight": torch.ones(2, 2)}, path)
    with pytest.raises(
        ModelFailed, match=r"not LoRA matrices of linear maps: base_model\.model\.l"
    ):
        load_lora("tuned", folder, base)
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ModelFailed, match="expected A and B of every module"):
        load_lora("tuned", folder, base)
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2000, 2000)}, path)
    with pytest.raises(ModelFailed, match="expected fewer than its base"):
        load_lora("tuned", folder, base)
    path.unlink()
    with pytest.raises(ModelFailed, match=r"'adapter_model\.safetensors' is missing"):
        load_lora("tuned", folder, base)
    with pytest.raises(ModelFailed, match="the folder does not exist"):
        load_lora("tuned", tmp_path / "none", base)
