"""Write tests/fixtures/presentation/*.json: what results look like in words and figures.

`januslens._presentation` makes the expected texts. The tests of the command and of the notebook go
through that module; the tests of the pages read the same files, so that all three agree. A test
fails where a file is not what this program writes; run it and commit the files after a change:

    python -m tests.client.presentation_fixtures

Texts have the ASCII apostrophe and the hyphen-minus. A page may show the typographic ’ and − in
their place; its tests map them back before they compare.

numbers.json: for each format, pairs of `[value, text]`; values that are not finite are strings.
    probability, signed, percent, measure, count

colours.json:
    rank_bins: `[rank or null, vocabulary or null, bin]`, the bins by name
    norms: `[norm, largest norm, [red, green, blue], ink]` on a light background; the ink is
        "black" or "white"

waiting.json: `[requests ahead, expected seconds, text]` of a request that waits for the device

names.json: names by node kind, for example `"HEAD_KEY": "key"`.

traces.json, a list of:
    case: what is special about it
    stream: the messages of the Trace stream, each as protobuf JSON
    position: the query position that the rest is about
    sentences: the sentences about the target, in order, as text
    levels: the sentences about layers without all parts
    residual_steps: `{"name", "place", "node"}` of each step of the residual stream, upwards
    contributions: `[depth, name, contribution]` of each line of `Trace.why()`; empty without
        contributions
    node_names: name by node id, for every node

gradients.json, a list of:
    case, stream: likewise, of the GradientLens stream
    sentence: the sentence about the loss, where it is not known which loss it is
    likelihood_sentence: the same where the loss is a negative log-likelihood
    components: for each matrix by name the components, largest first: `{"position", "size",
        "promoted", "suppressed"}`, size as `measure` gives it, tokens as they are shown
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from januslens import Gradient, Trace, Waiting
from januslens import _presentation as presentation
from januslens.assemblers import GradientAssembler, TraceAssembler
from januslens.v1 import common_pb2, trace_pb2
from tests.client import messages

FOLDER = Path(__file__).parents[1] / "fixtures" / "presentation"

TIES = [0.0625, 0.1875, 0.125, 0.375, 1.125, 1.375]
# The last values are halfway between two texts and are rounded to the even digit.
FIGURES = [0.0, 1.0, 12.345, 0.992, 0.0526, 0.005, 0.0005, 0.00049, 6.05e-05, 8.3e-10, *TIES]
SHARES = [
    0.0,
    1.0,
    2.53,
    0.992,
    0.0996,
    0.0994,
    0.0526,
    0.0051,
    0.000949,
    0.00049,
    6.05e-05,
    4e-05,
    1.125,
    1.135,
]
LARGE = [999.4, 999.6, 1234.0, 1235.0, 65504.0, 999_499.0, 999_999.9, 1_234_567.0, 3.4e38]
NOT_FINITE = ["NaN", "Infinity", "-Infinity"]
RANKS = [None, 0, 1, 9, 10, 99, 100, 999, 1000, 5000, 50156, 50157, 50256]


def files() -> dict[str, Any]:
    """The content of every file by its name."""
    return {
        "numbers.json": numbers(),
        "colours.json": colours(),
        "waiting.json": [
            [ahead, seconds, presentation.waiting_line(Waiting(ahead, seconds, 1.0))]
            for ahead, seconds in ((0, 0.0), (1, 0.02), (1, 1.0), (2, 1.01), (64, 600.0))
        ],
        "names.json": {str(kind): name for kind, name in presentation.NODE_NAMES.items()},
        "traces.json": [trace_case(case, stream) for case, stream in traces()],
        "gradients.json": [gradient_case(case, stream) for case, stream in gradients()],
    }


def numbers() -> dict[str, list[list[Any]]]:
    negative = [-value for value in FIGURES[1:]]
    return {
        "probability": with_non_finite(presentation.probability, FIGURES[:2] + FIGURES[3:-2]),
        "signed": with_non_finite(presentation.signed, FIGURES + negative + [-1e6, *LARGE]),
        "percent": with_non_finite(
            presentation.percent, [*SHARES, *(-share for share in SHARES[1:]), 1e6]
        ),
        "measure": with_non_finite(
            presentation.measure, [*FIGURES, *LARGE, 0.00010001, 0.00009999, -21.66]
        ),
        "count": pairs(presentation.count, [0, 999, 1000, 50257, 1234567]),
    }


def pairs(form: Callable[[Any], str], values: Sequence[float]) -> list[list[Any]]:
    return [[value, form(value)] for value in values]


def with_non_finite(form: Callable[[float], str], values: Sequence[float]) -> list[list[Any]]:
    return pairs(form, values) + [[value, form(float(value))] for value in NOT_FINITE]


def colours() -> dict[str, list[list[Any]]]:
    norms = [(0.0, 0.0), (0.0, 2.0), (0.1, 2.0), (0.5, 2.0), (1.0, 2.0), (1.9, 2.0), (2.0, 2.0)]
    return {
        "rank_bins": [
            [rank, size, presentation.rank_bin(rank, size)]
            for size in (None, 50257, 512)
            for rank in RANKS
            if rank is None or size is None or rank < size
        ],
        "norms": [norm_row(norm, largest) for norm, largest in norms],
    }


def norm_row(norm: float, largest: float) -> list[Any]:
    colour = presentation.norm_colour(norm, largest)
    ink = "black" if presentation.ink_on(colour) == (0, 0, 0) else "white"
    return [norm, largest, list(colour), ink]


def traces() -> Iterator[tuple[str, list[trace_pb2.TraceResponse]]]:
    yield "the target ranks first from the MLP on", stream_of(messages.layer())
    yield "attention and MLP are parallel", stream_of(without_nodes("RESIDUAL_MID"))
    yield "a block has an MLP and no attention", stream_of(with_one_sublayer())
    chosen = stream_of(messages.layer())
    chosen[0].header.selected_by = trace_pb2.SELECTION_CRITERION_CONTRIBUTION
    yield "the parts were selected by their contributions", chosen
    difference = stream_of(messages.layer())
    difference[0].header.other_token_id = 3
    difference[0].header.targets[0].logit_difference = 1.25
    yield "contributions add up to a logit difference", difference
    yield "no logit contributions", stream_of(without_contributions())
    yield "the target never ranks first", stream_of(with_rank(3), target=3)
    yield (
        "no residual has a reading",
        stream_of(without_nodes("RESIDUAL_MID", "BLOCK_OUTPUT", "BLOCK_INPUT")),
    )
    yield "the best neuron belongs to an expert", stream_of(with_expert())
    yield "the remainder of the sources has the largest attention", stream_of(with_remainder())
    yield "no source has a position", stream_of(without_sources())
    yield "a contribution is not finite", stream_of(with_contribution(float("nan")))
    yield "the target has no rank", stream_of(without_ranks())
    coarse = stream_of(with_mixer())
    coarse[0].header.limited_layers.extend(sublayers(0, 1, 2))
    stream_only = common_pb2.LayerLevel(layer=4, level=common_pb2.LEVEL_STREAM, reason="no sum")
    coarse[0].header.limited_layers.append(stream_only)
    yield "a layer shows only its sublayers", coarse
    yield "a whole layer has a mixer beside its sublayers", stream_of(with_mixer())
    heads = stream_of(with_mixer_heads())
    heads[0].header.limited_layers.extend(sublayers(0))
    yield "a mixer has heads", heads
    yield "the trace begins above the first layer", stream_of(moved(5))
    yield "the target falls from the first rank and returns in a second layer", two_layers()


def stream_of(layer: trace_pb2.LayerGraph, target: int = 2) -> list[trace_pb2.TraceResponse]:
    header = messages.trace_header()
    header.tokens.extend(messages.tokens(2, 3))
    header.layers[:] = [layer.layer]
    if target != 2:
        header.targets[0].target_token_id = target
        header.targets[0].target_rank = 7
        header.targets[0].target_probability = 0.0004
    return messages.trace_stream(header, layer, messages.trace_summary())


def without_nodes(*kinds: str) -> trace_pb2.LayerGraph:
    layer = messages.layer()
    kept = [node for node in layer.nodes if not node.id.endswith(kinds)]
    ids = {node.id for node in kept}
    edges = [edge for edge in layer.edges if {edge.source, edge.target} <= ids]
    del layer.nodes[:], layer.edges[:]
    layer.nodes.extend(kept)
    layer.edges.extend(edges)
    return layer


def with_one_sublayer() -> trace_pb2.LayerGraph:
    """A block that adds only its MLP to its input."""
    attention = ("RESIDUAL_MID", "ATTENTION", "HEAD", "MEMORY", "OTHER")
    ids = [node.id for node in messages.layer().nodes]
    layer = without_nodes(*(i for i in ids if any(kind in i for kind in attention)))
    layer.edges.append(
        messages.edge("p1/BLOCK_INPUT", "L0/p1/BLOCK_OUTPUT", "PART", 1.0, share=0.25)
    )
    return layer


def without_contributions() -> trace_pb2.LayerGraph:
    layer = messages.layer()
    for edge in layer.edges:
        edge.ClearField("logit_contribution")
    return layer


def with_rank(least: int) -> trace_pb2.LayerGraph:
    """Every rank of the target moved away from the top."""
    layer = messages.layer()
    for node in layer.nodes:
        if node.HasField("projection"):
            node.projection.target_rank += least
    return layer


def with_expert() -> trace_pb2.LayerGraph:
    layer = messages.layer()
    for node in layer.nodes:
        if node.HasField("neuron"):
            node.expert = 1
    return layer


def with_remainder() -> trace_pb2.LayerGraph:
    layer = messages.layer()
    layer.nodes.add(id="L0/p1/OTHER/h0", kind="NODE_KIND_OTHER", layer=0, position=1, head=0)
    layer.edges.add(
        source="L0/p1/OTHER/h0",
        target="L0/p1/HEAD_OUTPUT/h0",
        kind="EDGE_KIND_PART",
        share=0.1,
        attention=0.95,
    )
    return layer


def without_sources() -> trace_pb2.LayerGraph:
    layer = messages.layer()
    for node in layer.nodes:
        node.ClearField("source_position")
    return layer


def with_contribution(value: float) -> trace_pb2.LayerGraph:
    """The contribution of the head that adds most, replaced."""
    layer = messages.layer()
    for edge in layer.edges:
        if edge.source == "L0/p1/HEAD_OUTPUT/h0" and edge.HasField("logit_contribution"):
            edge.logit_contribution = value
    return layer


def without_ranks() -> trace_pb2.LayerGraph:
    layer = messages.layer()
    for node in layer.nodes:
        node.projection.ClearField("target_rank")
    return layer


def with_mixer() -> trace_pb2.LayerGraph:
    """A layer whose attention is a mixer, without nodes inside of its sublayers."""
    shown = ("BLOCK_INPUT", "ATTENTION_OUTPUT", "RESIDUAL_MID", "MLP_OUTPUT", "BLOCK_OUTPUT")
    inside = (node.id for node in messages.layer().nodes if not node.id.endswith(shown))
    layer = without_nodes("OTHER/MLP_OUTPUT", *inside)
    for node in layer.nodes:
        if node.kind == trace_pb2.NODE_KIND_ATTENTION_OUTPUT:
            node.kind = trace_pb2.NODE_KIND_MIXER_OUTPUT
            node.id = "L0/p1/MIXER_OUTPUT"
    for edge in layer.edges:
        edge.source = edge.source.replace("ATTENTION_OUTPUT", "MIXER_OUTPUT")
    return layer


def with_mixer_heads() -> trace_pb2.LayerGraph:
    """`with_mixer`, with the heads of the mixer."""
    layer = with_mixer()
    for head, top, contribution in ((0, 2, 1.5), (1, 3, -0.25)):
        name = f"L0/p1/MIXER_HEAD/h{head}"
        layer.nodes.append(messages.node(name, "MIXER_HEAD", (top,), 0, head=head, norm=2.0))
        values = {"share": 0.75 - 0.5 * head, "logit_contribution": contribution}
        layer.edges.append(messages.edge(name, "L0/p1/MIXER_OUTPUT", "PART", 2.0, **values))
    return layer


def sublayers(*layers: int) -> list[common_pb2.LayerLevel]:
    """Layers with a state space and an MLP."""
    kinds = {
        "mamba": common_pb2.SUBLAYER_KIND_STATE_SPACE,
        "mlp": common_pb2.SUBLAYER_KIND_MLP,
    }
    return [
        common_pb2.LayerLevel(
            layer=layer,
            level=common_pb2.LEVEL_SUBLAYERS,
            reason=f"layer {layer} has 3 linear maps",
            sublayers=[common_pb2.Sublayer(module=m, kind=kind) for m, kind in kinds.items()],
        )
        for layer in layers
    ]


def moved(number: int) -> trace_pb2.LayerGraph:
    """Return the layer moved up, whose input is the output of the layer below."""
    layer = messages.layer()
    layer.layer = number
    below = f"L{number - 1}/p1/BLOCK_OUTPUT"
    renamed = {}
    for node in layer.nodes:
        moved_id = node.id.replace("L0/", f"L{number}/")
        own = below if "BLOCK_INPUT" in node.id else moved_id
        renamed[node.id] = own
        if "BLOCK_INPUT" in node.id:
            node.kind = trace_pb2.NODE_KIND_BLOCK_OUTPUT
        node.id = own
        if own.startswith("L"):
            node.layer = number - 1 if own == below else number
    for edge in layer.edges:
        edge.source, edge.target = renamed[edge.source], renamed[edge.target]
    return layer


def two_layers() -> list[trace_pb2.TraceResponse]:
    """Two layers; the head and the neuron that add most are in the lower one."""
    lower, upper = messages.layer(), moved(1)
    after = ("FINAL_NORM", "PREDICTION")
    kept = [node for node in lower.nodes if not node.id.endswith(after)]
    ids = {node.id for node in kept}
    edges = [edge for edge in lower.edges if {edge.source, edge.target} <= ids]
    del lower.nodes[:], lower.edges[:]
    lower.nodes.extend(kept)
    lower.edges.extend(edges)
    above = [node for node in upper.nodes if node.id not in ids]
    del upper.nodes[:]
    upper.nodes.extend(above)
    for edge in upper.edges:
        if edge.HasField("logit_contribution"):
            edge.logit_contribution /= 2
    header = messages.trace_header()
    header.tokens.extend(messages.tokens(2, 3))
    header.layers[:] = [0, 1]
    return messages.trace_stream(header, lower, upper, messages.trace_summary())


def trace_case(case: str, stream: list[trace_pb2.TraceResponse]) -> dict[str, Any]:
    trace = assembled(TraceAssembler(), stream)
    assert isinstance(trace, Trace)
    target = trace.target()
    return {
        "case": case,
        "stream": as_json(stream),
        "position": target.position,
        "sentences": [
            presentation.plain(sentence) for sentence in presentation.trace_sentences(trace, target)
        ],
        "levels": presentation.level_sentences(trace.header.limited_layers),
        "residual_steps": [
            {"name": step.name, "place": step.place, "node": step.node.id}
            for step in presentation.all_residual_steps(trace, target.position)
        ],
        "contributions": contributions(trace),
        "node_names": {
            node.id: presentation.node_name(node, trace.prompt_tokens) for node in trace.node_list
        },
    }


def contributions(trace: Trace) -> list[list[Any]]:
    try:
        tree = trace.why()
    except ValueError:
        return []
    lines = presentation.contribution_lines(tree, trace)
    return [[line.depth, line.name, presentation.signed(line.contribution)] for line in lines]


def gradients() -> Iterator[tuple[str, list[Any]]]:
    yield "two matrices", messages.gradient_stream()
    header = messages.gradient_header()
    header.target_token_ids[:] = [2, 4]
    header.loss = 12.34567
    yield (
        "two targets",
        messages.gradient_stream(header, messages.matrix(), messages.gradient_summary()),
    )


def gradient_case(case: str, stream: list[Any]) -> dict[str, Any]:
    gradient = assembled(GradientAssembler(), stream)
    assert isinstance(gradient, Gradient)
    likely = presentation.loss_sentence(gradient, likelihood=True)
    return {
        "case": case,
        "stream": as_json(stream),
        "sentence": presentation.plain(presentation.loss_sentence(gradient)),
        "likelihood_sentence": presentation.plain(likely),
        "components": {
            matrix.name: [
                {
                    "position": part.position,
                    "size": presentation.measure(part.size),
                    "promoted": [str(token) for token in part.promoted],
                    "suppressed": [str(token) for token in part.suppressed],
                }
                for part in matrix.components
            ]
            for matrix in gradient.matrices
        },
    }


def assembled(assembler: Any, stream: Sequence[Any]) -> Any:
    for response in stream:
        assembler.feed(response)
    return assembler.result()


def as_json(stream: Sequence[Message]) -> list[dict[str, Any]]:
    return [MessageToDict(message) for message in stream]


def text_of(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (FOLDER / name).write_text(text_of(content), encoding="utf-8")
        sys.stdout.write(f"wrote {FOLDER / name}\n")


if __name__ == "__main__":
    main()
