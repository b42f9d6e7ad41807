"""Quantised checkpoints are served with the weights that their published formulas give."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from januslens_server.errors import ModelFailed
from januslens_server.models.loader import ModelSource, load
from januslens_server.models.quantization_scheme import read_scheme
from januslens_server.models.quantized import TensorEntry, dense_weights
from tests.architectures.cases import CASES, MIXTURES, SHARED_EXPERTS, Case
from tests.loading.folders import room_for, saved

WEIGHTS = "model.safetensors"
BY_ID = {case.id: case for case in (*CASES, *MIXTURES, *SHARED_EXPERTS)}
GPT_OSS = Case(
    "gpt_oss", "packed", BY_ID["gpt_oss-sinks, window"].settings | {"intermediate_size": 64}
)
DENSE, MIXTURE = BY_ID["qwen3-grouped, window"], BY_ID["qwen3_moe-mixed with dense"]
LATENT = BY_ID["deepseek_v3-latent queries, YaRN"]

Tensors = dict[str, torch.Tensor]
Quantise = Callable[[str, tuple[int, ...], np.random.Generator], tuple[Tensors, np.ndarray]]

FOUR_BIT_FLOATS = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def e4m3(code: int) -> float:
    """Decode an 8-bit float: 4 bits of exponent with a bias of 7, 3 bits of mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def floats8(drawn: np.random.Generator, shape: tuple[int, ...]) -> tuple[torch.Tensor, np.ndarray]:
    """Draw codes of finite 8-bit floats, and their values."""
    codes = drawn.integers(0, 120, shape).astype(np.uint8) | drawn.choice([0, 128], shape)
    codes = codes.astype(np.uint8)
    table = np.array([e4m3(code) for code in range(256)], np.float32)
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), table[codes]


