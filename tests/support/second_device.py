"""A device for tests that is not the CPU to the code, but computes on it.

A tensor of this device is an `OnDevice`, which reports the device `cuda:0` and refuses to meet a
tensor of the CPU, as a GPU does. Every wait of the host for the device is recorded with the line of
our code that caused it. So tests on a machine without a GPU find what would fail or wait on one.

Copies that do not wait (`non_blocking`) arrive when the host waits for their event or stream. Until
then their target has NaN, or the largest integer, so that reading it too early changes results.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("cuda:0")
PACKAGE = str(Path("januslens_server"))

_aten = torch.ops.aten

# Operations whose result has a size or a value that the host must know.
WAITING = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,
    _aten.equal.default,
    _aten._linalg_svd.default,
    _aten.linalg_qr.default,
    _aten._linalg_eigh.default,
    _aten.bincount.default,
}
# Operations whose indices may be on the CPU; they are copied to the device, which waits.
INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


def _mm_in_float32(a: torch.Tensor, b: torch.Tensor, _type: Any, *, out: torch.Tensor) -> Any:
    return torch.mm(a.float(), b.float(), out=out)


def _addmm_in_float32(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, _type: Any, *, out: torch.Tensor
) -> Any:
    return torch.addmm(c, a.float(), b.float(), out=out)


def _histc_of_integers(values: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return torch.histc(values.float(), *args, **options).to(values.dtype)


# Operations that the CPU lacks: products of half types with float32 sums, counts of integers. A
# conjugate is computed at once, since the held tensor's mark of a later one would be overlooked.
SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    _aten.mm.dtype_out: _mm_in_float32,
    _aten.addmm.dtype_out: _addmm_in_float32,
    _aten.histc.default: _histc_of_integers,
    _aten._conj.default: torch.conj_physical,
}


class MixedDevices(RuntimeError):
    """Tensors of the CPU and of the device met in one operation."""


@dataclass
class Record:
    """What happened on the device: waits and copies by line of code, and number of operations."""

    waits: Counter[str] = field(default_factory=Counter)
    pageable: Counter[str] = field(default_factory=Counter)
    operations: int = 0

    @property
    def total(self) -> int:
        """Number of waits of the host for the device."""
        return self.waits.total()

    def clear(self) -> None:
        """Forget everything that was recorded."""
        self.waits.clear()
        self.pageable.clear()
        self.operations = 0


RECORD = Record()


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` has its values, in memory of the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: Any, held: torch.Tensor) -> OnDevice:
        """Wrap a tensor of the CPU."""
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("cpu"),
            requires_grad=False,
        )
        made.held = held
        return made  # type: ignore[no-any-return] # torch types the wrapper as Any

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # other stubs

    @property
    def device(self) -> torch.device:  # type: ignore[override] # an attribute in torch's stubs
        """The device."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override] # an attribute in torch's stubs
        """Always True."""
        return True

    def __repr__(self, **_options: Any) -> str:  # type: ignore[override] # fewer options
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch passes these arguments by position
        cls,
        operation: Any,
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute an operation on the CPU, after checking its devices."""
        kwargs = kwargs or {}
        if operation._can_decompose():
            return operation.decompose(*args, **kwargs)  # into operations that are listed above
        leaves, layout = tree_flatten((args, kwargs))
        if operation is _aten.copy_.default:
            return _copy_into(*args, **kwargs)
        _check(operation, args, leaves)
        RECORD.operations += 1
        held = [leaf.held if isinstance(leaf, OnDevice) else leaf for leaf in leaves]
        plain_args, plain_kwargs = tree_unflatten(held, layout)
        compute = SUBSTITUTES.get(operation, operation)
        found = compute(*plain_args, **plain_kwargs)
        return _returned(operation, found, args, kwargs)


def _check(operation: Any, args: tuple[Any, ...], leaves: list[Any]) -> None:
    if operation in WAITING:
        wait(str(operation))
    indexing = operation in INDEXING
    if indexing:
        if not isinstance(args[0], OnDevice):
            raise MixedDevices(f"{operation}: indices of the device for a tensor of the CPU")
        for index in args[1]:
            if index is None:
                continue
            if index.dtype in (torch.bool, torch.uint8) or not isinstance(index, OnDevice):
                wait(f"{operation} by a mask or by indices of the CPU")
    for leaf in leaves:
        foreign = isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnDevice)
        if foreign and leaf.dim() and not indexing:
            raise MixedDevices(f"{operation}: a tensor {tuple(leaf.shape)} of the CPU")


def _returned(operation: Any, found: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrap results; operations that write to an argument return the argument itself."""
    schema = operation._schema
    written = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    if any(result.alias_info is not None for result in schema.returns):
        # A view is an inference tensor if its base is one, wherever it is made.
        with torch.inference_mode(args[0].is_inference()):
            return _wrapped(found)
    return _wrapped(found)


