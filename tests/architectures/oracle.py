"""Expected values from plain Hugging Face models, by forward passes and autograd only."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.falcon import modeling_falcon

from tests.architectures.cases import Case
from tests.architectures.tiny_models import plain
from tests.reference.interventions import attention_of_scores


@torch.no_grad()
def logits(case: Case, *, capped: bool = True) -> Tensor:
    """Logits `[pos, vocab]`; before the soft-cap unless `capped`."""
    network = plain(case)
    cap = getattr(network.config, "final_logit_softcapping", None)
    if not capped and cap is not None:
        network.config.final_logit_softcapping = None
    try:
        found: Tensor = network(torch.tensor([case.prompt]), use_cache=False).logits[0]
    finally:
        if cap is not None:
            network.config.final_logit_softcapping = cap
    return found


@torch.no_grad()
def attentions(case: Case) -> list[Tensor]:
    """Attention probabilities `[head, query, source]` of each layer."""
    if case.attention != "eager":
        return [_alibi_attention(states) for states in queries_and_keys(case)]
    found = plain(case)(torch.tensor([case.prompt]), use_cache=False, output_attentions=True)
    return [layer[0] for layer in found.attentions]


@dataclass
class EagerAttention:
    """The attention of one layer, as autograd sees it: tensors that keep their gradients.

    `pattern` is the output of the softmax and `scores` its input, both `[1, head, query, source]`,
    with the column of a sink. `capped` is the input of the soft cap's tanh, or None.
    """

    pattern: Tensor
    scores: Tensor
    capped: Tensor | None

    def gradients(self, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the probabilities, dL/da and dL/ds `[query, head, source]`."""
        length = self.pattern.shape[2]
        of_scores = self.scores.grad
        if self.capped is not None and cap is not None:
            assert self.capped.grad is not None
            of_scores = self.capped.grad / cap
        assert self.pattern.grad is not None
        assert of_scores is not None
        found = (self.pattern.detach(), self.pattern.grad, of_scores)
        pattern, of_pattern, of_scores = (t[0, :, :, :length].transpose(0, 1) for t in found)
        return pattern, of_pattern, of_scores


