"""Map the residual stream of any decoder: its blocks, its final norm and its output head.

Nothing is read from names. The blocks are the list of modules of which each reads exactly what the
one before returns; the final norm is the module after them whose formula reproduces its output; and
final norm and head must give the model's own logits from the last block's output.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from januslens_server.capture.hooks import nth_tensor
from januslens_server.errors import ModelFailed
from januslens_server.lens.head import LensHead
from januslens_server.lens.merge import HiddenLayer, Merge
from januslens_server.lens.norm import NoNorm, Norm
from januslens_server.lens.unembedding import Unembedding
from januslens_server.models.adapters.observed_pass import (
    ModuleCall,
    difference,
    observed_ids,
    read_norm,
    scales,
)
from januslens_server.models.adapters.several_streams import (
    StreamAxis,
    find_merge,
    pass_side_by_side,
)
from januslens_server.models.vetting import MAX_POSITIONS, one_line
from januslens_server.models.views import CoarseBlock, ModelView
from januslens_server.results import ModelFacts

# Maximum difference between logits that must be equal, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

ONE = "expected blocks that pass on one residual stream"

# Fields of configurations for the longest input.
CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "context_length",
)

# Fields of configurations for the cap of logits or of other values.
SOFT_CAP = re.compile("soft_?cap")

# Arguments of `forward` that continue a sequence, by the names that families use.
CACHES = ("cache", "past_key_values", "cache_params", "state")


@dataclass(frozen=True)
class Stream:
    """A model's blocks, and the calls of one pass over `ids` that show its residual stream.

    `name` is that of the list of blocks. `last` is the last block's output `[pos, d_model]`, or
    `[pos, streams * d_model]` with several streams, and `logits` are `[pos, vocab]`. `merge` is
    None if the final norm reads `last` itself. `norm` is the call of the final norm, or None
    without one.
    """

    model: PreTrainedModel
    name: str
    blocks: tuple[nn.Module, ...]
    ids: torch.Tensor
    last: torch.Tensor
    logits: torch.Tensor
    merge: Merge | None
    norm: ModuleCall | None

    @property
    def count(self) -> int:
        """The number of residual streams."""
        return 1 if self.merge is None else self.merge.streams


@dataclass
class _Call:
    """The first input and output of a module's call, as objects and as copies made at the time."""

    module: nn.Module
    input: torch.Tensor
    output: torch.Tensor
    input_then: torch.Tensor
    output_then: torch.Tensor