def _wrapped(found: Any) -> Any:
    return tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, found)


def wait(why: str) -> None:
    """Record that the host waits for the device."""
    RECORD.waits[f"{_line()}: {why}"] += 1
    _arrive()


def _line() -> str:
    """Return file and line of the innermost frame of our own code, or else of the caller."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if PACKAGE in path:
            return f"{path[path.rindex(PACKAGE) + len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "outside"


# Targets and values of the copies that have not arrived.
_under_way: list[tuple[torch.Tensor, torch.Tensor]] = []
_pinned: set[int] = set()


def _arrive() -> None:
    while _under_way:
        into, values = _under_way.pop(0)
        with torch.inference_mode():
            into.copy_(values)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a tensor of the CPU was allocated in pinned memory."""
    return not isinstance(tensor, OnDevice) and _storage(tensor) in _pinned


def _copy_into(
    target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
) -> torch.Tensor:
    into = target.held if isinstance(target, OnDevice) else target
    values = source.held if isinstance(source, OnDevice) else source
    crosses = isinstance(target, OnDevice) != isinstance(source, OnDevice)
    if crosses and source.dim() == 0 and not isinstance(source, OnDevice):
        crosses = False  # a number, passed to the kernel
    if not crosses:
        into.copy_(values)
        return target
    host = source if isinstance(target, OnDevice) else target
    if not is_pinned(host):
        RECORD.pageable[_line()] += 1
        wait("copy of memory that is not pinned")
        into.copy_(values)
    elif not non_blocking:
        wait("copy")
        into.copy_(values)
    elif isinstance(target, OnDevice):
        into.copy_(values)
    else:
        into.fill_(_garbage(into.dtype))
        _under_way.append((into, values))
    return target


def _garbage(data_type: torch.dtype) -> float | bool | int:
    if data_type.is_floating_point:
        return float("nan")
    return True if data_type is torch.bool else torch.iinfo(data_type).max


class _Move(torch.autograd.Function):
    """A copy to the device or back, which autograd differentiates."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, to_device: bool) -> torch.Tensor:
        ctx.to_device = to_device
        if not is_pinned(tensor):
            RECORD.pageable[_line()] += 1
        wait("copy to the device" if to_device else "copy to the host")
        if isinstance(tensor, OnDevice):
            return tensor.held.clone()
        return OnDevice(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _moved_to(gradient, not ctx.to_device), None


def _moved_to(tensor: torch.Tensor, to_device: bool) -> torch.Tensor:
    made: torch.Tensor = _Move.apply(tensor, to_device)  # type: ignore[no-untyped-call] # torch's
    return made


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Wrap a tensor of the CPU without recording a copy; others are returned unchanged."""
    return tensor if isinstance(tensor, OnDevice) else OnDevice(tensor)


