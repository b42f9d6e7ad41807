"""Which neurons write a token: a question to the weights alone."""

from __future__ import annotations

from collections.abc import Iterator

from januslens._requests.inputs import (
    Layers,
    TargetLike,
    layer_numbers,
    optional_count,
    target_message,
)
from januslens._results.neurons import FoundNeurons
from januslens._verbs.calls import Exchange, UnaryCall
from januslens.v1 import neurons_pb2

# The most that a server gives in one page.
_PAGE = 1000


def find_neurons(
    token: TargetLike,
    *,
    suppressed: bool = False,
    layers: Layers | None = None,
    limit: int | None = 20,
    model: str = "",
    revision: str = "",
    timeout: float | None = None,
) -> Exchange[FoundNeurons]:
    """The MLP neurons whose value, their row of FF2, promotes a token; no prompt is run.

    The first question about a layer may take long: the server reads all of its neurons for it.

    Args:
        token: Literal text that is one token (a leading space counts), or its id.
        suppressed: Those that push the token to the bottom instead.
        layers: Which blocks, from 0; None = all.
        limit: How many neurons at most, the best first; None = all that there are.
        model: Its name; empty = the only one resident.
        revision: Refuse any other than this one; empty = whatever is resident.
        timeout: Seconds to wait for each page of a thousand.

    Raises:
        TypeError: An argument has a type that no request can hold.
        ValueError: An argument has a value that no server could accept.
        JanuslensError: The call failed; see `januslens.errors` for the kinds.
    """
    wanted = optional_count(limit, "limit")
    if wanted == 0:
        raise ValueError("expected a limit of at least 1, or None; got 0")
    request = neurons_pb2.FindNeuronsRequest(
        model=model,
        revision=revision,
        token=target_message(token, "the token"),
        suppressed=suppressed,
        layers=layer_numbers(layers),
    )
    pages: list[neurons_pb2.FindNeuronsResponse] = []
    for size in _page_sizes(wanted):
        request.page_size = size
        pages.append((yield UnaryCall("FindNeurons", request, timeout)))
        request.page_token = pages[-1].next_page_token
        if not request.page_token:
            break
    return FoundNeurons.from_messages(pages, suppressed=suppressed)


def _page_sizes(wanted: int | None) -> Iterator[int]:
    """Pages that add up to `wanted`, or without end."""
    left = wanted
    while left is None or left > 0:
        yield _PAGE if left is None else min(left, _PAGE)
        left = None if left is None else left - _PAGE