def find_stream(model: PreTrainedModel) -> Stream:
    """Find the blocks and the final norm.

    Blocks with several residual streams are changed to pass them on side by side.

    Raises:
        ModelFailed: No list of modules passes a residual stream on.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    lists = _lists(model, n_layers)
    inside = {m for blocks in lists.values() for block in blocks for m in block.modules()}
    outside = [m for m in model.modules() if m not in inside and not list(m.children())]
    ids = observed_ids(model)
    calls, logits = _calls(model, ids, [*(b for one in lists.values() for b in one), *outside])
    reasons = []
    for name, blocks in lists.items():
        reason = _broken(blocks, calls)
        if reason is None:
            last = calls[blocks[-1]][0].output
            axis = StreamAxis.of(last, ids.shape[1])
            if axis is not None:
                pass_side_by_side(blocks, axis)
                return find_stream(model)
            later = [call for m in outside for call in calls.get(m, [])]
            merge, norm = _behind_blocks(model, name, inside, later, last)
            return Stream(model, name, blocks, ids, last[0], logits, merge, norm)
        reasons.append(f"{name}: {reason}")
    found = "; ".join(reasons) or f"found no list of {n_layers} blocks"
    raise ModelFailed(f"{found}; {ONE}")


def _lists(model: PreTrainedModel, n_layers: int) -> dict[str, tuple[nn.Module, ...]]:
    """Return the lists of as many modules as the configuration has layers, by name.

    Without one, return the lists that are in no other: each block of LongCat Flash counts as two
    layers.
    """
    lists = {
        name: tuple(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    counted = {name: blocks for name, blocks in lists.items() if len(blocks) == n_layers}
    return counted or {
        name: blocks
        for name, blocks in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }


@torch.no_grad()
def _calls(
    model: PreTrainedModel, ids: torch.Tensor, modules: Sequence[nn.Module]
) -> tuple[dict[nn.Module, list[_Call]], torch.Tensor]:
    """Run `ids` `[1, pos]`; return the calls of the modules, and logits `[pos, vocab]`."""
    calls: dict[nn.Module, list[_Call]] = {}
    begun: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def before(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        if any(isinstance(value, torch.Tensor) for value in (*args, *named.values())):
            taken = nth_tensor(args, named)
            begun[module] = taken, taken.clone()

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        values = output if isinstance(output, tuple | list) else (output,)
        if module in begun and any(isinstance(value, torch.Tensor) for value in values):
            given = nth_tensor(values)
            taken, then = begun.pop(module)
            calls.setdefault(module, []).append(_Call(module, taken, given, then, given.clone()))

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return calls, logits[0]


def _broken(blocks: Sequence[nn.Module], calls: dict[nn.Module, list[_Call]]) -> str | None:
    """Return why these blocks pass no residual stream on, or None if they do."""
    counts = [len(calls.get(block, [])) for block in blocks]
    if any(count != 1 for count in counts):
        times = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        return f"a pass calls its blocks {times} times"
    called = [calls[block][0] for block in blocks]
    for layer, call in enumerate(called):
        if call.output.shape != call.input.shape or call.output.dim() not in {3, 4}:
            return f"block {layer} turns {list(call.input.shape)} into {list(call.output.shape)}"
        if not (
            torch.equal(call.input, call.input_then) and torch.equal(call.output, call.output_then)
        ):
            return f"block {layer} has its input or output changed in place"
    for layer, (below, above) in enumerate(pairwise(called)):
        if not torch.equal(below.output_then.float(), above.input_then.float()):
            return f"block {layer + 1} does not read what block {layer} returns"
    return None


def _behind_blocks(
    model: PreTrainedModel,
    name: str,
    inside: Collection[nn.Module],
    calls: Sequence[_Call],
    last: torch.Tensor,
) -> tuple[Merge | None, ModuleCall | None]:
    """Return how the residual stream is merged, and the call of the final norm, each or None.

    `calls` are those of the modules outside of the blocks, and `inside` the modules in them.

    Raises `ModelFailed` if several streams are merged in an unknown way.
    """
    streams, left = divmod(last.shape[-1], _width(model))
    if streams <= 1 or left:
        norm = _final_norm(calls, last)
        hidden = _hidden_layer(calls, norm)
        return hidden if hidden is not None else (None, norm)
    merge = find_merge([module for module in model.modules() if module not in inside])
    if merge is None or merge.streams != streams:
        raise ModelFailed(
            f"{name}: the model merges its {streams} residual streams in an unknown way: expected "
            "a merge as in DeepSeek V4, HY V4, Qwen 4 or Gemma 3n"
        )
    return merge, _final_norm(calls, merge(last), TOLERANCE[last.dtype])


def _final_norm(
    calls: Sequence[_Call], read: torch.Tensor, tolerance: float = 0.0
) -> ModuleCall | None:
    """Return the call that reads `read` `[1, pos, d_model]` and computes a norm, or None.

    A relative `tolerance` is for vectors that were computed in float32.
    """
    for call in calls:
        if not call.input_then.shape == read.shape == call.output_then.shape:
            continue
        same = difference(call.input_then, read) <= tolerance
        if same and not isinstance(call.module, nn.Linear):
            return _module_call(call)
    return None


def _module_call(call: _Call) -> ModuleCall:
    name = type(call.module).__name__
    return ModuleCall(name, call.module, call.input, call.output, call.output_then)


def _hidden_layer(
    calls: Sequence[_Call], norm: ModuleCall | None
) -> tuple[HiddenLayer, ModuleCall] | None:
    """Return the hidden layer of a head, behind the final norm, and the call of its own norm.

    Each module reads what the one before returns: a linear map, an activation and a norm.
    """
    if norm is None:
        return None
    chain, read = [], norm.given
    for _ in range(3):
        found = next((call for call in calls if _reads(call, read)), None)
        if found is None:
            return None
        chain.append(found)
        read = found.output_then
    linear, activation, own = chain
    if not isinstance(linear.module, nn.Linear) or list(activation.module.parameters()):
        return None
    matrix = linear.module.weight.detach().float().T
    bias = getattr(linear.module, "bias", None)
    offset = None if bias is None else bias.detach().float()
    merge = HiddenLayer(read_norm(norm), matrix, offset, activation.module)
    return merge, _module_call(own)


def _reads(call: _Call, vectors: torch.Tensor) -> bool:
    """Whether a module reads exactly these vectors and returns others of their shape."""
    shaped = call.input_then.shape == vectors.shape == call.output_then.shape
    return shaped and torch.equal(call.input_then, vectors)


def _width(model: PreTrainedModel) -> int:
    """Return the width of the vectors that the output head reads.

    Raises `ModelFailed` if the head is no linear map.
    """
    head: Any = model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise ModelFailed(
            f"the output head is a {type(head).__name__}: expected a linear map with a weight"
        )
    width: int = head.weight.shape[1]
    return width


def view(model: PreTrainedModel, reason: str) -> ModelView:
    """Map a decoder's residual stream; `reason` says why the parts of its blocks are unknown.

    Raises:
        ModelFailed: The model has no residual stream, its positions attend to later ones, or its
            logits are not those of final norm and head.
    """
    return view_of_stream(find_stream(model), [reason])


def view_of_stream(stream: Stream, reasons: Sequence[str]) -> ModelView:
    """Map a stream, with the reason for each block, or one for all."""
    model = stream.model
    config: Any = model.config.get_text_config()
    if not _is_causal(stream):
        raise ModelFailed(
            f"positions of this {config.model_type} depend on later ones: expected causal attention"
        )
    lens = lens_of_stream(stream)
    each = list(reasons) * (len(stream.blocks) if len(reasons) == 1 else 1)
    return ModelView(
        embedding=model.get_input_embeddings(),
        blocks=tuple(map(CoarseBlock, stream.blocks, each)),
        lens=lens,
        facts=ModelFacts(
            n_layers=len(stream.blocks),
            n_heads=0,
            n_kv_heads=0,
            d_model=lens.unembedding.d_model,
            n_streams=stream.count,
            d_head=0,
            d_mlp=0,
            n_experts=0,
            vocab_size=lens.unembedding.vocab,
            max_positions=max_positions(config),
        ),
        cache_argument=_cache_argument(stream),
    )


def max_positions(config: Any) -> int:
    """Return the longest input in tokens; `MAX_POSITIONS` if the configuration sets no limit."""
    found = (getattr(config, name, None) for name in CONTEXTS)
    return next((n for n in found if isinstance(n, int) and n > 0), MAX_POSITIONS)


def lens_of_stream(stream: Stream) -> LensHead:
    """Map final norm and head, with the scale and soft-cap that reproduce the model's logits.

    Raises:
        ModelFailed: No scale and soft-cap of the configuration do.
    """
    head: Any = stream.model.get_output_embeddings()
    width = _width(stream.model)
    if stream.last.shape[1] != width * stream.count:
        raise ModelFailed(
            f"the output head reads vectors of width {width}: expected {stream.last.shape[1]}, "
            "as in the residual stream"
        )
    norm: Norm = NoNorm.of_width(width, stream.last.device)
    if stream.norm is not None:
        norm = read_norm(stream.norm)
    bias = getattr(head, "bias", None)
    offset = None if bias is None else bias.detach().float()
    unembedding = Unembedding(head.weight)
    errors: dict[LensHead, float] = {}
    config = stream.model.config.get_text_config()
    for scale, cap in product(_scales(config), _caps(config)):
        lens = LensHead(norm, unembedding, offset, scale, cap, merge=stream.merge)
        error = _difference(lens.cap(lens.logits(lens.normed(stream.last))), stream.logits)
        if not errors or error < min(errors.values()):
            errors = {lens: error}
    (lens, error) = next(iter(errors.items()))
    if not error <= _tolerance(stream):
        raise ModelFailed(
            "final norm and output head do not give the model's logits from the last block's "
            f"output (relative error {error:.2g})"
        )
    return lens


def _tolerance(stream: Stream) -> float:
    """Return that of the model's data type: some models return logits in float32 (Nemotron-H)."""
    return max(TOLERANCE[stream.logits.dtype], TOLERANCE[stream.model.dtype])


