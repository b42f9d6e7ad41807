"""The models of a server, the provenance of results, and cost estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from januslens.errors import LimitViolation, limit_name
from januslens.results.exports import notebook_html
from januslens.v1 import common_pb2, cost_pb2, models_pb2, server_pb2, streams_pb2


@dataclass(frozen=True)
class Provenance:
    """The model, device and library versions that computed a result.

    Attributes:
        model: The model's name on this server.
        revision: The hub's commit, or a hash of a local folder's weights.
        architecture: The model class, e.g. `GPT2LMHeadModel`.
        data_type: Data type of the weights.
        device: Device of the weights.
        attention: The attention implementation.
        versions: Versions of the libraries, by name.
        quantization: How the checkpoint stores quantised weights, e.g. `GGUF Q4_K, Q6_K` or
            `MXFP4`; empty if it has none. The numbers are exact for the dequantised weights.
        lora: The LoRA that changes the weights, e.g. `rank 8 on q_proj, over the model base`; empty
            if there is none.
    """

    model: str
    revision: str
    architecture: str
    data_type: str
    device: str
    attention: str
    versions: Mapping[str, str]
    quantization: str = ""
    lora: str = ""

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
            quantization=message.quantization,
            lora=message.lora,
            versions=dict(message.versions),
        )


@dataclass(frozen=True)
class Waiting:
    """The place of a request that waits for the server's device.

    Attributes:
        requests_ahead: Number of requests that are expected to use the device before it, including
            the running one.
        expected_seconds: Expected seconds until it starts, from the estimates of these requests.
        waited_seconds: Seconds since the server admitted it.
    """

    requests_ahead: int
    expected_seconds: float
    waited_seconds: float

    @classmethod
    def from_message(cls, message: streams_pb2.Waiting) -> Waiting:
        """Read one place."""
        return cls(message.requests_ahead, message.expected_seconds, message.waited_seconds)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the model, for interpreting ranks, layers, heads and neurons.

    Attributes:
        n_layers: Number of layers.
        n_heads: Number of query heads per layer.
        d_mlp: Number of neurons of one MLP, or of one expert.
        vocab_size: Number of rows of the unembedding; ranks are below it.
        d_head: Width of one head; ATTENTION_NEURON i belongs to head `i // d_head`.
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
class Sublayer:
    """A sublayer of a block: a module whose output is added to the residual stream.

    Attributes:
        module: Name of the module in its block.
        kind: `ATTENTION`, `LINEAR_ATTENTION`, `STATE_SPACE`, `CONVOLUTION`, `MLP`, `EXPERTS` or
            `OTHER`.
    """

    module: str
    kind: str

    @classmethod
    def from_message(cls, message: common_pb2.Sublayer) -> Sublayer:
        """Read one sublayer."""
        name = common_pb2.SublayerKind.Name(message.kind).removeprefix("SUBLAYER_KIND_")
        return cls(message.module, name)


@dataclass(frozen=True)
class LinearMap:
    """A linear map `y = x W + b` of a block, with `W: [d_in, d_out]`.

    Attributes:
        module: Name of its module in the block.
        d_in: Number of rows of W.
        d_out: Number of columns of W.
    """

    module: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class LayerLevel:
    """How much of a layer can be shown.

    Attributes:
        layer: The layer, from 0.
        level: `STREAM` for the residual stream before and after the block, `SUBLAYERS` for what
            each sublayer adds as well, `PARTS` for all parts.
        reason: Why the level is below `PARTS`; empty otherwise.
        sublayers: The sublayers at the level `SUBLAYERS`, in the order of the pass.
        linear_maps: The linear maps that `gradient_lens` takes as `modules`; in `Model.levels`
            only.
    """

    layer: int
    level: str
    reason: str
    sublayers: tuple[Sublayer, ...] = ()
    linear_maps: tuple[LinearMap, ...] = ()

    @classmethod
    def from_message(cls, message: common_pb2.LayerLevel) -> LayerLevel:
        """Read one level."""
        name = common_pb2.Level.Name(message.level).removeprefix("LEVEL_")
        sublayers = tuple(Sublayer.from_message(each) for each in message.sublayers)
        maps = tuple(LinearMap(each.module, each.d_in, each.d_out) for each in message.linear_maps)
        return cls(message.layer, name, message.reason, sublayers, maps)


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
    """A measured property of a model, with its tolerance (see docs/guarantees.md)."""

    name: str
    measured_error: float
    tolerance: float
    held: bool

    @classmethod
    def from_message(cls, message: common_pb2.Guarantee) -> Guarantee:
        """Read one guarantee."""
        return cls(message.name, message.measured_error, message.tolerance, message.held)


@dataclass(frozen=True)
class Model:
    """One configured model.

    Attributes:
        name: The model's name in requests.
        state: `LOADING`, `READY`, `FAILED` or `UNLOADING`; a newer server may have others.
        state_reason: Why the model failed; empty in other states.
        provenance: The model's revision, architecture, data type and device.
        n_layers: Number of layers.
        n_heads: Number of query heads per layer; 0 = no layer shows heads.
        n_kv_heads: Number of key-value heads per layer.
        d_model: Width of the residual stream.
        d_head: Width of a head.
        d_mlp: Number of neurons of one MLP, or of one expert; 0 = no layer shows neurons.
        n_experts: Number of routed experts per layer; 0 = a plain MLP. A shared expert, which
            every position uses, has this number.
        vocab_size: Number of rows of the unembedding.
        max_positions: Maximum length of a prompt, in tokens.
        guarantees: Results of the self-check at load.
        levels: How much of each layer can be shown.
        loaded_fraction: How much of the loading is done, from 0 to 1.
        residual_streams: Number of residual streams side by side, 1 in most models. With several,
            vectors of the residual stream have the width `residual_streams * d_model`.
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
    levels: tuple[LayerLevel, ...] = ()
    loaded_fraction: float = 0.0
    residual_streams: int = 1

    @classmethod
    def from_message(cls, message: models_pb2.Model) -> Model:
        """Read one model."""
        return cls(
            name=message.name,
            state=_state_name(message.state),
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
            levels=tuple(LayerLevel.from_message(level) for level in message.levels),
            loaded_fraction=message.loaded_fraction,
            residual_streams=message.residual_streams or 1,
        )

    @property
    def ready(self) -> bool:
        """Whether the model serves requests."""
        return self.state == "READY"

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


