"""The live page in a real browser, against the real server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, FrameLocator, Locator, Page, expect

import januslens
from januslens.interventions import SweepOver, zero
from tests.pages.conftest import PROMPT
from tests.pages.models import HOSTILE, LAYERS
from tests.support.axe import serious_findings
from tests.support.metrics import unfinished, wait_until_idle
from tests.support.server import ServerProcess
from tests.support.ui import LivePage, live_page

LONG = "The capital of Japan is the city of Tokyo. " * 8  # with every part, some seconds

# Runs in every frame. After each change of the page it records the highest layer that is drawn, so
# that tests can check the order of arrival afterwards, at any speed of the machine.
RECORD_LAYERS = """
window.drawnLayers = [];
new MutationObserver(() => {
  const cells = document.querySelectorAll('.overview .cell[data-id^="L"]');
  const layers = Array.from(cells, (cell) => parseInt(cell.dataset.id.slice(1), 10));
  const highest = Math.max(...layers);
  if (layers.length && highest !== window.drawnLayers.at(-1)) window.drawnLayers.push(highest);
}).observe(document, { childList: true, subtree: true });
"""


@pytest.fixture(scope="module")
def running(server_address: str) -> Iterator[LivePage]:
    with live_page(server_address) as page:
        yield page


@pytest.fixture(scope="module")
def running_deep(random_server: ServerProcess) -> Iterator[LivePage]:
    with live_page(random_server.address) as page:
        yield page


@dataclass(frozen=True)
class Shared:
    """One page for all tests, as in `conftest`, with what it says and the addresses it asks for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def shared(browser: Browser) -> Iterator[Shared]:
    context = browser.new_context(viewport={"width": 1600, "height": 1000}, accept_downloads=True)
    context.add_init_script(RECORD_LAYERS)
    shared = Shared(context.new_page())
    shared.page.set_default_timeout(60_000)
    shared.page.on("console", lambda message: shared.complaints.append(message.text))
    shared.page.on("pageerror", lambda error: shared.complaints.append(f"raised: {error}"))
    shared.page.on("request", lambda request: shared.requests.append(request.url))
    yield shared
    context.close()


@pytest.fixture
def live(shared: Shared, running: LivePage) -> Iterator[Page]:
    """The opened page; the test fails if it logs anything or sends requests to another server."""
    with opened(shared, running, "demo") as page:
        yield page


@pytest.fixture
def deep(shared: Shared, running_deep: LivePage) -> Iterator[Page]:
    """The opened page, as `live`, for the model with twelve layers and 50,257 tokens."""
    with opened(shared, running_deep, "random") as page:
        yield page


@contextmanager
def opened(shared: Shared, running: LivePage, model: str) -> Iterator[Page]:
    """Open the page as in a new browser, without a token or a history of questions."""
    page = shared.page
    page.goto(running.address)
    page.get_by_label("Model").select_option(model)
    yield page
    complaints, requests = shared.complaints.copy(), shared.requests.copy()
    page.evaluate("sessionStorage.clear()")
    page.goto("about:blank")
    shared.complaints.clear()
    shared.requests.clear()
    assert complaints == []
    own = (running.origin, "data:", "blob:", "about:")
    assert [url for url in requests if not url.startswith(own)] == []


def panel(live: Page, number: int = 0) -> tuple[Locator, FrameLocator]:
    """Return the panel of a result, and the page in it."""
    found = live.locator(".answer-panel").nth(number)
    return found, found.frame_locator("iframe")


def drawn_layers(live: Page) -> list[int]:
    """Return the highest layer of the first result after each drawing, in order."""
    layers: list[int] = live.frames[1].evaluate("window.drawnLayers")
    return layers


def state(panel: Locator, wanted: str) -> None:
    expect(panel).to_have_attribute("data-state", wanted, timeout=60_000)


