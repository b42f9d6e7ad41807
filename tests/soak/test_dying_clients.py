"""Two hundred clients killed while they read leave no resources behind."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import grpc

from januslens.v1 import service_pb2_grpc, trace_pb2
from tests.support.calls import prompt, timeless
from tests.support.memory import open_files, resident_bytes
from tests.support.metrics import sample, wait_until_idle
from tests.support.readers import reader
from tests.support.server import ServerProcess

KILLED = 200
AT_ONCE = 4
MAY_GROW = 20 * 2**20
SHORT = trace_pb2.TraceRequest(input=prompt("The capital of Japan is the city of"))


def test_two_hundred_killed_clients_leave_a_healthy_idle_server(soaked: ServerProcess) -> None:
    draws = random.Random(5)
    plans = [(draws.randrange(4), draws.uniform(0, 0.3)) for _ in range(KILLED)]

    def die(plan: tuple[int, float]) -> None:
        messages, seconds = plan
        with reader(soaked.address, messages, draws.choice(["goes on", "stops"])):
            time.sleep(seconds)

    with grpc.insecure_channel(soaked.address) as channel:
        stub = service_pb2_grpc.IntrospectionServiceStub(channel)
        before = [timeless(message) for message in stub.Trace(SHORT)]
        held = []
        for half in (plans[: KILLED // 2], plans[KILLED // 2 :]):
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(die, half))
            wait_until_idle(soaked, seconds=30)
            held.append(resident_bytes(soaked.process.pid))
            print(f"{len(half)} killed: {held[-1] / 2**20:.1f} MiB")
        assert [timeless(message) for message in stub.Trace(SHORT)] == before
    assert held[1] - held[0] <= MAY_GROW
    assert open_files(soaked.process.pid) < 100
    for gauge in ("januslens_queue_depth", "januslens_in_flight"):
        assert sample(soaked, gauge) == 0
    assert "Traceback" not in soaked.log
