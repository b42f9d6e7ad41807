"""A survey by Ray Data has the rows of one by the asynchronous client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import januslens
from tests.support.replicas import Replicas, running_replicas
from tests.support.surveys import contents

ray = pytest.importorskip("ray", reason="needs pip install 'januslens[ray]'")

PROMPTS = [f"{i}. The capital of Japan is the city of" for i in range(300)]
OPTIONS: dict[str, Any] = {"node_kinds": ["BLOCK_OUTPUT", "HEAD_OUTPUT"], "top_k": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of this machine alone, on which a busy machine may spend a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_raylet_start_wait_time_s", "300")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def pair() -> Iterator[Replicas]:
    with running_replicas(2) as replicas:
        yield replicas


@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.usefixtures("cluster")
def test_two_actors_and_two_servers_write_the_same_rows(pair: Replicas, tmp_path: Path) -> None:
    from januslens.surveys.on_ray import survey_on_ray

    first, second = servers = [f"127.0.0.1:{port}" for port in pair.ports]
    with januslens.Client(first) as client:
        client.survey(PROMPTS, tmp_path / "plain", replicas=[second], **OPTIONS)
    found = survey_on_ray(PROMPTS, tmp_path / "ray", servers=servers, **OPTIONS)
    assert found.complete
    assert contents(tmp_path / "ray") == contents(tmp_path / "plain")
    for part in sorted((tmp_path / "ray/prompts").glob("*.parquet"))[1:]:
        for table in found.tables:
            (tmp_path / "ray" / table / part.name).unlink()
    survey_on_ray(tmp_path / "ray/input.jsonl", tmp_path / "ray", servers=servers, **OPTIONS)
    assert contents(tmp_path / "ray") == contents(tmp_path / "plain")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("cluster")
def test_error_of_an_actor_is_that_of_the_call(pair: Replicas, tmp_path: Path) -> None:
    from januslens.surveys.on_ray import survey_on_ray

    with pytest.raises(januslens.InvalidRequest, match="layers"):
        survey_on_ray(
            PROMPTS, tmp_path / "out", servers=[f"127.0.0.1:{pair.ports[0]}"], layers=[99]
        )