def spread(scales: np.ndarray, rows: int, columns: int, block: tuple[int, int]) -> np.ndarray:
    """The scale of each weight, by its row and column."""
    return np.array(
        [[scales[i // block[0], j // block[1]] for j in range(columns)] for i in range(rows)],
        np.float32,
    )


def scales_for(
    drawn: np.random.Generator, rows: int, columns: int, block: tuple[int, int]
) -> np.ndarray:
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    return drawn.uniform(1e-3, 2e-3, shape).astype(np.float32)


def block_fp8(block: tuple[int, int]) -> Quantise:
    def quantise(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
        codes, values = floats8(drawn, shape)
        rows, columns = shape
        scales = scales_for(drawn, rows, columns, block)
        stored = {name: codes, f"{name}_scale_inv": torch.from_numpy(scales)}
        return stored, values * spread(scales, rows, columns, block)

    return quantise


def single_fp8(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
    """One scale for a matrix, and one for its inputs, which are not quantised here."""
    codes, values = floats8(drawn, shape)
    scale = np.float32(drawn.uniform(1e-3, 2e-3))
    scales = [f"{name}_scale_inv", f"{name.removesuffix('.weight')}.activation_scale"]
    return {name: codes} | {key: torch.tensor(scale) for key in scales}, values * scale


def rows_fp8(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
    codes, values = floats8(drawn, shape)
    scales = drawn.uniform(1e-3, 2e-3, (shape[0], 1)).astype(np.float32)
    return {name: codes, f"{name}_scale": torch.from_numpy(scales)}, values * scales


def exponents_fp8(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
    """Scales that are powers of two, stored as bytes."""
    codes, values = floats8(drawn, shape)
    rows, columns = shape
    exponents = drawn.integers(115, 119, (rows, -(-columns // 32))).astype(np.uint8)
    factors = np.array([2.0 ** (int(e) - 127) for e in exponents.flat], np.float32)
    scales = spread(factors.reshape(exponents.shape), rows, columns, (1, 32))
    return {name: codes, f"{name}_scale_inv": torch.from_numpy(exponents)}, values * scales


def mxfp4(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
    experts, columns, rows = shape  # of the model, which multiplies by the transpose
    codes = drawn.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8)
    scales = drawn.integers(120, 126, codes.shape[:-1]).astype(np.uint8)
    values = np.empty(shape, np.float32)
    for e, j, i in np.ndindex(*shape):
        byte = int(codes[e, i, j // 32, j % 32 // 2])
        code = byte >> 4 if j % 2 else byte & 15
        values[e, j, i] = FOUR_BIT_FLOATS[code] * 2.0 ** (int(scales[e, i, j // 32]) - 127)
    stored = {f"{name}_blocks": torch.from_numpy(codes), f"{name}_scales": torch.from_numpy(scales)}
    return stored, values


def nvfp4(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
    rows, columns = shape
    codes = drawn.integers(0, 256, (rows, columns // 2)).astype(np.uint8)
    eights, factors = floats8(drawn, (rows, columns // 16))
    whole = np.float32(drawn.uniform(500, 900))
    values = np.empty(shape, np.float32)
    for i, j in np.ndindex(*shape):
        code = codes[i, j // 2] >> 4 if j % 2 else codes[i, j // 2] & 15
        values[i, j] = FOUR_BIT_FLOATS[code] * (factors[i, j // 16] / whole)
    stored = {
        f"{name}_packed": torch.from_numpy(codes),
        f"{name}_scale": eights,
        f"{name}_global_scale": torch.tensor([whole]),
    }
    return stored, values


def packed(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Pack signed integers along the last dimension, the first in the lowest bits."""
    per = 32 // bits
    found = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per)), np.uint32)
    for index in np.ndindex(*codes.shape):
        unsigned = int(codes[index]) + 2 ** (bits - 1)
        found[(*index[:-1], index[-1] // per)] |= np.uint32(unsigned << bits * (index[-1] % per))
    return torch.from_numpy(found.view(np.int32))


def integers(bits: int, group: int, *, zeros: bool = False, shuffled: bool = False) -> Quantise:
    def quantise(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
        rows, columns = shape
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        codes = drawn.integers(low, high, shape)
        scales = scales_for(drawn, rows, columns, (1, group))
        groups = np.arange(columns) // group
        if shuffled:
            groups = drawn.permutation(groups)
        centres = drawn.integers(low, high, scales.shape) if zeros else np.zeros(scales.shape, int)
        stored = {
            f"{name}_packed": packed(codes, bits),
            f"{name}_scale": torch.from_numpy(scales),
            f"{name}_shape": torch.tensor(shape),
        }
        if zeros:
            stored[f"{name}_zero_point"] = packed(centres.T, bits).T.contiguous()
        if shuffled:
            stored[f"{name}_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        values = (codes - centres[:, groups]).astype(np.float32) * scales[:, groups]
        return stored, values

    return quantise


def gptq(
    bits: int, group: int, *, offset: int = 1, shuffled: bool = False, biased: bool = False
) -> Quantise:
    """Integers as AutoGPTQ stores them: codes packed along the inputs, zeros along the outputs."""

    def quantise(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
        (rows, columns), high = shape, 2**bits
        codes, groups = drawn.integers(0, high, shape), np.arange(columns) // group
        zeros = drawn.integers(0, high, (rows, groups[-1] + 1))
        zeros[0, 0] = 0  # stored as the largest code if 1 is subtracted
        scales = drawn.uniform(1e-3, 2e-3, zeros.shape).astype(np.float16)
        if shuffled:
            groups = drawn.permutation(groups)
        half = 2 ** (bits - 1)
        stored_zeros = (zeros - offset) % high
        module = name.removesuffix(".weight")
        stored = {
            f"{module}.qweight": packed(codes - half, bits).T.contiguous(),
            f"{module}.qzeros": packed(stored_zeros.T - half, bits),
            f"{module}.scales": torch.from_numpy(scales.T.copy()),
        }
        if shuffled:
            stored[f"{module}.g_idx"] = torch.from_numpy(groups.astype(np.int32))
        if biased:
            stored[f"{module}.bias"] = torch.zeros(rows)
        values = (codes - zeros[:, groups]) * scales.astype(np.float32)[:, groups]
        return stored, values.astype(np.float32)

    return quantise


def awq(group: int) -> Quantise:
    """4-bit integers as AutoAWQ stores them: eight outputs in 32 bits, the even ones first."""

    def quantise(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
        rows, columns = shape
        codes, n_groups = drawn.integers(0, 16, shape), columns // group
        zeros = drawn.integers(0, 16, (rows, n_groups))
        scales = drawn.uniform(1e-3, 2e-3, zeros.shape).astype(np.float16)
        order = [8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8] for i in range(rows)]
        module = name.removesuffix(".weight")
        stored = {
            f"{module}.qweight": packed(codes.T[:, order] - 8, 4),
            f"{module}.qzeros": packed(zeros.T[:, order] - 8, 4),
            f"{module}.scales": torch.from_numpy(scales.T.copy()),
        }
        values = np.empty(shape, np.float32)
        for i, j in np.ndindex(*shape):
            values[i, j] = (codes[i, j] - zeros[i, j // group]) * np.float32(scales[i, j // group])
        return stored, values

    return quantise


def bytes_by_row(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
    codes = drawn.integers(-128, 128, shape).astype(np.int8)
    scales = drawn.uniform(1e-3, 2e-3, (shape[0], 1)).astype(np.float32)
    stored = {name: torch.from_numpy(codes), f"{name}_scale": torch.from_numpy(scales)}
    return stored, codes.astype(np.float32) * scales


def four_bits(*, nested: bool = False) -> Quantise:
    """Codes into a table, as bitsandbytes stores them: the first one in a byte's upper bits.

    Rows do not end where blocks of 64 values end.
    """

    def quantise(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
        size = int(np.prod(shape))
        codes, n_blocks = drawn.integers(0, 16, size + size % 2), -(-size // 64)
        table = np.sort(drawn.uniform(-1, 1, 16)).astype(np.float32)
        scales = drawn.uniform(0.05, 0.1, n_blocks).astype(np.float32)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        stored = {
            name: torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]),
            f"{name}.quant_map": torch.from_numpy(table),
        }
        if nested:
            own = drawn.uniform(0.01, 0.02, -(-n_blocks // 4)).astype(np.float32)
            levels = np.sort(drawn.uniform(-1, 1, 256)).astype(np.float32)
            picked = drawn.integers(0, 256, n_blocks)
            state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.0625}
            scales = np.array([levels[c] * own[i // 4] for i, c in enumerate(picked)], np.float32)
            scales += np.float32(0.0625)
            stored[f"{name}.nested_absmax"] = torch.from_numpy(own)
            stored[f"{name}.nested_quant_map"] = torch.from_numpy(levels)
        absmax = picked.astype(np.uint8) if nested else scales
        stored[f"{name}.absmax"] = torch.from_numpy(absmax)
        stored[f"{name}.quant_state.bitsandbytes__nf4"] = text_tensor(json.dumps(state))
        values = [table[codes[i]] * scales[i // 64] for i in range(size)]
        return stored, np.array(values, np.float32).reshape(shape)

    return quantise


def text_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def eight_bits(name: str, shape: tuple[int, ...], drawn: np.random.Generator) -> Any:
    """Integers of LLM.int8(): a row's largest magnitude is 127 steps."""
    codes = drawn.integers(-127, 128, shape).astype(np.int8)
    largest = drawn.uniform(0.1, 0.2, shape[0]).astype(np.float32)
    module = name.removesuffix(".weight")
    stored = {
        name: torch.from_numpy(codes),
        f"{module}.SCB": torch.from_numpy(largest),
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    values = codes.astype(np.float32) * largest[:, None] * np.float32(1 / 127)
    return stored, values


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """The configuration that llm-compressor writes for one group of weights."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


BLOCKS = {"quant_method": "fp8", "weight_block_size": [24, 20], "activation_scheme": "dynamic"}
INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": True}
FP8 = {"type": "float", "num_bits": 8}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}
LINEAR = r"(q|k|v|o|gate|up|down)_proj\.weight$"
SCHEMES: dict[str, tuple[Case, str, dict[str, Any], Quantise, str]] = {
    "MXFP4": (GPT_OSS, r"experts\.\w+_proj$", {"quant_method": "mxfp4"}, mxfp4, "MXFP4"),
    # Blocks that divide no side, as in DeepSeek's and Qwen's matrices.
    "block FP8": (DENSE, LINEAR, BLOCKS, block_fp8((24, 20)), "FP8 in blocks of 24x20"),
    "block FP8, usual blocks": (
        DENSE, LINEAR, {"quant_method": "fp8"}, block_fp8((128, 128)), "FP8 in blocks of 128x128"
    ),
    "block FP8, experts": (
        MIXTURE, LINEAR, BLOCKS, block_fp8((24, 20)), "FP8 in blocks of 24x20"
    ),
    "block FP8, latent attention": (
        LATENT, r"(a|b|mqa|o|gate|up|down)_proj\w*\.weight$", BLOCKS, block_fp8((24, 20)),
        "FP8 in blocks of 24x20",
    ),
    "single FP8": (
        DENSE, LINEAR, {"quant_method": "fp8", "weight_block_size": None}, single_fp8, "FP8"
    ),
    "FP8 with exponents": (
        DENSE, LINEAR, {"quant_method": "mxfp8"}, exponents_fp8,
        "FP8 in blocks of 1x32",
    ),
    "FBGEMM FP8": (DENSE, LINEAR, {"quant_method": "fbgemm_fp8"}, rows_fp8, "FBGEMM FP8"),
    "compressed floats by row": (
        DENSE, LINEAR, compressed("float-quantized", **FP8, strategy="channel"), rows_fp8,
        "compressed-tensors float-quantized (float8)",
    ),
    "compressed integers by row": (
        DENSE, LINEAR,
        compressed("int-quantized", type="int", num_bits=8, strategy="channel"), bytes_by_row,
        "compressed-tensors int-quantized (int8)",
    ),
    "4-bit groups": (
        MIXTURE, LINEAR, compressed("pack-quantized", **INT4), integers(4, 16),
        "compressed-tensors pack-quantized (int4)",
    ),
    "4-bit groups with zero points": (
        DENSE, LINEAR, compressed("pack-quantized", **INT4 | {"symmetric": False}),
        integers(4, 16, zeros=True), "compressed-tensors pack-quantized (int4)",
    ),
    "4-bit groups of any columns": (
        DENSE, LINEAR, compressed("pack-quantized", **INT4, actorder="group"),
        integers(4, 16, shuffled=True), "compressed-tensors pack-quantized (int4)",
    ),
    "8-bit groups": (
        DENSE, LINEAR, compressed("pack-quantized", **INT4 | {"num_bits": 8}), integers(8, 16),
        "compressed-tensors pack-quantized (int8)",
    ),
    "NVFP4": (
        DENSE, r"(q|k|v|gate|up)_proj\.weight$",  # their inputs are multiples of 16 wide
        compressed(
            "nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16
        ),
        nvfp4, "compressed-tensors nvfp4-pack-quantized (float4)",
    ),
    "GPTQ": (DENSE, LINEAR, GPTQ, gptq(4, 16), "GPTQ (int4 in groups of 16)"),
    "GPTQ, groups of any columns": (
        DENSE, LINEAR, GPTQ | {"desc_act": True}, gptq(4, 16, shuffled=True),
        "GPTQ (int4 in groups of 16)",
    ),
    "GPTQ, 8 bits, second format": (
        DENSE, LINEAR, GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, gptq(8, 16, offset=0),
        "GPTQ (int8 in groups of 16)",
    ),
    "GPTQ, 2 bits, one group, biases of zeros": (
        # Only matrices whose sides are multiples of 16 hold codes of 2 bits.
        DENSE, r"(q|o)_proj\.weight$", GPTQ | {"bits": 2, "group_size": -1},
        gptq(2, 1000, biased=True), "GPTQ (int2 in groups of all columns)",
    ),
    "bitsandbytes NF4": (DENSE, LINEAR, NF4, four_bits(), "bitsandbytes NF4"),
    "bitsandbytes NF4, nested": (
        DENSE, LINEAR, NF4 | {"bnb_4bit_use_double_quant": True}, four_bits(nested=True),
        "bitsandbytes NF4, nested",
    ),
    "bitsandbytes int8": (
        DENSE, LINEAR, {"quant_method": "bitsandbytes", "load_in_8bit": True}, eight_bits,
        "bitsandbytes int8",
    ),
    "AWQ, experts": (MIXTURE, LINEAR, AWQ, awq(8), "AWQ (int4 in groups of 8)"),
}  # fmt: skip


def quantised(scheme: str, folder: Path) -> tuple[ModelSource, ModelSource]:
    """Write a model twice: with a scheme's codes, and with the values that they stand for."""
    case, chosen, described, quantise, _ = SCHEMES[scheme]
    source, expected = saved(case, folder / "quantised"), folder / "expected"
    shutil.copytree(source.location, expected)
    stored, dense = load_file(expected / WEIGHTS), load_file(expected / WEIGHTS)
    drawn = np.random.default_rng(0)
    names = [name for name in stored if re.search(chosen, name)]
    assert names
    for name in names:
        codes, values = quantise(name, tuple(stored.pop(name).shape), drawn)
        stored |= codes
        assert values.dtype == np.float32
        dense[name] = torch.from_numpy(values)
    save_file(dense, expected / WEIGHTS, {"format": "pt"})
    save_file(stored, Path(source.location) / WEIGHTS, {"format": "pt"})
    describe(source, quantization_config=described)
    return source, ModelSource(case.family, str(expected))


def describe(source: ModelSource, **changes: Any) -> None:
    path = Path(source.location) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(source: ModelSource, **changes: torch.Tensor | None) -> None:
    """Replace or remove stored tensors; each key is the end of a tensor's name."""
    path = Path(source.location) / WEIGHTS
    tensors = load_file(path)
    for end, value in changes.items():
        name = next(name for name in tensors if name.endswith(end))
        del tensors[name]
        if value is not None:
            tensors[name] = value
    save_file(tensors, path, {"format": "pt"})


def refusal(source: ModelSource) -> str:
    with pytest.raises(ModelFailed) as refused:
        load(source)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_those_of_the_published_formula(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if only one row of blocks is dequantised at once."""
    monkeypatch.setattr("januslens_server.models.quantized.VALUES_AT_ONCE", 1)
    source, expected = quantised(scheme, tmp_path)
    model, plain = load(source), load(expected)
    found, wanted = model.network.state_dict(), plain.network.state_dict()
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(found[name], values), name
    assert model.provenance.quantization == SCHEMES[scheme][-1]
    assert plain.provenance.quantization == ""


BITSANDBYTES = Path(__file__).parents[1] / "fixtures" / "bitsandbytes.safetensors"


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_weights_are_those_that_bitsandbytes_returns(kind: str, tmp_path: Path) -> None:
    """Compared with version 0.50.2 on a CPU.

    The fixture has the tensors of `quantize_4bit(..., blocksize=64)` (NF4 with
    `compress_statistics`) and of `int8_vectorwise_quant`, and what `dequantize_4bit` (NF4 in
    bfloat16) and `int8_vectorwise_dequant` return for them.
    """
    tensors = {
        name.removeprefix(f"{kind}."): values
        for name, values in load_file(BITSANDBYTES).items()
        if name.startswith(f"{kind}.")
    }
    expected = tensors.pop("expected")
    save_file(tensors, tmp_path / WEIGHTS)
    kinds = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32"}
    entries = {
        name: TensorEntry(WEIGHTS, kinds[values.dtype], tuple(values.shape))
        for name, values in tensors.items()
    }
    described = NF4 | {"bnb_4bit_quant_type": kind, "load_in_8bit": kind == "int8"}
    weights = dense_weights(tmp_path, entries, read_scheme({"quantization_config": described}))
    found = replace(weights["map.weight"], data_type=expected.dtype)[...]
    assert list(weights) == ["map.weight"]
    assert torch.equal(found, expected)


def test_dequantised_weights_are_rounded_once(tmp_path: Path) -> None:
    source, expected = quantised("block FP8", tmp_path)
    found = load(ModelSource("half", source.location, data_type="bfloat16"))
    wanted = load(expected).network.state_dict()
    for name, values in found.network.state_dict().items():
        assert torch.equal(values, wanted[name].to(values.dtype)), name
    assert found.provenance.data_type == "bfloat16"


def test_dequantised_weights_can_be_offloaded(tmp_path: Path) -> None:
    source, expected = quantised("block FP8", tmp_path)
    offloaded = load(
        ModelSource(
            "offloaded",
            source.location,
            device="auto",
            limits=room_for(DENSE, 0.5),
            offload_dir=tmp_path / "disk",
        )
    )
    assert offloaded.provenance.device == "cpu, disk"
    prompt = torch.tensor([DENSE.prompt])
    torch.testing.assert_close(
        offloaded.network(prompt).logits, load(expected).network(prompt).logits, rtol=0, atol=0
    )


EXCESS = torch.ones(10**6)
BROKEN: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor | None], str]] = {
    "scales of other blocks": (
        "block FP8", {}, {"q_proj.weight_scale_inv": torch.ones(3, 2)}, "with scales [3, 2]"
    ),
    "too many scales": (
        "block FP8", {}, {"q_proj.weight_scale_inv": EXCESS}, "with scales [1000000]"
    ),
    "no scales": ("block FP8", {}, {"q_proj.weight_scale_inv": None}, "or scales beside it"),
    "scales of integers": (
        "block FP8", {}, {"q_proj.weight_scale_inv": torch.ones(2, 2, dtype=torch.int64)},
        "is stored as I64: expected floating point",
    ),
    "blocks of zero": (
        "block FP8", {"weight_block_size": [0, 128]}, {}, "invalid weight_block_size [0, 128]"
    ),
    "blocks of text": (
        "block FP8", {"weight_block_size": "128"}, {}, "invalid weight_block_size '128'"
    ),
    "huge blocks": (
        "block FP8", {"weight_block_size": [2**31 - 1] * 2}, {}, "expected float8 in blocks of"
    ),
    "blocks beyond numbers": (
        "block FP8", {"weight_block_size": [10**4000, 1]}, {}, "invalid weight_block_size"
    ),
    "no matrix of codes": (
        "block FP8", {}, {"q_proj.weight": torch.ones(0, 32).to(torch.float8_e4m3fn)},
        "has shape [0, 32]: expected a matrix",
    ),
    "scales that are NaN": (
        "block FP8", {}, {"q_proj.weight_scale_inv": torch.full((2, 2), torch.nan)},
        "infinite or NaN in model.layers.0.self_attn.q_proj.weight",
    ),
    "MXFP4 exponents that are NaN": (
        "MXFP4", {}, {"gate_up_proj_scales": torch.full((4, 128, 1), 255, dtype=torch.uint8)},
        "infinite or NaN in model.layers.0.mlp.experts.gate_up_proj",
    ),
    "a list for the method": (
        "block FP8", {"quant_method": ["fp8"]}, {}, "is quantised by ['fp8']: expected"
    ),
    "a list for the format": ("4-bit groups", {"format": [1]}, {}, "stores weights as '[1]'"),
    "a list for the strategy": (
        "4-bit groups", compressed("pack-quantized", **INT4 | {"strategy": [1]}), {},
        "scales weights by '[1]'",
    ),
    "a list for the bits": (
        "4-bit groups", compressed("pack-quantized", **INT4 | {"num_bits": [4]}), {},
        "weights of [4] bits",
    ),
    "a negative group size": (
        "4-bit groups", compressed("pack-quantized", **INT4 | {"group_size": -7}), {},
        "invalid group_size [1, -7]",
    ),
    "sparsity of a text": ("4-bit groups", {"sparsity_config": "x"}, {}, "or sparse ones"),
    "a vector of codes": (
        "block FP8", {}, {"q_proj.weight": torch.ones(48).to(torch.float8_e4m3fn)},
        "has shape [48]: expected a matrix",
    ),
    "short MXFP4 scales": (
        "MXFP4", {}, {"gate_up_proj_scales": torch.ones(4, 128, 2, dtype=torch.uint8)},
        "has shape [4, 128, 2]: expected [4, 128, 1]",
    ),
    "MXFP4 without scales": ("MXFP4", {}, {"gate_up_proj_scales": None}, "which MXFP4 needs"),
    "MXFP4 blocks of another size": (
        "MXFP4", {}, {"gate_up_proj_blocks": torch.ones(4, 128, 1, 8, dtype=torch.uint8)},
        "expected U8 [experts, rows, blocks, 16] for MXFP4",
    ),
    "a shape of terabytes": (
        "4-bit groups", {}, {"q_proj.weight_shape": torch.tensor([48, 10**12])},
        "describes [48, 1000000000000]",
    ),
    "a negative shape": (
        "4-bit groups", {}, {"q_proj.weight_shape": torch.tensor([-48, 32])}, "describes [-48, 32]"
    ),
    "columns of no group": (
        "4-bit groups of any columns", {},
        {"q_proj.weight_g_idx": torch.full((32,), 7, dtype=torch.int32)},
        "names groups beyond the 2",
    ),
    "no zero points": (
        "4-bit groups with zero points", {}, {"q_proj.weight_zero_point": None},
        "which asymmetric codes need",
    ),
    "an unknown format": (
        "4-bit groups", {"format": "marlin-24"}, {}, "stores weights as 'marlin-24'"
    ),
    "odd bits": (
        "4-bit groups", compressed("pack-quantized", **INT4 | {"num_bits": 3}), {},
        "weights of 3 bits",
    ),
    "no groups": ("4-bit groups", {"config_groups": {}}, {}, "describes no quantised weights"),
    "thousands of groups": (
        "4-bit groups",
        {"config_groups": {str(i): {"weights": INT4 | {"group_size": i + 1}} for i in range(9000)}},
        {}, "describes 9000 groups: expected at most 100",
    ),
    "sparse weights": (
        "4-bit groups", {"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "or sparse ones"
    ),
    "GPTQ of 3 bits": ("GPTQ", {"bits": 3}, {}, "weights of 3 bits: expected 2, 4 or 8; convert"),
    "GPTQ of a list of bits": ("GPTQ", {"bits": [4]}, {}, "weights of [4] bits"),
    "GPTQ of Marlin": ("GPTQ", {"checkpoint_format": "marlin"}, {}, "stores weights as 'marlin'"),
    "GPTQ of other bits": (
        "GPTQ", {"bits": 8}, {}, "qzeros' has shape [3, 4]: expected [2, 8] for GPTQ"
    ),
    "GPTQ with scales of other groups": (
        "GPTQ", {}, {"q_proj.scales": torch.ones(3, 48)}, "has shape [3, 48]: expected [2, 48]"
    ),
    "GPTQ without zero points": ("GPTQ", {}, {"q_proj.qzeros": None}, "which GPTQ (int4 in groups"),
    "GPTQ codes of floats": (
        "GPTQ", {}, {"q_proj.qweight": torch.ones(4, 48)}, "is stored as F32 [4, 48]: expected a"
    ),
    "GPTQ columns of no group": (
        "GPTQ, groups of any columns", {},
        {"q_proj.g_idx": torch.full((32,), -1, dtype=torch.int32)}, "names groups beyond the 2",
    ),
    "GPTQ groups of zero": ("GPTQ", {"group_size": 0}, {}, "invalid group_size [1, 0]"),
    "bitsandbytes of another kind": (
        "bitsandbytes NF4", {"bnb_4bit_quant_type": "af4"}, {}, "stores weights as 'af4': expected"
    ),
    "bitsandbytes without scales": (
        "bitsandbytes NF4", {}, {"q_proj.weight.absmax": None}, "q_proj.weight.absmax', which bits"
    ),
    "bitsandbytes with a short table": (
        "bitsandbytes NF4", {}, {"q_proj.weight.quant_map": torch.ones(8)}, "[8]: expected [16]"
    ),
    "bitsandbytes with a state that is no JSON": (
        "bitsandbytes NF4", {}, {"q_proj.weight.quant_state.bitsandbytes__nf4": text_tensor("{")},
        "bitsandbytes__nf4' is not JSON",
    ),
    "bitsandbytes with a state of a list": (
        "bitsandbytes NF4", {}, {"q_proj.weight.quant_state.bitsandbytes__nf4": text_tensor("[]")},
        "describes no shape",
    ),
    "bitsandbytes of terabytes": (
        "bitsandbytes NF4", {},
        {
            "q_proj.weight.quant_state.bitsandbytes__nf4": text_tensor(
                '{"shape": [1000000, 1000000], "blocksize": 64}'
            )
        },
        "has shape [768, 1]: expected [500000000000, 1]",
    ),
    "bitsandbytes with blocks of zero": (
        "bitsandbytes NF4", {},
        {
            "q_proj.weight.quant_state.bitsandbytes__nf4": text_tensor(
                '{"shape": [48, 32], "blocksize": 0}'
            )
        },
        "has blocksize 0: expected 1 to 65536",
    ),
    "bitsandbytes integers of other rows": (
        "bitsandbytes int8", {}, {"q_proj.SCB": torch.ones(7)}, "has shape [48, 32]: expected [7,"
    ),
    "bitsandbytes integers in tiles": (
        "bitsandbytes int8", {},
        {"q_proj.weight_format": torch.tensor(2, dtype=torch.uint8)}, "expected codes in rows",
    ),
    "AWQ of another version": ("AWQ, experts", {"version": "gemv"}, {}, "in version 'gemv'"),
    "AWQ of 8 bits": ("AWQ, experts", {"bits": 8}, {}, "stores weights of 8 bits"),
    "codes that are not there": (
        "block FP8", {"quant_method": "mxfp4"}, {}, "describes MXFP4, but no tensor has this scheme"
    ),
}  # fmt: skip


def test_codes_of_no_blocks_allocate_nothing(tmp_path: Path) -> None:
    """A header may give tensors without values any number of rows."""
    source, _ = quantised("MXFP4", tmp_path)
    path = Path(source.location) / WEIGHTS
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name.endswith("gate_up_proj_blocks"))
    scales = name.replace("_blocks", "_scales")
    for tensor, shape in ((name, [10**9, 10**6, 0, 16]), (scales, [10**9, 10**6, 0])):
        header[tensor.replace(".0.", ".9.")] = header[tensor] | {
            "shape": shape, "data_offsets": [len(content) - 8 - size] * 2
        }  # fmt: skip
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    assert "[1000000000, 1000000, 0, 16]: expected U8" in refusal(source)


def test_a_weight_that_is_quantised_and_not_is_refused(tmp_path: Path) -> None:
    source, _ = quantised("4-bit groups", tmp_path)
    path = Path(source.location) / WEIGHTS
    plain = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(48, 32)}
    save_file(load_file(path) | plain, path, {"format": "pt"})
    assert "q_proj.weight twice, quantised and not" in refusal(source)


def test_expressions_in_a_list_of_ignored_modules_are_not_evaluated(tmp_path: Path) -> None:
    source, _ = quantised("4-bit groups", tmp_path)
    slow = {"ignore": ["re:(a+)+$", "re:(.*)*b" * 1000], "targets": ["re:(a|a)*$"]}
    describe(source, quantization_config=SCHEMES["4-bit groups"][2] | slow)
    assert load(source).provenance.quantization.startswith("compressed-tensors")


@pytest.mark.parametrize("broken", BROKEN)
def test_what_does_not_fit_its_scheme_is_refused(broken: str, tmp_path: Path) -> None:
    scheme, described, tensors, reason = BROKEN[broken]
    source, _ = quantised(scheme, tmp_path)
    describe(source, quantization_config=SCHEMES[scheme][2] | described)
    change(source, **tensors)
    assert reason in refusal(source)


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("aqlm", "serve the checkpoint that it was made from"),
        ("higgs", ".dequantize().save_pretrained("),
        (None, "an unnamed method"),
    ],
)
def test_other_schemes_are_refused_with_the_command_that_converts_them(
    method: str | None, advice: str, tmp_path: Path
) -> None:
    source = saved(DENSE, tmp_path / "model")
    describe(source, quantization_config={"quant_method": method, "bits": 4})
    (tmp_path / "model" / WEIGHTS).write_bytes(b"never read")
    reason = refusal(source)
    assert f"quantised by {method or 'an unnamed method'}" in reason
    assert advice in reason


READ = {"awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "mxfp4", "mxfp8"}


@pytest.mark.parametrize("method", sorted(AUTO_QUANTIZATION_CONFIG_MAPPING.keys() - READ))
def test_every_other_scheme_of_transformers_is_refused_by_name(method: str) -> None:
    with pytest.raises(ModelFailed) as refused:
        read_scheme({"quantization_config": {"quant_method": method, "bits": 4}})
    assert f"is quantised by {method}: expected awq, bitsandbytes, comp" in str(refused.value)
    assert "serve the checkpoint that it was made from" in str(refused.value)


def test_schemes_of_other_parts_are_refused(tmp_path: Path) -> None:
    source = saved(DENSE, tmp_path / "model")
    describe(source, vision_config={"quantization_config": {"quant_method": "fp8"}})
    assert "quantised weights of a part of the model" in refusal(source)
