"""Resolve the experiments of an Intervene request: those listed, then those of its sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from januslens_server.errors import InvalidRequest
from januslens_server.models.interventions import Intervention
from januslens_server.models.resident import ResidentModel
from januslens_server.models.sites import SITES_WITH_HEADS, site_shape
from januslens_server.pipelines.hidden_sources import Block, blocks_of, check_sources_left
from januslens_server.pipelines.interventions import (
    OtherPrompts,
    numbered_blocks,
    read_interventions,
)
from januslens_server.results import Coordinates
from januslens_server.specs import Add, InterveneSpec, SetTo, Site, SweepSpec, Vectors

MAX_EXPERIMENTS = 16_384


@dataclass(frozen=True)
class Experiment:
    """Interventions that apply to one pass, with the label or the place in the sweep."""

    label: str
    coordinates: Coordinates
    interventions: tuple[Intervention, ...]

    @property
    def lowest(self) -> int:
        """The lowest layer that changes, -1 for EMBEDDING, or a large number if none does."""
        return min((key[0] for i in self.interventions for key in i.keys), default=2**31)


def read_experiments(
    model: ResidentModel,
    spec: InterveneSpec,
    length: int,
    always: Sequence[Intervention],
    others: OtherPrompts,
) -> list[Experiment]:
    """Resolve all experiments for a prompt of `length` tokens.

    `always` are interventions that apply together with each experiment.

    Raises `InvalidRequest` for interventions that do not fit, and for too many or no experiments.
    """
    blocks = numbered_blocks(always, "always")
    experiments = []
    for i, experiment in enumerate(spec.experiments):
        field = f"experiments[{i}].interventions"
        own = read_interventions(
            model, experiment.interventions, length, field=field, others=others
        )
        if blocks:
            hiding = numbered_blocks(own, field)
            check_sources_left(model, hiding, others.check_cancelled, blocks)
        experiments.append(Experiment(experiment.label, Coordinates(), own))
    if spec.sweep is not None:
        room = MAX_EXPERIMENTS - len(experiments)
        experiments += _swept(model, spec.sweep, length, room, blocks, others)
    if not experiments:
        raise InvalidRequest("experiments", "no experiments given; send some, or a sweep")
    return experiments


def _swept(
    model: ResidentModel,
    sweep: SweepSpec,
    length: int,
    at_most: int,
    always: Sequence[Block],
    others: OtherPrompts,
) -> list[Experiment]:
    _check_axes(sweep)
    (template,) = read_interventions(
        model, (sweep.template,), length, field="sweep.template", numbered=False, others=others
    )
    units = template.units
    if units is None and sweep.by_unit:
        units = _all_units(model, template, length)
    keys = template.keys
    axes: list[Sequence[int | None]] = [
        range(len(keys)) if sweep.by_layer else [None],
        range(len(template.positions)) if sweep.by_position else [None],
        range(len(units or ())) if sweep.by_unit else [None],
        template.hidden if sweep.by_source else [None],
    ]
    count = len(axes[0]) * len(axes[1]) * len(axes[2]) * len(axes[3])
    if count > at_most:
        raise InvalidRequest(
            "sweep",
            f"too many experiments: expected at most {MAX_EXPERIMENTS}, got "
            f"{MAX_EXPERIMENTS - at_most + count}; split fewer axes, or name layers, positions or "
            "heads",
        )
    # Each head of a layer and position is in an experiment, with all sources or one of them.
    hidden = [(source,) for source in template.hidden] if sweep.by_source else [template.hidden]
    for sources in hidden:
        part = blocks_of([("sweep.template", replace(template, hidden=sources))])
        check_sources_left(model, part, others.check_cancelled, always)
    whole = replace(template, units=units)
    experiments = []
    for experiment in _split(whole, sweep, axes):
        others.check_cancelled()
        experiments.append(experiment)
    return experiments


def _all_units(model: ResidentModel, template: Intervention, length: int) -> tuple[int, ...]:
    """Return all heads or neurons of the template.

    Raises `InvalidRequest` if its layers have different numbers of them.
    """
    axis = -1 if template.keys[0][1] is Site.NEURONS else 0
    counts = {site_shape(model, key, length)[axis] for key in template.keys}
    if len(counts) > 1:
        raise InvalidRequest(
            "sweep.template.layers",
            f"the layers have {' or '.join(map(str, sorted(counts)))} units to split by; name "
            "layers that have the same number",
        )
    return tuple(range(counts.pop()))


def _check_axes(sweep: SweepSpec) -> None:
    site = sweep.template.site
    if sweep.by_unit and site not in (*SITES_WITH_HEADS, Site.NEURONS):
        raise InvalidRequest("sweep", f"{site.name} has neither heads nor neurons to split by")
    if sweep.by_source and site is not Site.ATTENTION_PATTERN:
        raise InvalidRequest("sweep.by_source", f"{site.name} has no sources to split by")
    if sweep.layer_window < 1 or (sweep.layer_window > 1 and not sweep.by_layer):
        raise InvalidRequest(
            "sweep.layer_window", "expected a number of layers above 0, together with by_layer"
        )


def _split(
    whole: Intervention, sweep: SweepSpec, axes: Sequence[Sequence[int | None]]
) -> Iterator[Experiment]:
    unit = "neuron" if sweep.template.site is Site.NEURONS else "head"
    before, after = sweep.layer_window // 2, (sweep.layer_window + 1) // 2
    for key, place, at_unit, source in product(*axes):
        part, at = whole, Coordinates()
        if key is not None:
            keys = whole.keys[max(0, key - before) : key + after]
            part, at = replace(part, keys=keys), replace(at, layer=max(0, whole.keys[key][0]))
        if place is not None:
            at = replace(at, position=whole.positions[place])
            part = _at_position(part, place)
        if at_unit is not None and whole.units is not None:
            at = replace(at, **{unit: whole.units[at_unit]})
            part = _at_unit(part, at_unit)
        if source is not None:
            at, part = replace(at, source_position=source), replace(part, hidden=(source,))
        yield Experiment("", at, (part,))


def _at_position(part: Intervention, place: int) -> Intervention:
    sources = part.sources
    if sources and not part.over_positions:
        sources = tuple(replace(s, positions=(s.positions[place],)) for s in sources)
    operation = part.operation
    if isinstance(operation, SetTo):
        operation = SetTo(_row(operation.values, place, part))
    elif isinstance(operation, Add):
        operation = replace(operation, vector=_row(operation.vector, place, part))
    positions = (part.positions[place],)
    return replace(part, positions=positions, sources=sources, operation=operation)


def _row(values: Vectors, place: int, part: Intervention) -> Vectors:
    """Return the values of one position of a tensor that may have one row for each."""
    return values[place][None] if values.ndim > _dimensions(part) else values


def _at_unit(part: Intervention, number: int) -> Intervention:
    units = None if part.units is None else (part.units[number],)
    operation = part.operation
    axis = -1 if part.experts is not None else -_dimensions(part)
    if isinstance(operation, SetTo):
        operation = SetTo(operation.values.take([number], axis=axis))
    elif isinstance(operation, Add):
        operation = replace(operation, vector=operation.vector.take([number], axis=axis))
    return replace(part, units=units, operation=operation)


def _dimensions(part: Intervention) -> int:
    """Return the number of dimensions of the site's shape at one position."""
    return 2 if part.keys[0][1] in SITES_WITH_HEADS or part.experts is not None else 1
