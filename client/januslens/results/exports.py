"""Convert results to pandas frames, networkx graphs, safetensors files, JSON lines and HTML."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from numpy.typing import NDArray

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from januslens.results.comparison import EdgeDifference, NodeDifference
    from januslens.results.gradient import EditCell, EditPreview, Effect, SegmentRow
    from januslens.results.graph import Edge, Node, Part
    from januslens.results.matrices import Component, Matrix
    from januslens.results.tokens import Token
    from januslens.results.vectors import NeuronHit, Tensor


@singledispatch
def notebook_html(result: Any) -> str:
    """Return the HTML that a notebook shows for a result."""
    raise TypeError(f"no notebook HTML for {type(result).__name__}")


@singledispatch
def page_html(result: Any, beside: Any) -> str:
    """Return an interactive HTML file with a result and, beside it, an overview or previews."""
    raise TypeError(f"no page for {type(result).__name__} and {type(beside).__name__}")


@singledispatch
def figure_of(result: Any, ax: Axes | None, **chosen: Any) -> Figure:  # noqa: ARG001 - of the kinds
    """Draw a figure of a result in the given axes, or in a new figure. Requires matplotlib."""
    raise TypeError(f"no figure for {type(result).__name__}")


@dataclass(frozen=True)
class PageFrame:
    """A page as the result of a notebook's cell.

    The notebook shows it in an iframe, from which its script cannot access the notebook.

    Attributes:
        html: The HTML file.
        height: Height of the frame in pixels.
    """

    html: str = field(repr=False)
    height: int

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


def require(library: str, extra: str, purpose: str) -> Any:
    """Import an optional library.

    Raises:
        ImportError: The library is not installed; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library.partition(".")[0]:
            raise  # the library is installed, but broken
        message = f"{purpose} needs {library}: pip install 'januslens[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error


def json_line(message: Message) -> str:
    """Return a message as one line of JSON, without a line break.

    Keys are sorted so that equal messages give equal lines; protobuf does not define the order of
    map entries.
    """
    return MessageToJson(message, indent=None, sort_keys=True)


def json_lines(messages: Iterable[Message]) -> Iterator[str]:
    """Return each message as one line of JSON."""
    return map(json_line, messages)


_COUNTS = (
    "layer",
    "position",
    "head",
    "source_position",
    "neuron",
    "expert",
    "members",
    "top_token_id",
    "target_rank",
)
_MEASURES = (
    "norm",
    "activation",
    "gradient_norm",
    "top_logit",
    "top_probability",
    "top_log_probability",
    "entropy_bits",
    "target_probability",
    "target_log_probability",
    "target_logit",
)
_NODE_FIELDS = (
    "id",
    "kind",
    "layer",
    "position",
    "head",
    "source_position",
    "neuron",
    "expert",
    "norm",
    "activation",
    "gradient_norm",
)
_EDGE_FIELDS = (
    "source",
    "target",
    "kind",
    "weight",
    "share",
    "attention",
    "logit_contribution",
    "overlap",
    "attribution",
)


def node_frame(
    nodes: Iterable[Node], prompt: Sequence[Token], leaving: Mapping[str, Edge]
) -> pd.DataFrame:
    """Return a frame with one row per node; absent values are `pd.NA`, NaN or None.

    `leaving` has the edge from each part to its sum, by the id of the part.
    """
    pandas = require("pandas", "analysis", "a frame of nodes")
    rows = [_node_row(node) | _place_row(node, leaving.get(node.id), prompt) for node in nodes]
    columns = [*_NODE_FIELDS, *_members_row(None), *_projection_row(None), *_PLACE_FIELDS]
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=columns).set_index("id")
    counts, measures = dict.fromkeys(_COUNTS, "Int64"), dict.fromkeys(_MEASURES, "float64")
    return frame.astype(counts | measures | {"logit_contribution": "float64", "share": "float64"})


def part_frame(parts: Iterable[Part], prompt: Sequence[Token]) -> pd.DataFrame:
    """Return a frame with one row per part, with the id of its sum."""
    listed = list(parts)
    leaving = {part.node.id: part.edge for part in listed if part.edge is not None}
    frame = node_frame([part.node for part in listed], prompt, leaving)
    frame["sum"] = [None if part.edge is None else part.edge.target for part in listed]
    return frame


_PLACE_FIELDS = ("token", "source_token", "share", "logit_contribution")


