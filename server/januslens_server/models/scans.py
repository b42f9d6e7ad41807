"""The work of mixers that carry a state from position to position: state spaces, delta rules.

transformers computes them in float32 and in chunks of positions, to which it pads the prompt. So
their memory and operations follow from other sizes than those of attention. The packages that
compute them faster (`mamba-ssm`, `flash-linear-attention`) need less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

# Positions of a chunk of a delta rule; an argument's default in transformers.
DELTA_CHUNK = 64


@dataclass(frozen=True)
class Scan:
    """Upper bounds of the work of a mixer for each position of the padded prompt.

    Attributes:
        chunk: The prompt is padded to a multiple of this number.
        values: Float32 values in memory at once, in a pass and in a backward pass. Measured on
            single blocks and rounded up (tests/numerics/test_scans.py).
        flops: Floating-point operations of matrix products.
    """

    chunk: int = 1
    values: int = 0
    flops: int = 0

    def padded(self, tokens: int) -> int:
        """Return the number of positions that the mixer computes; one position is no scan."""
        return math.ceil(tokens / self.chunk) * self.chunk if tokens > 1 else 0


def scan_of(module: nn.Module) -> Scan | None:
    """Return the scan of a mixer, recognised by its sizes; None for other modules."""
    if found := _sizes(module, "chunk_size", "num_heads", "head_dim", "ssm_state_size"):
        return _mamba_2(*found)
    if found := _sizes(module, "intermediate_size", "ssm_state_size", "time_step_rank"):
        return _mamba(*found)
    if found := _sizes(module, "num_v_heads", "head_k_dim", "head_v_dim"):
        return _gated_delta_rule(*found)
    if hasattr(module, "forget_gate") and (found := _sizes(module, "num_heads", "head_dim")):
        return _kimi_delta_rule(*found)
    return None


def _sizes(module: nn.Module, *names: str) -> list[int]:
    """Return the attributes of these names, or an empty list if one of them is not an integer."""
    found = [getattr(module, name, None) for name in names]
    sizes = [size for size in found if isinstance(size, int)]
    return sizes if len(sizes) == len(names) else []


def _mamba(inner: int, state: int, _rank: int) -> Scan:
    """Mamba: decay, input and state of every channel and position."""
    return Scan(values=4 * inner * state)


def _mamba_2(chunk: int, heads: int, width: int, state: int) -> Scan:
    """Mamba 2: scores of each pair of positions in a chunk; four states for each chunk."""
    values = 4 * chunk + 6 * (width + state) + 4 * width * state // chunk
    flops = 2 * chunk * (state + width) + 4 * width * state + 8 * width * state // chunk
    return Scan(chunk, heads * values, heads * flops)


def _gated_delta_rule(heads: int, key: int, value: int) -> Scan:
    """Gated DeltaNet: scores of each pair in a chunk, two triangular systems, and the state."""
    chunk = DELTA_CHUNK
    flops = chunk * (5 * key + 3 * value) + 6 * key * value
    return Scan(chunk, heads * (5 * chunk + 8 * (key + value)), heads * flops)


def _kimi_delta_rule(heads: int, width: int) -> Scan:
    """Kimi Delta Attention: as Gated DeltaNet, but each channel of each pair has a decay."""
    chunk = DELTA_CHUNK
    flops = 6 * chunk * width + 6 * width * width
    return Scan(chunk, heads * 4 * chunk * width, heads * flops)