def _state_name(number: int) -> str:
    """Return the name of a state, or its number if a newer server sent it."""
    known = models_pb2.Model.State.DESCRIPTOR.values_by_number
    name: str = known[number].name if number in known else str(number)
    return name.removeprefix("STATE_")


class Models(list[Model]):
    """The models of a server, in order of their names."""

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


@dataclass(frozen=True)
class ServerInfo:
    """A server, and what it allows this client.

    Attributes:
        version: Version of the server.
        rpcs: Names of the RPCs that the client may use.
        limits: The configured limits on the cost of a request, in seconds or bytes by name.
    """

    version: str
    rpcs: tuple[str, ...]
    limits: Mapping[str, float]

    @classmethod
    def from_message(cls, message: server_pb2.GetServerInfoResponse) -> ServerInfo:
        """Read the response."""
        limits = {limit_name(limit.limit): limit.allowed for limit in message.limits}
        return cls(message.version, tuple(message.rpcs), limits)


@dataclass(frozen=True)
class CostEstimate:
    """The estimated cost of a request, and whether the server would admit it.

    Attributes:
        seconds: Device time if nothing else runs, usually within a factor of two.
        projected_vectors: Maximum number of vectors that are projected.
        flops: Maximum number of floating-point operations.
        device_bytes: Maximum memory on the device, without the weights.
        stream_bytes: Maximum size of all response messages.
        admissible: Whether an idle server would admit the request.
        exceeded: Every limit that the request exceeds; empty if admissible.
    """

    seconds: float
    projected_vectors: int
    flops: float
    device_bytes: int
    stream_bytes: int
    admissible: bool
    exceeded: tuple[LimitViolation, ...]

    @property
    def limit_exceeded(self) -> str:
        """The name of the first limit that the request exceeds; empty if admissible."""
        return self.exceeded[0].limit if self.exceeded else ""

    @classmethod
    def from_message(cls, message: cost_pb2.EstimateCostResponse) -> CostEstimate:
        """Read the response."""
        return cls(
            seconds=message.seconds,
            projected_vectors=message.projected_vectors,
            flops=message.flops,
            device_bytes=message.device_bytes,
            stream_bytes=message.stream_bytes,
            admissible=message.admissible,
            exceeded=tuple(map(LimitViolation.from_message, message.exceeded)),
        )