def _scales(config: Any) -> list[float]:
    """List the factors that the configuration may give logits."""
    base = getattr(config, "dim_model_base", None)
    own = [base / config.hidden_size] if isinstance(base, int) and base > 0 else []
    return scales(config) + own


def _caps(config: Any) -> list[float | None]:
    """List None and the caps that the configuration may give logits, by any name."""
    found: list[float | None] = [None]
    for name, value in config.to_dict().items():
        if SOFT_CAP.search(name) and type(value) in {int, float} and value > 0:
            found.append(float(value))
    return list(dict.fromkeys(found))


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference relative to the largest logit; excluded tokens are left out."""
    excluded = expected.isneginf()
    distance = (found.float() - expected.float()).abs().masked_fill_(excluded, 0).max()
    largest = expected.float().abs().masked_fill_(excluded, 0).max()
    return float(distance / largest.clamp(min=1e-30))


# Maximum gradient with respect to later positions, relative to the largest gradient. It is 0 where
# a mask hides them, apart from rounding in scans over positions.
LATER = 1e-6


def _is_causal(stream: Stream) -> bool:
    """Whether the logits of the first half do not depend on the residual stream of the second."""
    leaf: list[torch.Tensor] = []

    def as_leaf(
        _module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        whole = nth_tensor(args, named)
        leaf.append(whole.detach().clone().requires_grad_())
        return (
            tuple(leaf[0] if value is whole else value for value in args),
            {name: leaf[0] if value is whole else value for name, value in named.items()},
        )

    half = stream.ids.shape[1] // 2
    handle = stream.blocks[0].register_forward_pre_hook(as_leaf, with_kwargs=True)
    try:
        with torch.enable_grad():
            logits = stream.model(input_ids=stream.ids, use_cache=False).logits[0, :half].float()
            weights = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
            value = (logits.masked_fill(logits.isneginf(), 0) * weights).sum()
            (gradient,) = torch.autograd.grad(value, leaf)
    finally:
        handle.remove()
    sizes = gradient.reshape(-1, gradient.shape[-1]).abs().amax(-1)
    return bool(sizes[half:].max() <= LATER * sizes.max())


def _cache_argument(stream: Stream) -> str | None:
    """Return the argument that continues a sequence with the logits of a whole pass, or None."""
    known = inspect.signature(stream.model.forward).parameters
    for name in CACHES:
        if name in known:
            try:
                found = torch.cat(list(_continued(stream, name)))
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
                continue  # a family without a cache, or with one of another kind
            expected = stream.logits[-len(found) :]
            if _difference(found, expected) <= _tolerance(stream):
                return name
    return None


@torch.no_grad()
def _continued(stream: Stream, argument: str) -> Iterator[torch.Tensor]:
    """Yield logits `[1, vocab]` of the last two tokens, each continuing the tokens before it."""
    cache: Any = None
    length = stream.ids.shape[1]
    for start, end in ((0, length - 2), (length - 2, length - 1), (length - 1, length)):
        passed: Any = stream.model(
            input_ids=stream.ids[:, start:end], use_cache=True, **{argument: cache}
        )
        cache = passed[argument]
        if cache is None:
            raise KeyError(argument)
        if start:
            yield passed.logits[0, -1:]


def reason_of(error: Exception, config: Any) -> str:
    """Return why the parts of a family's blocks are unknown, in one line."""
    if isinstance(error, ModelFailed):
        return str(error)
    return f"the structure of {config.model_type} is unknown: {one_line(error)}"
