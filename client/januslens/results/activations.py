"""The tensors of a forward pass, as arrays with named dimensions and as a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from januslens.results import exports
from januslens.results.exports import notebook_html
from januslens.results.kinds import SITES, Site
from januslens.results.models import LayerLevel, Provenance, StageTime
from januslens.results.tokens import Token
from januslens.results.vectors import Tensor
from januslens.v1 import activations_pb2, common_pb2, streams_pb2

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ActivationsHeader:
    """Prompt and positions of a request for activations; the first event of its stream.

    Attributes:
        request_id: Id of the call, as in the server's log.
        provenance: The model's revision, data type, device and library versions.
        prompt_tokens: The prompt's tokens, one per position.
        positions: The positions that are read, ascending.
        limited_layers: The layers that lack a requested site, and why.
    """

    request_id: str
    provenance: Provenance
    prompt_tokens: tuple[Token, ...]
    positions: tuple[int, ...]
    limited_layers: tuple[LayerLevel, ...] = ()

    @classmethod
    def from_message(cls, message: streams_pb2.StreamHeader) -> ActivationsHeader:
        """Read the header."""
        return cls(
            request_id=message.request_id,
            provenance=Provenance.from_message(message.provenance),
            prompt_tokens=tuple(Token.from_message(token) for token in message.prompt_tokens),
            positions=tuple(message.positions),
            limited_layers=tuple(
                LayerLevel.from_message(level) for level in message.limited_layers
            ),
        )


@dataclass(frozen=True)
class ActivationsSummary:
    """The last event of a stream of activations; a stream without one is incomplete.

    Attributes:
        times: Seconds by stage on the server.
    """

    times: tuple[StageTime, ...]

    @classmethod
    def from_message(cls, message: streams_pb2.StreamSummary) -> ActivationsSummary:
        """Read the summary."""
        return cls(times=tuple(StageTime.from_message(time) for time in message.times))


# The dimensions after that of the positions.
_DIMENSIONS = {
    Site.QUERY: ("head", "d_head"),
    Site.KEY: ("kv_head", "d_head"),
    Site.VALUE: ("kv_head", "d_head"),
    Site.ATTENTION_PATTERN: ("head", "source"),
    Site.HEAD_RESULT: ("head", "d_head"),
    Site.NEURONS: ("neuron",),
    Site.ROUTER: ("expert",),
    Site.LOGITS: ("token",),
}
_OF_EXPERTS = ("expert", "neuron")


@dataclass(frozen=True)
class SiteTensor:
    """The values of one site in one layer.

    Attributes:
        site: The site.
        layer: Layer, from 0; None for EMBEDDING, FINAL_NORM and LOGITS.
        tensor: The values as the server sent them, `[positions, ...]`.
    """

    site: Site
    layer: int | None
    tensor: Tensor = field(repr=False)

    @classmethod
    def from_message(cls, last: activations_pb2.SiteTensor, data: bytes) -> SiteTensor:
        """Read one tensor; `data` has the elements of all its pieces, `last` is one of them."""
        name = common_pb2.DataType.Name(last.piece.data_type)
        data_type = name.removeprefix("DATA_TYPE_").lower()
        return cls(
            site=SITES.member(last.site),
            layer=last.layer if last.HasField("layer") else None,
            tensor=Tensor(data_type, tuple(last.shape), data),
        )

    @property
    def name(self) -> str:
        """The site and the layer, for example `BLOCK_OUTPUT.3`."""
        return _name(self.site, self.layer)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The names of the axes, for example `("position", "head", "d_head")`."""
        of_experts = self.site is Site.NEURONS and len(self.tensor.shape) == 3
        names = _OF_EXPERTS if of_experts else _DIMENSIONS.get(self.site, ("d_model",))
        return ("position", *names)

    def numpy(self) -> NDArray[Any]:
        """Return a copy as an array; bfloat16 becomes float32, because numpy does not support it.

        Raises:
            ValueError: The data type is unknown.
        """
        return self.tensor.numpy()


def tensor_name(message: activations_pb2.SiteTensor) -> str:
    """Return the name of the tensor that a message has a piece of."""
    return _name(SITES.member(message.site), message.layer if message.HasField("layer") else None)


def _name(site: Site, layer: int | None) -> str:
    return str(site) if layer is None else f"{site}.{layer}"


