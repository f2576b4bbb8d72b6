"""The page's chat: its dialogue, its patches and system message, and its buttons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime_tests.runtime.pace import Pace
from runtime_tests.runtime.serve_page.conftest import PROMPT
from runtime_tests.runtime.serve_page.serving import Served
from runtime_tests.runtime.serve_page.steps import begin_text, choose, row, say, turns, view, wait
from tp_runtime.model import PatchedModel


def bodies(page: Any) -> list[dict[str, Any]]:
    """Return a list that gets the body of each request from now on."""
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: request.method == "POST" and sent.append(json.loads(request.post_data)))
    return sent


def test_every_message_is_sent_with_the_dialogue_before_it(page: Any, chat_model: PatchedModel) -> None:
    sent = bodies(page)
    choose(page, "policy")
    view(page, "Chat")
    say(page, "Hello")
    wait(page, "#send")
    first = turns(page)
    assert first == ["Hello", chat_model.generate("Hello", patch="policy", max_new_tokens=8)]
    say(page, "And now?")
    wait(page, "#send")
    assert [message["content"] for message in sent[1]["messages"]] == [*first, "And now?"]
    assert sent[1]["patch"] == {"policy": 1} and len(turns(page)) == 4
    assert "of context, 8 answered, cut at the limit; first token" in page.locator("#chat-log").text_content()


def test_the_prompt_is_a_system_message_where_the_patches_allow_one(page: Any) -> None:
    sent = bodies(page)
    page.locator("#prompt").fill(PROMPT)
    choose(page, "pirate")
    view(page, "Chat")
    page.get_by_label("send the prompt of Compare").check()
    say(page, "Hello")
    wait(page, "#send")
    assert sent[0]["messages"][0] == {"role": "system", "content": PROMPT}
    choose(page, "policy")
    assert page.get_by_label("send the prompt of Compare").is_disabled()
    help_text = page.locator("#chat-prompt-help").text_content()
    assert help_text == "System message: policy: none: the entries stand where a system message or tools would be."
    say(page, "Hello")
    wait(page, "#send")
    assert "system" not in {message["role"] for message in sent[1]["messages"]}
    row(page, "policy").get_by_role("checkbox").uncheck()
    assert page.get_by_label("send the prompt of Compare").is_enabled()


def test_a_patch_in_front_of_a_system_message_gets_one(
    serve: Callable[..., Served], open_page: Callable[..., Any], tiny_llama_export: Path
) -> None:
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu")
    model.load_patch(model.absorb("Answer in rhymes.", "front", before_system=True), "front")
    page = open_page(serve(model))
    sent = bodies(page)
    page.locator("#prompt").fill("You answer by telephone.")
    choose(page, "front")
    view(page, "Chat")
    help_text = page.locator("#chat-prompt-help").text_content()
    assert help_text == "System message: front: needed: the entries stand in front of a system message."
    page.get_by_label("send the prompt of Compare").check()
    say(page, "Hello")
    wait(page, "#send")
    assert sent[0]["messages"][0] == {"role": "system", "content": "You answer by telephone."}
    assert len(turns(page)) == 2


def test_stop_keeps_what_was_said(page: Any, pace: Pace) -> None:
    sent = bodies(page)
    view(page, "Chat")
    pace.allow(0)
    say(page, "Hello", tokens=200)
    begin_text(page, pace, page.locator("#chat-log .text span"))
    assert page.get_by_role("button", name="Send").is_disabled()
    page.locator("#chat-stop").click()
    wait(page, "#send")
    pace.allow(None)
    before = turns(page)
    assert before[1] and "stopped" in page.locator("#chat-log").text_content()
    say(page, "Go on")
    wait(page, "#send")
    assert [message["content"] for message in sent[1]["messages"]] == [*before, "Go on"]


def test_clear_forgets_the_dialogue_also_while_an_answer_comes(page: Any, pace: Pace) -> None:
    sent = bodies(page)
    view(page, "Chat")
    pace.allow(0)
    say(page, "Hello", tokens=200)
    begin_text(page, pace, page.locator("#chat-log .text span"))
    page.get_by_role("button", name="Clear").click()
    pace.allow(None)
    wait(page, "#send")
    assert turns(page) == []
    say(page, "Anew")
    wait(page, "#send")
    assert [message["content"] for message in sent[1]["messages"]] == ["Anew"]


def test_a_completion_style_model_is_said_to_remember_nothing(
    serve: Callable[..., Served], open_page: Callable[..., Any], completion_model: PatchedModel
) -> None:
    page = open_page(serve(completion_model))
    sent = bodies(page)
    view(page, "Chat")
    page.get_by_text("does not remember the others").wait_for()
    for text in ("Once upon", "Twice"):
        say(page, text)
        wait(page, "#send")
    assert [body["prompt"] for body in sent] == ["Once upon", "Twice"]
