"""What a request would take, in a few lines."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from januslens._results.cost import CostEstimate

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def cost_table(cost: CostEstimate) -> Table:
    """One row a figure, the verdict last."""
    grid = Table.grid(padding=(0, 2))
    rows = {
        "device": f"{cost.seconds:.3g} s",
        "operations": f"up to {cost.flops:.3g}",
        "memory": f"up to {_size(cost.device_bytes)} beside the weights",
        "answer": f"up to {_size(cost.stream_bytes)}",
        "projections": f"up to {cost.projected_vectors:,}",
    }
    for name, figure in rows.items():
        grid.add_row(Text(name, "dim"), Text(figure))
    verdict = Text("would be admitted", "green")
    if not cost.admissible:
        verdict = Text(f"would be refused: above the server's {cost.limit_exceeded}", "red")
    grid.add_row("", verdict)
    return grid


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} {_UNITS[-1]}"