def _place_row(node: Node, edge: Edge | None, prompt: Sequence[Token]) -> dict[str, Any]:
    """Return the texts of a node's position and source, and its figures as a part of its sum."""
    return {
        "token": _text_at(node.position, prompt),
        "source_token": _text_at(node.source_position, prompt),
        "share": edge.share if edge else None,
        "logit_contribution": edge.logit_contribution if edge else None,
    }


def _text_at(position: int | None, prompt: Sequence[Token]) -> str | None:
    known = position is not None and position < len(prompt)
    return prompt[position].text if known and position is not None else None


_SEGMENT_FIELDS = (
    "segment",
    "layer",
    "kind",
    "mean_vjp_norm",
    "mean_target_rank",
    "positions",
)


def segment_frame(segments: Iterable[SegmentRow]) -> pd.DataFrame:
    """Return a frame with one row per matrix and segment."""
    pandas = require("pandas", "analysis", "a frame of segments")
    rows = [
        {name: getattr(row, name) for name in _SEGMENT_FIELDS} | {"kind": str(row.kind)}
        for row in segments
    ]
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=list(_SEGMENT_FIELDS))
    return frame.astype({"mean_vjp_norm": "float64", "mean_target_rank": "float64"})


_EDIT_FIELDS = ("layer", "strength", "gradient_cosine")
_EFFECT_TOKENS = ("target", "predicted_before", "predicted_after")
_EFFECT_FIELDS = (
    "label",
    *_EFFECT_TOKENS,
    "probability_before",
    "probability_after",
    "log_probability_before",
    "log_probability_after",
    "rank_before",
    "rank_after",
    "kl_bits",
)


def preview_frame(preview: EditPreview) -> pd.DataFrame:
    """Return a frame with one row per prompt, the edited one first; tokens are texts."""
    pandas = require("pandas", "analysis", "a frame of effects")
    rows = [_effect_row(effect) for effect in (preview.edited, *preview.probes)]
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=list(_EFFECT_FIELDS))
    return frame


def edit_grid_frame(cells: Iterable[EditCell]) -> pd.DataFrame:
    """Return a frame with one row per edit of a grid and prompt; tokens are texts."""
    pandas = require("pandas", "analysis", "a frame of effects")
    rows = [
        {name: getattr(cell, name) for name in _EDIT_FIELDS} | _effect_row(effect)
        for cell in cells
        for effect in (cell.edited, *cell.probes)
    ]
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=[*_EDIT_FIELDS, *_EFFECT_FIELDS])
    return frame.astype({"gradient_cosine": "float64"})


def _effect_row(effect: Effect) -> dict[str, Any]:
    tokens = {name: getattr(effect, name).text for name in _EFFECT_TOKENS}
    return {name: getattr(effect, name) for name in _EFFECT_FIELDS} | tokens


def edge_frame(edges: Iterable[Edge]) -> pd.DataFrame:
    """Return a frame with one row per edge."""
    pandas = require("pandas", "analysis", "a frame of edges")
    rows = [_edge_row(edge) for edge in edges]
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=list(_EDGE_FIELDS))
    measured = [name for name in _EDGE_FIELDS if name not in ("source", "target", "kind")]
    return frame.astype(dict.fromkeys(measured, "float64"))


_COMPARED_NODES = (
    "norm",
    "activation",
    "gradient_norm",
    "top_token",
    "top_token_id",
    "top_logit",
    "top_probability",
    "top_log_probability",
    "entropy_bits",
    "target_rank",
    "target_probability",
    "target_log_probability",
    "target_logit",
)
_COMPARED_EDGES = (
    "weight",
    "share",
    "attention",
    "logit_contribution",
    "overlap",
    "attribution",
)


def node_differences_frame(nodes: Iterable[NodeDifference]) -> pd.DataFrame:
    """Return a frame with one row per node of two traces; figures have `_before` and `_after`."""
    pandas = require("pandas", "analysis", "a frame of nodes")
    named = _NODE_FIELDS[: _NODE_FIELDS.index("norm")]
    columns = [*named, *_before_and_after(_COMPARED_NODES)]
    rows = []
    for node in nodes:
        before, after = _node_row(node.before), _node_row(node.after)
        figures = [row[name] for name in _COMPARED_NODES for row in (before, after)]
        rows.append([*(before[name] for name in named), *figures])
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=columns).set_index("id")
    counts = {column: "Int64" for column in columns if column.split("_before")[0] in _COUNTS}
    counts |= {column: "Int64" for column in columns if column.split("_after")[0] in _COUNTS}
    measures = dict.fromkeys(_before_and_after(_MEASURES), "float64")
    return frame.astype(counts | measures)


