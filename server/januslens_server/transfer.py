"""Copy numbers between the host and a GPU in few pieces, without waiting where possible.

Each wait of the host for a GPU costs more than many kernels. Indices therefore go to the device
from pinned memory, and results come back packed into one buffer, on a stream of its own, while the
device computes further. Tensors of a CPU are not copied.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def to_device(
    numbers: Sequence[int] | Sequence[Sequence[int]] | NDArray[np.int64], device: torch.device
) -> torch.Tensor:
    """Return integers, such as indices, as an int64 tensor; the host does not wait for a GPU."""
    made = torch.tensor(numbers, dtype=torch.long)
    if device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)


class DeviceIndex:
    """Indices that select rows of tensors on several devices; copied to each device once."""

    def __init__(self, numbers: Sequence[int]) -> None:
        """Keep the `numbers` on the host until a device needs them."""
        self.numbers = numbers
        self._on: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the indices `[n]` on a device."""
        if device not in self._on:
            # Autograd cannot save a tensor of inference mode, and later passes may need gradients.
            with torch.inference_mode(mode=False):
                self._on[device] = to_device(self.numbers, device)
        return self._on[device]


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors on the CPU: those of a GPU cross in one copy, for which the host waits."""
    return HostCopy(*tensors).tensors()


class HostCopy:
    """Copies of tensors on the CPU, which are started when it is created.

    The GPU's next kernels run during the copy. A pinned buffer returns to torch's allocator as soon
    as its numbers are read, so two copies under way need two buffers, however many follow.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        """Start to copy `tensors`; all that are on GPUs are on the same one."""
        self._tensors = [tensor.detach() for tensor in tensors]
        # Larger elements first, so that every tensor is aligned in the packed bytes.
        self._order = sorted(
            (i for i, tensor in enumerate(tensors) if tensor.device.type == "cuda"),
            key=lambda i: -tensors[i].element_size(),
        )
        if self._order:
            self._buffer, self._arrived = _start(_packed([self._tensors[i] for i in self._order]))

    def tensors(self) -> list[torch.Tensor]:
        """Wait until the copies have arrived, and return them in order."""
        if not self._order:
            return [tensor.cpu() for tensor in self._tensors]
        self._wait()
        numbers = self._buffer.clone()  # frees the pinned buffer
        found, start = list(self._tensors), 0
        for i in self._order:
            tensor = self._tensors[i]
            end = start + tensor.numel() * tensor.element_size()
            found[i] = numbers[start:end].view(tensor.dtype).reshape(tensor.shape)
            start = end
        return [tensor.cpu() for tensor in found]

    def _wait(self) -> None:
        self._arrived.synchronize()


def _packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the bytes of all tensors as one tensor of their device."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])


def _start(packed: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Start to copy bytes to the host; return the pinned buffer, and the event of its arrival."""
    buffer = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
    stream = _stream(packed.device)
    stream.wait_stream(torch.cuda.current_stream(packed.device))
    with torch.cuda.stream(stream):
        buffer.copy_(packed, non_blocking=True)
    packed.record_stream(stream)  # its memory is reused only after the copy
    return buffer, stream.record_event()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies from a GPU."""
    return torch.cuda.Stream(device)
