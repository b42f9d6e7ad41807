"""Read and change the sites of plain Hugging Face models with forward hooks.

The expected values for activations and interventions. For each model type, `FAMILIES` names the
modules whose inputs and outputs are the sites of docs/semantics.md; nothing of the server is
imported. A hook changes its tensor in place, so a change of the residual stream also reaches the
skip connection that holds the same tensor.

Sizes in shapes: T positions, H heads, e dimensions of a head, d dimensions of the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Key = tuple[str, int | None]
"""A site's name and its layer; the layer is None for the sites of the whole model."""

Values = dict[Key, Tensor]

WITHOUT_LAYER = ("EMBEDDING", "FINAL_NORM", "LOGITS")


@dataclass(frozen=True)
class Family:
    """Names of modules: `blocks` and `final_norm` from the model, the others from a block.

    Attributes:
        blocks: The list of blocks.
        final_norm: The norm before the unembedding.
        attention: The module that holds the linear maps of attention.
        output: W_O, whose input is HEAD_RESULT, from `attention`.
        mlp_input: The module whose input is MLP_INPUT.
        ff2: The linear map whose input is NEURONS; None for a mixture of experts.
        middle: The module whose input is RESIDUAL_MID; None if the sublayers are parallel.
        attention_output: The module whose output is ATTENTION_OUTPUT; None = W_O.
        mlp_output: The module whose output is MLP_OUTPUT; None = FF2.
        router: The module whose output begins with the router logits; None without experts.
    """

    blocks: str
    final_norm: str
    attention: str
    output: str
    mlp_input: str
    ff2: str | None
    middle: str | None
    attention_output: str | None = None
    mlp_output: str | None = None
    router: str | None = None


_LLAMA = Family(
    blocks="model.layers",
    final_norm="model.norm",
    attention="self_attn",
    output="o_proj",
    mlp_input="mlp.gate_proj",
    ff2="mlp.down_proj",
    middle="post_attention_layernorm",
)


def _like(family: Family, **changes: str | None) -> Family:
    return Family(**{**vars(family), **changes})


_GEMMA2 = _like(
    _LLAMA,
    middle="pre_feedforward_layernorm",
    attention_output="post_attention_layernorm",
    mlp_output="post_feedforward_layernorm",
)
_PHI = _like(
    _LLAMA,
    final_norm="model.final_layernorm",
    output="dense",
    mlp_input="mlp.fc1",
    ff2="mlp.fc2",
    middle=None,
)
_MIXTURE = _like(
    _LLAMA,
    mlp_input="mlp",
    ff2=None,
    mlp_output="mlp",
    router="mlp.gate",
)
_GPT2 = Family(
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    attention="attn",
    output="c_proj",
    mlp_input="mlp.c_fc",
    ff2="mlp.c_proj",
    middle="ln_2",
)
_GPT_NEOX = Family(
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    attention="attention",
    output="dense",
    mlp_input="mlp.dense_h_to_4h",
    ff2="mlp.dense_4h_to_h",
    middle=None,
)
_BLOOM = Family(
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    attention="self_attention",
    output="dense",
    mlp_input="mlp.dense_h_to_4h",
    ff2="mlp.dense_4h_to_h",
    middle="post_attention_layernorm",
)


def _gpt_neox(config: Any) -> Family:
    middle = None if config.use_parallel_residual else "post_attention_layernorm"
    return _like(_GPT_NEOX, middle=middle)


def _falcon(config: Any) -> Family:
    parallel = config.new_decoder_architecture or config.parallel_attn
    return _like(_BLOOM, middle=None if parallel else "post_attention_layernorm")


def _stablelm(config: Any) -> Family:
    return _like(_LLAMA, middle=None) if config.use_parallel_residual else _LLAMA


