"""The largest and smallest entries of long rows, without a pass over them for each."""

from __future__ import annotations

import torch

# Entries of which one extreme is kept first: the top k stand in the k blocks with the highest
# ones, so only those are searched. Torch's own `topk` reads every entry with its index.
BLOCK = 64


def highest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices `[n, count]` of the largest entries of `rows` `[n, width]`, largest first.

    By value, then by lower index; which of several equal values at the cut enters is open.
    """
    return _extremes(rows, count, largest=True)


def lowest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `highest`, of the smallest entries, smallest first."""
    return _extremes(rows, count, largest=False)


def _extremes(
    rows: torch.Tensor, count: int, *, largest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    count = min(count, rows.shape[1])
    if not 0 < 2 * count * BLOCK <= rows.shape[1]:
        return _ordered(*rows.topk(count, largest=largest), largest=largest)
    candidates = _candidates(rows, count, largest=largest)
    values, where = rows.gather(1, candidates).topk(count, largest=largest)
    return _ordered(values, candidates.gather(1, where), largest=largest)


def _candidates(rows: torch.Tensor, count: int, *, largest: bool) -> torch.Tensor:
    """Indices `[n, candidates]`: the `count` most extreme blocks, and what no block holds."""
    width, device = rows.shape[1], rows.device
    blocks = width // BLOCK
    by_block = rows[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    ends = by_block.amax(2) if largest else by_block.amin(2)
    chosen = ends.topk(count, largest=largest).indices
    inside = chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)
    rest = torch.arange(blocks * BLOCK, width, device=device).expand(len(rows), -1)
    return torch.cat([inside.flatten(1), rest], dim=1)


def _ordered(
    values: torch.Tensor, ids: torch.Tensor, *, largest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """By value, then by lower id: `topk` leaves the order among equals open."""
    ids, by_id = ids.sort(dim=1)
    values = values.gather(1, by_id)
    values, by_value = values.sort(dim=1, descending=largest, stable=True)
    return values, ids.gather(1, by_value)
