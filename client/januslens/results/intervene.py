"""The effects of experiments, each a changed forward pass, on the prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from januslens.results import exports
from januslens.results.exports import PageFrame, json_lines, notebook_html, page_html
from januslens.results.heat_map import HeatMap
from januslens.results.message_file import save_messages
from januslens.results.models import Provenance, StageTime
from januslens.results.tokens import Token, TokenTable
from januslens.v1 import intervene_pb2, streams_pb2

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction at one position of one pass.

    Attributes:
        position: The position.
        target: The requested target, or the model's own prediction without interventions.
        probability: The target's probability.
        log_probability: Natural logarithm of the target's probability, which does not underflow.
        logit: The target's logit.
        rank: Number of tokens with a larger logit than the target; 0 = it is the prediction.
        logit_difference: The target's logit minus that of the other token; None without one.
        kl_nats: `KL(before || after)` of the whole distribution, in nats; 0 in a header.
        top: The most probable tokens with their probabilities, most probable first.
    """

    position: int
    target: Token
    probability: float
    log_probability: float
    logit: float
    rank: int
    logit_difference: float | None
    kl_nats: float
    top: tuple[tuple[Token, float], ...]

    @classmethod
    def from_message(cls, message: streams_pb2.Outcome, tokens: TokenTable) -> Prediction:
        """Read one prediction; `tokens` has the texts of its tokens."""
        difference = message.logit_difference if message.HasField("logit_difference") else None
        named = (tokens[token_id] for token_id in message.top_token_ids)
        return cls(
            position=message.position,
            target=tokens[message.target_token_id],
            probability=message.target_probability,
            log_probability=message.target_log_probability,
            logit=message.target_logit,
            rank=message.target_rank,
            logit_difference=difference,
            kl_nats=message.kl_nats,
            top=tuple(zip(named, message.top_probabilities, strict=True)),
        )


@dataclass(frozen=True)
class InterveneHeader:
    """Prompt and predictions without interventions; the first event of a stream of effects.

    Attributes:
        request_id: Id of the call, as in the server's log.
        provenance: The model's revision, data type, device and library versions.
        prompt_tokens: The prompt's tokens, one per position.
        positions: The positions where the prediction is read, ascending.
        before: The predictions without interventions, one per position that is read.
        experiments: Number of experiments, each of which gets an effect.
        experiments_at_once: Largest number of experiments that run together as a batch.
    """

    request_id: str
    provenance: Provenance
    prompt_tokens: tuple[Token, ...]
    positions: tuple[int, ...]
    before: tuple[Prediction, ...]
    experiments: int
    experiments_at_once: int

    @classmethod
    def from_message(cls, message: streams_pb2.StreamHeader, tokens: TokenTable) -> InterveneHeader:
        """Read the header; `tokens` has the texts of its predictions."""
        return cls(
            request_id=message.request_id,
            provenance=Provenance.from_message(message.provenance),
            prompt_tokens=tuple(Token.from_message(token) for token in message.prompt_tokens),
            positions=tuple(message.positions),
            before=_predictions(message.before, tokens),
            experiments=message.experiments,
            experiments_at_once=message.experiments_at_once,
        )


@dataclass(frozen=True, slots=True)
class InterventionEffect:
    """The effect of one experiment.

    Attributes:
        experiment: Number of the experiment, from 0; those of a sweep follow those listed.
        label: Label of the experiment; empty in a sweep.
        layer: Layer of a sweep by layer, otherwise None.
        position: Position of a sweep by position, otherwise None.
        head: Head of a sweep by head, otherwise None.
        neuron: Neuron of a sweep by neuron, otherwise None.
        source_position: Source position of a sweep by source, otherwise None.
        after: The predictions under the interventions, one per position that is read.
    """

    experiment: int
    label: str
    layer: int | None
    position: int | None
    head: int | None
    neuron: int | None
    source_position: int | None
    after: tuple[Prediction, ...]

    @property
    def coordinates(self) -> dict[str, int]:
        """The coordinates in the sweep, by the names of the attributes; empty if it was listed."""
        found = ((name, getattr(self, name)) for name in _COORDINATES)
        return {name: value for name, value in found if value is not None}

    @classmethod
    def from_message(
        cls, message: intervene_pb2.InterventionEffect, tokens: TokenTable
    ) -> InterventionEffect:
        """Read one effect; `tokens` has the texts of its tokens."""
        return cls(
            experiment=message.experiment,
            label=message.label,
            layer=message.layer if message.HasField("layer") else None,
            position=message.position if message.HasField("position") else None,
            head=message.head if message.HasField("head") else None,
            neuron=message.neuron if message.HasField("neuron") else None,
            source_position=(
                message.source_position if message.HasField("source_position") else None
            ),
            after=_predictions(message.after, tokens),
        )