def test_access_token_is_removed_from_the_address(live: Page, running: LivePage) -> None:
    assert live.url == f"{running.origin}/"
    live.reload()
    expect(live.get_by_label("Model")).to_have_value("demo")  # the tab remembers it


def test_trace_equals_the_client_result(live: Page, server_address: str) -> None:
    live.get_by_label("Prompt", exact=True).fill(PROMPT)
    live.get_by_role("button", name="Trace", exact=True).click()
    answer, page = panel(live)
    state(answer, "done")
    with januslens.Client(server_address) as client:
        trace = client.trace(PROMPT)
        around = client.trace_overview(trace)
    live.get_by_text("more", exact=True).click()
    assert serious_findings(live) == []
    for node in around.nodes_of("BLOCK_OUTPUT"):
        assert node.projection
        cell = page.locator(f'.overview .cell[data-id="{node.id}"]').first
        top = re.compile(re.escape(str(node.projection.top_tokens[0])))
        expect(cell).to_have_attribute("aria-label", top)
    expect(page.locator("h1")).to_contain_text("␣Tokyo")


def test_layers_appear_while_streaming_and_cancel_stops_the_trace(
    live: Page, server: ServerProcess
) -> None:
    live.get_by_label("Prompt", exact=True).fill(LONG)
    live.get_by_text("more", exact=True).click()
    live.get_by_label("Positions").fill("all")
    live.get_by_label("Heads").fill("0")
    live.get_by_role("button", name="Trace", exact=True).click()
    answer, page = panel(live)
    last = page.locator('.overview .cell[data-id^="L0/"]').first
    expect(last).to_be_attached(timeout=60_000)
    assert unfinished(server) >= 1
    place = last.bounding_box()
    answer.get_by_role("button", name="Cancel").click()
    state(answer, "cancelled")
    wait_until_idle(server)
    assert last.bounding_box() == place
    layers = drawn_layers(live)
    assert layers[0] == 0
    assert layers == sorted(layers)
    assert page.locator('.overview .cell[data-id^="L3/"]').count() == 0
    expect(answer.get_by_role("button", name="Cancel")).to_have_count(0)


def test_twelve_layers_arrive_in_order_and_equal_the_client_result(
    deep: Page, random_server: ServerProcess
) -> None:
    prompt = "".join(HOSTILE)
    deep.get_by_label("Prompt", exact=True).fill(prompt)  # line breaks and all
    deep.get_by_label("Prompt", exact=True).press("Enter")
    answer, page = panel(deep)
    state(answer, "done")
    layers = drawn_layers(deep)
    assert layers == sorted(layers)
    assert layers[0] < layers[-1] == LAYERS - 1
    with januslens.Client(random_server.address) as client:
        trace = client.trace(prompt, model="random")
    own = [node for node in trace.nodes_of("BLOCK_OUTPUT") if node.layer is not None]
    assert len(own) == LAYERS
    for node in own:
        assert node.projection
        token = str(node.projection.top_tokens[0])[:3]
        cell = page.locator(f'.overview .cell[data-id="{node.id}"]').first
        expect(cell).to_have_attribute("aria-label", re.compile(re.escape(token)))


def test_cancel_stops_a_trace_of_twelve_layers(deep: Page, random_server: ServerProcess) -> None:
    deep.get_by_label("Prompt", exact=True).fill("".join(HOSTILE))
    deep.get_by_text("more", exact=True).click()
    deep.get_by_label("Positions").fill("all")
    deep.get_by_role("button", name="Trace", exact=True).click()
    answer, page = panel(deep)
    expect(page.locator('.overview .cell[data-id^="L0/"]').first).to_be_attached(timeout=60_000)
    answer.get_by_role("button", name="Cancel").click()
    state(answer, "cancelled")
    wait_until_idle(random_server)
    assert page.locator(f'.overview .cell[data-id^="L{LAYERS - 1}/"]').count() == 0


