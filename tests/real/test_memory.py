"""Every admitted request leaves the server alive, under a memory limit and with a wide vocabulary.

The model has 262,144 tokens, so the scores of one position take a mebibyte.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest

from januslens.v1 import cost_pb2, service_pb2_grpc, trace_pb2
from tests.real.checkpoints import GEMMA
from tests.support.server import ServerProcess, running_server

pytestmark = pytest.mark.real

# Weights, the lens' copy of the head and the interpreter take 2.2 GiB, the reserve up to 1 GiB.
LIMIT = 7 * 2**29
CALLERS = 8
LAYERS = 18
OK = grpc.StatusCode.OK
START_SECONDS = 600
ANSWER_SECONDS = 600
Stub = service_pb2_grpc.IntrospectionServiceStub


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    flags = ["--model", f"gemma3={GEMMA}", "--row-cache", "0", "--max-request-seconds", "600"]
    within = ["prlimit", f"--data={LIMIT}"]
    with running_server(*flags, within=within, seconds=START_SECONDS) as server:
        yield server


def request(tokens: int, caller: int = 0) -> trace_pb2.TraceRequest:
    """Return a request for the residual at the last position; the pass uses most of its memory."""
    made = trace_pb2.TraceRequest(node_kinds=[trace_pb2.NODE_KIND_BLOCK_OUTPUT])
    made.input.token_ids.ids.extend(2 + (7 * i + caller) % 1000 for i in range(tokens))
    return made


def longest_admitted(stub: Stub, most: int) -> int:
    """Return the length in tokens, up to 64 too low, of the longest admissible prompt."""
    low, high = 1, most
    while high - low > 64:
        middle = (low + high) // 2
        estimate = cost_pb2.EstimateCostRequest(trace=request(middle))
        low, high = (middle, high) if stub.EstimateCost(estimate).admissible else (low, middle)
    return low


def code(server: ServerProcess, tokens: int, caller: int) -> grpc.StatusCode:
    """Return the status of a trace, which is either complete or refused."""
    with grpc.insecure_channel(server.address) as channel:
        try:
            answers = list(Stub(channel).Trace(request(tokens, caller), timeout=ANSWER_SECONDS))
        except grpc.RpcError as error:
            ended: grpc.StatusCode = error.code()
            return ended
    assert sum(len(answer.layer.nodes) for answer in answers) == LAYERS
    return grpc.StatusCode.OK


def together(server: ServerProcess, tokens: int) -> Counter[grpc.StatusCode]:
    """Send the traces of all callers at once; print and return their statuses."""
    started = time.monotonic()
    with ThreadPoolExecutor(CALLERS) as pool:
        codes = Counter(pool.map(lambda caller: code(server, tokens, caller), range(CALLERS)))
    counts = ", ".join(f"{count} {each.name}" for each, count in codes.items())
    print(f"{CALLERS} callers, {tokens} tokens each: {counts}; {time.monotonic() - started:.0f} s")
    return codes


def test_longest_admitted_prompt_of_eight_callers_leaves_the_server_alive(
    server: ServerProcess,
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub, process = Stub(channel), psutil.Process(server.process.pid)
        tokens = longest_admitted(stub, 8000)
        print(f"\nlongest admitted prompt under {LIMIT >> 20} MiB: {tokens} tokens")
        assert 500 < tokens < 7000  # the limit admits long prompts, and it is what ends them
        assert code(server, tokens, 0) is OK
        # Connections and the remains of the first pass use memory, so some callers may be refused.
        at_limit = together(server, longest_admitted(stub, tokens))
        assert at_limit.keys() <= {OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert at_limit[OK] > 0
        below = together(server, longest_admitted(stub, tokens) * 9 // 10)
        assert below == {OK: CALLERS}
        assert server.process.poll() is None
        print(f"resident: {process.memory_info().rss >> 20} MiB")
        assert code(server, 3, 0) is OK