def edge_differences_frame(edges: Iterable[EdgeDifference]) -> pd.DataFrame:
    """Return a frame with one row per edge of two traces; figures have `_before` and `_after`."""
    pandas = require("pandas", "analysis", "a frame of edges")
    rows = []
    for edge in edges:
        before, after = _edge_row(edge.before), _edge_row(edge.after)
        figures = [row[name] for name in _COMPARED_EDGES for row in (before, after)]
        rows.append([before["source"], before["target"], before["kind"], *figures])
    columns = ["source", "target", "kind", *_before_and_after(_COMPARED_EDGES)]
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=columns)
    return frame.astype(dict.fromkeys(_before_and_after(_COMPARED_EDGES), "float64"))


def _before_and_after(names: Iterable[str]) -> list[str]:
    return [f"{name}_{when}" for name in names for when in ("before", "after")]


def directed_graph(
    known: Mapping[str, Node], nodes: Iterable[Node], edges: Iterable[Edge]
) -> nx.MultiDiGraph[str]:
    """Return a graph of node ids; the key of an edge is its kind.

    Attributes are numbers and strings, as networkx's GraphML, GEXF and JSON writers require. Lists
    of tokens are JSON strings, and characters that XML cannot hold are escaped.
    """
    networkx = require("networkx", "analysis", "a graph")
    graph: nx.MultiDiGraph[str] = networkx.MultiDiGraph()
    for node in nodes:
        graph.add_node(node.id, **_present(_node_row(node), without="id"))
    for edge in edges:
        if edge.source not in graph:  # in the graph of one layer: the output of an earlier layer
            graph.add_node(edge.source, **_present(_node_row(known[edge.source]), without="id"))
        attributes = _present(_edge_row(edge), without="source target")
        graph.add_edge(edge.source, edge.target, key=str(edge.kind), **attributes)
    return graph


def _node_row(node: Node) -> dict[str, Any]:
    row = {name: getattr(node, name) for name in _NODE_FIELDS}
    return row | {"kind": str(node.kind)} | _members_row(node) | _projection_row(node)


def _members_row(node: Node | None) -> dict[str, Any]:
    """Return the columns of the parts that an OTHER node sums; None for other nodes."""
    members = node.members if node else None
    return {
        "members": members.count if members else None,
        "members_digest": f"{members.digest:016x}" if members else None,
    }


def _projection_row(node: Node | None) -> dict[str, Any]:
    """Return the columns of a node's projection; without a projection they are None."""
    read = node.projection if node else None
    return {
        "top_token": read.top[0].token.text if read and read.top else None,
        "top_token_id": read.top[0].token.id if read and read.top else None,
        "top_logit": read.top[0].logit if read and read.top else None,
        "top_probability": read.top[0].probability if read and read.top else None,
        "top_log_probability": read.top[0].log_probability if read and read.top else None,
        "top_token_ids": [token.id for token in read.top_tokens] if read else None,
        "bottom_token_ids": [token.id for token in read.bottom_tokens] if read else None,
        "top_tokens": [token.text for token in read.top_tokens] if read else None,
        "bottom_tokens": [token.text for token in read.bottom_tokens] if read else None,
        "entropy_bits": read.entropy_bits if read else None,
        "target_rank": read.target_rank if read else None,
        "target_probability": read.target_probability if read else None,
        "target_log_probability": read.target_log_probability if read else None,
        "target_logit": read.target_logit if read else None,
    }


def _edge_row(edge: Edge) -> dict[str, Any]:
    row = {name: getattr(edge, name) for name in _EDGE_FIELDS}
    return row | {"kind": str(edge.kind)}


def _present(row: Mapping[str, Any], without: str) -> dict[str, Any]:
    left_out = without.split()
    return {
        name: _attribute(value)
        for name, value in row.items()
        if value is not None and name not in left_out
    }


def _attribute(value: Any) -> Any:
    if isinstance(value, list):
        listed = [xml_text(each) if isinstance(each, str) else each for each in value]
        return json.dumps(listed, ensure_ascii=False)
    return xml_text(value) if isinstance(value, str) else value