FAMILIES: Mapping[str, Family | Callable[[Any], Family]] = {
    "bloom": _BLOOM,
    "cohere": _like(_LLAMA, middle=None),
    "falcon": _falcon,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3": _like(
        _GEMMA2, blocks="model.language_model.layers", final_norm="model.language_model.norm"
    ),
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_neo": _like(_GPT2, attention="attn.attention", output="out_proj"),
    "gpt_neox": _gpt_neox,
    "gpt_oss": _like(_MIXTURE, router="mlp.router"),
    "gptj": _like(_GPT2, output="out_proj", mlp_input="mlp.fc_in", ff2="mlp.fc_out", middle=None),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTURE,
    "mpt": Family(
        blocks="transformer.blocks",
        final_norm="transformer.norm_f",
        attention="attn",
        output="out_proj",
        mlp_input="ffn.up_proj",
        ff2="ffn.down_proj",
        middle="norm_2",
    ),
    "olmo": _LLAMA,
    "olmo2": _like(
        _LLAMA,
        middle="mlp",
        attention_output="post_attention_layernorm",
        mlp_output="post_feedforward_layernorm",
    ),
    "olmoe": _MIXTURE,
    "opt": Family(
        blocks="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        attention="self_attn",
        output="out_proj",
        mlp_input="fc1",
        ff2="fc2",
        middle="final_layer_norm",
    ),
    "phi": _PHI,
    "phi3": _like(_LLAMA, mlp_input="mlp.gate_up_proj"),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _MIXTURE,
    "smollm3": _LLAMA,
    "stablelm": _stablelm,
    "starcoder2": _like(_LLAMA, mlp_input="mlp.c_fc", ff2="mlp.c_proj"),
}