@dataclass(frozen=True, repr=False)
class Activations:
    """The tensors of one forward pass.

    Attributes:
        header: Prompt, positions and provenance.
        tensors: The tensors by layer, in the order of the forward pass.
        summary: Times; None if the stream was interrupted.
    """

    header: ActivationsHeader
    tensors: tuple[SiteTensor, ...]
    summary: ActivationsSummary | None

    @property
    def prompt_tokens(self) -> tuple[Token, ...]:
        """The prompt's tokens, one per position."""
        return self.header.prompt_tokens

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions that were read, ascending: the first axis of every array."""
        return self.header.positions

    @property
    def provenance(self) -> Provenance:
        """The model's revision, data type, device and library versions."""
        return self.header.provenance

    def tensor(self, site: Site | str, layer: int | None = None) -> SiteTensor:
        """Return the tensor of a site in a layer; without a layer, the only one of the site.

        Raises:
            KeyError: The site was not read in this layer, or in several layers and none is given.
            ValueError: There is no such site.
        """
        wanted = Site.of(site)
        found = [tensor for tensor in self.tensors if tensor.site is wanted]
        if layer is not None:
            found = [tensor for tensor in found if tensor.layer == layer]
        if len(found) != 1:
            names = ", ".join(tensor.name for tensor in self.tensors)
            problem = "is in several layers" if found else "was not read"
            raise KeyError(f"{_name(wanted, layer)} {problem}; expected one of {names or 'none'}")
        return found[0]

    def array(self, site: Site | str, layer: int | None = None) -> NDArray[Any]:
        """Return the values of a site in a layer as an array `[positions, ...]`.

        `dimensions` of the tensor names the axes. bfloat16 becomes float32, because numpy does
        not support it.

        Raises:
            KeyError: The site was not read in this layer, or in several layers and none is given.
            ValueError: There is no such site.
        """
        return self.tensor(site, layer).numpy()

    def stack(self, site: Site | str) -> NDArray[Any]:
        """Return the values of a site in all layers that were read, `[layers, positions, ...]`.

        Raises:
            KeyError: The site was not read.
            ValueError: There is no such site, or its shape differs between layers.
        """
        wanted = Site.of(site)
        arrays = [tensor.numpy() for tensor in self.tensors if tensor.site is wanted]
        if not arrays:
            raise KeyError(f"{wanted} was not read")
        return np.stack(arrays)

    def to_pandas(self, site: Site | str, layer: int | None = None) -> pd.DataFrame:
        """Return the values of a site in a layer as a data frame. Requires pandas.

        The rows are the positions, or the pairs of position and head or expert. The
        columns are the elements of the last dimension.

        Raises:
            KeyError: The site was not read in this layer, or in several layers and none is given.
            ValueError: There is no such site.
        """
        tensor = self.tensor(site, layer)
        return exports.tensor_frame(tensor.numpy(), tensor.dimensions, self.positions)

    def save(self, path: str | Path) -> None:
        """Write all tensors to a safetensors file, bit for bit.

        The tensors have names such as `BLOCK_OUTPUT.3`; `positions` are the positions that were
        read. The metadata has the prompt's token ids and the provenance.

        Raises:
            OSError: The file cannot be written.
        """
        exports.save_tensors(path, self._arrays(), self._metadata())

    def _arrays(self) -> dict[str, Tensor]:
        positions = np.array(self.positions, "<i8")
        shape = (len(self.positions),)
        named = {tensor.name: tensor.tensor for tensor in self.tensors}
        return named | {"positions": Tensor("int64", shape, positions.tobytes())}

    def _metadata(self) -> dict[str, str]:
        return {
            "model": self.provenance.model,
            "revision": self.provenance.revision,
            "data_type": self.provenance.data_type,
            "prompt_token_ids": " ".join(str(token.id) for token in self.prompt_tokens),
        }

    def __repr__(self) -> str:
        """A one-line description, because there may be many values."""
        prompt = "".join(token.text for token in self.prompt_tokens)
        sites = dict.fromkeys(str(tensor.site) for tensor in self.tensors)
        size = sum(len(tensor.tensor.data) for tensor in self.tensors)
        return (
            f"<Activations of {prompt!r}: {len(self.tensors)} tensors of "
            f"{', '.join(sites) or 'no site'}, {size:,} bytes>"
        )

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)

    @classmethod
    def from_parts(
        cls,
        header: ActivationsHeader,
        tensors: Sequence[SiteTensor],
        summary: ActivationsSummary | None,
    ) -> Activations:
        """Combine the events of a stream."""
        return cls(header=header, tensors=tuple(tensors), summary=summary)
