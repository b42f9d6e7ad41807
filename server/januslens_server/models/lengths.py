"""Check attention beyond every length that a configuration names, on a miniature of the model.

Sliding windows, original context lengths and position-dependent scalings have no effect on prompts
shorter than they are, so a short prompt cannot show whether an adapter maps them correctly. A
miniature has the model's family, layers and head size, small widths, random weights, and lengths of
a few tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from januslens_server.capture import capturing
from januslens_server.errors import ModelFailed
from januslens_server.graph.attention import head_row
from januslens_server.models.graph_inputs import block_weights, layer_activations, layer_taps
from januslens_server.models.views import Block, ModelView

# Tokens of a miniature's prompt; more than every length in `SHORT`.
PROMPT_LENGTH = 24

# Fields of configurations in transformers that hold a length, and a miniature's values for them.
# Most values differ, so that a confusion of two fields is noticed.
SHORT = {
    "attention_chunk_size": 7,
    "attention_window": 5,
    "attention_window_size": 5,
    "floor_scale": 3,
    "index_topk": 4,
    "keep_window_size": 5,
    "local_attention": 5,
    "original_max_position_embeddings": 8,
    "relative_max_distance": 6,
    "sliding_window": 5,
    "sliding_window_size": 5,
    "sliding_windows": 5,
    "window_size": 5,
}

# Sizes of every miniature, by the names that families use.
WIDTHS = {
    "intermediate_size": 24,
    "intermediate_size_mlp": 24,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "shared_expert_intermediate_size": 16,
    "vocab_size": 64,
}
MAX_POSITIONS = 2 * PROMPT_LENGTH

# d_model of a miniature in families where d_head is a separate setting.
NARROW = 64

# Maximum number of a miniature's parameters, 800 MB; deep models with wide heads have most.
MAX_PARAMETERS = 200_000_000

# Maximum relative error of a head's result in float32. One source position too many or too few, or
# a wrong scale, changes it by several per cent.
TOLERANCE = 1e-4

Path = tuple[str, ...]


@dataclass(frozen=True)
class Length:
    """One length of a configuration: its path and its value, a tuple if it has one per layer."""

    path: Path
    value: int | tuple[int, ...]

    @property
    def name(self) -> str:
        """Dotted name, for example `rope_parameters.original_max_position_embeddings`."""
        return ".".join(self.path)

    def of_layer(self, layer: int) -> int:
        """Return the length in one layer."""
        return self.value[layer] if isinstance(self.value, tuple) else self.value


def lengths_of(config: PreTrainedConfig) -> list[Length]:
    """List the lengths that a model's configuration sets."""
    text = config.get_text_config()
    return list(_lengths(text.to_dict()))


def _lengths(values: dict[str, Any], path: Path = ()) -> Iterator[Length]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _lengths(value, (*path, name))
        elif name in SHORT and _is_length(value):
            yield Length((*path, name), tuple(value) if isinstance(value, list) else value)


