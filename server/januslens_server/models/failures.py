"""Failures of a computation: NaN and infinity, exhausted memory, a lost device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import nn

from januslens_server.errors import DeviceLost, ModelFailed, NotFinite, OutOfMemory, shortlist
from januslens_server.models.matrices import read_parameter
from januslens_server.results import Floats

# In the message of the plain RuntimeError that torch's CPU allocator raises.
CPU_ALLOCATOR = "DefaultCPUAllocator: "


def check_weights(network: nn.Module, advance: Callable[[float], object] = lambda _: None) -> None:
    """Raise `ModelFailed` if a weight is infinite or NaN.

    `advance` receives the share of the weights that are checked.
    """
    weights = [
        (f"{path}.{name}", module, name, parameter.numel())
        for path, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    total, checked, broken = sum(count for *_, count in weights), 0, []
    for full_name, module, name, count in weights:
        if not bool(_finite(read_parameter(module, name))):
            broken.append(full_name)
        checked += count
        advance(checked / total)
    if broken:
        raise ModelFailed(f"weights are infinite or NaN in {shortlist(broken)}")


def check_pass(residual: torch.Tensor, logits: torch.Tensor) -> None:
    """Raise `NotFinite` unless the last residual `[pos, d_model]` and the logits are finite.

    An overflow in an earlier layer stays in the residual stream, so checking its end is enough.
    Logits `[pos, vocab]` may be minus infinity, because some models exclude tokens with them.
    """
    fine = [_finite(residual), (logits.amax(-1) < torch.inf).all()]
    if not _all(fine):
        raise NotFinite(
            "the model's activations are infinite or NaN",
            "use another prompt",
            _advice(residual.dtype),
        )


def check_gradients(vjps: Iterable[torch.Tensor]) -> None:
    """Raise `NotFinite` if a gradient dL/dy `[pos, d_out]` is infinite or NaN."""
    vjps = list(vjps)
    if not _all([_finite(vjp) for vjp in vjps]):
        raise NotFinite(
            "the gradients of this loss are infinite or NaN",
            "use another loss",
            _advice(vjps[-1].dtype),
        )


def check_numbers(what: str, *columns: Floats | None) -> None:
    """Raise `NotFinite` if a number of a result is infinite or NaN; `what` names the result.

    A vector's norm overflows before the vector does, and the model's norms square it as well. So if
    the norms are finite, no share and no projection was computed from an infinite square.
    """
    for column in columns:
        if column is not None and not np.isfinite(column).all():
            raise NotFinite(f"{what} are too large: squaring them overflows float32")


def _advice(data_type: torch.dtype) -> str:
    """Advice for a model that is served in half precision."""
    if data_type in (torch.float16, torch.bfloat16):
        name = str(data_type).removeprefix("torch.")
        return f"serve the model with --data-type float32 instead of {name}"
    return ""


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all values are finite, on the tensor's device.

    Checks only the extremes, which needs no large tensor.
    """
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(torch.aminmax(tensor.detach())).isfinite().all()


def _all(fine: Sequence[torch.Tensor]) -> bool:
    """Whether all are true; the host waits once for them, wherever they are."""
    return bool(torch.stack([each.to(fine[0].device) for each in fine]).all())


def devices_work() -> bool:
    """Whether every GPU still computes. After some errors a GPU needs a new process."""
    try:
        for device in range(torch.cuda.device_count()):
            torch.ones(1, device=f"cuda:{device}").item()
    except RuntimeError:
        return False
    return True


def service_error(error: Exception, works: Callable[[], bool] = devices_work) -> Exception:
    """Convert torch's errors to `OutOfMemory` or `DeviceLost`; return other errors unchanged.

    After an accelerator error, `works` decides whether the device is lost or still computes.
    """
    exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if exhausted or (isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)):
        return OutOfMemory(
            "the device had no memory left for this request; request fewer layers, positions or "
            "parts, or try again when the server is less busy"
        )
    if isinstance(error, torch.AcceleratorError) and not works():
        return DeviceLost()
    return error
