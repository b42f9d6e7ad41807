"""The training curriculum's mask: some layers see only the current and the previous token."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def previous_token_attention(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, the blocks' attention reaches the current and the previous token only.

    Args:
        blocks: transformer blocks of Hugging Face's GPT-2, whose `attn` takes the hidden states
            `[batch, pos, d_model]` and an additive `attention_mask` as keyword.
    """
    with ExitStack() as hooks:
        for block in blocks:
            attention = block.get_submodule("attn")
            hooks.callback(
                attention.register_forward_pre_hook(_mask_distant_tokens, with_kwargs=True).remove
            )
        yield


def _mask_distant_tokens(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    normed: Tensor = args[0]
    mask = previous_token_mask(normed.shape[1], normed.dtype)
    return args, {**kwargs, "attention_mask": mask}


def previous_token_mask(length: int, dtype: torch.dtype) -> Tensor:
    """An additive mask `[1, 1, query, key]`: 0 at distances 0 and 1, the lowest value elsewhere."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = (distance == 0) | (distance == 1)
    mask = torch.zeros(length, length, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    return mask[None, None]