def _predictions(
    messages: Iterable[streams_pb2.Outcome], tokens: TokenTable
) -> tuple[Prediction, ...]:
    return tuple(Prediction.from_message(message, tokens) for message in messages)


@dataclass(frozen=True)
class InterveneSummary:
    """The last event of a stream of effects; a stream without one is incomplete.

    Attributes:
        times: Seconds by stage on the server.
    """

    times: tuple[StageTime, ...]

    @classmethod
    def from_message(cls, message: streams_pb2.StreamSummary) -> InterveneSummary:
        """Read the summary."""
        return cls(times=tuple(StageTime.from_message(time) for time in message.times))


@dataclass(frozen=True, repr=False)
class InterventionEffects:
    """The effects of several experiments on the prediction of one prompt.

    Attributes:
        header: Prompt, predictions without interventions, and provenance.
        effects: The effects by number of the experiment.
        summary: Times; None if the stream was interrupted.
        responses: The messages that this result was read from.
    """

    header: InterveneHeader
    effects: tuple[InterventionEffect, ...]
    summary: InterveneSummary | None
    responses: tuple[intervene_pb2.InterveneResponse, ...] = field(repr=False, compare=False)

    @property
    def prompt_tokens(self) -> tuple[Token, ...]:
        """The prompt's tokens, one per position."""
        return self.header.prompt_tokens

    @property
    def before(self) -> tuple[Prediction, ...]:
        """The predictions without interventions, one per position that is read."""
        return self.header.before

    @property
    def provenance(self) -> Provenance:
        """The model's revision, data type, device and library versions."""
        return self.header.provenance

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the sweep, such as `("layer", "head")`; empty without a sweep."""
        swept = next((effect for effect in self.effects if effect.coordinates), None)
        return () if swept is None else tuple(swept.coordinates)

    def heat_maps(self, figure: str | None = None, position: int | None = None) -> list[HeatMap]:
        """Return the effects of the sweep by two of its axes.

        The rows are the layers if the sweep has them. A sweep with more than two axes gives one map
        for each value of the others; a sweep with one axis gives a map with one row.

        Args:
            figure: `logit`, `probability`, `logit_difference` or `kl_nats`; None = the logit
                difference if there is another token, otherwise the logit. The values are
                differences to the prediction without interventions.
            position: Position where the prediction is read; None = the last one that was read.

        Raises:
            ValueError: There is no such figure, or the position was not read.
        """
        figure = figure or ("logit" if self.before[-1].logit_difference is None else _DIFFERENCE)
        if figure not in _FIGURES:
            raise ValueError(f"unknown figure {figure!r}; expected one of {', '.join(_FIGURES)}")
        at = -1 if position is None else self._read_at(position)
        before = self.before[at]
        values: dict[tuple[int, ...], float] = {}
        for effect in self.effects:
            if found := effect.coordinates:
                values[tuple(found.values())] = _change(before, effect.after[at], figure)
        if not values:
            return []
        places = [sorted(set(places)) for places in zip(*values, strict=True)]
        axes = self.axes if len(self.axes) > 1 else ("", *self.axes)
        places = places if len(places) > 1 else [[-1], *places]
        return [
            self._heat_map(values, axes, places, fixed, f"{_FIGURES[figure]} of {before.target}")
            for fixed in product(*places[1:-1])
        ]

    def _read_at(self, position: int) -> int:
        read = self.header.positions
        wanted = position if position >= 0 else position + len(self.prompt_tokens)
        if wanted not in read:
            raise ValueError(f"position {position} was not read; expected one of {list(read)}")
        return read.index(wanted)

    def _heat_map(
        self,
        values: dict[tuple[int, ...], float],
        axes: tuple[str, ...],
        places: list[list[int]],
        fixed: tuple[int, ...],
        title: str,
    ) -> HeatMap:
        """Return the map of the first and last axis, at the given places of the axes between."""
        rows, columns = places[0], places[-1]
        table = [[(row, *fixed, column) for column in columns] for row in rows]
        found = [[values.get(_known(place, axes), np.nan) for place in row] for row in table]
        where = (self._label(a, p) for a, p in zip(axes[1:-1], fixed, strict=True))
        return HeatMap(
            title=", ".join([title, *where]),
            row_axis=axes[0],
            rows=tuple(self._label(axes[0], row) for row in rows),
            column_axis=axes[-1],
            columns=tuple(self._label(axes[-1], column) for column in columns),
            values=np.array(found),
        )

    def _label(self, axis: str, place: int) -> str:
        """Name a coordinate: positions by number and token."""
        if axis in ("position", "source_position"):
            return f"{place} {self.prompt_tokens[place]}"
        return f"{axis} {place:>3}" if axis == "layer" else f"{axis} {place}" if axis else ""

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame with one row per experiment and position read. Requires pandas.

        Columns for coordinates that no experiment has are left out. The `_effect` columns are
        differences to the prediction without interventions.
        """
        pandas = exports.require("pandas", "analysis", "a frame of effects")
        frame: pd.DataFrame = pandas.DataFrame(list(self._rows()))
        absent = [name for name in _COORDINATES if name in frame and frame[name].isna().all()]
        present = [name for name in _COORDINATES if name in frame and name not in absent]
        return frame.drop(columns=absent).astype(dict.fromkeys(present, "Int64"))

    def to_xarray(self) -> xr.Dataset:
        """Return the figures as arrays with named dimensions. Requires xarray.

        The dimensions are the axes of the sweep, or `experiment` without a sweep, followed by
        `read_position`. Experiments that were listed beside a sweep are left out.
        """
        exports.require("xarray", "analysis", "a dataset of effects")
        axes = list(self.axes)
        frame = self.to_pandas()
        if axes:
            frame = frame[frame[axes[0]].notna()].astype(dict.fromkeys(axes, "int64"))
        index = [*(axes or ["experiment"]), "read_position"]
        left_out = {"label", "target", "predicted", "experiment"} - set(index)
        made: xr.Dataset = frame.drop(columns=[*left_out]).set_index(index).to_xarray()
        if not axes:
            made = made.assign_coords(label=("experiment", [one.label for one in self.effects]))
        return made

    def save(self, path: str | PathLike[str]) -> None:
        """Write the messages of the stream to a file that `januslens.load` reads.

        Raises:
            OSError: The file cannot be written.
        """
        save_messages(path, self.responses)

    def to_json_lines(self) -> Iterable[str]:
        """Return each message of the stream as one line of JSON; `read_effects` reads them."""
        return json_lines(self.responses)

    def to_html(self) -> str:
        """Return these effects as a page: a heat map in one HTML file that needs no network.

        Rows are layers, and columns are the other axis of the sweep. The page has the prediction at
        the last position that was read.
        """
        return page_html(self, None)

    def show(self, *, height: int = 700) -> PageFrame:
        """Show the page of `to_html` in a notebook; `height` is in pixels."""
        return PageFrame(self.to_html(), height)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for effect in self.effects:
            place = {name: getattr(effect, name) for name in _COORDINATES}
            for before, after in zip(self.before, effect.after, strict=True):
                yield {
                    "experiment": effect.experiment,
                    "label": effect.label,
                    **place,
                    "read_position": after.position,
                    "target": after.target.text,
                    "probability": after.probability,
                    "probability_effect": after.probability - before.probability,
                    "logit": after.logit,
                    "logit_effect": after.logit - before.logit,
                    "rank": after.rank,
                    "logit_difference": after.logit_difference,
                    "logit_difference_effect": _change(before, after, _DIFFERENCE),
                    "kl_nats": after.kl_nats,
                    "predicted": after.top[0][0].text if after.top else None,
                }

    def __repr__(self) -> str:
        """A one-line description, because there may be many effects."""
        prompt = "".join(token.text for token in self.prompt_tokens)
        return f"<InterventionEffects on {prompt!r}: {len(self.effects)} experiments>"

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return notebook_html(self)


_COORDINATES = ("layer", "position", "head", "neuron", "source_position")
_DIFFERENCE = "logit_difference"
_FIGURES = {
    "logit": "change of the logit",
    "probability": "change of the probability",
    _DIFFERENCE: "change of the logit difference",
    "kl_nats": "KL divergence in nats",
}


def _change(before: Prediction, after: Prediction, figure: str) -> float:
    """Return after minus before; NaN if the figure was not requested."""
    first, second = getattr(before, figure), getattr(after, figure)
    return np.nan if first is None or second is None else float(second - first)


def _known(place: tuple[int, ...], axes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the coordinates, without the row of a map that has no axis for its rows."""
    return place if axes[0] else place[1:]