# Characters that XML 1.0 forbids, and the carriage return, which XML parsers turn into a line feed.
_NOT_XML = re.compile("[^\\t\\n\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


def xml_text(text: str) -> str:
    """Escape the characters that XML cannot hold as `<U+XXXX>`."""
    return _NOT_XML.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def component_frame(matrices: Iterable[Matrix], prompt_tokens: Sequence[Token]) -> pd.DataFrame:
    """Return a frame with one row per component; `token` is None if the prompt is unknown."""
    pandas = require("pandas", "analysis", "a frame of components")
    rows = [
        _component_row(matrix, component, prompt_tokens)
        for matrix in matrices
        for component in matrix.components
    ]
    frame: pd.DataFrame = pandas.DataFrame(rows, columns=_COMPONENT_COLUMNS)
    return frame.astype(dict.fromkeys(("expert", "predicted_rank", "target_rank"), "Int64"))


_COMPONENT_COLUMNS = [
    "layer",
    "kind",
    "expert",
    "position",
    "token",
    "input_norm",
    "vjp_norm",
    "size",
    "promoted",
    "suppressed",
    "top_tokens",
    "bottom_tokens",
    "predicted_rank",
    "target_rank",
    "entropy_bits",
]


def _component_row(
    matrix: Matrix, component: Component, prompt_tokens: Sequence[Token]
) -> list[Any]:
    read = component.projection
    known = component.position < len(prompt_tokens)
    return [
        matrix.layer,
        str(matrix.kind),
        matrix.expert,
        component.position,
        prompt_tokens[component.position].text if known else None,
        component.input_norm,
        component.vjp_norm,
        component.size,
        _texts(component.promoted),
        _texts(component.suppressed),
        _texts(read.top_tokens) if read else None,
        _texts(read.bottom_tokens) if read else None,
        component.predicted_rank,
        component.target_ranks[0] if component.target_ranks else None,
        read.entropy_bits if read else None,
    ]


def _texts(tokens: Iterable[Token]) -> list[str]:
    return [token.text for token in tokens]


_NEURON_COLUMNS = [
    "layer",
    "expert",
    "neuron",
    "rank",
    "logit",
    "probability",
    "top_tokens",
    "bottom_tokens",
    "entropy_bits",
]


def neuron_frame(neurons: Iterable[NeuronHit]) -> pd.DataFrame:
    """Return a frame with one row per neuron; `expert` is missing if the MLP has no experts."""
    pandas = require("pandas", "analysis", "a frame of neurons")
    frame: pd.DataFrame = pandas.DataFrame(
        [_neuron_row(hit) for hit in neurons], columns=_NEURON_COLUMNS
    )
    return frame.astype({"expert": "Int64"})


def _neuron_row(hit: NeuronHit) -> list[Any]:
    return [
        hit.layer,
        hit.expert,
        hit.neuron,
        hit.rank,
        hit.logit,
        hit.value.target_probability,
        [token.text for token in hit.value.top_tokens],
        [token.text for token in hit.value.bottom_tokens],
        hit.value.entropy_bits,
    ]


def tensor_frame(
    values: NDArray[Any], dimensions: Sequence[str], positions: Sequence[int]
) -> pd.DataFrame:
    """Return a frame of `values`; its columns are the elements of the last dimension."""
    pandas = require("pandas", "analysis", "a frame of activations")
    inner = [range(size) for size in values.shape[1:-1]]
    rows = pandas.MultiIndex.from_product([positions, *inner], names=dimensions[:-1])
    if not inner:
        rows = pandas.Index(positions, name=dimensions[0])
    columns = pandas.RangeIndex(values.shape[-1], name=dimensions[-1])
    flat = values.reshape(-1, values.shape[-1])
    frame: pd.DataFrame = pandas.DataFrame(flat, index=rows, columns=columns)
    return frame


_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors to a safetensors file in their own data types.

    The library cannot write bfloat16 from numpy. The format is the length of a JSON header as 64
    bits, little-endian, then the header and the elements of all tensors.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[tensor.data_type],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    with Path(path).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(tensor.data)


def save_factors(
    matrices: Iterable[Matrix], path: str | PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write `NAME.input`, `NAME.vjp` and `NAME.position` of every matrix."""
    files = require("safetensors.numpy", "analysis", "saving factors")
    arrays: dict[str, NDArray[np.generic]] = {}
    for matrix in matrices:
        inputs, vjps = matrix.factors()
        positions = [component.position for component in matrix.components]
        arrays[f"{matrix.name}.input"] = inputs
        arrays[f"{matrix.name}.vjp"] = vjps
        arrays[f"{matrix.name}.position"] = np.array(positions, np.int64)
    files.save_file(arrays, path, metadata=dict(metadata))