class _Factories(TorchFunctionMode):
    """Create and move tensors for which our code names the device."""

    def __torch_function__(
        self,
        function: Any,
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in _METHODS:
            return _METHODS[function](function, args, kwargs)
        pinned = kwargs.pop("pin_memory", False)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == DEVICE.type:
            kwargs["device"] = "cpu"
            made = function(*args, **kwargs)
            if function in (torch.tensor, torch.as_tensor):
                wait("torch.tensor with data of the host")
            return on_device(made)
        found = function(*args, **kwargs)
        if pinned:
            _keep_pinned(found)
        return found


# Pinned storages are kept, so that no later one gets the same address.
_kept: list[torch.Tensor] = []


def _keep_pinned(tensor: torch.Tensor) -> torch.Tensor:
    _pinned.add(_storage(tensor))
    _kept.append(tensor)
    return tensor


def _to(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    tensor: torch.Tensor = args[0]
    rest = args[1:]
    device: torch.device | None = None
    options = dict(kwargs)
    positional = []
    for value in rest:
        if isinstance(value, torch.Tensor):
            device = value.device
            options.setdefault("dtype", value.dtype)
        elif isinstance(value, torch.device | str):
            device = torch.device(value)
        elif isinstance(value, bool):
            options["non_blocking"] = value
        else:
            positional.append(value)
    if (named := options.pop("device", None)) is not None:
        device = torch.device(named)
    non_blocking = bool(options.pop("non_blocking", False))
    if device is not None:
        to_device = device.type == DEVICE.type
        if to_device != isinstance(tensor, OnDevice):
            if to_device and non_blocking and is_pinned(tensor):
                tensor = OnDevice(tensor.detach().clone())
            else:
                tensor = _moved_to(tensor, to_device)
    if positional or options:
        tensor = function(tensor, *positional, **options)
    return tensor


def _cpu(_function: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> torch.Tensor:
    (tensor,) = args
    moved: torch.Tensor = _moved_to(tensor, False) if isinstance(tensor, OnDevice) else tensor
    return moved


def _tolist(function: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    (tensor,) = args
    if isinstance(tensor, OnDevice):
        wait("tolist")
        return tensor.held.tolist()
    return function(tensor)


def _numpy(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], OnDevice):
        raise MixedDevices("numpy of a tensor of the device: copy it to the host first")
    return function(*args, **kwargs)


def _storage_of(function: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    (tensor,) = args
    return function(tensor.held if isinstance(tensor, OnDevice) else tensor)


def _pin(_function: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> torch.Tensor:
    return _keep_pinned(args[0].clone())


def _new_tensor(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    tensor, *rest = args
    if not isinstance(tensor, OnDevice):
        found: torch.Tensor = function(tensor, *rest, **kwargs)
        return found
    wait("new_tensor with data of the host")
    return OnDevice(tensor.held.new_tensor(*rest, **kwargs))


def _set_data(function: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    tensor, value = args
    function(tensor, value)
    if isinstance(tensor, OnDevice):
        tensor.held = value.held


def _attention(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Attention; torch would make the causal mask on the CPU if keys and values differ in width."""
    query, key, *_ = args
    if isinstance(query, OnDevice) and kwargs.get("is_causal"):
        size = query.shape[-2], key.shape[-2]
        mask = OnDevice(torch.ones(size, dtype=torch.bool).tril())
        kwargs = kwargs | {"is_causal": False, "attn_mask": mask}
    attended: torch.Tensor = function(*args, **kwargs)
    return attended


_METHODS: dict[Any, Callable[..., Any]] = {
    nn.functional.scaled_dot_product_attention: _attention,
    torch.Tensor.to: _to,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.tolist: _tolist,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.untyped_storage: _storage_of,
    torch.Tensor.pin_memory: _pin,
    torch.Tensor.is_pinned: lambda _function, args, _kwargs: is_pinned(args[0]),
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined] # an attribute in stubs
}


class Event:
    """Stands in for `torch.cuda.Event`: all copies that were started arrive when it is awaited."""

    def __init__(self, **_options: Any) -> None: ...

    def record(self, _stream: object = None) -> None:
        """Mark the present place of a stream."""

    def wait(self, _stream: object = None) -> None:
        """Let a stream, not the host, wait."""

    def query(self) -> bool:
        """Whether all copies have arrived."""
        return not _under_way

    def synchronize(self) -> None:
        """Let the host wait."""
        wait("event")


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def wait_stream(self, _other: Stream) -> None:
        """Let this stream, not the host, wait for another."""

    def wait_event(self, _event: Event) -> None:
        """Let this stream, not the host, wait for an event."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event at the present place."""
        return event or Event()

    def synchronize(self) -> None:
        """Let the host wait."""
        wait("stream")


@contextmanager
def _in_stream(_stream: Stream) -> Iterator[None]:
    yield


@contextmanager
def second_device() -> Iterator[Record]:
    """Provide the device inside the context; yields the record of what happened on it."""
    RECORD.clear()
    with (
        patch.multiple(
            torch.cuda,
            Stream=Stream,
            Event=Event,
            stream=_in_stream,
            current_stream=lambda _device=None: Stream(),
            # Without grouped matrix products, which the CPU lacks.
            get_device_capability=lambda _device=None: (7, 0),
        ),
        patch.object(torch.Tensor, "record_stream", lambda _tensor, _stream: None),
        _Factories(),
    ):
        yield RECORD
    _under_way.clear()
    _pinned.clear()
    _kept.clear()


def moved(network: nn.Module) -> nn.Module:
    """Move a model's parameters and buffers to the device, in place."""
    made: dict[int, Any] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                own = OnDevice(parameter.detach())
                made[id(parameter)] = nn.Parameter(own, requires_grad=False)
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_device(buffer)
    return network