@dataclass(frozen=True)
class Change:
    """A change of one site; empty indices mean all of them.

    Attributes:
        site: The site's name, such as `BLOCK_OUTPUT`.
        operation: Takes the site's name, its layer and the selected values; returns new values.
        layers: Layers, from 0.
        positions: Positions, from 0.
        heads: Heads of a site that has them, or neurons or experts of one that has these.
        sources: Source positions of ATTENTION_PATTERN, or neurons of a mixture's experts.
    """

    site: str
    operation: Callable[[Key, Tensor], Tensor]
    layers: Sequence[int] = ()
    positions: Sequence[int] = ()
    heads: Sequence[int] = ()
    sources: Sequence[int] = ()

    def holds_at(self, key: Key) -> bool:
        site, layer = key
        return site == self.site and (layer is None or not self.layers or layer in self.layers)

    def index(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the indices of the selected values in `values` `[T, ...]`."""
        wanted = (self.positions, self.heads, self.sources)
        chosen = (
            torch.tensor(list(indices) or range(size))
            for indices, size in zip(wanted, values.shape[:3], strict=False)
        )
        return torch.meshgrid(*chosen, indexing="ij")

    def apply(self, key: Key, values: Tensor) -> None:
        """Change `values` `[T, ...]` in place; of a pattern `[T, H, S]`, the selected sources."""
        index = self.index(values)
        values[index] = self.operation(key, values[index])


def zero() -> Callable[[Key, Tensor], Tensor]:
    return lambda _key, values: torch.zeros_like(values)


def scale(factor: float) -> Callable[[Key, Tensor], Tensor]:
    return lambda _key, values: values * factor


def set_to(tensor: Tensor) -> Callable[[Key, Tensor], Tensor]:
    return lambda _key, values: tensor.to(values.dtype).expand_as(values)


def add(tensor: Tensor, coefficient: float = 1.0) -> Callable[[Key, Tensor], Tensor]:
    return lambda _key, values: values + coefficient * tensor.to(values.dtype)


def block() -> Callable[[Key, Tensor], Tensor]:
    """Hide sources: the change is applied to the scores before the softmax."""
    return lambda _key, scores: torch.full_like(scores, -torch.inf)


def take_from(other: Values, chosen: Change) -> Callable[[Key, Tensor], Tensor]:
    """Return values of another pass at the positions and heads of `chosen`."""
    return lambda key, values: other[key][chosen.index(other[key])].to(values.dtype)


class HookedModel:
    """A copy of a plain model, of which every site can be read and changed.

    Args:
        network: A causal language model with a model type of `FAMILIES`, with eager attention or
            with `sdpa` that it calls itself.
    """

    def __init__(self, network: Any) -> None:
        self.network = copy.deepcopy(network).eval()
        self.config = getattr(self.network.config, "text_config", self.network.config)
        found = FAMILIES[self.network.config.model_type]
        self.family = found if isinstance(found, Family) else found(self.config)
        self.blocks: Any = self.network.get_submodule(self.family.blocks)
        self._multiplier = self._without_residual_multiplier()

    def run(self, ids: Sequence[int], changes: Sequence[Change] = ()) -> Values:
        """Run the prompt under the changes and return the values of all sites, `[T, ...]`.

        ATTENTION_PATTERN is `[T, H, T]`; NEURONS of a mixture is `[T, experts, neurons]`, 0 for
        experts that the router does not choose. Changes at one site apply in the given order.
        """
        visit = _Visit(changes, len(ids))
        with torch.no_grad(), ExitStack() as hooks:
            for layer, block_module in enumerate(self.blocks):
                self._hook_block(hooks, visit, layer, block_module)
            final = self.network.get_submodule(self.family.final_norm)
            hooks.enter_context(_on_output(final, visit, ("FINAL_NORM", None)))
            hooks.enter_context(_softmax_seen(visit))
            logits = self.network(torch.tensor([list(ids)]), use_cache=False).logits
        visit.values["LOGITS", None] = logits[0].clone()
        return visit.values

    def _hook_block(self, hooks: ExitStack, visit: _Visit, layer: int, module: Any) -> None:
        family = self.family
        attention = module.get_submodule(family.attention)
        output = attention.get_submodule(family.output)
        if layer == 0:
            hooks.enter_context(_on_input(module, visit, ("EMBEDDING", None)))
        self._hook_maps(hooks, visit, layer, attention)
        heads = self._n_heads
        hooks.enter_context(_on_input(output, visit, ("HEAD_RESULT", layer), heads))
        adds = module.get_submodule(family.attention_output) if family.attention_output else output
        hooks.enter_context(
            _on_output(adds, visit, ("ATTENTION_OUTPUT", layer), multiplier=self._multiplier)
        )
        if family.middle is not None:
            middle = module.get_submodule(family.middle)
            hooks.enter_context(_on_input(middle, visit, ("RESIDUAL_MID", layer)))
        self._hook_mlp(hooks, visit, layer, module)
        hooks.enter_context(_on_output(module, visit, ("BLOCK_OUTPUT", layer)))

    def _hook_mlp(self, hooks: ExitStack, visit: _Visit, layer: int, module: Any) -> None:
        family = self.family
        if family.router is not None and hasattr(module.mlp, "experts"):
            self._hook_experts(hooks, visit, layer, module)
        elif family.router is not None:  # a dense layer between mixtures
            family = _LLAMA
        into = module.get_submodule(family.mlp_input)
        hooks.enter_context(_on_input(into, visit, ("MLP_INPUT", layer)))
        if family.ff2 is not None:
            ff2 = module.get_submodule(family.ff2)
            hooks.enter_context(_on_input(ff2, visit, ("NEURONS", layer)))
        adds = module.get_submodule(family.mlp_output or family.ff2)
        hooks.enter_context(
            _on_output(adds, visit, ("MLP_OUTPUT", layer), multiplier=self._multiplier)
        )

    def _hook_experts(self, hooks: ExitStack, visit: _Visit, layer: int, module: Any) -> None:
        experts = module.mlp.experts

        def after_router(_module: nn.Module, _args: Any, out: Any) -> tuple[Tensor, Tensor, Tensor]:
            visit.see(("ROUTER", layer), out[0])
            return _routing(self.config, out[0])

        def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            neurons = experts_neurons(experts, x)
            visit.see(("NEURONS", layer), neurons)
            used = functional.one_hot(chosen, neurons.shape[1]).sum(1)
            visit.values["NEURONS", layer] *= used[:, :, None]
            return experts_output(experts, neurons, chosen, weights)

        router = module.get_submodule(self.family.router)
        hooks.callback(router.register_forward_hook(after_router).remove)
        original, experts.forward = experts.forward, forward
        hooks.callback(setattr, experts, "forward", original)

    def _hook_maps(self, hooks: ExitStack, visit: _Visit, layer: int, attention: Any) -> None:
        fused = next((name for name in _FUSED if hasattr(attention, name)), None)
        first = getattr(attention, fused or "q_proj")
        hooks.enter_context(_on_input(first, visit, ("ATTENTION_INPUT", layer)))
        if fused is not None:

            def after(_module: nn.Module, _args: Any, mixed: Tensor) -> None:
                self._clamp(mixed)
                for site, view in _parts(self.config, mixed[0], self._n_heads).items():
                    by_head = view.flatten(1, -2)  # a copy where heads are in groups
                    visit.see((site, layer), by_head)
                    view.copy_(by_head.view_as(view))

            hooks.callback(first.register_forward_hook(after).remove)
            return
        for site, letter in (("QUERY", "q"), ("KEY", "k"), ("VALUE", "v")):
            normed = (f"{letter}_norm", f"{letter}_layernorm")
            name = next((n for n in normed if hasattr(attention, n)), f"{letter}_proj")

            def heads(
                _module: nn.Module, _args: Any, out: Tensor, key: Key = (site, layer)
            ) -> None:
                self._clamp(out)
                visit.see(key, _by_head(out, attention.head_dim, visit.length))

            hooks.callback(getattr(attention, name).register_forward_hook(heads).remove)

    def _clamp(self, out: Tensor) -> None:
        """Clip what is seen; attention clips once more what a change puts in."""
        if clip := getattr(self.config, "clip_qkv", None) or _clip_of_mpt(self.config):
            out.clamp_(-clip, clip)

    @property
    def _n_heads(self) -> int:
        names = ("num_attention_heads", "n_head", "n_heads", "num_heads")
        found: int = next(getattr(self.config, n) for n in names if hasattr(self.config, n))
        return found

    def _without_residual_multiplier(self) -> float:
        """Multiply in the hooks, so that the output of a sublayer is what is added."""
        multiplier: float = getattr(self.config, "residual_multiplier", 1.0)
        for module in self.network.modules():
            if hasattr(module, "residual_multiplier"):
                module.residual_multiplier = 1.0
        return multiplier


class _Visit:
    """One pass: the changes to apply, and the values that were read."""

    def __init__(self, changes: Sequence[Change], length: int) -> None:
        self.changes = changes
        self.length = length
        self.values: Values = {}
        self.layer_of_pattern = 0

    def see(self, key: Key, view: Tensor) -> None:
        """Change the view `[T, ...]` in place, and keep a copy."""
        for change in self.changes:
            if change.holds_at(key):
                change.apply(key, view)
        self.values[key] = view.clone()


def _routing(config: Any, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, weights and ids of the chosen experts."""
    if config.model_type == "gpt_oss":
        top, chosen = logits.topk(config.num_experts_per_tok)
        return logits, top.softmax(-1), chosen
    top, chosen = logits.softmax(-1).topk(config.num_experts_per_tok)
    if config.model_type == "mixtral" or config.norm_topk_prob:
        top = top / top.sum(-1, keepdim=True)
    return logits, top, chosen


def experts_neurons(experts: Any, x: Tensor) -> Tensor:
    """Return the input of every expert's second linear map, `[T, experts, neurons]`."""
    if hasattr(experts, "gate_up_proj_bias"):
        both = torch.einsum("td,edm->tem", x, experts.gate_up_proj) + experts.gate_up_proj_bias
        gated: Tensor = experts._apply_gate(both)
        return gated
    if not hasattr(experts, "gate_up_proj"):  # Nemotron-H
        ungated: Tensor = experts.act_fn(torch.einsum("td,emd->tem", x, experts.up_proj))
        return ungated
    gate, up = torch.einsum("td,emd->tem", x, experts.gate_up_proj).chunk(2, dim=-1)
    product: Tensor = experts.act_fn(gate) * up
    return product


def experts_output(experts: Any, neurons: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum `[T, d]` of the chosen experts' results, given `experts_neurons`."""
    if hasattr(experts, "down_proj_bias"):
        out = torch.einsum("tem,emd->ted", neurons, experts.down_proj) + experts.down_proj_bias
    else:
        out = torch.einsum("tem,edm->ted", neurons, experts.down_proj)
    of_chosen = out.gather(1, chosen[..., None].expand(-1, -1, out.shape[-1]))
    total: Tensor = (of_chosen * weights[..., None]).sum(1)
    return total


def _clip_of_mpt(config: Any) -> float | None:
    return config.attn_config.clip_qkv if config.model_type == "mpt" else None


_FUSED = ("query_key_value", "qkv_proj", "Wqkv", "c_attn")


def _parts(config: Any, mixed: Tensor, n_heads: int) -> dict[str, Tensor]:
    """Return views of query, key and value `[T, H, e]` of a fused linear map."""
    kind, size = config.model_type, config.hidden_size // n_heads
    sites = ("QUERY", "KEY", "VALUE")
    if kind in ("gpt2", "mpt"):
        return {
            site: part.unflatten(-1, (n_heads, size))
            for site, part in zip(sites, mixed.chunk(3, dim=-1), strict=True)
        }
    if kind == "phi3":
        kv = config.num_key_value_heads
        widths = [heads * size for heads in (n_heads, kv, kv)]
        parts = mixed.split(widths, dim=-1)
        return {
            site: part.unflatten(-1, (-1, size)) for site, part in zip(sites, parts, strict=True)
        }
    if kind == "falcon" and config.new_decoder_architecture:
        groups = mixed.unflatten(-1, (config.num_kv_heads, -1, size))
        return {
            "QUERY": groups[:, :, :-2],  # [T, groups, H / groups, e]
            "KEY": groups[:, :, -2],
            "VALUE": groups[:, :, -1],
        }
    if kind == "falcon" and config.multi_query:
        heads = mixed.unflatten(-1, (n_heads + 2, size))
        return {"QUERY": heads[:, :-2], "KEY": heads[:, -2:-1], "VALUE": heads[:, -1:]}
    heads = mixed.unflatten(-1, (n_heads, 3, size))
    return {site: heads[:, :, i] for i, site in enumerate(sites)}


def _by_head(out: Tensor, size: int, length: int) -> Tensor:
    """Return a view `[T, H, e]` of the result of a linear map, or of a norm of queries or keys."""
    if out.ndim == 3:
        by_head: Tensor = out[0].unflatten(-1, (-1, size))
        return by_head
    if out.shape[1] == out.shape[2]:
        raise ValueError("expected a prompt that is not as long as the model has heads")
    return out[0] if out.shape[1] == length else out[0].transpose(0, 1)


@contextmanager
def _on_input(
    module: nn.Module, visit: _Visit, key: Key, heads: int | None = None
) -> Iterator[None]:
    def before(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensor = args[0] if args else named["hidden_states"]
        view = _rows(tensor, visit.length)
        visit.see(key, view if heads is None else view.unflatten(-1, (heads, -1)))

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _on_output(
    module: nn.Module, visit: _Visit, key: Key, multiplier: float = 1.0
) -> Iterator[None]:
    def after(_module: nn.Module, _args: Any, out: Any) -> None:
        view = _rows(out[0] if isinstance(out, tuple) else out, visit.length)
        if multiplier != 1.0:
            view.mul_(multiplier)
        visit.see(key, view)

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _rows(tensor: Tensor, length: int) -> Tensor:
    """Return a view `[T, d]` of `[1, T, d]` or `[T, d]`."""
    return tensor.view(length, -1)


@contextmanager
def _softmax_seen(visit: _Visit) -> Iterator[None]:
    """Read attention's scores and probabilities, from the only softmax with four dimensions."""
    softmax, fused = functional.softmax, functional.scaled_dot_product_attention

    def seen(scores: Tensor, *args: Any, **named: Any) -> Tensor:
        if scores.ndim != 4:
            return softmax(scores, *args, **named)
        layer, length = visit.layer_of_pattern, visit.length
        visit.layer_of_pattern += 1
        key = ("ATTENTION_PATTERN", layer)
        scores = scores.clone()
        view = scores[0, :, :, :length].transpose(0, 1)  # without a sink's column
        for change in visit.changes:
            if change.holds_at(key):
                change.apply(key, view)
        probabilities = softmax(scores, *args, **named)
        visit.values[key] = probabilities[0, :, :, :length].transpose(0, 1).clone()
        return probabilities

    functional.softmax = seen  # type: ignore[assignment]
    functional.scaled_dot_product_attention = attention_of_scores  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.softmax, functional.scaled_dot_product_attention = softmax, fused


def attention_of_scores(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    """Compute `scaled_dot_product_attention` with a softmax that can be observed."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if named.get("is_causal"):
        scores = scores.masked_fill(later, -torch.inf)
    mask = named.get("attn_mask")
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return functional.softmax(scores, dim=-1) @ value
