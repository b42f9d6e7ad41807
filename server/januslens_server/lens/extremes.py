"""The largest and smallest entries of long rows, without a pass over them for each."""

from __future__ import annotations

import torch

# Entries of which one extreme is kept first: the top k stand in the k blocks with the highest
# ones, so only those are searched. Torch's own `topk` reads every entry with its index.
BLOCK = 64


def highest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices `[n, count]` of the largest entries of `rows` `[n, width]`, largest first.

    By value, then by lower index: of equal values at the cut those with the lower indices enter.
    """
    return _extremes(rows, count, largest=True)


def lowest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `highest`, of the smallest entries, smallest first."""
    return _extremes(rows, count, largest=False)


def _extremes(
    rows: torch.Tensor, count: int, *, largest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    width = rows.shape[1]
    if not count:  # neither `topk` nor a sort returns early
        return rows.new_empty(len(rows), 0), rows.new_empty(len(rows), 0, dtype=torch.long)
    if count >= width:
        return _stable(rows, min(count, width), largest=largest)
    # One more than asked shows whether equal values stand at the cut.
    if 2 * (count + 1) * BLOCK <= width:
        candidates = _candidates(rows, count + 1, largest=largest)
        values, where = rows.gather(1, candidates).topk(count + 1, largest=largest)
        ids = candidates.gather(1, where)
    else:
        values, ids = rows.topk(count + 1, largest=largest)
    tied = (values[:, count - 1] == values[:, count]).nonzero()[:, 0]
    values, ids = _ordered(values[:, :count], ids[:, :count], largest=largest)
    if len(tied):
        values[tied], ids[tied] = _stable(rows[tied], count, largest=largest)
    return values, ids


def _stable(rows: torch.Tensor, count: int, *, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """By sorting whole rows, which keeps the order of equal values."""
    values, ids = rows.sort(dim=1, descending=largest, stable=True)
    return values[:, :count], ids[:, :count]


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
