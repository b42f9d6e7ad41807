"""Make long forward and backward passes stoppable within a layer.

With thousands of tokens, one layer takes seconds. Inside `interruptible`, every torch function
first calls the request's check. On a CPU, attention and linear maps are split into blocks of rows,
with a check before each block. Rows do not depend on each other, so only the rounding of the
results can differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from januslens_server.errors import CancelCheck

# Shorter passes have no checks inside layers: their layers are fast, and checks cost some per cent.
FEWEST_TOKENS = 256
# Floating-point operations between two checks, which take some tenths of a second on two CPU cores.
# Blocks have at least this many rows, because smaller ones take as long as reading the weights.
OPERATIONS = 1e10
FEWEST_LINEAR_ROWS, FEWEST_QUERIES = 256, 64


@contextmanager
def interruptible(check_cancelled: CancelCheck, tokens: int) -> Iterator[None]:
    """Call `check_cancelled` often during forward and backward passes inside the context."""
    if tokens < FEWEST_TOKENS:
        yield
        return
    with _Interruptible(check_cancelled):
        yield


class _Interruptible(TorchFunctionMode):
    def __init__(self, check_cancelled: CancelCheck) -> None:
        super().__init__()
        self._check = check_cancelled

    def __torch_function__(
        self,
        function: Any,
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._check()
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if function is functional.linear:
            return self._linear(function, 0, args, kwargs)
        if function is torch.addmm:  # transformers' Conv1D
            return self._linear(function, 1, args, kwargs)
        return function(*args, **kwargs)

    def _linear(
        self, function: Any, of_rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a linear `function` in blocks; argument `of_rows` has the rows `[..., n, d_in]`."""
        if len(args) <= of_rows + 1:
            return function(*args, **kwargs)
        vectors, matrix = args[of_rows], args[of_rows + 1]
        rows = _rows_at_once(2.0 * matrix.numel(), FEWEST_LINEAR_ROWS)
        if vectors.dim() < 2 or vectors.shape[-2] <= rows or vectors.device.type != "cpu":
            return function(*args, **kwargs)

        def of_block(start: int) -> torch.Tensor:
            block = vectors[..., start : start + rows, :]
            product: torch.Tensor = function(*args[:of_rows], block, *args[of_rows + 1 :], **kwargs)
            return product

        return self._in_blocks(of_block, vectors.shape[-2], rows)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> torch.Tensor:
        """Compute attention in blocks of queries, in causal attention with the keys up to them."""
        attend = functional.scaled_dot_product_attention
        length = query.shape[-2]
        each = 4.0 * query.numel() / length * key.shape[-2]
        rows = _rows_at_once(each, FEWEST_QUERIES)
        if length <= rows or query.device.type != "cpu":
            return attend(query, key, value, attn_mask, dropout_p, is_causal, **rest)

        def of_block(start: int) -> torch.Tensor:
            end = min(start + rows, length)
            keys, values, mask = key, value, attn_mask
            if is_causal:
                keys, values = key[..., :end, :], value[..., :end, :]
                mask = query.new_ones(end - start, end, dtype=torch.bool).tril(start)
            elif attn_mask is not None and attn_mask.shape[-2] == length:
                mask = attn_mask[..., start:end, :]
            return attend(query[..., start:end, :], keys, values, mask, dropout_p, **rest)

        return self._in_blocks(of_block, length, rows)

    def _in_blocks(
        self, of_block: Callable[[int], torch.Tensor], length: int, rows: int
    ) -> torch.Tensor:
        parts = []
        for start in range(0, length, rows):
            self._check()
            part = of_block(start)
            if part.requires_grad:
                part.register_hook(lambda _gradient: self._check())
            parts.append(part)
        return torch.cat(parts, dim=-2)


def _rows_at_once(operations_each: float, fewest: int) -> int:
    """Return the number of rows per block, a multiple of `fewest`."""
    return max(1, int(OPERATIONS / operations_each) // fewest) * fewest
