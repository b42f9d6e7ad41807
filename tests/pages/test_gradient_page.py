"""The page of a gradient, in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shlex
import zlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner
from playwright.sync_api import Page, expect

import januslens
from januslens.cli.program import januslens as command
from tests.pages.conftest import ELAPSED, PROMPT, exported, hostile_prompt, in_sight, wait_until
from tests.pages.models import LAYERS
from tests.support.axe import serious_findings
from tests.support.server import ServerProcess

KINDS = ["FF1", "FF2", "Q", "K", "V", "O"]
SHIFT = "Effect of a forward shift"


@pytest.fixture(scope="module")
def gradient(server_address: str) -> januslens.Gradient:
    with januslens.Client(server_address) as client:
        return client.gradient_lens(
            PROMPT,
            " Paris",
            matrices=KINDS,
            components=0,
            neurons=2,
            learning_rate=1e-3,
            spectrum=2,
            subject="Japan",
            verify=True,
        )


@pytest.fixture(scope="module")
def preview(server_address: str) -> januslens.EditPreview:
    with januslens.Client(server_address) as client:
        edit = januslens.ForwardShift(3, eta=0.15)
        return client.preview_edit(PROMPT, " Paris", edit, probes=["The capital of Peru is"])


@pytest.fixture(scope="module")
def page(
    gradient: januslens.Gradient,
    preview: januslens.EditPreview,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    path = tmp_path_factory.mktemp("gradient") / "gradient.html"
    path.write_text(gradient.to_html({SHIFT: preview}), encoding="utf-8")
    return path.as_uri()


@dataclass(frozen=True)
class Shown:
    """A gradient and the address of its page."""

    gradient: januslens.Gradient
    url: str


def asked(server: ServerProcess, path: Path, model: str) -> Shown:
    """The gradient of two hostile tokens on a hostile prompt, with all that a page can show."""
    with januslens.Client(server.address) as client:
        prompt = hostile_prompt(client)
        gradient = client.gradient_lens(
            prompt, prompt[:2], model=model, neurons=2, learning_rate=1e-3, spectrum=2, components=0
        )
    path.write_text(gradient.to_html(), encoding="utf-8")
    return Shown(gradient, path.as_uri())


@pytest.fixture(scope="module")
def deep(random_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A gradient with twelve layers and 50,257 tokens."""
    return asked(random_server, tmp_path_factory.mktemp("gradient") / "deep.html", "random")