def attention_gradients(
    case: Case, loss: Callable[[Tensor], Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Attention probabilities, dL/da and dL/ds `[query, head, source]` of each layer."""
    network, softmax, tanh = plain(case), functional.softmax, torch.tanh
    fused = functional.scaled_dot_product_attention
    layers: list[EagerAttention] = []
    capped: list[Tensor] = []

    def seen_tanh(scores: Tensor) -> Tensor:
        if scores.ndim == 4:
            scores.retain_grad()
            capped.append(scores)
        return tanh(scores)

    def seen_softmax(scores: Tensor, *args: Any, **named: Any) -> Tensor:
        pattern = softmax(scores, *args, **named)
        if scores.ndim == 4:
            scores.retain_grad()
            pattern.retain_grad()
            layers.append(EagerAttention(pattern, scores, capped.pop() if capped else None))
        return pattern

    functional.softmax, torch.tanh = seen_softmax, seen_tanh  # type: ignore[assignment]
    functional.scaled_dot_product_attention = attention_of_scores  # type: ignore[assignment]
    try:
        loss(network(torch.tensor([case.prompt]), use_cache=False).logits[0]).backward()
    finally:
        functional.softmax, torch.tanh = softmax, tanh
        functional.scaled_dot_product_attention = fused
        network.zero_grad()
    cap = getattr(network.config.get_text_config(), "attn_logit_softcapping", None)
    return [layer.gradients(cap) for layer in layers]


def multipliers(case: Case) -> Mapping[int, float]:
    """What each block multiplies its sum by: 1 but in Gemma 4."""
    modules = plain(case).base_model.modules()
    found = [float(module.layer_scalar) for module in modules if hasattr(module, "layer_scalar")]
    return defaultdict(lambda: 1.0, enumerate(found))


@torch.no_grad()
def gates(case: Case) -> dict[int, Tensor]:
    """What multiplies the heads' results `[pos, head, d_head or 1]`, of layers with a gate."""
    network, found = plain(case), dict[int, Tensor]()
    with ExitStack() as hooks:
        for layer, attention in enumerate(_attentions(case, network)):
            gate = _GATES.get(case.family)
            if gate is not None:
                hooks.callback(
                    getattr(attention, gate.module)
                    .register_forward_hook(
                        lambda _module, _args, output, layer=layer, gate=gate: found.update(
                            {layer: gate.of(output[0])}
                        )
                    )
                    .remove
                )
        network(torch.tensor([case.prompt]), use_cache=False)
    return found


class _Gate(NamedTuple):
    """The linear map of a gate, and the gate of what it returns `[pos, features]`, by head."""

    module: str
    of: Callable[[Tensor], Tensor]


_GATES = {
    "laguna": _Gate("g_proj", lambda y: nn.functional.softplus(y)[..., None]),
    "qwen3_next": _Gate("q_proj", lambda y: y.unflatten(-1, (4, 2, -1))[:, :, 1].sigmoid()),
}


def gradients(case: Case, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """dL/dparameter by name, for every parameter that the loss depends on."""
    network = plain(case)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    value = loss(network(torch.tensor([case.prompt]), use_cache=False).logits[0])
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        value, list(parameters.values()), allow_unused=True
    )
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


@dataclass
class QueriesAndKeys:
    """Queries and keys `[heads, pos, d_head]` of one layer, as they enter the dot product.

    They are computed from the attention input, given as two leaves `[1, pos, d_model]`. The scales
    of the norms are fixed.
    """

    query_input: Tensor
    key_input: Tensor
    query: Tensor | None = None
    key: Tensor | None = None

    def dot(self, head: int, position: int, source: int) -> tuple[Tensor, Tensor]:
        """q k^T of one query head and one source, with the key of the head's group."""
        if self.query is None or self.key is None:
            raise ValueError("expected an attention that was seen, got none")
        group = self.query.shape[0] // self.key.shape[0]
        return self.query[head, position], self.key[head // group, source]

    def memory_key(self, head: int, position: int, source: int) -> Tensor:
        """The gradient of q k^T with respect to the attention input at the query's position."""
        query, key = self.dot(head, position, source)
        (found,) = torch.autograd.grad(query @ key.detach(), self.query_input, retain_graph=True)
        return found[0, position]

    def head_query(self, head: int, position: int) -> Tensor:
        """The gradient of q k^T with respect to the key's attention input, at one position."""
        query, key = self.dot(head, position, position)
        (found,) = torch.autograd.grad(query.detach() @ key, self.key_input, retain_graph=True)
        return found[0, position]


def queries_and_keys(case: Case) -> list[QueriesAndKeys]:
    """Capture queries and keys of every layer at the dot product in the model's forward pass."""
    network = plain(case)
    seen = _Seen()
    attentions = _attentions(case, network)
    with torch.enable_grad(), _scales_fixed(), ExitStack() as patches:
        for attention in attentions:
            patches.enter_context(seen.leaves(attention))
        patches.enter_context(seen.watching(case, network, attentions))
        network(torch.tensor([case.prompt]), use_cache=False)
    return [seen.layers[id(attention)] for attention in attentions]


# The attention module of a block, and the linear maps that read its input.
_ATTENTION_NAMES = ("self_attn", "attention", "self_attention", "attn")
_FUSED = ("query_key_value", "qkv_proj", "Wqkv", "c_attn")


def _attentions(case: Case, network: Any) -> list[Any]:
    text = getattr(network.base_model, "language_model", network)
    blocks = next(module for module in text.modules() if isinstance(module, nn.ModuleList))
    if case.family == "nemotron_h":  # blocks with attention come before the others
        return [block.mixer for block in blocks if block.block_type == "full_attention"]
    found = [
        next(getattr(block, name) for name in _ATTENTION_NAMES if hasattr(block, name))
        for block in blocks
    ]
    return [attention.attention if case.family == "gpt_neo" else attention for attention in found]


def _first_maps(attention: Any) -> list[Any]:
    """Return the linear maps of queries and keys that read the attention input."""
    if hasattr(attention, "kv_a_proj_with_mqa"):  # with latent vectors
        query = getattr(attention, "q_a_proj", None) or attention.q_proj
        return [query, attention.kv_a_proj_with_mqa]
    return [attention.q_proj, attention.k_proj]


class _Seen:
    """Records calls of attention modules by identity."""

    def __init__(self) -> None:
        self.layers: dict[int, QueriesAndKeys] = {}

    @contextmanager
    def leaves(self, attention: Any) -> Iterator[None]:
        """Put leaves at the inputs of the linear maps of query and key."""
        fused = next(
            (getattr(attention, name) for name in _FUSED if hasattr(attention, name)), None
        )
        maps = [fused] if fused is not None else _first_maps(attention)
        leaves: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            leaves.append(args[0].detach().requires_grad_())
            if len(leaves) == len(maps):
                self.layers[id(attention)] = QueriesAndKeys(leaves[0], leaves[-1])
            return (leaves[-1],)

        with ExitStack() as hooks:
            for module in maps:
                hooks.callback(module.register_forward_pre_hook(before).remove)
            yield

    def saw(self, attention: Any, query: Tensor, key: Tensor) -> None:
        layer = self.layers[id(attention)]
        layer.query, layer.key = query[0], key[0]

    @contextmanager
    def watching(self, case: Case, network: Any, attentions: Sequence[Any]) -> Iterator[None]:
        """Record the queries and keys that the family passes to its attention function."""
        modeling = sys.modules[type(network).__module__]
        with ExitStack() as patches:
            if case.family in _FROM_FUSED:
                split = _FROM_FUSED[case.family]
                for attention in attentions:
                    name = next(name for name in _FUSED if hasattr(attention, name))
                    hook = self._splitting(attention, split, network)
                    patches.callback(getattr(attention, name).register_forward_hook(hook).remove)
            elif hasattr(modeling, "eager_attention_forward"):
                watched = self._interface(modeling.eager_attention_forward)
                patches.enter_context(_replaced(modeling, "eager_attention_forward", watched))
            else:  # GPT-J and GPT-Neo have a method instead
                for attention in attentions:
                    watched = self._method(attention)
                    patches.enter_context(_replaced(attention, "_attn", watched))
            yield

    def _splitting(self, attention: Any, split: Any, network: Any) -> Any:
        def after(_module: nn.Module, _args: Any, fused: Tensor) -> None:
            self.saw(attention, *split(attention, fused, network))

        return after

    def _interface(self, forward: Any) -> Any:
        def watched(module: Any, query: Tensor, key: Tensor, *args: Any, **named: Any) -> Any:
            prescaled = named.get("scaling") == 1.0 and type(module).__name__ == "OPTAttention"
            unscaled = query / module.scaling if prescaled else query / _temperatures(module, query)
            self.saw(module, unscaled, key)
            return forward(module, query, key, *args, **named)

        return watched

    def _method(self, attention: Any) -> Any:
        forward = attention._attn

        def watched(query: Tensor, key: Tensor, *args: Any, **named: Any) -> Any:
            self.saw(attention, query, key)
            return forward(query, key, *args, **named)

        return watched


def _temperatures(module: Any, query: Tensor) -> Tensor:
    """What Llama 4 multiplies queries `[1, heads, pos, d_head]` by in layers without rotation."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return torch.ones(1)
    positions = torch.arange(1, query.shape[2] + 1)
    scales: Tensor = 1 + module.attn_scale * torch.log1p(positions // module.floor_scale)
    return scales[:, None]


def _bloom(attention: Any, fused: Tensor, _network: Any) -> tuple[Tensor, Tensor]:
    query, key, _value = attention._reshape(fused)
    return query, key


def _falcon(attention: Any, fused: Tensor, network: Any) -> tuple[Tensor, Tensor]:
    query, key, _value = (part.transpose(1, 2) for part in attention._split_heads(fused))
    if network.config.alibi:
        return query, key
    positions = torch.arange(fused.shape[1])[None]
    cos, sin = network.transformer.rotary_emb(fused, positions)
    turned: tuple[Tensor, Tensor] = modeling_falcon.apply_rotary_pos_emb(query, key, cos, sin)
    return turned


def _mpt(attention: Any, fused: Tensor, _network: Any) -> tuple[Tensor, Tensor]:
    if attention.clip_qkv:
        fused = fused.clamp(-attention.clip_qkv, attention.clip_qkv)
    query, key, _value = fused.chunk(3, dim=-1)
    heads = (attention.n_heads, attention.head_dim)
    return query.unflatten(-1, heads).transpose(1, 2), key.unflatten(-1, heads).transpose(1, 2)


_FROM_FUSED = {"bloom": _bloom, "falcon": _falcon, "mpt": _mpt}


@contextmanager
def _scales_fixed() -> Iterator[None]:
    """Detach the norms' denominators from the graph."""
    rsqrt, power = torch.rsqrt, torch.pow

    def fixed_pow(x: Tensor, exponent: Any) -> Tensor:
        found = power(x, exponent)
        inverse_root = isinstance(exponent, float) and exponent == -0.5  # Gemma 4's norms
        return found.detach() if inverse_root else found

    def fixed_rsqrt(x: Tensor) -> Tensor:
        return rsqrt(x).detach()

    def fixed_layer_norm(
        x: Tensor, _shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred * fixed_rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        scaled = normed if weight is None else normed * weight
        return scaled if bias is None else scaled + bias

    with (
        _replaced(torch, "rsqrt", fixed_rsqrt),
        _replaced(torch, "pow", fixed_pow),
        _replaced(nn.functional, "layer_norm", fixed_layer_norm),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _alibi_attention(states: QueriesAndKeys) -> Tensor:
    """Compute Falcon's attention: add ALiBi once, then scale the sum."""
    if states.query is None or states.key is None:
        raise ValueError("expected an attention that was seen, got none")
    heads, length, d_head = states.query.shape
    scores = states.query @ states.key.transpose(-1, -2)
    alibi = modeling_falcon.build_alibi_tensor(
        torch.ones(1, length, dtype=torch.long), heads, torch.float32
    )
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    scaled: Tensor = (scores + alibi) * d_head**-0.5
    return scaled.masked_fill(later, -torch.inf).softmax(-1).detach()
