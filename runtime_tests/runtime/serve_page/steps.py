"""What a user does on the page, and what the page then shows, by the words that the user reads."""

from __future__ import annotations

import time
from typing import Any

from runtime_tests.runtime.pace import Pace

ARMS = ("No patch", "Prompt", "Patch")


def choose(page: Any, name: str, strength: float | None = None) -> None:
    """Choose a patch, and move its slider."""
    item = row(page, name)
    item.get_by_role("checkbox").check()
    if strength is not None:
        item.get_by_role("slider").fill(str(strength))


def row(page: Any, name: str) -> Any:
    """Return the row of a patch."""
    return page.locator("#patch-list > li").filter(has=page.get_by_label(name, exact=True))


def arm(page: Any, name: str) -> Any:
    """Return one of the three columns."""
    return page.locator(".arm").filter(has=page.get_by_role("heading", name=name, exact=True))


def answer(page: Any, name: str) -> str:
    """Return the text of an answer."""
    return arm(page, name).locator(".answer").text_content()


def ask(page: Any, question: str = "Who are you?", tokens: int = 8) -> None:
    """Ask all three, without waiting for an answer."""
    page.get_by_label("New tokens, at most").fill(str(tokens))
    page.locator("#question").fill(question)
    page.get_by_role("button", name="Ask all three").click()


def wait(page: Any, control: str = "#ask") -> None:
    """Wait until no request runs: the control can be used again."""
    page.locator(f"{control}:enabled").wait_for()


def view(page: Any, name: str) -> None:
    """Go to a tab."""
    page.get_by_role("tab", name=name).click()


def say(page: Any, text: str, tokens: int = 8) -> None:
    """Send a message in the chat, without waiting for the answer."""
    page.get_by_label("New tokens, at most").fill(str(tokens))
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def turns(page: Any) -> list[str]:
    """Return the texts of the chat's turns."""
    return page.locator("#chat-log .text").all_text_contents()


def begin_answer(page: Any, pace: Pace, *names: str) -> None:
    """Let the model run step by step until columns show text, which not every token is; then it waits."""
    places = [arm(page, name).locator(".answer") for name in names]
    begin_text(page, pace, *places)


def begin_text(page: Any, pace: Pace, *places: Any) -> None:
    """Let the model run step by step until all of these places show text; then it waits."""
    end = time.monotonic() + 60  # no test depends on this; it ends one that would wait for ever
    while time.monotonic() < end:
        if pace.spent():
            pace.allow(1)
        page.wait_for_timeout(20)
        if all(place.count() and place.first.text_content().strip() for place in places):
            return
    raise AssertionError("no answer begins")
