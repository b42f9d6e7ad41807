"""One stream out of several calls: what both kinds of stream have in common.

A stream that was cut goes on with another call for what is missing. The messages of both become
those of a stream that was never cut: pieces of a layer or matrix are held until it is whole, what
has come already is dropped, a token's text comes once, and `sequence` counts on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from januslens.v1 import common_pb2

RequestT = TypeVar("RequestT", bound=Message)
PartT = TypeVar("PartT", bound=Any)


class OtherAnswer(Exception):
    """The other replica answers another question: its parts would not fit."""


class Splice(ABC, Generic[RequestT, PartT]):
    """Takes each call's messages and gives back those of the one stream."""

    def __init__(self, request: RequestT) -> None:
        """`request` is the first call's."""
        self._request = request
        self._header: Any = None
        self._held: list[PartT] = []
        self._named: set[int] = set()
        self._given = 0

    def restart(self) -> None:
        """Another call begins: pieces of what was not whole are of no use."""
        self._held.clear()

    def take(self, response: PartT) -> list[PartT]:
        """The next messages of the one stream; none while they are held, or known already.

        Raises:
            OtherAnswer: The call runs on other weights or tokens than the first one did.
        """
        match response.WhichOneof("event"):
            case "header":
                given = self._take_header(response)
            case "summary":
                given = [self._sum_up(response)]
            case None:  # an event of a newer server's
                given = [response]
            case _:
                given = self._take_part(response)
        for message in given:
            message.sequence = self._given
            self._given += 1
        return given

    @abstractmethod
    def rest(self) -> RequestT:
        """What to ask another replica for."""

    @abstractmethod
    def _take_part(self, response: PartT) -> list[PartT]:
        """A layer or matrix, or a piece of one."""

    @abstractmethod
    def _sum_up(self, response: PartT) -> PartT:
        """The summary, with the counts of the whole."""

    @abstractmethod
    def _targets(self, header: Any) -> list[int]:
        """The tokens that the stream is about."""

    def _take_header(self, response: PartT) -> list[PartT]:
        if self._header is not None:
            self._compare(response.header)
            return []
        self._header = response.header
        self._named.update(token.id for token in response.header.prompt_tokens)
        self._named.update(token.id for token in response.header.tokens)
        return [response]

    def _compare(self, header: Any) -> None:
        for what, read in (
            ("revision", lambda h: h.provenance.revision),
            ("prompt tokens", lambda h: [token.id for token in h.prompt_tokens]),
            ("targets", self._targets),
        ):
            expected, got = read(self._header), read(header)
            if expected != got:
                raise OtherAnswer(f"expected {what} {expected} of the other replica; got {got}")

    def _unnamed(self, tokens: Iterable[common_pb2.Token]) -> list[common_pb2.Token]:
        """Those whose texts have not come."""
        fresh = [token for token in tokens if token.id not in self._named]
        self._named.update(token.id for token in fresh)
        return fresh

    def _again(self) -> RequestT:
        """The request, for the very weights that answered first."""
        request = type(self._request)()
        request.CopyFrom(self._request)
        if self._header is not None:
            provenance = self._header.provenance
            request.model, request.revision = provenance.model, provenance.revision  # type: ignore[attr-defined]  # every request of a stream names them
        return request


def replace_all(field: Any, values: list[Any]) -> None:
    """Give a repeated field other values."""
    del field[:]
    field.extend(values)
