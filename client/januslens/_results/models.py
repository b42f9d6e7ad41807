"""What a server serves."""

from __future__ import annotations

from dataclasses import dataclass

from januslens._notebook.others import models_html
from januslens._results.provenance import Guarantee, Provenance
from januslens.v1 import models_pb2


@dataclass(frozen=True)
class Model:
    """One configured model.

    Attributes:
        name: What requests call it.
        state: `LOADING`, `READY` or `FAILED`.
        state_reason: Why, where it failed.
        provenance: Its revision, architecture, data type and device.
        n_layers: Number of blocks.
        n_heads: Attention heads of a block.
        n_kv_heads: Key and value heads of a block.
        d_model: Width of the residual stream.
        d_head: Width of a head.
        d_mlp: Neurons of a block's MLP (of one expert).
        n_experts: Experts of a block; 0 = a plain MLP.
        vocab_size: Rows of the unembedding.
        max_positions: The longest prompt.
        guarantees: What the self-check at load measured.
    """

    name: str
    state: str
    state_reason: str
    provenance: Provenance
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    n_experts: int
    vocab_size: int
    max_positions: int
    guarantees: tuple[Guarantee, ...]

    @classmethod
    def from_message(cls, message: models_pb2.Model) -> Model:
        """Read one model."""
        return cls(
            name=message.name,
            state=models_pb2.Model.State.Name(message.state).removeprefix("STATE_"),
            state_reason=message.state_reason,
            provenance=Provenance.from_message(message.provenance),
            n_layers=message.n_layers,
            n_heads=message.n_heads,
            n_kv_heads=message.n_kv_heads,
            d_model=message.d_model,
            d_head=message.d_head,
            d_mlp=message.d_mlp,
            n_experts=message.n_experts,
            vocab_size=message.vocab_size,
            max_positions=message.max_positions,
            guarantees=tuple(Guarantee.from_message(g) for g in message.guarantees),
        )

    @property
    def ready(self) -> bool:
        """Whether requests for it are answered."""
        return self.state == "READY"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return models_html([self])


class Models(list[Model]):
    """The models of a server, in order of their names."""

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return models_html(self)
