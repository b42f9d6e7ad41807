"""Tests of sequences whose records are parsed from messages on first access."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest

from januslens.results.graph import KnownNodes, Node
from januslens.results.lazy import LazySequence
from januslens.results.tokens import TokenTable
from januslens.results.trace import LayerGraph
from januslens.v1 import common_pb2, trace_pb2


def counted(numbers: list[int], seen: list[int]) -> LazySequence[int]:
    """Return a sequence of squares; `seen` gets each number when its square is computed."""

    def square(number: int) -> int:
        seen.append(number)
        return number**2

    return LazySequence.of(numbers, square)


def test_records_are_parsed_once_on_first_access() -> None:
    seen: list[int] = []
    lazy = counted([1, 2, 3], seen)
    assert (len(lazy), bool(lazy), seen) == (3, True, [])
    assert (lazy[1], lazy[-1], lazy[1:], list(lazy)) == (4, 9, (4, 9), [1, 4, 9])
    assert seen == [1, 2, 3]
    assert not counted([], seen)


def test_lazy_sequence_equals_and_pickles_as_a_tuple() -> None:
    lazy = counted([1, 2], [])
    assert lazy == (1, 4)
    assert lazy == (1, 4)
    assert lazy == counted([1, 2], [])
    assert lazy != (1, 5)
    assert hash(lazy) == hash((1, 4))
    assert repr(lazy) == "(1, 4)"
    assert pickle.loads(pickle.dumps(lazy)) == (1, 4)  # noqa: S301 - our own bytes
    assert isinstance(copy.deepcopy(lazy), tuple)
    assert 4 in lazy
    assert (*lazy, 5) == (1, 4, 5)


def layer(number: int, *ids: str) -> trace_pb2.LayerGraph:
    return trace_pb2.LayerGraph(layer=number, nodes=[trace_pb2.Node(id=name) for name in ids])


def test_node_lookup_parses_layers_from_the_last_and_stops_at_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    original = Node.from_message.__func__  # type: ignore[attr-defined]  # a class method's

    def noting(cls: type[Node], message: trace_pb2.Node, tokens: TokenTable) -> Node:
        read.append(message.id)
        node: Node = original(cls, message, tokens)
        return node

    monkeypatch.setattr(Node, "from_message", classmethod(noting))
    layers: list[LayerGraph] = []
    for number, ids in enumerate((("a", "b"), ("c",), ("d", "e"))):
        layers.append(LayerGraph.from_message(layer(number, *ids), TokenTable(), layers))
    assert read == []
    assert layers[1].node("c").id == "c"
    assert read == ["c"]
    assert layers[1].node("a").id == "a"
    assert read == ["c", "a", "b"]
    with pytest.raises(KeyError, match="d"):
        layers[1].node("d")
    known = KnownNodes([graph.node_list for graph in layers])
    assert (list(known), len(known), known.get("z")) == (["a", "b", "c", "d", "e"], 5, None)


def test_token_table_is_filled_at_the_first_lookup() -> None:
    read: list[int] = []

    class Sent(list[common_pb2.Token]):
        """As a repeated field, noting when it is read."""

        def __iter__(self) -> Iterator[common_pb2.Token]:
            read.append(len(self))
            return super().__iter__()

    table = TokenTable(Sent([common_pb2.Token(id=1, text=" a")]))
    table.add(Sent([common_pb2.Token(id=2, text=" b"), common_pb2.Token(id=3, text=" c")]))
    assert read == []
    assert (table[3].text, read) == (" c", [1, 2])
    table.add(Sent([common_pb2.Token(id=4, text=" d")]))
    assert (table[1].text, table[4].text, table[5].text) == (" a", " d", "")
    assert read == [1, 2, 1]
