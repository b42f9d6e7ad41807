"""Find the largest and the smallest logits of rows, with equal logits in the order of tokens."""

from __future__ import annotations

import torch

# Number of entries in a block. The largest k entries are in the k blocks with the largest maxima,
# so only those blocks are searched.
BLOCK = 64


def highest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and indices `[n, count]` of the largest entries of each row, largest first.

    `rows` is `[n, width]` in float32. Equal values are ordered by index; if they tie for the last
    place, the lowest indices are taken.
    """
    return _extremes(rows, count, largest=True)


def lowest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest entries as `highest` does, smallest first."""
    return _extremes(rows, count, largest=False)


def _extremes(
    rows: torch.Tensor, count: int, *, largest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    width = rows.shape[1]
    if not count:  # `topk` would read all entries
        return rows.new_empty(len(rows), 0), rows.new_empty(len(rows), 0, dtype=torch.long)
    if rows.device.type != "cpu" or count >= width:
        return _by_key(rows, min(count, width), largest=largest)
    # One entry more shows whether equal values tie for the last place. A GPU would have to wait for
    # the answer; a CPU finds keys slower than floating-point numbers.
    if 2 * (count + 1) * BLOCK <= width:
        chosen = _block_ends(rows, largest=largest).topk(count + 1, largest=largest).indices
        candidates = _entries_of(chosen, width)
        values, where = rows.gather(1, candidates).topk(count + 1, largest=largest)
        ids = candidates.gather(1, where)
    else:
        values, ids = rows.topk(count + 1, largest=largest)
    tied = (values[:, count - 1] == values[:, count]).nonzero()[:, 0]
    values, ids = _ordered(values[:, :count], ids[:, :count], largest=largest)
    if len(tied):
        values[tied], ids[tied] = _by_key(rows[tied], count, largest=largest)
    return values, ids


def _ordered(
    values: torch.Tensor, ids: torch.Tensor, *, largest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort by value, then by id; `topk` does not define the order of equal values."""
    ids, by_id = ids.sort(dim=1)
    values = values.gather(1, by_id)
    values, by_value = values.sort(dim=1, descending=largest, stable=True)
    return values, ids.gather(1, by_value)


def _by_key(rows: torch.Tensor, count: int, *, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the extremes by keys that differ, so that ties need no extra search."""
    width = rows.shape[1]
    if 2 * count * BLOCK > width:
        ids = _first(rows, count, largest=largest)
        return rows.gather(1, ids), ids
    # Of blocks with equal extremes, the first are chosen. If an entry is in none of the blocks,
    # `count` entries are more extreme, or are equal and have a lower index.
    chosen = _first(_block_ends(rows, largest=largest), count, largest=largest)
    candidates = _entries_of(chosen.sort(dim=1).values, width)
    values = rows.gather(1, candidates)
    places = _first(values, count, largest=largest)
    return values.gather(1, places), candidates.gather(1, places)


def _first(values: torch.Tensor, count: int, *, largest: bool) -> torch.Tensor:
    """Return the places `[n, count]` of the extremes of each row, of equal ones the first.

    Keys are integers: the upper half has the bits of the number, in an order that is that of the
    numbers, and the lower half the place.
    """
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which it equals
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    width = values.shape[1]
    places = torch.arange(width, device=values.device)
    keys = ordered * 2**32 + (width - 1 - places if largest else places)
    found: torch.Tensor = keys.topk(count, largest=largest).indices
    return found


def _block_ends(rows: torch.Tensor, *, largest: bool) -> torch.Tensor:
    """Return the extreme `[n, blocks]` of each whole block."""
    blocks = rows.shape[1] // BLOCK
    by_block = rows[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    ends: torch.Tensor = by_block.amax(2) if largest else by_block.amin(2)
    return ends


def _entries_of(chosen: torch.Tensor, width: int) -> torch.Tensor:
    """Return the indices in the `chosen` blocks `[n, blocks]`, and those after the last block."""
    device = chosen.device
    inside = chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)
    rest = torch.arange(width // BLOCK * BLOCK, width, device=device).expand(len(chosen), -1)
    return torch.cat([inside.flatten(1), rest], dim=1)
