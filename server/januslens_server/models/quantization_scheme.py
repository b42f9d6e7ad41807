"""Read from config.json how a checkpoint stores its quantised weights.

A scheme that is not read is refused with the command that converts it, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from januslens_server.errors import ModelFailed
from januslens_server.models.vetting import QUANTIZATION_KEYS

# Rows and columns of a block where config.json does not say them.
DEFAULT_BLOCKS = {"fp8": [128, 128], "mxfp8": [1, 32]}

# Groups of weights with a scheme of their own; every weight is compared with each.
MAX_GROUPS = 100
# Rows or columns of a block. A block is as large as a matrix at most.
MAX_BLOCK = 2**31 - 1

# Widths of integers that divide 32 bits without a remainder.
PACKED_BITS = {2, 4, 8}
FORMATS = {
    "float-quantized",
    "int-quantized",
    "mixed-precision",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "pack-quantized",
}
# What is added to stored zero points, by the format's name.
GPTQ_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
AWQ_BITS = 4
# How to convert what is not read: transformers dequantises one scheme on a GPU, llama.cpp another.
DEQUANTISE = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('FOLDER').dequantize().save_pretrained('NEW_FOLDER')\""
)
CONVERSIONS = {
    "gptq": "convert_hf_to_gguf.py FOLDER --outtype f32 --outfile FILE.gguf (from llama.cpp)",
    "higgs": DEQUANTISE,
}


@dataclass(frozen=True)
class Group:
    """How a scheme stores some of the weights.

    `kind` is `int` or `float`, `block` the rows and columns that share a scale. None stands for all
    rows or columns.
    """

    kind: str
    bits: int
    block: tuple[int | None, int | None]
    symmetric: bool = True

    def block_of(self, rows: int, columns: int) -> tuple[int, int]:
        """The rows and columns of a block in a matrix `[rows, columns]`."""
        height, width = self.block
        return min(height or rows, rows), min(width or columns, columns)

    def __str__(self) -> str:
        sizes = "x".join("all" if size is None else str(size) for size in self.block)
        return f"{self.kind}{self.bits} in blocks of {sizes}"


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint stores its weights.

    `name` is the scheme's name for people, and `scale` the suffix of a scale's name behind that of
    its weight. `zero_offset` is added to the stored zero points.
    """

    method: str
    name: str
    groups: tuple[Group, ...] = ()
    scale: str = ""
    zero_offset: int = 0


def read_scheme(described: Mapping[str, Any]) -> Scheme | None:
    """Return the scheme that a config.json describes, or None.

    Raises:
        ModelFailed: The scheme is not read. The error names a command that converts it, if any.
    """
    text = described.get("text_config")
    for holder in (described, text if isinstance(text, Mapping) else {}):
        for key in QUANTIZATION_KEYS:
            if found := holder.get(key):
                return _scheme(found)
    return None


def _scheme(found: Any) -> Scheme:
    method = _named(found, "quant_method") if isinstance(found, Mapping) else None
    if method == "mxfp4":
        return Scheme(method, "MXFP4")
    if method in DEFAULT_BLOCKS:
        block = found.get("weight_block_size", DEFAULT_BLOCKS[method])
        sizes = (None, None) if block is None else _sizes(block, "weight_block_size")
        name = "FP8" if block is None else f"FP8 in blocks of {sizes[0]}x{sizes[1]}"
        return Scheme(method, name, (Group("float", 8, sizes),), "_scale_inv")
    if method == "fbgemm_fp8":
        return Scheme(method, "FBGEMM FP8", (Group("float", 8, (1, None)),), "_scale")
    if method is not None and method in READERS:
        return READERS[method](found)
    command = CONVERSIONS.get(method or "")
    raise ModelFailed(
        f"the checkpoint is quantised by {method or 'an unnamed method'}: expected "
        "awq, bitsandbytes, compressed-tensors, fbgemm_fp8, fp8, gptq, mxfp4, mxfp8, or weights in "
        "float32, bfloat16 or float16; serve the checkpoint that it was made from"
        + (f", or convert it: {command}" if command else "")
    )


def _named(described: Mapping[str, Any], key: str) -> str | None:
    """Return what a key names, None if it is missing. Only texts can be known names."""
    found = described.get(key)
    return found if found is None or isinstance(found, str) else repr(found)


def _sizes(found: Any, key: str) -> tuple[int, int]:
    sizes = tuple(found) if isinstance(found, list) else ()
    if len(sizes) != 2 or not all(type(s) is int and 0 < s <= MAX_BLOCK for s in sizes):
        raise ModelFailed(f"invalid {key} {found!r}: expected two numbers from 1 to {MAX_BLOCK}")
    return sizes[0], sizes[1]