@pytest.fixture(scope="module")
def mixture(random_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A gradient of four experts, two per position."""
    return asked(random_server, tmp_path_factory.mktemp("gradient") / "mixture.html", "mixture")


def cells(tab: Page, kind: str) -> dict[str, str]:
    """Return the texts of a heat map's cells by the ids of their components."""
    found: dict[str, str] = tab.evaluate(
        """kind => Object.fromEntries(Array.from(
            document.querySelectorAll(`.chip.painted[data-id$="/${kind}"]`),
            cell => [cell.dataset.id, cell.textContent.replace(/[\u2068\u2069]/g, "")]))""",
        kind,
    )
    return found


def expected(gradient: januslens.Gradient, kind: str) -> dict[str, str]:
    texts = {}
    for matrix in gradient.of_kind(kind):
        for part in matrix.components:
            if part.size and part.projection:
                shift = [str(end[0]) for end in (part.promoted, part.suppressed) if end]
                text = "↑ {}↓ {}".format(*shift) if shift else str(part.projection.top_tokens[0])
                texts[f"L{matrix.layer}/p{part.position}/{kind}"] = text
    return texts


def promotion_rank(gradient: januslens.Gradient, rank: float) -> float:
    """A rank in δ from the bottom, which a descent step promotes, as it subtracts δ."""
    return gradient.header.sizes.vocab_size - 1 - rank


def test_each_cell_shows_its_component(tab: Page, page: str, gradient: januslens.Gradient) -> None:
    tab.goto(page)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    for kind in KINDS:
        side = "shift" if kind in ("FF2", "O") else "imprint"
        tab.evaluate(f"location.hash = '{side}={kind}'")
        expect(tab.locator(f'[data-id$="/{kind}"]').first).to_be_visible()
        assert cells(tab, kind) == expected(gradient, kind)


def test_promoted_token_is_first_and_bold_and_either_can_be_hidden(tab: Page, page: str) -> None:
    tab.goto(page)
    cell = tab.locator('.chip.painted[data-id="L3/p7/FF2"]')
    expect(cell).to_be_visible()
    weights = cell.locator("text").evaluate_all("ts => ts.map(t => getComputedStyle(t).fontWeight)")
    assert weights == ["700", "400"]
    tab.get_by_label("Tokens", exact=True).select_option("suppressed")
    expect(cell).to_have_text("↓ ␣Azerbaijani")
    tab.keyboard.press("e")
    expect(cell).to_have_text("↑ ␣Paris↓ ␣Azerbaijani")


def test_colour_encodes_the_norm_on_the_legend_scale(
    tab: Page, page: str, gradient: januslens.Gradient
) -> None:
    tab.goto(page)
    parts = {(m.layer, c.position): c for m in gradient.of_kind("FF2") for c in m.components}
    fills = {
        place: tab.locator(f'.chip.painted[data-id="L{place[0]}/p{place[1]}/FF2"] rect').evaluate(
            "r => getComputedStyle(r).fill"
        )
        for place, part in parts.items()
        if part.size
    }

    def light(fill: str) -> int:
        return sum(int(channel) for channel in fill[4:-1].split(","))

    by_norm = sorted(fills, key=lambda place: parts[place].vjp_norm)
    shades = [light(fills[place]) for place in by_norm]
    assert shades == sorted(shades, reverse=True)
    assert fills[by_norm[-1]] == "rgb(94, 42, 104)"
    largest = f"{max(part.vjp_norm for part in parts.values()):.3g}"
    expect(tab.locator(".legend").first).to_contain_text(f"{largest} · |δ|, square-root scale")


def test_colour_can_show_the_size_or_the_rank(
    tab: Page, page: str, gradient: januslens.Gradient
) -> None:
    tab.goto(f"{page}#colour=size")
    matrix = gradient.matrix(3, "FF2")
    place = "L3/p{}/FF2"
    sizes = {place.format(part.position): part.size for part in matrix.components if part.size}
    largest = max(sizes, key=lambda node_id: sizes[node_id])
    expect(tab.locator(f'.chip.painted[data-id="{largest}"]')).to_be_visible()
    expect(tab.locator(".legend").first).to_contain_text("|x||δ|, square-root scale")
    tab.get_by_label("Colour of the cells").select_option("rank")
    last = next(part for part in matrix.components if part.position == 7)
    assert promotion_rank(gradient, last.target_ranks[0]) == 0
    cell = tab.locator(f'.chip[data-id="{place.format(7)}"]').first
    expect(cell).to_have_class(re.compile("bin-0"))
    expect(tab.locator(".legend").first).to_contain_text("top")


def test_ranks_equal_the_result(tab: Page, page: str, gradient: januslens.Gradient) -> None:
    tab.goto(page)
    for matrix in gradient.of_kind("FF2"):
        for part in matrix.components:
            if part.size:
                place = f"L{matrix.layer}/p{part.position}/FF2"
                cell = tab.locator(f'.chip:not(.painted)[data-id="{place}"]')
                rank = promotion_rank(gradient, part.target_ranks[0])
                expect(cell).to_have_text(str(rank))


def test_click_selects_and_fills_the_inspector(
    tab: Page, page: str, gradient: januslens.Gradient
) -> None:
    tab.goto(page)
    tab.locator('.chip.painted[data-id="L1/p3/FF1"]').click()
    part = next(c for c in gradient.matrix(1, "FF1").components if c.position == 3)
    inspector = tab.locator(".inspector")
    assert part.projection
    expect(inspector.locator("h2")).to_have_text(str(part.projection.top_tokens[0]))
    expect(inspector).to_contain_text(f"size |x||δ|{float(f'{part.size:.3g}'):g}")
    expect(inspector).to_contain_text(f"rank of ␣Paris{part.target_ranks[0]} of 982")
    for token in (*part.projection.top_tokens, *part.projection.bottom_tokens):
        expect(inspector.get_by_text(str(token), exact=True).first).to_be_visible()
    assert "sel=L1%2Fp3%2FFF1" in tab.url
    inspector.get_by_role("button", name="FF2").click()
    expect(inspector.locator(".where")).to_have_text("L1 FF2, at ␣Japan (3)")


def test_token_click_shows_a_command_for_that_target(
    tab: Page, page: str, server_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is run as shown."""
    tab.goto(page)
    tab.locator('.chip.painted[data-id="L3/p7/FF2"]').click()
    tab.locator(".inspector").get_by_role("button", name="␣Kazakh").click()
    said = tab.get_by_label("Command for this target").input_value()
    program, *arguments = shlex.split(said)
    assert program == "januslens"
    assert arguments[:4] == ["gradient", PROMPT, "--target", " Kazakh"]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, [*arguments, "--server", server_address])
    assert result.exit_code == 0
    assert (tmp_path / "page.html").is_file()
    tab.get_by_role("button", name="Close").click()
    expect(tab.get_by_role("dialog")).to_be_hidden()


def test_hover_shows_a_tooltip(tab: Page, page: str) -> None:
    tab.goto(page)
    tab.locator('.chip.painted[data-id="L3/p7/FF2"]').hover()
    expect(tab.locator(".tooltip")).to_contain_text("L3 FF2, at ␣of (7)")


def test_page_works_with_the_keyboard_alone(tab: Page, page: str) -> None:
    tab.goto(page)
    tab.locator('.chip.painted[data-id="L3/p7/FF2"]').focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("Enter")
    expect(tab.locator(".inspector .where")).to_have_text("L2 FF2, at ␣city (6)")
    tab.keyboard.press("?")
    expect(tab.get_by_role("dialog")).to_be_visible()


def test_requested_tables_are_shown(
    tab: Page, page: str, gradient: januslens.Gradient, preview: januslens.EditPreview
) -> None:
    tab.goto(page)
    neuron = gradient.matrix(3, "FF2").neurons[0]
    row = tab.get_by_role("row").filter(has_text=f"L3{neuron.neuron}")
    assert neuron.change
    expect(row.first).to_contain_text("".join(map(str, neuron.change.top_tokens[:3])))
    singular = gradient.matrix(3, "FF2").spectrum[0]
    expect(tab.get_by_role("cell", name=f"{singular.value:.3g}", exact=True).first).to_be_visible()
    edited = preview.edited
    shift = tab.locator("section", has=tab.get_by_role("heading", name=SHIFT))
    expect(shift.get_by_role("row").nth(1)).to_contain_text(
        f"{edited.probability_after:.3f}{edited.rank_before} → {edited.rank_after}"
    )
    expect(tab.locator(".verification")).to_contain_text("24 matrices compared with autograd")
    last = [r for r in gradient.segments if (r.layer, str(r.kind)) == (3, "FF2")][-1]
    assert last.segment == "last_token"
    assert last.mean_target_rank is not None
    rank = promotion_rank(gradient, last.mean_target_rank)
    segment = tab.get_by_label("means over layer 3, last token")
    expect(segment).to_have_text(f"|δ| {last.mean_vjp_norm:.3g}rank {rank:.0f}")


def shown_ranks(tab: Page, kind: str) -> dict[str, str]:
    """Return the cells of the rank picture by the ids of their components."""
    found: dict[str, str] = tab.evaluate(
        """kind => Object.fromEntries(Array.from(
            document.querySelectorAll(`.chip:not(.painted)[data-id$="/${kind}"]`),
            cell => [cell.dataset.id, cell.querySelector('.body').textContent]))""",
        kind,
    )
    return found


def count(number: float) -> str:
    return f"{number:,}".replace(",", "\u2009")


def test_twelve_layers_equal_the_result(tab: Page, deep: Shown) -> None:
    tab.goto(deep.url)
    expect(tab.locator(".chip.painted").first).to_be_visible()
    for kind in ("FF1", "FF2"):
        wanted = expected(deep.gradient, kind)
        texts = cells(tab, kind)
        assert texts.keys() == wanted.keys()
        assert len(texts) > 10 * LAYERS
        for place, text in texts.items():  # cut where a column has no room for more
            pieces = [re.escape(piece) for piece in text.split("…")]
            assert re.fullmatch(".*".join(pieces), wanted[place], re.DOTALL)
    ranks = {
        f"L{matrix.layer}/p{part.position}/FF2": count(
            promotion_rank(deep.gradient, part.target_ranks[0])
        )
        for matrix in deep.gradient.of_kind("FF2")
        for part in matrix.components
        if part.size
    }
    assert shown_ranks(tab, "FF2") == ranks
    part = next(c for c in deep.gradient.matrix(5, "FF2").components if c.position == 7)
    tab.locator('.chip.painted[data-id="L5/p7/FF2"]').click()
    inspector = tab.locator(".inspector")
    ranks_here = [promotion_rank(deep.gradient, rank) for rank in part.target_ranks]
    for rank in ranks_here:
        expect(inspector).to_contain_text(f"{count(rank)} of {count(50_257)}")
    expect(inspector).to_contain_text(f"|δ|, the VJP{float(f'{part.vjp_norm:.3g}'):g}")
    tab.get_by_label("Target", exact=True).select_option("1")
    expect(tab.locator('.chip:not(.painted)[data-id="L5/p7/FF2"]')).to_have_text(
        count(ranks_here[1])
    )


def test_twelve_layers_draw_and_respond_within_bounds(tab: Page, deep: Shown) -> None:
    """Loose bounds, since other tests run at the same time; the benchmark has the figures."""
    tab.goto(deep.url)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    drawn = tab.evaluate("performance.getEntriesByName('januslens-drawn')[0].startTime")
    assert drawn < 5_000
    for state in ("sel=L5/p7/FF2", "imprint=V", "shift=O", "ends=promoted", "q=a", "theme=dark"):
        assert tab.evaluate(ELAPSED, state) < 2_000


def test_selection_redraws_only_two_cells(tab: Page, deep: Shown) -> None:
    """In each picture, only the selected cell and the one selected before change."""
    tab.goto(deep.url)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    tab.evaluate("""() => {
      window.touched = new Set()
      const seen = new MutationObserver((changes) => changes.forEach(({ target }) =>
        window.touched.add(target.closest?.('.chip') ?? target.parentElement?.closest('.chip'))))
      for (const cells of document.querySelectorAll('g.cells'))
        seen.observe(cells, { subtree: true, attributes: true, childList: true })
    }""")
    tab.locator('.chip.painted[data-id="L5/p7/FF2"]').click()
    expect(tab.locator(".inspector .where")).to_contain_text("L5 FF2")
    assert tab.evaluate("window.touched.size") <= 2 * 3


def test_search_finds_every_reading_of_a_token(
    tab: Page, page: str, gradient: januslens.Gradient
) -> None:
    tab.goto(page)
    tab.keyboard.press("/")
    tab.keyboard.type("tokyo")
    found = tab.locator('.chip.painted.found[data-id$="/FF2"]')
    wanted = {
        f"L{matrix.layer}/p{part.position}/FF2"
        for matrix in gradient.of_kind("FF2")
        for part in matrix.components
        if part.size and part.projection
        for token in (*part.projection.top_tokens, *part.projection.bottom_tokens)
        if "tokyo" in str(token).lower()
    }
    assert wanted
    expect(found).to_have_count(len(wanted))
    ids = set(found.evaluate_all("cells => cells.map(cell => cell.dataset.id)"))
    assert ids == wanted
    assert "q=tokyo" in tab.url
    tab.locator(".chip.found").first.focus()
    tab.keyboard.press("Escape")
    expect(found).to_have_count(0)


def test_experts_are_shown_separately(tab: Page, mixture: Shown) -> None:
    """Each cell shows the largest component of all experts, or that of a chosen expert."""
    tab.goto(mixture.url)
    expect(tab.locator(".chip.painted").first).to_be_visible()
    matrices = mixture.gradient.of_kind("FF2")
    parts = [(matrix, part) for matrix in matrices for part in matrix.components if part.size]

    def ranks(expert: int | None) -> dict[str, str]:
        chosen = [(m, p) for m, p in parts if expert in (None, m.expert)]
        by_size = sorted(chosen, key=lambda pair: pair[1].size)  # the largest is written last
        return {
            f"L{m.layer}/p{p.position}/FF2": count(
                promotion_rank(mixture.gradient, p.target_ranks[0])
            )
            for m, p in by_size
        }

    expect(tab.locator('.chip.painted[data-id$="/FF2"]')).to_have_count(len(ranks(None)))
    assert shown_ranks(tab, "FF2") == ranks(None)
    tab.get_by_label("Expert", exact=True).select_option("2")
    expect(tab.locator('.chip.painted[data-id$="/FF2"]')).to_have_count(len(ranks(2)))
    assert shown_ranks(tab, "FF2") == ranks(2)
    place = next(iter(ranks(2)))
    tab.locator(f'.chip.painted[data-id="{place}"]').click()
    here = [m.expert for m, p in parts if f"L{m.layer}/p{p.position}/FF2" == place]
    expect(tab.locator(".inspector .facts .where")).to_have_count(len(here))
    expect(tab.locator(".inspector")).to_contain_text(f"expert {here[0]} FF2")
    spectrum = tab.locator("section", has=tab.get_by_role("heading", name="Spectrum of FF2"))
    expect(spectrum.get_by_role("row").nth(1)).to_contain_text(re.compile(r"L2 expert \d"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_reports_nothing_serious(tab: Page, page: str, scheme: str) -> None:
    tab.goto(f"{page}#theme={scheme}")
    tab.wait_for_selector(".chip.painted")
    assert serious_findings(tab) == []


def test_tab_stops_of_all_maps_are_at_the_selected_place(tab: Page, deep: Shown) -> None:
    tab.goto(f"{deep.url}#sel=L7/p5/FF2")
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    stops = tab.locator("svg.heat [tabindex='0']")
    ids = stops.evaluate_all("all => all.map((stop) => stop.dataset.id)")
    assert len(ids) >= 3
    assert {place.rsplit("/", 1)[0] for place in ids} == {"L7/p5"}


def test_facts_of_a_selection_stay_in_sight_in_a_narrow_window(tab: Page, deep: Shown) -> None:
    tab.set_viewport_size({"width": 1024, "height": 900})
    tab.goto(deep.url)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    tab.locator(".chip.painted").first.click()
    expect(tab.locator(".inspector h2")).to_be_in_viewport()
    tab.keyboard.press("Escape")
    expect(tab.locator(".inspector h2")).not_to_be_in_viewport()


def test_bars_of_promoted_and_suppressed_tokens_have_one_scale(
    tab: Page, page: str, gradient: januslens.Gradient
) -> None:
    tab.goto(f"{page}#sel=L3/p7/FF2")
    [component] = [found for found in gradient.matrix(3, "FF2").components if found.position == 7]
    read = component.projection
    assert read
    # Of δ, which a descent step subtracts.
    expected = [-score.logit for score in (*read.bottom, *read.top)]
    bars = tab.locator(".facts .scored .bar")
    expect(bars).to_have_count(len(expected))
    found = bars.evaluate_all(
        """all => all.map((bar) =>
          (bar.matches('.subtracts') ? -1 : 1) * bar.style.getPropertyValue('--share'))"""
    )
    largest = max(map(abs, expected))
    assert found == pytest.approx([change / largest for change in expected], abs=1e-3)


def test_narrow_window_does_not_scroll_sideways(tab: Page, page: str) -> None:
    tab.goto(page)
    tab.set_viewport_size({"width": 700, "height": 900})
    wait_until(tab, "document.documentElement.scrollWidth <= window.innerWidth")


def test_narrow_picture_scrolls_to_the_selection(tab: Page, deep: Shown) -> None:
    tab.set_viewport_size({"width": 480, "height": 900})
    tab.goto(deep.url)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    chosen = tab.locator(".chip.painted.selected").first
    box = chosen.bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 480
    assert len(chosen.locator(".body").first.text_content() or "") >= 5  # of its token
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("width", [390, 768])
@pytest.mark.parametrize("matrix", ["FF1", "FF2"])
def test_a_link_shows_its_selection(tab: Page, deep: Shown, width: int, matrix: str) -> None:
    tab.set_viewport_size({"width": width, "height": 700})
    tab.goto(f"{deep.url}#sel=L2/p5/{matrix}")
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    assert in_sight(tab, tab.locator(".chip.painted.selected").first)


def test_printed_page_is_light_with_complete_pictures(tab: Page, page: str) -> None:
    tab.goto(f"{page}#theme=dark")
    expect(tab.locator(".chip.painted").first).to_be_visible()
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 700, "height": 1000})
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    largest = tab.locator('.chip.painted[data-id="L1/p7/FF2"] rect')
    assert largest.evaluate("r => getComputedStyle(r).fill") == "rgb(94, 42, 104)"
    edges = tab.locator("svg.heat").evaluate_all(
        "all => all.map(s => s.getBoundingClientRect().right)"
    )
    assert max(edges) <= 700
    expect(tab.get_by_role("toolbar")).to_be_hidden()


def test_printed_table_of_a_preview_fits_on_the_sheet(tab: Page, page: str) -> None:
    tab.goto(page)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 640, "height": 1000})
    tables = tab.locator("table.readings")
    assert tables.count() > 0
    edges = tables.evaluate_all("all => all.map(t => t.getBoundingClientRect().right)")
    assert max(edges) <= 640


def test_exported_matrices_are_beside_each_other_where_two_fit(
    tab: Page, page: str, tmp_path: Path
) -> None:
    tab.goto(page)
    tab.wait_for_selector("html[data-ready=complete]", state="attached")
    for size, columns in (("page", 1), ("slide", 2)):
        path = exported(tab, "SVG", tmp_path / f"{size}.svg", size=size)
        pictures = re.findall(r'<svg [^>]*class="picture[^>]*>', path.read_text(encoding="utf-8"))
        lefts = [re.search(r' x="([\d.]+)"', picture)[1] for picture in pictures]  # type: ignore[index]  # all have one
        assert len(lefts) >= 2
        assert len(set(lefts)) == columns


def test_forced_colours_keep_pictures_and_bars(tab: Page, page: str) -> None:
    tab.emulate_media(forced_colors="active")
    tab.goto(page)
    cell = tab.locator('.chip.painted[data-id="L3/p7/FF2"]')
    fill, ink = (
        cell.locator(part).first.evaluate("e => getComputedStyle(e).fill")
        for part in ("rect", "text")
    )
    assert fill != ink
    bar = tab.locator(".inspector .bar").first
    assert bar.evaluate("b => getComputedStyle(b).backgroundColor") == "rgb(108, 127, 153)"


def test_hostile_tokens_are_text(tab: Page, gradient: januslens.Gradient, tmp_path: Path) -> None:
    hostile = ["<img src=x onerror=alert(1)>", "\u202eevil", "a\u200bb", "👩‍👩‍👧", "</script>"]
    lines = [json.loads(line) for line in gradient.to_json_lines()]
    for i, token in enumerate(lines[0]["header"]["promptTokens"]):
        token["text"] = hostile[i % len(hostile)]
    recorded = januslens.read_gradient(map(json.dumps, lines))
    path = tmp_path / "hostile.html"
    path.write_text(recorded.to_html(), encoding="utf-8")
    tab.goto(path.as_uri())
    expect(tab.locator("h1")).to_contain_text("<U+202E>evil")
    expect(tab.locator("h1")).to_contain_text("<img␣src=x␣onerror=alert(1)>")
    expect(tab.locator("h1")).to_contain_text("</script>")
    assert tab.locator("img").count() == 0


def test_command_writes_the_page(server_address: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    arguments = ["gradient", PROMPT, "--target", " Paris", "--shift", "3", "--html", str(path)]
    result = CliRunner().invoke(
        command, [*arguments, "--server", server_address], catch_exceptions=False
    )
    assert result.exit_code == 0
    html = path.read_text(encoding="utf-8")
    assert len(html.encode()) < 1_500_000
    assert 'data-stream="preview:Effect of a forward shift of layer 3 by 0.24"' in html
    blocks = [part.split("<")[0] for part in html.split('data-stream="gradient">')[1:]]
    first = json.loads(zlib.decompress(base64.b64decode(blocks[0])))
    assert first["header"]["promptTokens"][3]["text"] == " Japan"
    assert quote(" Paris") not in html