def _is_length(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_length(each) for each in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def miniature(
    model: PreTrainedModel, n_heads: int, n_kv_heads: int, d_head: int, lengths: Sequence[Length]
) -> PreTrainedModel:
    """Build a small model of the same family with random float32 weights and short `lengths`.

    Raises:
        ModelFailed: No small model of the family can be built.
    """
    config: Any = copy.deepcopy(model.config.get_text_config())
    for length in lengths:
        _shorten(config, length)
    small = copy.deepcopy(config)
    grouped = n_kv_heads < n_heads
    widths = WIDTHS | {
        "num_attention_heads": 4 if grouped else 2,
        "num_key_value_heads": 2,
        "num_kv_heads": 2,
        "hidden_size": d_head * (4 if grouped else 2),
        "head_dim": d_head,
    }
    if "kv_lora_rank" in config.to_dict():  # the widths of heads have fields of their own
        widths["hidden_size"] = NARROW
        del widths["head_dim"]
    if n_kv_heads == 1:
        widths |= {"num_key_value_heads": 1, "num_kv_heads": 1}
    narrow = copy.deepcopy(config)
    if "head_dim" in config.to_dict():  # heads need not fill the residual stream
        _resize(narrow, widths | {"hidden_size": NARROW})
    _resize(small, widths)
    _resize(config, {"vocab_size": WIDTHS["vocab_size"]})
    reasons = []
    for candidate in (narrow, small, config):
        try:
            return _built(candidate, model)
        except (
            AttributeError,
            IndexError,
            ModelFailed,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            reasons.append(str(error).split("\n", maxsplit=1)[0])
    names = ", ".join(length.name for length in lengths)
    raise ModelFailed(
        f"cannot check the attention of prompts longer than {names}: a small model of the family "
        f"could not be built ({reasons[0]})"
    )


def _shorten(config: Any, length: Length) -> None:
    short = SHORT[length.path[-1]]
    value = length.value
    shorter = [min(v, short) for v in value] if isinstance(value, tuple) else min(value, short)
    holder = config
    for name in length.path[:-1]:
        holder = holder[name] if isinstance(holder, dict) else getattr(holder, name)
    if isinstance(holder, dict):
        holder[length.path[-1]] = shorter
    else:
        setattr(holder, length.path[-1], shorter)


def _resize(config: Any, widths: dict[str, int]) -> None:
    """Set those widths that the configuration has, and move special tokens into the vocabulary.

    Where heads differ by layer, their number and widths stay.
    """
    own = set(config.to_dict()) | set(config.attribute_map)
    if varying := getattr(config, "per_layer_attributes", None):
        own -= varying | {"num_attention_heads", "num_key_value_heads"}
    for name, width in widths.items():
        if name in own and getattr(config, name) is not None:
            setattr(config, name, width)
    if "max_position_embeddings" in own and isinstance(config.max_position_embeddings, int):
        within = min(config.max_position_embeddings, MAX_POSITIONS)
        config.max_position_embeddings = max(within, PROMPT_LENGTH)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)


def _built(config: Any, model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in skeleton.parameters())
    if size > MAX_PARAMETERS:
        raise ModelFailed(f"it would have {size:,} parameters")
    attention = model.config._attn_implementation  # noqa: SLF001 - no public reader
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            for parameter in network.parameters():
                _draw(parameter)
    built: PreTrainedModel = network.eval().requires_grad_(requires_grad=False)
    with torch.inference_mode():
        built(input_ids=prompt_of(built), use_cache=False)
    return built


def _draw(parameter: nn.Parameter) -> None:
    """Draw values that give attention scores of a few units; vectors vary around their defaults."""
    noise = torch.randn_like(parameter)
    if parameter.dim() > 1:
        parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    else:
        parameter.add_(0.3 * noise)


def prompt_of(network: PreTrainedModel) -> torch.Tensor:
    """Return token ids `[1, pos]` for a miniature; neighbouring ids differ."""
    vocab_size = network.get_input_embeddings().get_parameter("weight").shape[0]
    return (torch.arange(PROMPT_LENGTH) * 7 + 3)[None] % vocab_size


@torch.inference_mode()
def captured_layers(
    network: PreTrainedModel, ids: torch.Tensor, blocks: Iterable[Block]
) -> list[dict[str, torch.Tensor]]:
    """Run a forward pass and return the captured tensors of every block by name."""
    blocks = list(blocks)
    taps = {(i, name): tap for i, b in enumerate(blocks) for name, tap in layer_taps(b).items()}
    with capturing(taps) as captured:
        network(input_ids=ids, use_cache=False)
    found: list[dict[str, torch.Tensor]] = [{} for _ in blocks]
    for (layer, name), tensor in captured.items():
        found[layer][name] = tensor
    return found


@torch.inference_mode()
def attention_error(
    block: Block, captured: dict[str, torch.Tensor], positions: Sequence[int], enough: float
) -> float:
    """Largest relative error of the heads' recomputed results at these positions.

    The error at position p is `||sum_s a_ps v_s - z_p|| / ||z_p||`. Stops at the first position
    with an error above `enough`.
    """
    length = captured["query"].shape[-2]
    acts = layer_activations(block, captured, length)
    weights = block_weights(block).attention
    if weights is None:
        raise ValueError("expected a block with attention")
    worst = 0.0
    for position in positions:
        row = head_row(position, acts, weights)
        rebuilt = torch.einsum("hs,hse->he", row.pattern, row.values)
        errors = (rebuilt - row.concat).norm(dim=-1) / row.concat.norm(dim=-1)
        error = float(errors.max())
        worst = error if error != error else max(worst, error)  # noqa: PLR0124 - NaN
        if not worst <= enough:
            break
    return worst


def check_lengths(
    model: PreTrainedModel, view: ModelView, adapter: Callable[[PreTrainedModel], ModelView]
) -> None:
    """Check that an adapter maps the attention correctly beyond every length.

    Args:
        model: The model.
        view: Its view.
        adapter: The adapter that built the view; it also maps the miniatures.

    Raises:
        ModelFailed: The attention of a miniature is not reproduced. The error names the first
            length that suffices to show it.
    """
    lengths = lengths_of(model.config)
    if not lengths:
        return
    facts = view.facts

    def unlike(shortened: Sequence[Length]) -> int | None:
        small = miniature(model, facts.n_heads, facts.n_kv_heads, facts.d_head, shortened)
        return first_mismatch(small, adapter(small))

    layer = unlike(lengths)
    if layer is not None:
        one = next((length for length in lengths if unlike([length]) is not None), None)
        names = ", ".join(length.name for length in (lengths if one is None else [one]))
        raise ModelFailed(
            f"cannot reproduce the attention of layer {layer} for prompts longer than {names}: the "
            "model uses this setting in an unknown way"
        )


def first_mismatch(network: PreTrainedModel, view: ModelView) -> int | None:
    """Return the first layer whose attention is not reproduced at every position, or None."""
    positions = range(PROMPT_LENGTH - 1, -1, -1)
    layers = captured_layers(network, prompt_of(network), view.known.values())
    for (layer, block), captured in zip(view.known.items(), layers, strict=True):
        if not attention_error(block, captured, positions, TOLERANCE) <= TOLERANCE:
            return layer
    return None
