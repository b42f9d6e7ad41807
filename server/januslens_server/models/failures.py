"""Failures of a computation: NaN and infinity, exhausted memory, a lost device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from januslens_server.errors import DeviceLost, ModelFailed, NotFinite, OutOfMemory
from januslens_server.models.matrices import read_parameter
from januslens_server.results import Floats

# Parameters that an error names.
LISTED = 3

# In the message of the plain RuntimeError that torch's CPU allocator raises.
CPU_ALLOCATOR = "DefaultCPUAllocator: "


def check_weights(network: nn.Module) -> None:
    """Raise `ModelFailed` if a weight is infinite or NaN, even one that few prompts would meet."""
    broken = [
        f"{path}.{name}"
        for path, module in network.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if not _finite(read_parameter(module, name))
    ]
    if broken:
        more = ", ..." if len(broken) > LISTED else ""
        raise ModelFailed(
            f"expected finite weights, got infinity or NaN in {', '.join(broken[:LISTED])}{more}"
        )


def check_pass(residual: torch.Tensor, logits: torch.Tensor) -> None:
    """Raise `NotFinite` if a pass ended in no numbers `[pos, d_model]` or logits `[pos, vocab]`.

    What overflows in an earlier layer stays in the residual stream, so its end shows it. Logits
    may be minus infinity where a model rules tokens out.
    """
    if not _finite(residual) or bool(logits.isnan().any()):
        raise NotFinite(
            "the model's activations are infinite or NaN on this prompt; use another prompt"
            + _advice(logits.dtype)
        )


def check_gradients(vjps: Iterable[torch.Tensor]) -> None:
    """Raise `NotFinite` if one of the gradients dL/dy `[pos, d_out]` is infinite or NaN."""
    for vjp in vjps:
        if not _finite(vjp):
            raise NotFinite(
                "the gradients of this loss are infinite or NaN; use another loss"
                + _advice(vjp.dtype)
            )


def check_numbers(what: str, *columns: Floats | None) -> None:
    """Raise `NotFinite` if a number of an answer is infinite or NaN.

    The norm of a vector overflows before the vector does, and every norm of the model squares too,
    so finite norms also mean that no share and no reading was computed from an infinite square.
    """
    for column in columns:
        if column is not None and not np.isfinite(column).all():
            raise NotFinite(f"{what} are too large: squaring them overflows float32")


def _advice(data_type: torch.dtype) -> str:
    """What helps a model that is served in half precision."""
    if data_type in (torch.float16, torch.bfloat16):
        name = str(data_type).removeprefix("torch.")
        return f", or serve the model with --data-type float32 instead of {name}"
    return ""


def _finite(tensor: torch.Tensor) -> bool:
    """Without a tensor of the same size: the extremes carry infinities and NaN."""
    if not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def devices_answer() -> bool:
    """Whether every GPU still computes: after some errors none does until the process ends."""
    try:
        for device in range(torch.cuda.device_count()):
            torch.ones(1, device=f"cuda:{device}").item()
    except RuntimeError:
        return False
    return True


def in_service_terms(error: Exception, answers: Callable[[], bool] = devices_answer) -> Exception:
    """`OutOfMemory` and `DeviceLost` for what torch says of them; else the error itself.

    An error of an accelerator may be a bug's or the device's end: `answers` says whether it still
    computes.
    """
    exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if exhausted or (isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)):
        return OutOfMemory(
            "the device had no memory left for this request, which holds none of it any more; "
            "ask for fewer layers, positions or parts, or try again when less runs"
        )
    if isinstance(error, torch.AcceleratorError) and not answers():
        return DeviceLost()
    return error
