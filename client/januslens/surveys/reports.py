"""Answer the questions of a report from the folders of surveys, as frames, figures and a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

from januslens import _html as html
from januslens._charts import svg
from januslens._presentation import measure
from januslens.results.exports import require
from januslens.results.tokens import visible
from januslens.surveys.questions import REPORTS, Question, ReportKind
from januslens.surveys.survey import Survey

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

# Maximum rows of a table on a page. Frames have all rows.
_ROWS = 40
# The kind of node that a sweep over a site removes.
_REMOVED = {
    "SITE_HEAD_RESULT": "HEAD_OUTPUT",
    "SITE_NEURONS": "MLP_VALUE",
    "SITE_ATTENTION_OUTPUT": "ATTENTION_OUTPUT",
    "SITE_MLP_OUTPUT": "MLP_OUTPUT",
}


@dataclass(frozen=True)
class ReportTable:
    """One table of a report.

    Attributes:
        title: What the table has.
        text: What its columns mean, and what it does not show.
        query: The SQL that DuckDB has run; views have the names of the survey's tables.
        frame: The rows.
        figure: The figure as the text of an SVG file; None = the table has none.
        left_out: What the rows leave out because the surveys do not have it, and what to request.
    """

    title: str
    text: str
    query: str = field(repr=False)
    frame: pd.DataFrame = field(repr=False)
    figure: str | None = field(repr=False)
    left_out: tuple[str, ...]
    _drawn: Element | None = field(repr=False)


@dataclass(frozen=True)
class Report:
    """The answers of a report.

    Attributes:
        name: Name of the report, such as `answers`.
        title: What it is about.
        surveys: The surveys that it has read.
        tables: Its tables.
    """

    name: str
    title: str
    surveys: tuple[Survey, ...]
    tables: tuple[ReportTable, ...]

    @property
    def source(self) -> str:
        """The model, its revision, and the number of prompts."""
        survey = self.surveys[0]
        model, count = survey.manifest["model"], survey.dataset(_counted(survey)).count_rows()
        unfinished = "" if survey.complete else ", unfinished survey"
        return f"{model['name']} {model['revision'][:12]}, {count} prompts{unfinished}"

    def to_html(self) -> str:
        """Return the report as a page: one HTML file that needs no network."""
        return html.file(f"{self.title} · Januslens", html.document(*self._elements()))

    def _repr_html_(self) -> str:
        """The HTML that a notebook shows."""
        return html.document(*self._elements())

    def _elements(self) -> Iterator[Element]:
        yield html.element("h1", self.title)
        yield html.element("p", self.source, classes="d")
        for table in self.tables:
            yield html.element("h2", table.title)
            if table._drawn is not None:  # noqa: SLF001 - our own record
                yield html.element("p", table._drawn)  # noqa: SLF001
            yield _table(table)
            yield from (html.warning(text) for text in table.left_out)
            yield html.note(table.text)
            query = html.element("pre", table.query.strip())
            yield html.element("details", html.element("summary", "SQL"), query)


def report(name: str, *surveys: str | Path | Survey) -> Report:
    """Answer the questions of a report from one or several surveys. Requires duckdb and pandas.

    docs/surveys.md has the reports, and the request that each of them needs.

    Args:
        name: `units`, `norms`, `answers`, `gradients`, `edits` or `estimates`.
        surveys: Folders of surveys. `estimates` reads a survey of traces first, then surveys of
            experiments with the same prompts; the other reports read one survey.

    Raises:
        FileNotFoundError: A folder has no manifest.
        ValueError: There is no such report, or a survey does not have what it reads.
    """
    if name not in REPORTS:
        raise ValueError(f"unknown report {name!r}; expected one of {', '.join(REPORTS)}")
    kind = REPORTS[name]
    found = tuple(one if isinstance(one, Survey) else Survey.open(one) for one in surveys)
    _check(name, kind, found)
    engine = require("duckdb", "analysis", "a report")
    require("pandas", "analysis", "a report")
    with engine.connect() as connection:
        _create_views(connection, kind, found)
        sizes = found[0].manifest["sizes"]
        tables = tuple(_answered(connection, one, sizes) for one in kind.questions)
    return Report(name, kind.title, found, tables)


def _check(name: str, kind: ReportKind, surveys: Sequence[Survey]) -> None:
    """Check that the surveys are those that a report reads.

    Raises:
        ValueError: They are not; the message says how to run them.
    """
    advice = f"run {kind.request}"
    if not surveys or (len(surveys) > 1) != kind.measured:
        expected = "a survey of traces and surveys of experiments" if kind.measured else "one"
        raise ValueError(f"{len(surveys)} surveys given; {name} reads {expected}; {advice}")
    first, *others = surveys
    if first.manifest["rpc"] != kind.rpc:
        raise ValueError(
            f"the survey {str(first.path)!r} has results of {first.manifest['rpc']}; {name} reads "
            f"those of {kind.rpc}; {advice}"
        )
    missing = [table for table in kind.tables if table not in first.tables]
    if missing:
        raise ValueError(
            f"the survey {str(first.path)!r} has no rows in {missing[0]}, which {name} reads; "
            f"{advice}"
        )
    for other in others:
        different = [
            key for key in ("input", "model") if other.manifest[key] != first.manifest[key]
        ]
        if different:
            raise ValueError(
                f"the survey {str(other.path)!r} has another {different[0]} than "
                f"{str(first.path)!r}; expected the same; {advice}"
            )
        _removed_kind(other)


def _removed_kind(survey: Survey) -> str:
    """Return the kind of node that the experiments of a survey remove.

    Raises:
        ValueError: They are not sweeps that zero one site at the last position.
    """
    template = survey.manifest["request"].get("sweep", {}).get("template", {})
    removed = _REMOVED.get(template.get("site", ""))
    if removed is None or not template.get("zero") or template.get("positions") != [-1]:
        raise ValueError(
            f"the survey {str(survey.path)!r} has other experiments; expected a sweep of "
            f"zero(SITE, positions=-1) by layer, with SITE one of "
            f"{', '.join(site.removeprefix('SITE_') for site in _REMOVED)}"
        )
    return removed


def _create_views(
    connection: duckdb.DuckDBPyConnection, kind: ReportKind, surveys: Sequence[Survey]
) -> None:
    """Create views of the tables that a report reads, of `measured` effects, and `requested`."""
    first, *experiments = surveys
    for table in kind.tables:
        connection.from_arrow(first.dataset(table)).create_view(table)
    measured = [
        connection.from_arrow(survey.dataset("effects")).project(
            f"'{_removed_kind(survey)}' AS kind, *"
        )
        for survey in experiments
    ]
    if measured:
        reduce(lambda one, other: one.union(other), measured).create_view("measured")
    kinds = first.manifest["request"].get("node_kinds", [])
    names = [(name.removeprefix("NODE_KIND_"),) for name in kinds]
    connection.execute("CREATE TABLE requested (kind VARCHAR)")
    if names:
        connection.executemany("INSERT INTO requested VALUES (?)", names)


def _answered(
    connection: duckdb.DuckDBPyConnection, question: Question, sizes: dict[str, int]
) -> ReportTable:
    def sized(sql: str) -> str:
        return sql.replace("{vocab_size}", str(sizes["vocab_size"]))

    query = sized(question.query)
    frame = connection.sql(query).df()
    drawn = question.draw(frame) if question.draw is not None and len(frame) else None
    left_out = tuple(
        gap.text.format(**row)
        for gap in question.gaps
        for row in connection.sql(sized(gap.query)).df().to_dict("records")
    )
    figure = None if drawn is None else svg(drawn)
    return ReportTable(question.title, question.text, query, frame, figure, left_out, drawn)


def _counted(survey: Survey) -> str:
    return "prompts" if "prompts" in survey.tables else "failures"


def _table(table: ReportTable) -> Element:
    shown = table.frame.head(_ROWS)
    headings = [
        f">{name}" if table.frame[name].dtype.kind in "fiu" else str(name) for name in table.frame
    ]
    rows = ([cell(value) for value in row] for row in shown.itertuples(index=False))
    more = len(table.frame) - len(shown)
    caption = f"the first {_ROWS} of {len(table.frame)} rows" if more > 0 else ""
    return html.table(caption, headings, rows)


def cell(value: Any) -> str:
    """Return a value of a report's frame as text; nothing for a missing one."""
    if isinstance(value, str):
        return visible(value)
    if hasattr(value, "__len__"):
        return "  ".join(visible(str(one)) for one in value)
    if require("pandas", "analysis", "a report").isna(value):
        return ""
    if isinstance(value, float) and not (math.isfinite(value) and value == int(value)):
        return measure(value)
    return f"{value:.0f}"
