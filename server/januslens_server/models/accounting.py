"""Every parameter of a block belongs to a part of the view, or the model is refused.

A part that nobody has read (routed experts beside a shared one, a gate, an adapter) adds to the
residual stream and would be missing from every sum.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from januslens_server.errors import ModelFailed
from januslens_server.models.experts import Experts
from januslens_server.models.views import Block, Linear, ModelView

# Parameters that an error names.
LISTED = 3


def check_parameters(network: nn.Module, view: ModelView) -> None:
    """Raise `ModelFailed` naming the parameters of blocks that no part of the view holds."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    unread = [
        names.get(id(parameter), name)
        for block in view.blocks
        for name, parameter in _unread(block)
    ]
    if unread:
        more = ", ..." if len(unread) > LISTED else ""
        raise ModelFailed(
            f"{len(unread)} parameters of the blocks belong to no part that is known here: "
            f"{', '.join(unread[:LISTED])}{more}"
        )


def _unread(block: Block) -> Iterator[tuple[str, nn.Parameter]]:
    """The block's parameters that its view does not account for."""
    matrices = [m for m in block.matrices.values() if isinstance(m, Linear)]
    whole = {id(m.module) for m in matrices if _covered(m, matrices)}
    experts = block.mlp if isinstance(block.mlp, Experts) else None
    for path, module in block.module.named_modules():
        if id(module) in whole or _is_norm(module):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if name == "sinks" and block.attention.scoring.sinks is not None:
                continue
            if experts is not None and _of_experts(experts, module, name, parameter):
                continue
            yield full, parameter


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm, which adds nothing itself; those over heads have a row for each."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _covered(matrix: Linear, matrices: list[Linear]) -> bool:
    """Whether the maps that one module holds are together all of its columns."""
    parts = [m.columns for m in matrices if m.module is matrix.module]
    if None in parts:
        return True
    weight = matrix.module.get_parameter("weight")
    width = weight.shape[1 if matrix.stored_as_rows else 0]
    return len({column for part in parts for column in part or ()}) == width


def _of_experts(experts: Experts, module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether it is one of the experts' stacked matrices, or of the router that chooses among them.

    A router gives a number for each expert, in the module of the whole MLP.
    """
    if module is experts.module:
        return name.removesuffix("_bias") in {"gate_up_proj", "down_proj"}
    inside = any(module is other for other in experts.block.modules())
    n_experts = experts.module.get_parameter("down_proj").shape[0]
    return inside and parameter.shape[0] == n_experts and parameter.dim() <= 2