def _compressed(found: Mapping[str, Any]) -> Scheme:
    """Read the groups of a compressed-tensors configuration (vllm-project/compressed-tensors)."""
    listed = found.get("config_groups")
    described = list(listed.values()) if isinstance(listed, Mapping) else []
    if len(described) > MAX_GROUPS:
        raise ModelFailed(
            f"compressed-tensors describes {len(described)} groups: expected at most {MAX_GROUPS}"
        )
    groups, formats = [], set()
    for group in described:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        form = _named(group, "format") or _named(found, "format")
        if form not in FORMATS:
            raise ModelFailed(
                f"compressed-tensors stores weights as {form!r}: expected one of "
                f"{', '.join(sorted(FORMATS))}; serve the checkpoint that it was made from"
            )
        formats.add(form)
        groups.append(_group(weights))
    sparsity = found.get("sparsity_config") or {"format": "dense"}
    dense = isinstance(sparsity, Mapping) and sparsity.get("format", "dense") == "dense"
    if not groups or not dense:
        raise ModelFailed(
            "compressed-tensors describes no quantised weights, or sparse ones: expected groups "
            "with weights; serve the checkpoint that it was made from"
        )
    kinds = dict.fromkeys(f"{group.kind}{group.bits}" for group in groups)
    name = f"compressed-tensors {', '.join(sorted(formats))} ({', '.join(kinds)})"
    return Scheme("compressed-tensors", name, tuple(dict.fromkeys(groups)), "_scale")


def _group(weights: Mapping[str, Any]) -> Group:
    kind, strategy = _named(weights, "type"), _named(weights, "strategy")
    bits, size = weights.get("num_bits"), weights.get("group_size")
    strategy = strategy or ("tensor" if size is None else "channel" if size == -1 else "group")
    readable = PACKED_BITS if kind == "int" else {4, 8}
    if kind not in {"int", "float"} or type(bits) is not int or bits not in readable:
        raise ModelFailed(
            f"compressed-tensors stores weights of {bits} bits and type {kind!r}: expected "
            "integers of 2, 4 or 8 bits, or floats of 4 or 8"
        )
    if strategy in {"group", "tensor_group"}:
        block: tuple[int | None, int | None] = _sizes([1, size], "group_size")
    elif strategy == "block":
        block = _sizes(weights.get("block_structure"), "block_structure")
    elif strategy in {"tensor", "channel"}:
        block = (1 if strategy == "channel" else None, None)
    else:
        raise ModelFailed(
            f"compressed-tensors scales weights by {strategy!r}: expected tensor, channel, group, "
            "tensor_group or block"
        )
    return Group(kind, bits, block, weights.get("symmetric", True) is not False)


def _gptq(found: Mapping[str, Any]) -> Scheme:
    """Read what AutoGPTQ and GPTQModel write.

    Their first format stores zero points less one, so that 0 is stored as the largest code.
    """
    form = _named(found, "checkpoint_format") or _named(found, "format") or "gptq"
    if form not in GPTQ_ZERO_OFFSETS or found.get("is_marlin_format"):
        raise ModelFailed(
            f"GPTQ stores weights as {'marlin' if found.get('is_marlin_format') else form!r}: "
            "expected gptq or gptq_v2; serve the checkpoint that it was made from"
        )
    bits = found.get("bits")
    if type(bits) is not int or bits not in PACKED_BITS:
        raise ModelFailed(
            f"GPTQ stores weights of {bits!r} bits: expected 2, 4 or 8; convert them: "
            f"{CONVERSIONS['gptq']}"
        )
    return _integer_columns("gptq", "GPTQ", found, bits, GPTQ_ZERO_OFFSETS[form])


def _awq(found: Mapping[str, Any]) -> Scheme:
    """Read what AutoAWQ writes in its version GEMM, which is nearly always published."""
    form = _named(found, "version") or _named(found, "format") or "gemm"
    bits = found.get("bits", 4)
    if form.lower() != "gemm" or type(bits) is not int or bits != AWQ_BITS:
        raise ModelFailed(
            f"AWQ stores weights of {bits!r} bits in version {form!r}: expected {AWQ_BITS} bits in "
            "version 'gemm'; serve the checkpoint that it was made from"
        )
    return _integer_columns("awq", "AWQ", found, bits, 0)


def _bitsandbytes(found: Mapping[str, Any]) -> Scheme:
    """Read what bitsandbytes writes through transformers: 4 bits into a table, or LLM.int8()."""
    if found.get("load_in_8bit") is True:
        return Scheme("bitsandbytes", "bitsandbytes int8")
    kind = _named(found, "bnb_4bit_quant_type") or "fp4"
    if found.get("load_in_4bit") is not True or kind not in {"fp4", "nf4"}:
        raise ModelFailed(
            f"bitsandbytes stores weights as {kind!r}: expected load_in_8bit, or load_in_4bit with "
            "fp4 or nf4; serve the checkpoint that it was made from"
        )
    nested = ", nested" if found.get("bnb_4bit_use_double_quant") is True else ""
    return Scheme("bitsandbytes", f"bitsandbytes {kind.upper()}{nested}")


def _integer_columns(
    method: str, name: str, found: Mapping[str, Any], bits: int, zero_offset: int
) -> Scheme:
    size = found.get("group_size", 128)
    columns = None if size == -1 else _sizes([1, size], "group_size")[1]
    groups = (Group("int", bits, (1, columns), symmetric=False),)
    shown = f"{name} (int{bits} in groups of {columns or 'all columns'})"
    return Scheme(method, shown, groups, zero_offset=zero_offset)


READERS: Mapping[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
}
