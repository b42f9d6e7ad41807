"""The rows of each result in the tables of a survey.

Rows are read from the messages of a result column by column, without a Python object for each node
or edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from januslens.results.activations import Activations
from januslens.results.generation import GeneratedText
from januslens.results.gradient import Gradient
from januslens.results.intervene import InterventionEffects
from januslens.results.kinds import EDGE_KINDS, ENDS, NODE_KINDS, SIDES, Numbering
from januslens.results.matrices import kind_of, matrix_name
from januslens.results.models import Provenance
from januslens.results.tokens import Token
from januslens.results.trace import Trace
from januslens.results.vectors import Tensor
from januslens.surveys.schema import COLUMNS, SCHEMAS, TEXT
from januslens.v1 import common_pb2, edits_pb2, gradient_lens_pb2, lens_pb2, streams_pb2, trace_pb2


@dataclass
class Rows:
    """The rows and tensors of one prompt.

    Attributes:
        prompt: Number of the prompt.
        provenance: The model and libraries that computed the result.
        batches: A batch of rows for each table.
        tensors: Tensors by their name in the file.
    """

    prompt: int
    provenance: Provenance
    batches: dict[str, pa.RecordBatch] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, table: str, columns: Mapping[str, Any]) -> None:
        """Add the rows of a table, given as lists or arrays by column, except `prompt`."""
        schema = SCHEMAS[table]
        count = len(next(iter(columns.values())))
        numbers = pa.array(np.full(count, self.prompt, np.int64))
        arrays = [
            numbers if column.name == "prompt" else _array(columns[column.name], column.type)
            for column in schema
        ]
        self.batches[table] = pa.RecordBatch.from_arrays(arrays, schema=schema)

    @property
    def token_count(self) -> int | None:
        """Number of tokens of the prompt; None if the call does not return them."""
        return self.batches["tokens"].num_rows if "tokens" in self.batches else None

    @property
    def size(self) -> int:
        """Bytes of the rows and tensors in memory."""
        rows = sum(int(batch.nbytes) for batch in self.batches.values())
        return rows + sum(len(tensor.data) for tensor in self.tensors.values())


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


class _Vocabulary:
    """Texts of the tokens of a stream, looked up for whole columns."""

    def __init__(self, tokens: Iterable[Token | common_pb2.Token]) -> None:
        texts = {token.id: token.text for token in tokens}
        ids = sorted(texts)
        self._ids = np.array(ids, np.int64)
        self._texts = pa.array([texts[token_id] for token_id in ids], TEXT)

    def texts(self, ids: NDArray[np.int64]) -> pa.Array:
        """Return the text of each id; null for an id that the stream did not name."""
        if not len(self._ids):
            return pa.nulls(len(ids), TEXT)
        places = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        return self._texts.take(pa.array(places, mask=self._ids[places] != ids))

    def list_of(self, ids: Sequence[int]) -> list[str | None]:
        """Return the texts of some ids as a list."""
        found: list[str | None] = self.texts(np.array(ids, np.int64)).to_pylist()
        return found


def _column(messages: Sequence[Any], name: str) -> list[Any]:
    """Return a field of each message; None where an optional field is not set."""
    values = list(map(attrgetter(name), messages))
    if not messages or not messages[0].DESCRIPTOR.fields_by_name[name].has_presence:
        return values
    # A value other than 0 is set; asking takes longer than reading.
    pairs = zip(values, messages, strict=True)
    return [value if value or one.HasField(name) else None for value, one in pairs]


def _list_column(messages: Sequence[Any], name: str) -> list[list[Any]]:
    """Return a repeated field of each message; a slice is faster to iterate than the field."""
    return [values[:] for values in map(attrgetter(name), messages)]


def _columns(messages: Sequence[Any], *names: str) -> dict[str, list[Any]]:
    return {name: _column(messages, name) for name in names}


def _names(numbering: Numbering[Any, Any], numbers: Iterable[int]) -> list[str]:
    known: dict[int, str] = {}
    return [
        known.get(number) or known.setdefault(number, str(numbering.member(number)))
        for number in numbers
    ]


def _lists(rows: Sequence[Sequence[Any]], kind: Any, absent: Sequence[bool] | None) -> pa.Array:
    """Return lists as an array; null where `absent` is set."""
    values = np.fromiter(chain.from_iterable(rows), kind)
    return _listed(pa.array(values), rows, absent)


def _listed(
    values: pa.Array, rows: Sequence[Sequence[Any]], absent: Sequence[bool] | None
) -> pa.Array:
    """Return the array of lists with these values, as long as those of `rows`."""
    ends = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, rows), np.int32, len(rows)), out=ends[1:])
    mask = None if absent is None else pa.array(absent, pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends), values, mask=mask)


def _token_lists(
    rows: Sequence[Sequence[int]], vocabulary: _Vocabulary, absent: Sequence[bool] | None = None
) -> tuple[pa.Array, pa.Array]:
    """Return lists of token ids and of their texts."""
    ids = np.fromiter(chain.from_iterable(rows), np.int64)
    found = _listed(pa.array(ids.astype(np.int32)), rows, absent)
    return found, _listed(vocabulary.texts(ids), rows, absent)


_NO_PROJECTION = lens_pb2.Projection()


def _projections(
    messages: Sequence[Any], name: str, vocabulary: _Vocabulary
) -> dict[str, pa.Array | list[Any]]:
    """Return the columns of a projection; null where the message has none."""
    absent = [not message.HasField(name) for message in messages]
    found = [
        _NO_PROJECTION if missing else getattr(message, name)
        for message, missing in zip(messages, absent, strict=True)
    ]
    columns: dict[str, Any] = _columns(
        found, "log_normalizer", "target_rank", "target_probability", "target_logit"
    )
    entropies = zip(found, absent, strict=True)
    columns["entropy_bits"] = [None if gone else one.entropy_bits for one, gone in entropies]
    columns["target_log_probability"] = [
        None if logit is None or normalizer is None else logit - normalizer
        for logit, normalizer in zip(
            columns["target_logit"], columns["log_normalizer"], strict=True
        )
    ]
    for end in ("top", "bottom"):
        ids = _list_column(found, f"{end}_token_ids")
        columns[f"{end}_token_ids"], columns[f"{end}_tokens"] = _token_lists(
            ids, vocabulary, absent
        )
        for figure in ("probabilities", "logits"):
            numbers = _list_column(found, f"{end}_{figure}")
            columns[f"{end}_{figure}"] = _lists(numbers, np.float32, absent)
    return columns


def _add_tokens(rows: Rows, tokens: Sequence[Token]) -> None:
    names = ("text", "raw", "start", "end", "message")
    columns: dict[str, list[Any]] = {
        name: [getattr(token, name) for token in tokens] for name in names
    }
    columns |= {"position": list(range(len(tokens))), "token_id": [token.id for token in tokens]}
    rows.add("tokens", columns)


def trace_rows(prompt: int, trace: Trace) -> Rows:
    """Return the targets, nodes and edges of a trace."""
    rows = Rows(prompt, trace.provenance)
    header = trace.responses[0].header
    layers = [one.layer for one in trace.responses if one.HasField("layer")]
    sent = chain(header.prompt_tokens, header.tokens, *(layer.tokens for layer in layers))
    vocabulary = _Vocabulary(sent)
    _add_tokens(rows, trace.prompt_tokens)
    _add_targets(rows, header.targets, vocabulary)
    edges = [edge for layer in layers for edge in layer.edges]
    of_layer = [layer.layer for layer in layers for _ in layer.edges]
    columns = _columns(
        edges,
        "source",
        "target",
        "weight",
        "share",
        "attention",
        "logit_contribution",
        "overlap",
        "attribution",
    )
    columns |= {"layer": of_layer, "kind": _names(EDGE_KINDS, [edge.kind for edge in edges])}
    rows.add("edges", columns)
    nodes = [node for layer in layers for node in layer.nodes]
    _add_nodes(rows, nodes, columns, vocabulary)
    states = [node for node in nodes if node.HasField("gradient")]
    if states:
        read = _columns(states, "id", "layer", "position")
        rows.add("state_gradients", read | _projections(states, "gradient", vocabulary))
    if nodes and nodes[0].HasField("vector"):
        _add_vectors(rows, f"{prompt}.vectors", "NODES", [node.vector for node in nodes])
    return rows


def _add_targets(
    rows: Rows, targets: Sequence[trace_pb2.PositionTarget], vocabulary: _Vocabulary
) -> None:
    names = [name for name in COLUMNS["targets"] if name not in ("target", "predicted")]
    columns = _columns(targets, *names)
    for name in ("target", "predicted"):
        columns[name] = vocabulary.list_of(columns[f"{name}_token_id"])
    rows.add("targets", columns)


def _add_nodes(
    rows: Rows,
    nodes: Sequence[trace_pb2.Node],
    edges: Mapping[str, Sequence[Any]],
    vocabulary: _Vocabulary,
) -> None:
    """Add nodes, each with the figures of its edge to the sum that it is a part of."""
    columns: dict[str, Any] = _columns(
        nodes,
        "id",
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
    columns["kind"] = _names(NODE_KINDS, [node.kind for node in nodes])
    parts = zip(edges["source"], edges["kind"], strict=True)
    leaving = {source: i for i, (source, kind) in enumerate(parts) if kind == "PART"}
    places = [leaving.get(node_id) for node_id in columns["id"]]
    for name, figure in (
        ("sum", "target"),
        ("share", "share"),
        ("attention", "attention"),
        ("logit_contribution", "logit_contribution"),
        ("attribution", "attribution"),
    ):
        columns[name] = [None if i is None else edges[figure][i] for i in places]
    rows.add("nodes", columns | _projections(nodes, "projection", vocabulary))


def _add_vectors(rows: Rows, name: str, site: str, vectors: Sequence[common_pb2.Tensor]) -> None:
    """Add vectors of equal length as one float32 tensor, and its row in the table `tensors`."""
    shape = (len(vectors), *vectors[0].shape)
    rows.tensors[name] = Tensor("float32", shape, b"".join(vector.data for vector in vectors))
    _add_tensor_rows(rows, [(name, site, None, None)])


def _add_tensor_rows(
    rows: Rows, listed: Sequence[tuple[str, str, int | None, Sequence[int] | None]]
) -> None:
    """Add rows for tensors that have a name, a site, a layer and positions; `file` is set later."""
    tensors = [rows.tensors[name] for name, *_ in listed]
    names, sites, layers, positions = zip(*listed, strict=True)
    columns = {
        "name": names,
        "site": sites,
        "layer": layers,
        "positions": positions,
        "shape": [tensor.shape for tensor in tensors],
        "data_type": [tensor.data_type for tensor in tensors],
        "file": [None] * len(listed),
    }
    before = rows.batches.get("tensors")
    rows.add("tensors", columns)
    if before is not None:
        rows.batches["tensors"] = pa.concat_batches([before, rows.batches["tensors"]])


def gradient_rows(prompt: int, gradient: Gradient) -> Rows:
    """Return the loss, matrices and components of a gradient."""
    rows = Rows(prompt, gradient.provenance)
    header = gradient.responses[0].header
    pieces = [one.matrix for one in gradient.responses if one.HasField("matrix")]
    sent = chain(header.prompt_tokens, header.tokens, *(piece.tokens for piece in pieces))
    vocabulary = _Vocabulary(sent)
    _add_tokens(rows, gradient.prompt_tokens)
    rows.add(
        "losses",
        {
            "loss": [header.loss],
            "predicted_token_id": [header.predicted_token_id],
            "predicted": vocabulary.list_of([header.predicted_token_id]),
            "target_token_ids": [list(header.target_token_ids)],
            "targets": [vocabulary.list_of(header.target_token_ids)],
        },
    )
    _add_matrices(rows, [piece for piece in pieces if piece.last])
    _add_components(rows, pieces, vocabulary)
    _add_spectrum(rows, pieces, vocabulary)
    _add_neuron_changes(rows, pieces, vocabulary)
    # A few rows, so their records cost nothing.
    rows.add(
        "segments",
        {
            "segment": [row.segment for row in gradient.segments],
            "layer": [row.layer for row in gradient.segments],
            "kind": [str(row.kind) for row in gradient.segments],
            "mean_vjp_norm": [row.mean_vjp_norm for row in gradient.segments],
            "mean_target_rank": [row.mean_target_rank for row in gradient.segments],
            "positions": [row.positions for row in gradient.segments],
        },
    )
    return rows


def _of_matrices(pieces: Sequence[gradient_lens_pb2.GradientMatrix]) -> dict[str, list[Any]]:
    """Return the columns that say which matrix each row is about."""
    kinds = [str(kind_of(piece)) for piece in pieces]
    return _columns(pieces, "layer", "expert") | {"kind": kinds}


def _add_matrices(rows: Rows, last: Sequence[gradient_lens_pb2.GradientMatrix]) -> None:
    columns = _of_matrices(last)
    columns |= _columns(last, "d_in", "d_out", "frobenius_norm", "component_count")
    columns["projected_side"] = _names(SIDES, [piece.projected_side for piece in last])
    columns["promoted_end"] = _names(ENDS, [piece.promoted_end for piece in last])
    columns["relative_error"] = [
        piece.verification.relative_error if piece.HasField("verification") else None
        for piece in last
    ]
    rows.add("matrices", columns)


def _add_components(
    rows: Rows, pieces: Sequence[gradient_lens_pb2.GradientMatrix], vocabulary: _Vocabulary
) -> None:
    pairs = [(piece, component) for piece in pieces for component in piece.components]
    components = [component for _, component in pairs]
    columns: dict[str, Any] = _of_matrices([piece for piece, _ in pairs])
    columns |= _columns(components, "position", "input_norm", "vjp_norm", "size", "predicted_rank")
    ranks = _list_column(components, "target_ranks")
    columns["target_ranks"] = _lists(ranks, np.int32, None)
    columns["promoted_end"] = _names(ENDS, [piece.promoted_end for piece, _ in pairs])
    rows.add("components", columns | _projections(components, "projection", vocabulary))
    for factor in ("input", "vjp"):
        by_matrix: dict[str, list[common_pb2.Tensor]] = {}
        for piece, component in pairs:
            if component.HasField(factor):
                expert = piece.expert if piece.HasField("expert") else None
                name = matrix_name(piece.layer, kind_of(piece), expert)
                by_matrix.setdefault(name, []).append(getattr(component, factor))
        for name, vectors in by_matrix.items():
            _add_vectors(rows, f"{rows.prompt}.{name}.{factor}", factor.upper(), vectors)


def _add_spectrum(
    rows: Rows, pieces: Sequence[gradient_lens_pb2.GradientMatrix], vocabulary: _Vocabulary
) -> None:
    pairs = [(piece, i) for piece in pieces for i in range(len(piece.spectrum))]
    found = [piece.spectrum[i] for piece, i in pairs]
    columns: dict[str, Any] = _of_matrices([piece for piece, _ in pairs])
    columns |= _columns(found, "value", "explained") | {"number": [i for _, i in pairs]}
    rows.add("singular_values", columns | _projections(found, "projection", vocabulary))


def _add_neuron_changes(
    rows: Rows, pieces: Sequence[gradient_lens_pb2.GradientMatrix], vocabulary: _Vocabulary
) -> None:
    """Add three rows for each neuron: its vector before the step, the change, and after it."""
    pairs = [(piece, neuron) for piece in pieces for neuron in piece.neurons]
    neurons = [neuron for _, neuron in pairs]
    batches = []
    for vector in ("before", "change", "after"):
        columns: dict[str, Any] = _of_matrices([piece for piece, _ in pairs])
        columns |= _columns(neurons, "neuron", "change_norm") | {"vector": [vector] * len(pairs)}
        rows.add("neuron_changes", columns | _projections(neurons, vector, vocabulary))
        batches.append(rows.batches["neuron_changes"])
    rows.batches["neuron_changes"] = pa.concat_batches(batches)


def effect_rows(prompt: int, found: InterventionEffects) -> Rows:
    """Return the predictions without interventions, and the effects of experiments."""
    rows = Rows(prompt, found.provenance)
    vocabulary = _Vocabulary(
        chain(
            found.prompt_tokens,
            *(response.tokens for response in found.responses),
        )
    )
    _add_tokens(rows, found.prompt_tokens)
    before = found.responses[0].header.before
    rows.add("baselines", _outcomes(before, vocabulary))
    effects = sorted(
        (one.effect for one in found.responses if one.HasField("effect")),
        key=lambda effect: effect.experiment,
    )
    read = [outcome for effect in effects for outcome in effect.after]
    columns = _outcomes(read, vocabulary)
    for name in COLUMNS["effects"]:
        if name in ("experiment", "label", "layer", "position", "head", "neuron"):
            columns[name] = _repeated(_column(effects, name), effects)
    columns["source_position"] = _repeated(_column(effects, "source_position"), effects)
    columns["kl_nats"] = [outcome.kl_nats for outcome in read]
    first = {outcome.position: outcome for outcome in before}
    plain = _outcomes([first[outcome.position] for outcome in read], vocabulary)
    for figure in ("probability", "logit", "logit_difference"):
        pairs = zip(columns[figure], plain[figure], strict=True)
        columns[f"{figure}_effect"] = [None if a is None else a - b for a, b in pairs]
    rows.add("effects", columns)
    return rows


def _repeated(values: Sequence[Any], effects: Sequence[Any]) -> list[Any]:
    """Return the value of each experiment once for each of its predictions."""
    return [value for value, effect in zip(values, effects, strict=True) for _ in effect.after]


def _outcomes(outcomes: Sequence[streams_pb2.Outcome], vocabulary: _Vocabulary) -> dict[str, Any]:
    columns: dict[str, Any] = {"read_position": [one.position for one in outcomes]}
    for figure in ("probability", "log_probability", "logit", "rank"):
        columns[figure] = _column(outcomes, f"target_{figure}")
    columns |= _columns(outcomes, "target_token_id", "logit_difference")
    columns["target"] = vocabulary.list_of(columns["target_token_id"])
    return columns | _top_tokens(outcomes, vocabulary)


def _top_tokens(messages: Sequence[Any], vocabulary: _Vocabulary) -> dict[str, Any]:
    ids, texts = _token_lists(_list_column(messages, "top_token_ids"), vocabulary)
    probabilities = _lists(_list_column(messages, "top_probabilities"), np.float32, None)
    return {"top_token_ids": ids, "top_tokens": texts, "top_probabilities": probabilities}


def generation_rows(prompt: int, found: GeneratedText) -> Rows:
    """Return the generated text, its tokens, and what each layer predicted."""
    rows = Rows(prompt, found.provenance)
    steps = [one.generated for one in found.responses if one.HasField("generated")]
    vocabulary = _Vocabulary(
        chain(
            found.prompt_tokens,
            (step.token for step in steps),
            *(response.tokens for response in found.responses),
        )
    )
    _add_tokens(rows, found.prompt_tokens)
    rows.add(
        "texts",
        {
            "text": [found.text],
            "finish_reason": [found.finish_reason],
            "token_count": [len(found)],
        },
    )
    columns: dict[str, Any] = _columns(steps, "log_probability", "entropy_bits")
    columns |= {
        "step": list(range(len(steps))),
        "token_id": [step.token.id for step in steps],
        "token": [step.token.text for step in steps],
        "decided": [made.decided for made in found],
    }
    rows.add("generated", columns | _top_tokens(steps, vocabulary))
    layers = [layer for step in steps for layer in step.layers]
    columns = _columns(layers, "layer", "rank", "probability", "log_probability")
    columns["step"] = [i for i, step in enumerate(steps) for _ in step.layers]
    columns["top_token_ids"], columns["top_tokens"] = _token_lists(
        _list_column(layers, "top_token_ids"), vocabulary
    )
    rows.add("readings", columns)
    return rows


def activation_rows(prompt: int, found: Activations) -> Rows:
    """Return the tensors of a forward pass, and their list."""
    rows = Rows(prompt, found.provenance)
    _add_tokens(rows, found.prompt_tokens)
    listed = []
    for tensor in found.tensors:
        name = f"{prompt}.{tensor.name}"
        rows.tensors[name] = tensor.tensor
        listed.append((name, str(tensor.site), tensor.layer, found.positions))
    _add_tensor_rows(rows, listed)
    return rows


def edit_rows(prompt: int, found: edits_pb2.PreviewEditResponse) -> Rows:
    """Return the effects of each edit on its own prompt, and on its probes."""
    rows = Rows(prompt, Provenance.from_message(found.provenance))
    vocabulary = _Vocabulary(found.tokens)
    edits: Sequence[tuple[int | None, float | None, Any]]
    edits = [(cell.layer, cell.strength, cell) for cell in found.cells]
    listed = [
        (layer, strength, cell, probe, effect)
        for layer, strength, cell in edits or [(None, None, found)]
        for probe, effect in [(None, cell.edited), *enumerate(cell.probes)]
    ]
    layers, strengths, cells, probes, effects = zip(*listed, strict=True)
    columns: dict[str, Any] = {"layer": layers, "strength": strengths, "probe": probes}
    columns["gradient_cosine"] = _column(cells, "gradient_cosine")
    names = ("label", "target_token_id", "kl_bits")
    around = (f"{name}_{when}" for name in _MEASURED for when in ("before", "after"))
    columns |= _columns(effects, *names, *around)
    columns["target"] = vocabulary.list_of(columns["target_token_id"])
    for name in ("predicted_before", "predicted_after"):
        columns[f"{name}_token_id"] = _column(effects, name)
        columns[name] = vocabulary.list_of(columns[f"{name}_token_id"])
    rows.add("edits", columns)
    return rows


_MEASURED = ("probability", "log_probability", "rank")

Reader = Callable[[int, Any], Rows]


def batches_by_table(many: Iterable[Rows]) -> Iterator[tuple[str, pa.Table]]:
    """Yield one table of the rows of many prompts for each name."""
    by_table: dict[str, list[pa.RecordBatch]] = {}
    for rows in many:
        for table, batch in rows.batches.items():
            by_table.setdefault(table, []).append(batch)
    for table, batches in by_table.items():
        yield table, pa.Table.from_batches(batches)
