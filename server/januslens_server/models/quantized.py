"""Read quantised safetensors as the weights that they stand for.

Published checkpoints store codes of few bits with scales. A weight is `(code - zero) * scale`,
computed in float32 and rounded once to the data type that is served. These schemes are read:

- MXFP4, as gpt-oss is published: 4-bit floats in blocks of 32 that share a power of two
  (OCP Microscaling Formats (MX) 1.0, sections 5.3.3 and 5.4.1);
- block FP8, as DeepSeek-V3 and Qwen3 are published: 8-bit floats with a scale for each block of
  rows and columns (DeepSeek-V3 Technical Report, section 3.3.2), and FBGEMM's with one per row;
- compressed-tensors, as llm-compressor writes it: floats of 8 bits, of 4 bits (NVFP4), integers;
- GPTQ, as AutoGPTQ and GPTQModel write it: integers with a group for each column (Frantar et al.
  2022), and AWQ, as AutoAWQ writes it (Lin et al. 2023, section 4);
- bitsandbytes: codes of 4 bits into a table, with a scale for each block of values (NF4 and FP4,
  Dettmers et al. 2023, section 3), and integers of 8 bits with a scale for each row (LLM.int8()).

transformers could dequantise them, but derives the size of blocks from the number of scales. This
is wrong if blocks do not divide a matrix, as in DeepSeek's keys. It also accepts codes without
scales. Here every shape is compared with the scheme before memory is allocated, and what does not
fit is refused. Scales of activations are ignored, because activations are not quantised here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import safe_open

from januslens_server.errors import ModelFailed, shortlist
from januslens_server.models.quantization_scheme import Group, Scheme

FLOATS = {"F64", "F32", "F16", "BF16"}
SCALES = FLOATS | {"F8_E8M0", "F8_E4M3", "U8"}
FP8, INT8, INT32, BYTES = "F8_E4M3", "I8", "I32", "U8"

# The values of a 4-bit float's lower three bits; the upper bit is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX_BLOCK = 32

# Values of a weight that are dequantised at once, each of which takes some 16 bytes meanwhile.
VALUES_AT_ONCE = 2**22

# The places of eight columns in 32 bits of AWQ: even columns first.
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)

# How bitsandbytes stores a weight of 4 bits: the end of the name, and the most bytes in JSON.
QUANT_STATE, MAX_STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$"), 4096
# Values with one scale. bitsandbytes has 32 to 4096 in a weight, and 256 among the scales.
MAX_BLOCK = 2**16
# The step of LLM.int8()'s scales, as bitsandbytes has it: a float32 near 1 / 127.
INT8_STEP = 7.874015718698502e-3

# Scales that quantise activations, and cached keys and values.
OF_ACTIVATIONS = re.compile(
    r"\.(activation_scale(_ub)?|(input|output|[qkv])_(scale(_ub)?|zero_point|global_scale))$"
)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in the header of a safetensors file, with its type such as `BF16`."""

    file: str
    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class DenseWeight:
    """A weight that is dequantised when it is read.

    `read` returns its values in float32, or as they are stored if they are not quantised.
    `data_type` is the type to which dequantised values are rounded.
    """

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    quantised: bool = True
    data_type: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def __getitem__(self, _whole: EllipsisType) -> torch.Tensor:
        """The values. transformers reads every tensor of a checkpoint as `tensor[...]`."""
        values = self.read()
        return values.to(self.data_type) if self.quantised else values


def dense_weights(
    folder: Path, entries: Mapping[str, TensorEntry], scheme: Scheme | None
) -> dict[str, DenseWeight]:
    """Return the weights that quantised tensors stand for, under the names that they would have.

    Only headers and tensors of a few values are read.

    Args:
        folder: The model folder.
        entries: Every tensor in its weights files.
        scheme: How they are stored; None for weights that are not quantised.

    Raises:
        ModelFailed: Codes lack their scales, or have others than the scheme describes.
    """
    files = _Files(folder, entries)
    weights: dict[str, DenseWeight] = {}
    kept = dict(entries)
    if scheme is not None:
        weights, used = FINDERS.get(scheme.method, _scaled)(files, scheme)
        if not used:
            raise ModelFailed(f"config.json describes {scheme.name}, but no tensor has this scheme")
        dropped = {name for name in entries if OF_ACTIVATIONS.search(name)}
        kept = {name: entries[name] for name in entries.keys() - used - dropped}
    if twice := sorted(weights.keys() & kept.keys()):
        raise ModelFailed(
            f"the checkpoint has {shortlist(twice)} twice, quantised and not: expected one of them"
        )
    check_float(kept, or_else="" if scheme is None else ", or scales beside it")
    for name, entry in kept.items():
        weights[name] = DenseWeight(entry.shape, files.reader(name), quantised=False)
    return weights


