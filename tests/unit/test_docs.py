"""Check the documentation against the product: names, limits, flags and links; run the examples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from januslens.cli.program import januslens
from januslens.v1 import gradient_lens_pb2, lens_pb2, service_pb2, trace_pb2
from januslens_server.config import read_settings
from januslens_server.models.adapters import ADAPTERS
from januslens_server.pipelines import checks, gradient_lens
from januslens_server.rpc import decode
from januslens_server.rpc.decode import BOUNDS
from januslens_server.specs import MAX_SUPPRESSED

ROOT = Path(__file__).parents[2]
README, SEMANTICS, API = ROOT / "README.md", ROOT / "docs/semantics.md", ROOT / "docs/api.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "tests/conformance/README.md",
    ROOT / "tests/reference/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SERVING = "Serve a model of your own"
DEFAULT_ADDRESS = "127.0.0.1:50051"

SERVICE = service_pb2.DESCRIPTOR.services_by_name["IntrospectionService"]
# Lines of a command's output that depend on the weights or the machine, or were shortened.
FIGURES = re.compile(r"\d\.\d|\d\d|\.\.\.|─")
EXTERNAL_FLAGS = {"--extra-index-url", "--index-url"}  # pip's, in the installation section
COMMON_FIELDS = {"model", "revision", "input"}  # explained once for all RPCs


def section(page: Path, title: str) -> str:
    """Return the text below a heading, up to the next heading of its level or above."""
    match = re.search(
        rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |^#{{1,2}} |\Z)",
        page.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert match, f"expected a section {title!r} in {page.name}"
    return match[2]


def first_cells(text: str) -> set[str]:
    """Return the words in the first column of the tables in `text`."""
    return {
        word
        for cell in re.findall(r"^\| ([^|]+)\|", text, re.MULTILINE)
        for word in re.findall(r"\w+", cell)
    }


def kinds(enum: Any) -> list[str]:
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.DESCRIPTOR.name).upper() + "_"
    names = [name.removeprefix(prefix) for name in enum.DESCRIPTOR.values_by_name]
    return [name for name in names if name != "UNSPECIFIED"]


@pytest.mark.parametrize(
    ("title", "enum"),
    [
        ("Nodes", trace_pb2.NodeKind),
        ("Edges", trace_pb2.EdgeKind),
        ("Matrices", gradient_lens_pb2.MatrixKind),
        ("Logit lens", lens_pb2.Lens),
    ],
)
def test_every_kind_has_its_row(title: str, enum: Any) -> None:
    assert set(kinds(enum)) <= first_cells(section(SEMANTICS, title))


def test_every_loss_has_its_row() -> None:
    losses = gradient_lens_pb2.GradientLensRequest.DESCRIPTOR.oneofs_by_name["loss"].fields
    rows = first_cells(section(SEMANTICS, "Losses"))
    assert len(losses) == 3
    assert {field.message_type.name for field in losses if field.message_type} <= rows


def test_every_rpc_has_its_section() -> None:
    headings = re.findall(r"^## (.+)$", API.read_text(), re.MULTILINE)
    assert {method.name for method in SERVICE.methods} <= set(", ".join(headings).split(", "))


@pytest.mark.parametrize(
    ("rpc", "request_type"),
    [("Trace", trace_pb2.TraceRequest), ("GradientLens", gradient_lens_pb2.GradientLensRequest)],
)
def test_every_field_of_the_large_requests_is_explained(rpc: str, request_type: Any) -> None:
    fields = {field.name for field in request_type.DESCRIPTOR.fields} - COMMON_FIELDS
    explained = first_cells(section(API, rpc)) | set(re.findall(r"`(\w+)`", section(API, "Trace")))
    assert fields <= explained


def test_limits_equal_the_servers() -> None:
    rows = section(API, "Limits")
    counts = (
        decode.MAX_TOKENS,
        decode.MAX_VECTORS,
        decode.MAX_LISTED,
        BOUNDS["PreviewEditRequest.probes"],
    )
    for limit in (*counts, MAX_SUPPRESSED, decode.MAX_NEURONS):
        assert f"| {limit:,}" in rows


def test_checks_and_tolerances_equal_the_servers() -> None:
    text = section(SEMANTICS, "Checks")
    full, half = checks.TOLERANCES["float32"], checks.TOLERANCES["bfloat16"]
    for name in (checks.LENS, checks.SHARES, checks.CONTRIBUTIONS):
        assert re.search(rf"\| `{name}` \|.*\| {full:.0e} / {half:.0e} \|", exponents(text))
    verified = exponents(section(SEMANTICS, "Verify"))
    assert {f"{value:.0e}" for value in gradient_lens.TOLERANCES.values()} <= set(
        re.findall(r"\de-\d\d", verified)
    )


def exponents(text: str) -> str:
    """Return numbers such as 1e-4 as Python prints them."""
    return re.sub(r"(\de-)(\d)\b", r"\g<1>0\2", text)


def test_every_listed_architecture_has_an_adapter() -> None:
    named = re.search(r"\*\*Architectures\*\*.*?: (.+?)\.\s", section(README, SERVING), re.DOTALL)
    assert named
    assert {"gpt2", "llama"} <= set(re.findall(r"`(\w+)`", named[1])) <= set(ADAPTERS)


@pytest.fixture
def helps(capsys: pytest.CaptureFixture[str]) -> dict[str, set[str]]:
    """Return the flags in each command's `--help`."""
    shown = {
        f"januslens {name}": CliRunner().invoke(januslens, [name, "--help"]).output
        for name in januslens.list_commands(click.Context(januslens))
    }
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    shown["januslens-server"] = capsys.readouterr().out
    return {command: flags(text) for command, text in shown.items()}


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def test_every_flag_exists(helps: dict[str, set[str]]) -> None:
    named = set().union(*(flags(page.read_text()) for page in (README, SEMANTICS, API)))
    assert named - EXTERNAL_FLAGS <= set().union(*helps.values())


