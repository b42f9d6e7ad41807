"""Memory that projections use again and again."""

from __future__ import annotations

import threading

import torch


class Scratch(threading.local):
    """Float32 buffers of one thread by name.

    On a CPU the kernel clears every fresh page: for a chunk of logits that takes a sixth of the
    time that it takes to compute them. A GPU's allocator keeps what was freed by itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Uninitialised `[rows, columns]`, valid until this thread asks for the same name again."""
        if device.type != "cpu":
            return torch.empty(rows, columns, device=device)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[name] = torch.empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)

    def like(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """As `matrix`, of another one's shape and device."""
        return self.matrix(name, matrix.shape[0], matrix.shape[1], matrix.device)
