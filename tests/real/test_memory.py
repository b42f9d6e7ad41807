"""Every admitted request leaves the server alive, under a memory limit and with a wide vocabulary.

The model has 262,144 tokens, so the scores of one position take a mebibyte.
"""

from __future__ import annotations

import time
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
START_SECONDS = 600
ANSWER_SECONDS = 300
Stub = service_pb2_grpc.IntrospectionServiceStub


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    flags = ["--model", f"gemma3={GEMMA}", "--row-cache", "0", "--max-request-seconds", "600"]
    within = ["prlimit", f"--data={LIMIT}"]
    with running_server(*flags, within=within, seconds=START_SECONDS) as server:
        yield server


def request(tokens: int, caller: int = 0) -> trace_pb2.TraceRequest:
    """The residual stream at the last position: most of the memory is taken by the pass."""
    made = trace_pb2.TraceRequest(node_kinds=[trace_pb2.NODE_KIND_BLOCK_OUTPUT])
    made.input.token_ids.ids.extend(2 + (7 * i + caller) % 1000 for i in range(tokens))
    return made


def longest_admitted(stub: Stub, most: int) -> int:
    """Number of tokens, to 64, of the longest prompt that the estimate calls admissible."""
    low, high = 1, most
    while high - low > 64:
        middle = (low + high) // 2
        estimate = cost_pb2.EstimateCostRequest(trace=request(middle))
        low, high = (middle, high) if stub.EstimateCost(estimate).admissible else (low, middle)
    return low


def answer(server: ServerProcess, tokens: int, caller: int) -> int:
    """The number of messages of a trace; one that is refused for its memory is asked again."""
    until = time.monotonic() + ANSWER_SECONDS
    with grpc.insecure_channel(server.address) as channel:
        while True:
            try:
                return len(list(Stub(channel).Trace(request(tokens, caller), timeout=600)))
            except grpc.RpcError as error:
                refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                if not refused or time.monotonic() > until:
                    raise
                time.sleep(1)


def test_longest_admitted_prompt_of_eight_callers_leaves_the_server_alive(
    server: ServerProcess,
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub, process = Stub(channel), psutil.Process(server.process.pid)
        tokens = longest_admitted(stub, 8000)
        print(f"\nlongest admitted prompt under {LIMIT >> 20} MiB: {tokens} tokens")
        assert 500 < tokens < 7000  # the limit admits long prompts, and it is what ends them
        alone = time.monotonic()
        assert answer(server, tokens, 0) > 18
        print(f"one caller: {time.monotonic() - alone:.0f} s")
        # What the first pass left (kernels, connections) is no longer free for the next ones.
        tokens = longest_admitted(stub, tokens) * 9 // 10
        together = time.monotonic()
        with ThreadPoolExecutor(CALLERS) as pool:
            answers = list(pool.map(lambda c: answer(server, tokens, c), range(CALLERS)))
        print(f"{CALLERS} callers with {tokens} tokens each: {time.monotonic() - together:.0f} s")
        assert min(answers) > 18
        assert server.process.poll() is None
        print(f"resident: {process.memory_info().rss >> 20} MiB")
        assert answer(server, 3, 0) > 18
