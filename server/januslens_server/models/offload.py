"""Weights that accelerate keeps on the CPU or on disk, and brings for a module's forward alone.

Between calls such parameters are on the meta device: without numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from transformers import PreTrainedModel


def read_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """The module's own parameter with its numbers, where it computes; None: there is none."""
    with align_module_device(module):
        tensor: torch.Tensor | None = getattr(module, name, None)
        return tensor


def read_parameter(module: nn.Module, name: str) -> torch.Tensor:
    """As `read_tensor`, of a parameter that must be there."""
    with align_module_device(module):
        return module.get_parameter(name)


@contextmanager
def brought(network: PreTrainedModel) -> Iterator[None]:
    """Inside, all parameters that views are made of have their numbers.

    These are the head and what stands around it, and the blocks' norms and other vectors. The
    blocks' matrices are read one by one when they are needed, the embedding not at all. The model
    may run.
    """
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    in_blocks = {module for blocks in lists for module in blocks.modules()}
    embedding = network.get_input_embeddings()
    with ExitStack() as stack:
        for module in network.modules():
            wanted = _holds_vectors(module) if module in in_blocks else module is not embedding
            if wanted:
                stack.enter_context(held(module))
        yield


def _holds_vectors(module: nn.Module) -> bool:
    """Whether it has no matrix; norms of queries and keys may have a row for each head."""
    is_norm = "norm" in type(module).__name__.lower()
    return is_norm or all(p.dim() < 2 for p in module.parameters(recurse=False))


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Inside, the module's parameters have their numbers and keep them through its forward."""
    if not has_offloaded_params(module):
        yield
        return
    hook: Any = module._hf_hook  # noqa: SLF001 - accelerate has no other way to say it
    with align_module_device(module):
        hook.offload = False
        try:
            yield
        finally:
            hook.offload = True
