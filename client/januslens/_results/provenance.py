"""Where a result comes from, how long it took and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from januslens.v1 import common_pb2


@dataclass(frozen=True)
class Provenance:
    """Which weights computed a result, where and with what.

    Attributes:
        model: Its name at this server.
        revision: The hub's commit, or a hash of a local folder's weights.
        architecture: The model class, e.g. `GPT2LMHeadModel`.
        data_type: What the weights are held in.
        device: Where they are.
        attention: The attention implementation.
        versions: Library name to version.
    """

    model: str
    revision: str
    architecture: str
    data_type: str
    device: str
    attention: str
    versions: Mapping[str, str]

    @classmethod
    def from_message(cls, message: common_pb2.Provenance) -> Provenance:
        """Read one provenance."""
        return cls(
            model=message.model,
            revision=message.revision,
            architecture=message.architecture,
            data_type=message.data_type,
            device=message.device,
            attention=message.attention,
            versions=dict(message.versions),
        )


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the model, against which ranks and layers are read.

    Attributes:
        n_layers: Transformer blocks.
        n_heads: Query heads of each attention.
        d_mlp: Neurons of one MLP, or of one expert.
        vocab_size: Tokens that the unembedding knows: ranks lie below it.
        d_head: Width of one head: ATTENTION_NEURON i belongs to head `i // d_head`.
    """

    n_layers: int
    n_heads: int
    d_mlp: int
    vocab_size: int
    d_head: int

    @classmethod
    def from_message(cls, message: common_pb2.ModelSizes) -> ModelSizes:
        """Read the sizes."""
        return cls(
            n_layers=message.n_layers,
            n_heads=message.n_heads,
            d_mlp=message.d_mlp,
            vocab_size=message.vocab_size,
            d_head=message.d_head,
        )


@dataclass(frozen=True)
class StageTime:
    """Seconds that one stage of a request took on the server."""

    stage: str
    seconds: float

    @classmethod
    def from_message(cls, message: common_pb2.StageTime) -> StageTime:
        """Read one time."""
        return cls(message.stage, message.seconds)


@dataclass(frozen=True)
class Guarantee:
    """One property of a model, as measured (docs/guarantees.md says how)."""

    name: str
    measured_error: float
    tolerance: float
    held: bool

    @classmethod
    def from_message(cls, message: common_pb2.Guarantee) -> Guarantee:
        """Read one guarantee."""
        return cls(message.name, message.measured_error, message.tolerance, message.held)