def test_clicked_token_becomes_the_target(live: Page, server_address: str) -> None:
    live.get_by_label("Prompt", exact=True).fill(PROMPT)
    live.get_by_role("button", name="Trace", exact=True).click()
    first, page = panel(live, 0)
    state(first, "done")
    page.locator(".inspector .target-choice").first.click()  # the second of the prediction's tokens
    second, aimed = panel(live, 1)
    state(second, "done")
    with januslens.Client(server_address) as client:
        own = client.trace(PROMPT).nodes_of("PREDICTION")[0].projection
        assert own
        token = own.top_tokens[1]
        trace = client.trace(PROMPT, target=[token.id])
    expect(aimed.locator("h1 .answer")).to_have_text(str(token))
    expect(live.get_by_label("Target")).to_have_value(token.text)
    for node in trace.nodes_of("BLOCK_OUTPUT"):
        assert node.projection
        aimed.locator(f'.overview .cell[data-id="{node.id}"]').first.click()
        expect(aimed.locator(".inspector")).to_contain_text(
            f"rank of {token}{node.projection.target_rank} of 982"
        )


def test_page_and_frames_share_the_theme(live: Page) -> None:
    live.get_by_label("Prompt", exact=True).fill(PROMPT)
    live.get_by_label("Target").fill(" Paris")
    live.get_by_role("button", name="Gradient", exact=True).click()
    first, page = panel(live, 0)
    state(first, "done")
    expect(page.get_by_label("Theme")).to_be_hidden()
    live.get_by_label("Theme").select_option("dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert live.evaluate(ground) == live.frames[1].evaluate(ground) == "rgb(20, 23, 29)"
    first.get_by_role("button", name="Trace beside it").click()
    expect(panel(live, 1)[1].locator("html")).to_have_attribute("data-theme", "dark")
    assert "theme=dark" in live.url
    live.reload()
    expect(live.locator("html")).to_have_attribute("data-theme", "dark")


def test_gradient_and_trace_share_the_selection(live: Page) -> None:
    live.get_by_label("Prompt", exact=True).fill(PROMPT)
    live.get_by_label("Target").fill(" Paris")
    live.get_by_role("button", name="Trace", exact=True).click()
    first, trace = panel(live, 0)
    state(first, "done")
    first.get_by_role("button", name="Gradient beside it").click()
    second, gradient = panel(live, 1)
    state(second, "done")
    expect(first.get_by_role("heading", level=2).first).to_have_text(
        f"Trace of “{PROMPT}” → ␣Paris (demo)"
    )
    gradient.locator('.chip.painted[data-id="L1/p3/FF2"]').click()
    expect(trace.locator(".inspector [data-node]")).to_have_attribute(
        "data-node", "L1/p3/BLOCK_OUTPUT"
    )
    trace.locator('.overview .cell[data-id="L2/p6/BLOCK_OUTPUT"]').first.click()
    expect(gradient.locator(".inspector .where")).to_have_text("L2 FF2, at ␣city (6)")
    boxes = [answer.bounding_box() for answer in (first, second)]
    tops = [box["y"] for box in boxes if box]
    assert tops == [tops[0]] * 2  # side by side


def test_edit_preview_is_in_the_saved_page(
    live: Page, running: LivePage, browser: Browser, tmp_path: Path
) -> None:
    live.get_by_label("Prompt", exact=True).fill(PROMPT)
    live.get_by_label("Target").fill(" Paris")
    live.get_by_role("button", name="Gradient", exact=True).click()
    answer, page = panel(live)
    state(answer, "done")
    answer.get_by_label("Layer of the edit").select_option("2")
    answer.get_by_role("button", name="Preview edit").click()
    expect(page.get_by_role("heading", name="shift of layer 2 by 0.15")).to_be_visible()
    answer.get_by_label("Layer of the edit").select_option("3")
    answer.get_by_role("button", name="Preview edit").click()
    page.get_by_role("heading", name="shift of layer 3 by 0.15").wait_for()
    row = page.get_by_role("row").filter(has_text="the edited prompt").last
    expect(row).to_contain_text("→ 0")
    with live.expect_download() as download:
        answer.get_by_role("button", name="Save page").click()
    kept = tmp_path / "kept.html"
    download.value.save_as(kept)
    with live.expect_download() as download:
        answer.get_by_role("button", name="JSON").click()
    download.value.save_as(tmp_path / "kept.jsonl")
    with (tmp_path / "kept.jsonl").open() as lines:
        assert januslens.read_gradient(lines).loss == pytest.approx(13.78, abs=0.01)
    context = browser.new_context(offline=True)
    alone = context.new_page()
    alone.goto(kept.as_uri())
    expect(alone.locator('.chip.painted[data-id="L3/p7/FF2"]')).to_contain_text("↑ ␣Paris")
    expect(alone.get_by_role("row").filter(has_text="the edited prompt")).to_have_count(2)
    context.close()
    assert running.origin not in kept.read_text(encoding="utf-8")


def test_fields_that_a_button_needs_say_what_to_enter(live: Page) -> None:
    ask = live.get_by_role("button", name="Gradient", exact=True)
    ask.click()
    prompt = live.get_by_role("textbox", name="Prompt", exact=True)
    target = live.get_by_role("textbox", name="Target", exact=True)
    expect(prompt).to_be_focused()
    expect(prompt).to_have_accessible_description("Enter a text that the model continues.")
    learned = "Gradient needs the text that the model should learn, with its leading space."
    expect(target).to_have_accessible_description(learned)
    expect(live.get_by_text(learned)).to_be_visible()
    prompt.fill(PROMPT)
    expect(live.locator(".needed")).to_have_text([learned])
    ask.click()
    expect(target).to_be_focused()
    target.fill(" Tokyo")
    expect(live.locator(".needed")).to_have_count(0)
    live.get_by_role("button", name="Chat", exact=True).click()
    live.get_by_role("button", name="Generate", exact=True).click()
    expect(live.get_by_label("Message")).to_have_accessible_description("Enter a message.")
    assert live.locator(".answer-panel").count() == 0


def test_escape_closes_the_history_and_the_options(live: Page) -> None:
    live.get_by_role("button", name="Trace an answer").click()
    state(panel(live)[0], "done")
    for name, inside in (
        ("more", live.get_by_label("Layers")),
        ("History (1)", live.get_by_role("button", name=f"Trace of “{PROMPT}”")),
    ):
        opener = live.get_by_text(name, exact=True)
        opener.press("Enter")
        inside.press("Escape")
        expect(inside).to_be_hidden()
        expect(opener).to_be_focused()


def test_question_is_as_wide_as_a_narrow_window(live: Page) -> None:
    live.set_viewport_size({"width": 768, "height": 900})
    question = live.locator(".ask").bounding_box()
    live.set_viewport_size({"width": 1600, "height": 1000})
    assert question
    assert question["width"] > 700


def test_server_errors_are_shown(live: Page) -> None:
    live.get_by_label("Prompt", exact=True).fill(PROMPT)
    live.get_by_text("more", exact=True).click()
    live.get_by_label("Layers").fill("99")
    live.get_by_role("button", name="Trace", exact=True).click()
    answer, _ = panel(live)
    state(answer, "failed")
    expect(answer.get_by_role("status").first).to_contain_text(
        "demo has no layer 99; expected -4 to 3"
    )


def test_layers_that_are_no_numbers_are_refused_in_words(live: Page) -> None:
    live.get_by_label("Prompt", exact=True).fill(PROMPT)
    live.get_by_text("more", exact=True).click()
    live.get_by_label("Layers").fill("abc")
    live.get_by_role("button", name="Trace", exact=True).click()
    expect(live.get_by_role("alert")).to_have_text(
        "invalid layers “abc”; expected numbers and ranges, for example 0-3,7"
    )
    assert live.locator(".answer-panel").count() == 0


def test_question_stays_in_the_address_and_in_the_history(live: Page) -> None:
    live.get_by_role("button", name="Trace an answer").click()
    state(panel(live)[0], "done")
    expect(live.locator(".examples")).to_be_hidden()
    assert "ask=trace&" in live.url
    live.get_by_label("Prompt", exact=True).fill("The capital of France is the city of")
    live.get_by_label("Prompt", exact=True).press("Enter")
    state(panel(live, 1)[0], "done")
    live.reload()
    answer, page = panel(live)
    state(answer, "done")
    expect(page.locator("h1")).to_contain_text("␣Paris")
    expect(live.get_by_label("Prompt", exact=True)).to_have_value(
        "The capital of France is the city of"
    )
    live.get_by_text("History (2)").click()
    live.get_by_role("button", name=f"Trace of “{PROMPT}”").click()
    answer, page = panel(live, 1)
    state(answer, "done")
    expect(page.locator("h1")).to_contain_text("␣Tokyo")


def generate(live: Page, prompt: str, tokens: int) -> tuple[Locator, FrameLocator]:
    """Ask for a generation and return its panel and its page."""
    live.get_by_label("Prompt", exact=True).fill(prompt)
    live.get_by_text("more", exact=True).click()
    live.get_by_label("Tokens", exact=True).fill(str(tokens))
    live.get_by_text("more", exact=True).click()
    live.get_by_role("button", name="Generate").click()
    return panel(live)


def test_clicked_token_of_a_generation_is_traced(
    live: Page, server_address: str, browser: Browser, tmp_path: Path
) -> None:
    answer, page = generate(live, PROMPT, 4)
    state(answer, "done")
    with januslens.Client(server_address) as client:
        generation = client.generate(PROMPT, max_new_tokens=4, layers="all")
        trace = generation.trace(token=1)
    tokens = page.locator(".said-token")
    expect(tokens).to_have_count(len(generation))
    for made, shown in zip(generation.tokens, tokens.all(), strict=True):
        expect(shown.locator(".token")).to_have_text(str(made.token))
        decided = "" if made.decided is None else f"L{made.decided}"
        expect(shown.locator(".decided")).to_have_text(decided)
    assert serious_findings(live) == []
    tokens.first.focus()
    tokens.first.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    tokens.nth(1).press("Enter")
    followed, traced = panel(live, 1)
    state(followed, "done")
    (prediction,) = trace.nodes_of("PREDICTION")
    assert prediction.projection
    expect(traced.locator("h1 .answer")).to_have_text(str(generation.tokens[1].token))
    expect(traced.locator(".inspector")).to_contain_text(
        f"rank of {generation.tokens[1].token}{prediction.projection.target_rank} of 982"
    )
    tokens.nth(2).click()  # the next trace takes the place of this one
    expect(panel(live, 1)[1].locator("h1 .answer")).to_have_text(str(generation.tokens[2].token))
    expect(live.locator(".answer-panel")).to_have_count(2)
    with live.expect_download() as download:
        answer.get_by_role("button", name="Save page").click()
    kept = tmp_path / "kept.html"
    download.value.save_as(kept)
    context = browser.new_context(offline=True)
    alone = context.new_page()
    alone.goto(kept.as_uri())
    expect(alone.locator(".said-token .token")).to_have_text(
        [str(made.token) for made in generation.tokens]
    )
    alone.locator(".said-token").nth(1).click()
    expect(alone.locator(".inspector .where")).to_have_text(f"token 1 of {len(generation)}")
    context.close()


def test_knocked_out_head_is_measured_beside_its_contribution(
    live: Page, server_address: str, browser: Browser, tmp_path: Path
) -> None:
    live.get_by_label("Prompt", exact=True).fill(PROMPT)
    live.get_by_role("button", name="Trace", exact=True).click()
    answer, page = panel(live)
    state(answer, "done")
    with januslens.Client(server_address) as client:
        trace = client.trace(PROMPT)
        part = next(part for part in trace.contributions() if part.node.kind == "HEAD_OUTPUT")
        head = (part.node.layer or 0, part.node.head or 0)
        here, everywhere = zero(heads=[head], positions=-1), zero(heads=[head])
        effects = client.intervene(PROMPT, experiments=[here, everywhere])
    page.get_by_role("button", name="heads", exact=True).click()
    node = part.node.id
    page.locator(f'.heads .cells [data-id="{node}"]').click()
    page.locator(f'.heads .cells [data-id="{node}"]').press("n")
    page.get_by_label("Name", exact=True).fill("name mover")
    page.get_by_label("Name", exact=True).press("Enter")
    assert "names=" in live.url
    page.get_by_role("button", name="Knock out").press("Enter")
    before = effects.before[0].logit
    added = [before - effect.after[0].logit for effect in effects.effects]
    shown = page.locator(".knock-out")
    expect(shown).to_contain_text("measured everywhere")
    expect(shown).to_be_focused()
    live.get_by_text("more", exact=True).click()
    live.get_by_label("Tokens", exact=True).fill("few")
    shown.get_by_role("button", name="Generate without it").click()
    expect(answer.locator(".status")).to_contain_text("invalid tokens “few”")
    expect(live.get_by_role("alert")).to_be_empty()
    expect(shown.get_by_role("row").first).to_contain_text(_signed(part.logit_contribution or 0))
    for i, value in enumerate(added):
        expect(
            shown.get_by_role("row").filter(has_text=("measured here", "measured everywhere")[i])
        ).to_contain_text(_signed(value))
    assert serious_findings(live) == []
    with live.expect_download() as download:
        answer.get_by_role("button", name="Save page").click()
    kept = tmp_path / "kept.html"
    download.value.save_as(kept)
    context = browser.new_context(offline=True)
    alone = context.new_page()
    alone.goto(f"{kept.as_uri()}#sel={node}")
    expect(alone.locator(".knock-out")).to_contain_text(_signed(added[1]))
    expect(alone.locator(".facts .where")).to_contain_text("“name mover”")
    context.close()


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def test_knocked_out_heads_are_a_heat_map(
    live: Page, server_address: str, browser: Browser, tmp_path: Path
) -> None:
    live.get_by_label("Prompt", exact=True).fill(PROMPT)
    live.get_by_role("button", name="Which heads matter?").click()
    answer, page = panel(live)
    state(answer, "done")
    with januslens.Client(server_address) as client:
        sweep = SweepOver(zero("HEAD_RESULT"), by=["layer", "head"])
        effects = client.intervene(PROMPT, sweep=sweep)
    before = effects.before[0].logit
    changes = {
        f"L{effect.layer}|head {effect.head}": effect.after[0].logit - before
        for effect in effects.effects
    }
    for place, change in changes.items():
        expect(page.locator(f'.heat [data-id="{place}"] .line-0')).to_have_text(_signed(change))
    strongest = max(changes, key=lambda place: abs(changes[place]))
    expect(page.locator(".facts")).to_have_attribute("data-node", strongest)
    assert serious_findings(live) == []
    page.locator(f'.heat [data-id="{strongest}"]').focus()
    for key in ("ArrowDown", "ArrowUp"):
        page.locator(".heat :focus").press(key)
    page.locator(".heat :focus").press("Enter")
    expect(page.locator(".facts")).to_have_attribute("data-node", strongest)
    path = tmp_path / "effects.html"
    path.write_text(effects.to_html(), encoding="utf-8")
    context = browser.new_context(offline=True)
    alone = context.new_page()
    alone.goto(f"{path.as_uri()}#measure=kl")
    largest = max(effects.effects, key=lambda effect: effect.after[0].kl_nats)
    cell = alone.locator(f'.heat [data-id="L{largest.layer}|head {largest.head}"]')
    expect(cell.locator(".line-0")).to_have_text(f"{largest.after[0].kl_nats:.3f}")
    context.close()
    page.get_by_role("button", name="Generate without it").click()
    both, texts = panel(live, 1)
    state(both, "done")
    layer, head = map(int, re.findall(r"\d+", strongest))
    with januslens.Client(server_address) as client:
        removed = zero(heads=[(layer, head)])
        plain, changed = (
            client.generate(PROMPT, interventions=interventions)
            for interventions in ([], [removed])
        )
    for i, generation in enumerate((plain, changed)):
        expect(texts.locator(".said-answer").nth(i).locator(".said-token .token")).to_have_text(
            [str(made.token) for made in generation.tokens]
        )
    expect(texts.locator(".said-answer h2").nth(1)).to_contain_text(f"L{layer} head {head}")
    texts.locator(".said-answer").nth(1).locator(".said-token").first.click()
    followed, _ = panel(live, 2)
    state(followed, "done")
    expect(followed.get_by_role("heading").first).to_contain_text(f"without L{layer} head {head}")
    page.get_by_role("button", name="Trace without it").click()
    without, traced = panel(live, 3)
    state(without, "done")
    expect(without.get_by_role("heading").first).to_contain_text("without L")
    effect = max(effects.effects, key=lambda effect: abs(effect.after[0].logit - before))
    expect(traced.locator(".story")).to_contain_text(f"{effect.after[0].probability:.3f}")


# Stops the generation while its first token is shown, at any speed of the machine.
STOP_EARLY = """
new MutationObserver((_, observer) => {
  const status = document.querySelector('.answer-panel .status')
  if (!status?.textContent.startsWith('1 token')) return
  observer.disconnect()
  for (const button of document.querySelectorAll('.answer-panel button'))
    if (button.textContent === 'Stop') button.click()
}).observe(document.querySelector('main'), { childList: true, subtree: true });
"""


def test_stopped_conversation_can_be_continued(deep: Page, random_server: ServerProcess) -> None:
    deep.get_by_role("button", name="Chat").click()
    expect(deep.get_by_label("Prompt", exact=True)).to_be_hidden()
    deep.get_by_label("Role").select_option("system")
    deep.get_by_label("Message").fill("aeioul")
    deep.get_by_role("button", name="Add message").click()
    deep.get_by_label("Message").nth(1).fill("nrst")
    deep.evaluate(STOP_EARLY)
    deep.get_by_label("Message").nth(1).press("Enter")
    answer, page = panel(deep)
    state(answer, "cancelled")
    expect(answer.locator(".status")).to_have_text(re.compile(r"^\d+ tokens?, stopped$"))
    wait_until_idle(random_server)
    with januslens.Client(random_server.address) as client:
        chat = [{"role": "system", "content": "aeioul"}, {"role": "user", "content": "nrst"}]
        made = client.generate(messages=chat, model="random", max_new_tokens=1).tokens[0].token
    expect(page.locator(".said-token .token").first).to_have_text(str(made))
    answer.get_by_role("button", name="Continue").click()
    expect(deep.get_by_label("Role")).to_have_count(4)
    expect(deep.get_by_label("Role").nth(2)).to_have_value("assistant")
    expect(deep.get_by_label("Role").nth(3)).to_have_value("user")


def test_hostile_prompts_are_text(live: Page) -> None:
    live.get_by_label("Prompt", exact=True).fill("<img src=x onerror=alert(1)>\u202e")
    live.get_by_role("button", name="Trace", exact=True).click()
    answer, page = panel(live)
    state(answer, "done")
    expect(answer.get_by_role("heading").first).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator("img").count() == 0
    assert live.locator("img").count() == 0
