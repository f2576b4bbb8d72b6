"""How the page looks and is used: both schemes, narrow screens, the keyboard, reduced motion, and what axe finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from runtime_tests.runtime.pace import Pace
from runtime_tests.runtime.serve_page.conftest import PROMPT
from runtime_tests.runtime.serve_page.serving import Served
from runtime_tests.runtime.serve_page.steps import arm, ask, begin_answer, choose, say, turns, view, wait
from tp_runtime.model import PatchedModel

VIEWS = ("Compare", "Chat", "Figures")
OpenPage = Callable[..., Any]


def filled(page: Any) -> None:
    """Let every view show something, an error too."""
    page.get_by_text("connected", exact=True).wait_for()
    choose(page, "policy")
    page.locator("#prompt").fill(PROMPT)
    ask(page)
    wait(page)
    view(page, "Chat")
    say(page, "Hello")
    wait(page, "#send")
    say(page, "Hello", tokens=100_000)
    wait(page, "#send")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(scheme: str, open_page: OpenPage, shared_server: Served) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core comes with this package").Axe()
    page = open_page(shared_server, color_scheme=scheme)
    filled(page)
    for name in VIEWS:
        view(page, name)
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()


def test_axe_finds_nothing_in_the_form_for_a_key(
    open_page: OpenPage, serve: Callable[..., Served], chat_model: PatchedModel
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core comes with this package").Axe()
    page = open_page(serve(chat_model, api_keys=["a-key-of-this-test"]))
    page.get_by_label("API key").wait_for()
    found = axe.run(page)
    assert found.violations_count == 0, found.generate_report()


def test_the_page_follows_the_scheme_of_the_system(open_page: OpenPage, shared_server: Served) -> None:
    def brightness(scheme: str) -> int:
        page = open_page(shared_server, color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))

    assert brightness("light") > 600 > 150 > brightness("dark")


def test_nothing_is_cut_off_on_a_narrow_screen(open_page: OpenPage, shared_server: Served) -> None:
    page = open_page(shared_server, viewport={"width": 320, "height": 640})
    filled(page)
    for name in VIEWS:
        view(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        for control in page.locator("button:visible, input:visible, textarea:visible, .arm:visible").all():
            box = control.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 320


def focused(page: Any) -> str:
    """Return the id of the element that has the focus, which must be seen to have it."""
    name, outline = page.evaluate("[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]")
    assert name == "" or outline == "solid", f"the focus of {name} is not seen"
    return name


def reach(page: Any, name: str) -> None:
    """Press Tab until an element has the focus."""
    for _press in range(60):
        page.keyboard.press("Tab")
        if focused(page) == name:
            return
    raise AssertionError(f"Tab does not reach {name}")


def test_everything_is_done_with_the_keyboard(page: Any, pace: Pace) -> None:
    reach(page, "reload")
    page.keyboard.press("Enter")
    page.wait_for_load_state("networkidle")
    name = page.get_by_label("pirate", exact=True).get_attribute("id")
    reach(page, name)
    page.keyboard.press("Space")
    reach(page, f"{name}-strength")
    page.keyboard.press("ArrowLeft")
    assert arm(page, "Patch").locator(".about").text_content() == "pirate@0.95"
    reach(page, "max-tokens")
    page.keyboard.type("200")
    reach(page, "prompt")
    page.keyboard.type("Rhyme.")
    reach(page, "question")
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    reach(page, "in-turn")
    page.keyboard.press("Space")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "ask"
    pace.allow(0)
    page.keyboard.press("Enter")
    begin_answer(page, pace, "Patch")
    assert focused(page) == "ask-stop"
    page.keyboard.press("Enter")
    wait(page)
    pace.allow(None)
    assert focused(page) == "ask" and page.locator("#question").input_value() == "One line\nand another"
    page.locator("#tab-compare").focus()
    page.keyboard.press("ArrowRight")
    assert focused(page) == "tab-chat" and page.locator("#view-chat").is_visible()
    reach(page, "message")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    page.locator("#chat-log .turn").nth(1).wait_for()
    wait(page, "#send")
    assert turns(page)[0] == "Hello" and focused(page) == "message"
    page.locator("#tab-chat").focus()
    for key, expected in (("End", "figures"), ("ArrowRight", "compare"), ("ArrowLeft", "figures"), ("Home", "compare")):
        page.keyboard.press(key)
        assert focused(page) == f"tab-{expected}" and page.locator(f"#view-{expected}").is_visible()


def test_a_link_skips_to_the_work_area(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "work"


@pytest.mark.parametrize(("motion", "animation"), [("reduce", "none"), ("no-preference", "busy")])
def test_nothing_moves_where_motion_is_not_wanted(
    motion: str, animation: str, open_page: OpenPage, shared_server: Served, pace: Pace
) -> None:
    page = open_page(shared_server, reduced_motion=motion)
    pace.allow(0)
    ask(page, tokens=200)
    running = arm(page, "No patch")
    running.locator("[aria-busy=true]").wait_for()
    assert running.evaluate("node => getComputedStyle(node).animationName") == animation


def test_the_page_asks_no_other_server(open_page: OpenPage, shared_server: Served) -> None:
    page = open_page(shared_server)
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    page.reload()
    filled(page)
    assert urls and all(url.startswith((shared_server.url, "data:")) for url in urls)


def test_the_files_of_the_page_are_asked_for_anew(page: Any) -> None:
    """The scripts of two versions do not work together."""
    answered = page.request.get(page.url + "static/main.js")
    assert answered.ok and answered.headers["cache-control"] == "no-cache"