def test_commands_in_the_readme_use_existing_flags(helps: dict[str, set[str]]) -> None:
    shown = re.findall(
        r"^(?:\$|   ) ((januslens-server|januslens \w+) .*)$", README.read_text(), re.MULTILINE
    )
    assert {command for _, command in shown} >= {"januslens trace", "januslens-server"}
    for line, command in shown:
        assert flags(line) <= helps[command], line


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"^    make ([a-z-]+)$", README.read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= targets


def anchors(page: Path) -> Iterable[str]:
    """Return the names that GitHub gives to a page's headings."""
    outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.+)$", outside, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_resolve() -> None:
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if link.startswith("https://"):
                continue
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_python_examples_in_the_readme_run(
    server_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    printed = []
    for example in examples:
        code = compile(example.replace(DEFAULT_ADDRESS, server_address), README.name, "exec")
        exec(code, {"__name__": "readme"})  # noqa: S102 - our own documentation
        printed.append(capsys.readouterr().out)
    synchronous, asynchronous = printed
    assert "Tokyo" in synchronous
    assert "␣Paris" in synchronous.splitlines()[-1]
    assert [line.split()[0] for line in asynchronous.splitlines()] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("command", ["trace", "gradient"])
def test_output_in_the_readme_equals_the_commands(command: str, server_address: str) -> None:
    """Titles, columns and notes must be equal; figures and tokens may differ in the last digit."""
    block = re.search(
        rf'^```\n\$ januslens ({command} "(.+?)".*?)\n(.*?)^```',
        README.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert block
    arguments = [command, block[2], "--server", server_address]
    arguments += ["--target", " Paris"] if "--target" in block[1] else []
    output = words(CliRunner().invoke(januslens, arguments, catch_exceptions=False).output)
    fixed = [line for line in words(block[3]) if not FIGURES.search(line)]
    assert len(fixed) >= 2
    assert set(fixed) <= set(output)


def words(text: str) -> list[str]:
    """Return lines with single spaces, because the width of columns depends on their content."""
    return [" ".join(line.split()) for line in text.splitlines()]
