"""Effects of experiments on the demo, compared with passes that are read one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from januslens import (
    AsyncClient,
    Client,
    Experiment,
    InterveneHeader,
    InterveneSummary,
    Intervention,
    InterventionEffect,
    InterventionEffects,
    InvalidRequest,
    SweepOver,
    read_effects,
)
from januslens.interventions import noise, patch, zero

PROMPT = "The capital of Japan is the city of"
OTHER_PROMPT = "The capital of Peru is the city of"


@pytest.fixture(scope="module")
def client(server_address: str) -> Iterator[Client]:
    with Client(server_address) as client:
        yield client


@pytest.fixture(scope="module")
def by_head(client: Client) -> InterventionEffects:
    return client.intervene(
        PROMPT,
        target=" Tokyo",
        other=" Paris",
        sweep=SweepOver(zero("HEAD_RESULT", layers=[1, 3]), by=["layer", "head"]),
        top_k=3,
    )


def logits(client: Client, *interventions: Intervention) -> NDArray[np.float64]:
    """Return the logits at the last position of a changed pass."""
    read = client.activations(
        PROMPT, sites="LOGITS", positions=-1, float32=True, interventions=interventions
    )
    return np.asarray(read.array("LOGITS")[0], np.float64)


def probabilities(values: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(values - values.max())
    return np.asarray(exponentials / exponentials.sum())


def test_effects_of_a_sweep_are_those_of_single_passes(
    client: Client, by_head: InterventionEffects
) -> None:
    tokyo, paris = (client.tokenize(text)[0].id for text in (" Tokyo", " Paris"))
    plain = probabilities(logits(client))
    (before,) = by_head.before
    assert before.probability == pytest.approx(plain[tokyo], abs=1e-5)
    assert [effect.experiment for effect in by_head.effects] == list(range(8))
    for effect in by_head.effects[::3]:
        assert effect.layer is not None
        assert effect.head is not None
        changed = logits(client, zero(heads=[(effect.layer, effect.head)]))
        (after,) = effect.after
        assert after.target.text == " Tokyo"
        assert after.logit == pytest.approx(changed[tokyo], abs=1e-3)
        assert after.logit_difference == pytest.approx(changed[tokyo] - changed[paris], abs=1e-3)
        read = probabilities(changed)
        assert after.probability == pytest.approx(read[tokyo], abs=1e-4)
        assert after.rank == int((changed > changed[tokyo]).sum())
        assert after.kl_nats == pytest.approx(float(plain @ np.log(plain / read)), abs=1e-4)
        assert [token.id for token, _ in after.top] == np.argsort(-changed)[:3].tolist()
        assert all(token.text for token, _ in after.top)


def test_a_sweep_equals_its_experiments_one_by_one(client: Client) -> None:
    corrupted = noise(0.5, positions=[3], seed=1)
    swept = client.intervene(
        PROMPT,
        target=" Tokyo",
        always=[corrupted],
        sweep=SweepOver(patch("MLP_OUTPUT", source=PROMPT), ["layer", "position"], layer_window=2),
    )
    windows = [[0], [0, 1], [1, 2], [2, 3]]
    listed = client.intervene(
        PROMPT,
        target=" Tokyo",
        always=[corrupted],
        experiments=[
            Experiment(
                [patch("MLP_OUTPUT", source=PROMPT, layers=layers, positions=position)],
                label=f"layers {layers}, position {position}",
            )
            for layers in windows
            for position in range(len(swept.prompt_tokens))
        ],
    )
    assert len(swept.effects) == len(listed.effects) == 4 * len(swept.prompt_tokens)
    for one, other in zip(swept.effects, listed.effects, strict=True):
        assert other.label == f"layers {windows[one.layer or 0]}, position {one.position}"
        assert one.after[0].logit == pytest.approx(other.after[0].logit, abs=1e-4)
        assert one.after[0].kl_nats == pytest.approx(other.after[0].kl_nats, abs=1e-4)


def test_frame_has_a_row_per_experiment_and_position(client: Client) -> None:
    found = client.intervene(
        PROMPT, experiments=[zero(heads=[(3, 1)]), Experiment()], positions=[-1, 2]
    )
    frame = found.to_pandas()
    assert frame["experiment"].tolist() == [0, 0, 1, 1]
    assert frame["read_position"].tolist() == [2, 7, 2, 7]
    assert "head" not in frame
    assert frame["logit_effect"].tolist()[2:] == pytest.approx([0, 0], abs=1e-4)
    assert frame["logit"][0] == found.effects[0].after[0].logit


def test_frame_of_a_sweep_has_its_coordinates(by_head: InterventionEffects) -> None:
    frame = by_head.to_pandas()
    assert frame["layer"].tolist() == [1] * 4 + [3] * 4
    assert frame["head"].tolist() == [0, 1, 2, 3] * 2
    assert not {"position", "neuron", "source_position"} & set(frame)


def test_effects_arrive_one_by_one(client: Client, server_address: str) -> None:
    heads = zero(heads=[0, 1])
    with client.stream_intervene(PROMPT, sweep=SweepOver(heads, by="head")) as stream:
        events = list(stream)
    assert [type(event) for event in events] == [
        InterveneHeader,
        InterventionEffect,
        InterventionEffect,
        InterveneSummary,
    ]

    async def effects() -> InterventionEffects:
        async with AsyncClient(server_address) as other:
            return await other.intervene(PROMPT, sweep=SweepOver(heads, by="head"))

    assert asyncio.run(effects()).effects == stream.result().effects


def test_estimate_is_that_of_the_sweep(client: Client) -> None:
    sweep = SweepOver(zero("HEAD_RESULT"), by=["layer", "head"])
    assert client.estimate_intervene(PROMPT, sweep=sweep).stream_bytes > 16 * 50


def test_invalid_experiments_are_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="no experiments and no sweep given"):
        client.intervene(PROMPT)
    with pytest.raises(ValueError, match="expected one or several of layer, position"):
        client.intervene(PROMPT, sweep=SweepOver(zero("QUERY"), by="heads"))
    with pytest.raises(ValueError, match="give numbers instead of pairs"):
        client.intervene(PROMPT, sweep=SweepOver(zero(heads=[(1, 0), (2, 0)]), by="head"))
    with pytest.raises(ValueError, match='invalid positions "all"'):
        client.intervene(PROMPT, experiments=zero("QUERY"), positions="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an Experiment or an intervention"):
        client.intervene(PROMPT, experiments=["zero"])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="BLOCK_OUTPUT has neither heads nor neurons"):
        client.intervene(PROMPT, sweep=SweepOver(zero("BLOCK_OUTPUT"), by="head"))


def test_heat_maps_have_the_change_of_each_experiment(by_head: InterventionEffects) -> None:
    (found,) = by_head.heat_maps()
    assert (found.rows, found.columns) == (
        ("layer   1", "layer   3"),
        ("head 0", "head 1", "head 2", "head 3"),
    )
    (before,) = by_head.before
    for effect, value in zip(by_head.effects, found.values.ravel(), strict=True):
        (after,) = effect.after
        assert after.logit_difference is not None
        assert before.logit_difference is not None
        assert value == after.logit_difference - before.logit_difference
    assert found.largest == abs(found.values).max()
    (probabilities,) = by_head.heat_maps("probability", -1)
    assert probabilities.values[1, 2] == by_head.effects[6].after[0].probability - (
        before.probability
    )
    with pytest.raises(ValueError, match="expected one of logit, probability"):
        by_head.heat_maps("rank")
    with pytest.raises(ValueError, match=r"position 3 was not read; expected one of \[7\]"):
        by_head.heat_maps(position=3)


def test_sweeps_over_one_or_three_axes_have_maps(client: Client) -> None:
    by_one = client.intervene(PROMPT, sweep=SweepOver(zero("MLP_OUTPUT", layers=[0, 3]), "layer"))
    (row,) = by_one.heat_maps()
    assert (row.rows, row.columns) == (("",), ("layer   0", "layer   3"))
    template = zero("HEAD_RESULT", layers=[1, 3], heads=[0, 2], positions=[3, 7])
    by_three = client.intervene(
        PROMPT,
        experiments=[Experiment(label="nothing")],
        sweep=SweepOver(template, ["layer", "position", "head"]),
    )
    maps = by_three.heat_maps()
    assert [found.title.split(", ")[1] for found in maps] == ["3 ␣Japan", "7 ␣of"]
    frame = by_three.to_pandas().set_index(["layer", "position", "head"])["logit_effect"]
    assert maps[1].values[0, 1] == frame[1, 7, 2]
    arrays = by_three.to_xarray()
    assert dict(arrays.sizes) == {"layer": 2, "position": 2, "head": 2, "read_position": 1}
    found = arrays["logit_effect"].sel(layer=1, position=7, head=2).item()
    assert found == pytest.approx(frame[1, 7, 2])
    assert by_three._repr_html_().count("<table") == 3


def test_effects_are_read_back_from_json_lines(by_head: InterventionEffects) -> None:
    lines = list(by_head.to_json_lines())
    assert len(lines) == 10
    assert read_effects(lines) == by_head


def test_notebooks_show_heat_maps_and_listed_experiments(
    client: Client, by_head: InterventionEffects
) -> None:
    shown = by_head._repr_html_()
    (found,) = by_head.heat_maps()
    assert "change of the logit difference of ␣Tokyo" in shown
    assert shown.count('class="h"') == 8
    assert f">{found.values[1, 2]:+.2f}<" in shown
    listed = client.intervene(PROMPT, experiments=[Experiment([zero("QUERY")], label="no <query>")])
    assert "no &lt;query&gt;" in listed._repr_html_()
    assert listed.heat_maps() == []
    assert listed.to_xarray()["logit"].dims == ("experiment", "read_position")