def check_float(entries: Mapping[str, TensorEntry], or_else: str = "") -> None:
    """Refuse weights that are not stored in floating point."""
    for name, entry in entries.items():
        if name.endswith(("weight", "_proj")) and entry.kind not in FLOATS:
            expected = ", ".join(sorted(FLOATS)) + or_else
            raise ModelFailed(f"tensor {name!r} is stored as {entry.kind}: expected {expected}")


class _Files:
    """The open weights files of a folder."""

    def __init__(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.entries = entries
        names = {entry.file for entry in entries.values()}
        self._open: dict[str, Any] = {
            name: safe_open(folder / name, framework="pt") for name in names
        }

    def reader(self, name: str) -> Callable[[], torch.Tensor]:
        return lambda: self.read(name)

    def read(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._open[self.entries[name].file].get_tensor(name)
        return found

    def expect(self, name: str, kinds: Iterable[str], shape: tuple[int, ...], why: str) -> None:
        """Refuse a tensor of another type or shape."""
        entry, kinds = self.entries.get(name), sorted(kinds)
        if entry is None:
            raise ModelFailed(f"the checkpoint has no tensor {name!r}, which {why} needs")
        if entry.kind not in kinds:
            raise ModelFailed(
                f"tensor {name!r} is stored as {entry.kind}: expected {' or '.join(kinds)} "
                f"for {why}"
            )
        if entry.shape != shape:
            raise ModelFailed(
                f"tensor {name!r} has shape {list(entry.shape)}: expected {list(shape)} for {why}"
            )


def _microscaled(files: _Files, scheme: Scheme) -> tuple[dict[str, DenseWeight], set[str]]:
    """Find the MXFP4 experts: `[experts, rows, blocks, 16]` bytes with a scale for each block.

    The model multiplies by the transpose, `[experts, columns, rows]`.
    """
    weights, used = {}, set()
    for codes, entry in files.entries.items():
        name = codes.removesuffix("_blocks")
        if name == codes:
            continue
        scales = f"{name}_scales"
        blocks_of = len(entry.shape) == 4 and entry.shape[-1] == MX_BLOCK // 2
        if not blocks_of or not entry.size or entry.kind != BYTES:
            raise ModelFailed(
                f"tensor {codes!r} is stored as {entry.kind} {list(entry.shape)}: expected "
                f"{BYTES} [experts, rows, blocks, {MX_BLOCK // 2}] for {scheme.name}"
            )
        files.expect(scales, {BYTES}, entry.shape[:-1], scheme.name)
        experts, rows, blocks, _ = entry.shape
        shape = (experts, blocks * MX_BLOCK, rows)
        weights[name] = DenseWeight(shape, _microscaled_reader(files, codes, scales, shape))
        used |= {codes, scales}
    return weights, used


def _microscaled_reader(
    files: _Files, codes: str, scales: str, shape: tuple[int, ...]
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        values = torch.empty(shape)
        factors = _to_float(files.read(scales))
        for expert, packed in enumerate(files.read(codes)):
            rows = _unpacked_floats(packed) * factors[expert, ..., None]
            values[expert] = rows.flatten(1).T
        return values

    return read


def _scaled(files: _Files, scheme: Scheme) -> tuple[dict[str, DenseWeight], set[str]]:
    """Find the weights with scales beside them."""
    weights, used = {}, set()
    for scales in files.entries:
        name = scales.removesuffix(scheme.scale)
        if name == scales or OF_ACTIVATIONS.search(scales):
            continue
        if files.entries.keys().isdisjoint({name, f"{name}_packed"}):  # not the scales of a weight
            continue
        codes = _Codes(files, scheme, name)
        weights[name] = DenseWeight(codes.shape, codes.read)
        used |= codes.names
    return weights, used


class _Codes:
    """The codes, scales and zero points of one weight, with checked shapes."""

    def __init__(self, files: _Files, scheme: Scheme, name: str) -> None:
        self._files, self._scheme = files, scheme
        packed = f"{name}_packed"
        self._codes = packed if packed in files.entries else name
        self._scales = name + scheme.scale
        stored = files.entries[self._codes]
        if len(stored.shape) not in {2, 3} or not stored.size:
            raise ModelFailed(
                f"tensor {self._codes!r} has shape {list(stored.shape)}: expected a matrix, or one "
                "for each expert"
            )
        self._stored = stored
        self.names = {self._codes, self._scales}
        self.shape = self._dense_shape(f"{name}_shape")
        self._group = self._matching_group()
        self._zeros = self._checked_zeros(f"{name}_zero_point")
        self._order = self._checked_order(f"{name}_g_idx")
        self._global = self._checked_global(f"{name}_global_scale")

    def _dense_shape(self, shape_name: str) -> tuple[int, ...]:
        """Return the weight's shape: that of 8-bit codes, or what packed codes have room for."""
        if self._stored.kind in {FP8, INT8}:
            return self._stored.shape
        *rows, width = self._stored.shape
        if self._stored.kind == BYTES:  # two 4-bit floats in a byte
            return (*rows, 2 * width)
        self._files.expect(self._codes, {INT32}, self._stored.shape, self._scheme.name)
        self._files.expect(
            shape_name, {"I64", INT32}, (len(self._stored.shape),), self._scheme.name
        )
        self.names.add(shape_name)
        shape = tuple(self._files.read(shape_name).tolist())
        if shape[:-1] != tuple(rows) or not 0 < shape[-1] <= 32 * width:
            raise ModelFailed(
                f"tensor {shape_name!r} describes {list(shape)}: tensor {self._codes!r} has shape "
                f"{list(self._stored.shape)}"
            )
        return shape

    def _matching_group(self) -> Group:
        """Choose the group of the scheme that gives these shapes.

        Names of modules could choose it too, but they are those of the model before transformers
        renamed its modules.
        """
        rows, columns = self.shape[-2:]
        scales = self._files.entries[self._scales]
        if scales.kind not in SCALES:
            raise ModelFailed(
                f"tensor {self._scales!r} is stored as {scales.kind}: expected floating point"
            )
        found = {}
        for group in self._scheme.groups:
            height, width = block = group.block_of(rows, columns)
            expected = (*self.shape[:-2], -(-rows // height), -(-columns // width))
            alone = scales.size == 1 == math.prod(expected)
            in_rows = scales.shape == expected[:-1] and expected[-1] == 1
            if self._holds(group) and (scales.shape == expected or alone or in_rows):
                found[(group.kind, group.bits, block, group.symmetric)] = group
        if len(found) != 1:
            raise ModelFailed(
                f"tensor {self._codes!r} is stored as {self._stored.kind} "
                f"{list(self._stored.shape)} with scales {list(scales.shape)}: expected "
                f"{'those of one of' if len(self._scheme.groups) > 1 else ''} "
                f"{shortlist([str(group) for group in self._scheme.groups])}".replace("  ", " ")
            )
        return found.popitem()[1]

    def _holds(self, group: Group) -> bool:
        """Whether codes of the group have the stored type and width."""
        kind, width = self._stored.kind, self._stored.shape[-1]
        if group.kind == "float":
            return kind == (FP8 if group.bits == 8 else BYTES)
        if kind == INT8:
            return True
        return kind == INT32 and width == -(-self.shape[-1] // (32 // group.bits))

    def _checked_zeros(self, name: str) -> str | None:
        if name not in self._files.entries:
            if not self._group.symmetric:
                raise ModelFailed(
                    f"the checkpoint has no tensor {name!r}, which asymmetric codes need"
                )
            return None
        expected = self._files.entries[self._scales].shape
        if self._files.entries[name].kind == INT32 and len(expected) > 1:  # packed along the rows
            *lead, rows, groups = expected
            expected = (*lead, -(-rows // (32 // self._group.bits)), groups)
        kinds = {INT8, INT32, FP8, *FLOATS}
        self._files.expect(name, kinds, expected, self._scheme.name)
        self.names.add(name)
        return name

    def _checked_order(self, name: str) -> torch.Tensor | None:
        """Return the group of each column, if groups are not neighbouring columns."""
        if name not in self._files.entries:
            return None
        self._files.expect(name, {"I64", INT32}, self.shape[-1:], self._scheme.name)
        self.names.add(name)
        order = self._files.read(name).long()
        if bool((order == -1).all()):  # written where columns have their order
            return None
        *rows, groups = self._files.entries[self._scales].shape
        if tuple(rows) != self.shape[:-1]:
            raise ModelFailed(f"tensor {name!r} orders columns, but scales are not those of groups")
        if int(order.min()) < 0 or int(order.max()) >= groups:
            raise ModelFailed(f"tensor {name!r} names groups beyond the {groups} of the weight")
        return order

    def _checked_global(self, name: str) -> str | None:
        if name not in self._files.entries:
            return None
        shape = self._files.entries[name].shape
        self._files.expect(name, FLOATS, (1,) if shape else (), self._scheme.name)
        self.names.add(name)
        return name

    def read(self) -> torch.Tensor:
        """Dequantise the weight to float32, some rows at a time."""
        codes = self._files.read(self._codes)
        scales = _to_float(self._files.read(self._scales))
        if self._global is not None:
            scales = scales / self._files.read(self._global).float()
        zeros = None if self._zeros is None else self._zero_points(scales.shape[-2:])
        values, rows = torch.empty(self.shape), self.shape[-2]
        height, _ = self._group.block_of(*self.shape[-2:])
        in_blocks = math.prod(self.shape) // rows * height
        step = max(1, VALUES_AT_ONCE // in_blocks) * height
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            found = self._decoded(codes[..., part, :])
            if zeros is not None:
                found = found - self._spread(zeros, part)
            values[..., part, :] = found * self._spread(scales, part)
        return values

    def _decoded(self, codes: torch.Tensor) -> torch.Tensor:
        """The numbers that codes stand for, without their scales."""
        if codes.dtype is torch.uint8:
            return _unpacked_floats(codes)
        if codes.dtype is torch.int32:
            return self._integers(codes, -1, self.shape[-1])
        return codes.float()

    def _zero_points(self, shape: torch.Size) -> torch.Tensor:
        zeros = self._files.read(str(self._zeros))
        return self._integers(zeros, -2, shape[0]) if zeros.dtype is torch.int32 else zeros.float()

    def _integers(self, packed: torch.Tensor, dim: int, size: int) -> torch.Tensor:
        """Unpack integers whose zero is stored as half of their range."""
        bits = self._group.bits
        codes = _unpacked_integers(packed, range(0, 32, bits), bits, dim).narrow(dim, 0, size)
        return codes.float() - (1 << (bits - 1))

    def _spread(self, scales: torch.Tensor, part: slice) -> torch.Tensor:
        """Repeat `scales` for every weight that shares them, in the rows of `part`.

        `part` begins at a block's first row.
        """
        rows, columns = self.shape[-2:]
        height, width = self._group.block_of(rows, columns)
        if scales.numel() == 1:
            return scales.reshape(())
        if scales.shape == self.shape[:-1]:  # one for each row
            return scales[..., part, None]
        own = scales[..., part.start // height : -(-part.stop // height), :]
        if self._order is not None:
            return own[..., self._order]
        wide = own.repeat_interleave(width, -1)[..., :columns]
        return wide.repeat_interleave(height, -2)[..., : part.stop - part.start, :]


class _Columns:
    """A weight of GPTQ or AWQ: a matrix `[d_in, d_out]` of integers, the transpose of the weight.

    `qweight` has the codes. GPTQ packs neighbouring rows of a column into 32 bits, AWQ the columns
    of a row. `qzeros` and `scales` have a row for each group of rows; `qzeros` is packed along its
    rows. `g_idx` is the group of each row, where groups are not of neighbouring rows.
    """

    def __init__(self, files: _Files, scheme: Scheme, module: str) -> None:
        self._files, self._scheme = files, scheme
        self._bits = scheme.groups[0].bits
        self._codes, self._zeros, self._scales = (
            f"{module}.{part}" for part in ("qweight", "qzeros", "scales")
        )
        self.names = {self._codes, self._zeros, self._scales}
        stored = files.entries[self._codes]
        if stored.kind != INT32 or len(stored.shape) != 2 or not stored.size:
            raise ModelFailed(
                f"tensor {self._codes!r} is stored as {stored.kind} {list(stored.shape)}: expected "
                f"a matrix of {INT32} for {scheme.name}"
            )
        per, (rows, columns) = 32 // self._bits, stored.shape
        d_in, d_out = (rows * per, columns) if scheme.method == "gptq" else (rows, columns * per)
        self.shape = (d_out, d_in)
        self._size = scheme.groups[0].block_of(d_out, d_in)[1]
        self._n_groups = -(-d_in // self._size)
        if d_out % per:
            raise ModelFailed(
                f"tensor {self._codes!r} has {d_out} columns: expected a multiple of {per}"
            )
        zeros = (self._n_groups, d_out // per)
        files.expect(self._zeros, {INT32}, zeros, scheme.name)
        files.expect(self._scales, FLOATS, (self._n_groups, d_out), scheme.name)
        self._groups = self._checked_groups(f"{module}.g_idx")

    def _checked_groups(self, name: str) -> torch.Tensor | None:
        """Return the group of each row `[d_in]`; None if groups are neighbouring rows."""
        _, d_in = self.shape
        if name not in self._files.entries:
            return None
        self._files.expect(name, {"I64", INT32}, (d_in,), self._scheme.name)
        self.names.add(name)
        groups = self._files.read(name).long()
        if int(groups.min()) < 0 or int(groups.max()) >= self._n_groups:
            raise ModelFailed(f"tensor {name!r} names groups beyond the {self._n_groups} expected")
        return groups

    def read(self) -> torch.Tensor:
        """Dequantise the weight to float32 `[d_out, d_in]`, some rows of codes at a time."""
        codes, scales = self._files.read(self._codes), self._files.read(self._scales).float()
        in_columns = self._scheme.method == "gptq"
        shifts = range(0, 32, self._bits) if in_columns else AWQ_SHIFTS
        highest = (1 << self._bits) - 1
        zeros = _unpacked_integers(self._files.read(self._zeros), shifts, self._bits, -1)
        zeros = (zeros + self._scheme.zero_offset) & highest
        d_out, d_in = self.shape
        order = torch.arange(d_in) // self._size if self._groups is None else self._groups
        values, per = torch.empty(self.shape), d_in // codes.shape[0]
        step = max(1, VALUES_AT_ONCE // (d_out * per))
        for start in range(0, codes.shape[0], step):
            part = codes[start : start + step]
            found = _unpacked_integers(part, shifts, self._bits, -2 if in_columns else -1)
            rows = slice(start * per, start * per + found.shape[0])
            groups = order[rows]
            values[:, rows] = ((found - zeros[groups]).float() * scales[groups]).T
        return values


def _columns(files: _Files, scheme: Scheme) -> tuple[dict[str, DenseWeight], set[str]]:
    """Find the weights of GPTQ and AWQ."""
    weights, used = {}, set()
    for codes in files.entries:
        module = codes.removesuffix(".qweight")
        if module != codes:
            found = _Columns(files, scheme, module)
            weights[f"{module}.weight"] = DenseWeight(found.shape, found.read)
            used |= found.names
    return weights, used


class _Table:
    """A weight of bitsandbytes in 4 bits: codes into a table of 16 values, two in a byte.

    The first code is in the upper bits. Each block of values, counted over the whole weight, has a
    scale `absmax`. Scales may be codes of 8 bits into a table of 256 values themselves; they have a
    scale for each block, and a common offset.
    """

    def __init__(self, files: _Files, scheme: Scheme, name: str, state: str) -> None:
        self._files, self._name, self._why = files, name, scheme.name
        entry = files.entries[state]
        files.expect(state, {BYTES}, (min(entry.size, MAX_STATE),), scheme.name)
        try:
            self._state = json.loads(bytes(files.read(state).tolist()))
        except ValueError as error:
            raise ModelFailed(f"tensor {state!r} is not JSON: {error}") from error
        shape = self._state.get("shape") if isinstance(self._state, dict) else None
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            raise ModelFailed(f"tensor {state!r} describes no shape: expected sizes above 0")
        self.shape, self._size = tuple(shape), math.prod(shape)
        self._n_blocks = -(-self._size // self._block("blocksize"))
        self.names = {name, state}
        self._expect(name, {BYTES}, (-(-self._size // 2), 1))
        self._expect(f"{name}.quant_map", FLOATS, (16,))
        self._nested = f"{name}.nested_absmax" in files.entries
        self._expect(f"{name}.absmax", {BYTES} if self._nested else FLOATS, (self._n_blocks,))
        if self._nested:
            n_nested = -(-self._n_blocks // self._block("nested_blocksize"))
            self._expect(f"{name}.nested_absmax", FLOATS, (n_nested,))
            self._expect(f"{name}.nested_quant_map", FLOATS, (256,))
            if type(self._state.get("nested_offset")) not in {int, float}:
                raise ModelFailed(f"tensor {state!r} has no nested_offset: expected a number")

    def _expect(self, name: str, kinds: Iterable[str], shape: tuple[int, ...]) -> None:
        self._files.expect(name, kinds, shape, self._why)
        self.names.add(name)

    def _block(self, key: str) -> int:
        size = self._state.get(key)
        if type(size) is int and 0 < size <= MAX_BLOCK:
            return size
        raise ModelFailed(
            f"tensor {self._name!r} has {key} {size!r:.80}: expected 1 to {MAX_BLOCK}"
        )

    def read(self) -> torch.Tensor:
        """Dequantise the weight to float32, some blocks at a time."""
        codes = self._files.read(self._name).flatten()
        table = self._files.read(f"{self._name}.quant_map").float()
        scales, block = self._scales(), self._block("blocksize")
        values = torch.empty(self._size)
        step = max(1, VALUES_AT_ONCE // block) * block * 2  # begins at a byte and at a block
        for start in range(0, self._size, step):
            part = values[start : start + step]
            packed = codes[start // 2 : -(-(start + len(part)) // 2)]
            unpacked = torch.stack([packed >> 4, packed & 15], -1).flatten()[: len(part)]
            own = scales[start // block : -(-(start + len(part)) // block)]
            part[:] = table[unpacked.int()] * own.repeat_interleave(block)[: len(part)]
        return values.reshape(self.shape)

    def _scales(self) -> torch.Tensor:
        stored = self._files.read(f"{self._name}.absmax")
        if not self._nested:
            return stored.float()
        table = self._files.read(f"{self._name}.nested_quant_map").float()
        own = self._files.read(f"{self._name}.nested_absmax").float()
        spread = own.repeat_interleave(self._block("nested_blocksize"))[: self._n_blocks]
        scales: torch.Tensor = table[stored.int()] * spread + self._state["nested_offset"]
        return scales


def _bitsandbytes(files: _Files, scheme: Scheme) -> tuple[dict[str, DenseWeight], set[str]]:
    """Find the weights of bitsandbytes in 4 or 8 bits."""
    weights, used = {}, set()
    for name, entry in files.entries.items():
        if state := QUANT_STATE.search(name):
            codes = name[: state.start()]
            found = _Table(files, scheme, codes, name)
            weights[codes] = DenseWeight(found.shape, found.read)
            used |= found.names
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            codes, form = f"{module}.weight", f"{module}.weight_format"
            rows = files.entries[codes].shape if codes in files.entries else ()
            files.expect(codes, {INT8}, (entry.size, rows[-1] if rows else 1), scheme.name)
            files.expect(name, FLOATS, (entry.size,), scheme.name)
            if form in files.entries:
                files.expect(form, {BYTES}, (), scheme.name)
                if int(files.read(form)):
                    raise ModelFailed(f"tensor {form!r} is not 0: expected codes in rows")
            weights[codes] = DenseWeight(rows, _rows_reader(files, codes, name))
            used |= {codes, name, form}
    return weights, used & files.entries.keys()


def _rows_reader(files: _Files, codes: str, scales: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        values = files.read(codes).float()
        values *= files.read(scales).float()[:, None]
        values *= INT8_STEP
        return values

    return read


# What finds the weights of a method, where scales are not beside the codes of single weights.
FINDERS = {
    "awq": _columns,
    "bitsandbytes": _bitsandbytes,
    "gptq": _columns,
    "mxfp4": _microscaled,
}


def _unpacked_integers(
    packed: torch.Tensor, shifts: Iterable[int], bits: int, dim: int
) -> torch.Tensor:
    """Unpack integers of 32 bits along the last dimension or the one before.

    `shifts` are the places of the integers' lowest bits in the order of the result.
    """
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in shifts]
    if dim == -1:
        return torch.stack(parts, -1).flatten(-2)
    return torch.stack(parts, -2).flatten(-3, -2)


def _to_float(scales: torch.Tensor) -> torch.Tensor:
    """Convert scales to float32. Bytes are exponents of two with a bias of 127; 255 is NaN."""
    stored = scales.view(torch.float8_e8m0fnu) if scales.dtype is torch.uint8 else scales
    values: torch.Tensor = stored.float()
    return values


def _unpacked_floats(packed: torch.Tensor) -> torch.Tensor:
    """Unpack 4-bit floats, the lower four bits of a byte first, to float32 `[..., 2 * width]`."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    values: torch.Tensor = table[codes.int()]
    return values
