"""Answers as far as they came, from the lines of their streams."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.json_format import Parse

from januslens._results.gradient import Gradient
from januslens._results.trace import Trace
from januslens._stream.gradient import GradientAssembler
from januslens._stream.trace import TraceAssembler
from januslens.v1 import gradient_lens_pb2, trace_pb2

ResultT = TypeVar("ResultT")


def trace_so_far(lines: Iterable[str]) -> Trace:
    """A trace, whole or cut short.

    Raises:
        ValueError: Not even its header has come.
        ProtocolViolation: A message is missing.
        google.protobuf.json_format.ParseError: A line is no message of a Trace.
    """
    assembler = TraceAssembler()
    for line in lines:
        assembler.feed(Parse(line, trace_pb2.TraceResponse()))
    return _begun(assembler.partial())


def gradient_so_far(lines: Iterable[str]) -> Gradient:
    """A gradient, whole or cut short; raises as `trace_so_far` does."""
    assembler = GradientAssembler()
    for line in lines:
        assembler.feed(Parse(line, gradient_lens_pb2.GradientLensResponse()))
    return _begun(assembler.partial())


def _begun(result: ResultT | None) -> ResultT:
    if result is None:
        raise ValueError("expected a stream's header first; got none")
    return result
