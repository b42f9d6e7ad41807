"""Results read back from what `--json` printed or `to_json_lines()` gave."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.json_format import Parse

from januslens._results.gradient import Gradient
from januslens._results.trace import Trace
from januslens._stream.gradient import GradientAssembler
from januslens._stream.trace import TraceAssembler
from januslens.v1 import gradient_lens_pb2, trace_pb2


def read_trace(lines: Iterable[str]) -> Trace:
    """The trace of a recorded stream, e.g. an open file: one message a line.

    Raises:
        StreamInterrupted: The recording has no summary; its `partial` is what there is.
        ProtocolViolation: A message is missing.
        google.protobuf.json_format.ParseError: A line is no message of a Trace.
    """
    assembler = TraceAssembler()
    for line in lines:
        assembler.feed(Parse(line, trace_pb2.TraceResponse()))
    return assembler.result()


def read_gradient(lines: Iterable[str]) -> Gradient:
    """The gradient of a recorded stream, e.g. an open file: one message a line.

    Raises:
        StreamInterrupted: The recording has no summary; its `partial` is what there is.
        ProtocolViolation: A message is missing.
        google.protobuf.json_format.ParseError: A line is no message of a GradientLens.
    """
    assembler = GradientAssembler()
    for line in lines:
        assembler.feed(Parse(line, gradient_lens_pb2.GradientLensResponse()))
    return assembler.result()
