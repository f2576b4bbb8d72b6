"""What goes wrong is said in the server's words: keys, refusals, full queues, and connections that are lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime_tests.patches import patch_for
from runtime_tests.runtime.pace import Pace
from runtime_tests.runtime.serve_page.serving import Served
from runtime_tests.runtime.serve_page.steps import (
    ARMS,
    answer,
    arm,
    ask,
    begin_answer,
    choose,
    row,
    say,
    turns,
    view,
    wait,
)
from tp_runtime.model import PatchedModel

Serve, OpenPage = Callable[..., Served], Callable[..., Any]
KEY = "a-key-of-this-test"


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(
    serve: Serve, open_page: OpenPage, chat_model: PatchedModel
) -> None:
    page = open_page(serve(chat_model, api_keys=[KEY]))
    field = page.get_by_label("API key")
    field.wait_for()
    assert "the API key is missing or wrong" in page.locator("#page-error").text_content()
    for wrong in ("not-the-key", "schlüssel-ключ"):
        page.evaluate("document.getElementById('page-error').replaceChildren()")
        field.fill(wrong)
        page.get_by_role("button", name="Use key").click()
        page.locator("#page-error .error").wait_for()
        assert field.is_visible()
    field.fill(KEY)
    page.get_by_role("button", name="Use key").click()
    page.get_by_text("connected", exact=True).wait_for()
    assert field.is_hidden() and page.get_by_role("link", name="Metrics").is_hidden()
    assert not page.locator("#page-error .error").count()
    ask(page)
    wait(page)
    assert answer(page, "No patch")
    kept = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
    assert KEY in kept[0] and kept[1:] == ["{}", ""]
    page.reload()
    page.get_by_text("connected", exact=True).wait_for()


def test_the_field_for_a_key_is_not_there_without_need(page: Any) -> None:
    assert page.locator("#key-form").is_hidden()


def test_a_patch_that_is_gone_is_refused_and_leaves_the_list(
    serve: Serve, open_page: OpenPage, chat_model: PatchedModel
) -> None:
    page = open_page(serve(chat_model))
    chat_model.load_patch(patch_for(chat_model.graph.folder, seed=5), "brief")
    try:
        page.get_by_role("button", name="Reload").click()
        choose(page, "brief")
    finally:
        chat_model.unload_patch("brief")
    ask(page)
    wait(page)
    refused = arm(page, "Patch").locator(".error")
    refused.wait_for()
    assert "The server refused the request. patch: the server has no such model or patch" in refused.text_content()
    assert "Fix: GET /v1/models lists what can be named" in refused.text_content()
    assert answer(page, "No patch")
    page.get_by_text("The server no longer has brief.").wait_for()
    assert not row(page, "brief").count()


def test_a_refused_message_is_given_back(page: Any) -> None:
    view(page, "Chat")
    say(page, "Hello", tokens=100_000)
    page.locator("#chat-error .error").wait_for()
    wait(page, "#send")
    said = page.locator("#chat-error").text_content()
    assert "max_tokens: the request asks for more tokens than the server allows; got 100000" in said
    assert "Fix: ask for fewer" in said and said.count("Fix:") == 1
    assert page.get_by_label("Message", exact=True).input_value() == "Hello" and turns(page) == []


def test_a_field_that_is_no_number_the_server_takes_is_refused(page: Any) -> None:
    page.get_by_label("Temperature").fill("-1")
    ask(page)
    wait(page)
    assert "temperature" in arm(page, "No patch").locator(".error").text_content()


def test_a_full_queue_is_said(serve: Serve, open_page: OpenPage, chat_model: PatchedModel, pace: Pace) -> None:
    page = open_page(serve(chat_model, rows=1, queue=1))
    choose(page, "pirate")
    page.locator("#prompt").fill("Rhyme.")
    pace.allow(0)
    ask(page)
    page.locator(".arm .error").wait_for()
    assert "The server is busy." in page.locator(".arm .error").text_content()
    pace.allow(None)
    wait(page)
    assert sum("done" in arm(page, name).locator(".status").text_content() for name in ARMS) == 2


def test_a_connection_lost_in_an_answer_keeps_its_text_and_comes_back(
    serve: Serve, open_page: OpenPage, chat_model: PatchedModel, pace: Pace
) -> None:
    served = serve(chat_model)
    page = open_page(served)
    choose(page, "pirate")
    pace.allow(0)
    ask(page, tokens=200)
    begin_answer(page, pace, "Patch")
    served.cut()
    wait(page)
    pace.allow(None)
    served.stop()
    said = arm(page, "Patch").locator(".error").text_content()
    assert "The connection to the server was lost. The answer broke off before its end." in said
    assert answer(page, "Patch") and "failed" in arm(page, "Patch").locator(".status").text_content()
    page.get_by_text("no connection; looking for the server").wait_for()
    served.start()
    page.get_by_text("connected", exact=True).wait_for()
    assert row(page, "pirate").get_by_role("checkbox").is_checked()
    ask(page)
    wait(page)
    assert not page.locator(".arm .error").count()


def test_a_server_that_is_gone_is_said_and_the_message_is_given_back(
    serve: Serve, open_page: OpenPage, chat_model: PatchedModel
) -> None:
    served = serve(chat_model)
    page = open_page(served)
    page.get_by_text("connected", exact=True).wait_for()
    served.stop()
    view(page, "Chat")
    say(page, "Hello")
    page.locator("#chat-error .error").wait_for()
    assert "No answer came." in page.locator("#chat-error").text_content()
    assert page.get_by_label("Message", exact=True).input_value() == "Hello"
    served.start()
    page.get_by_text("connected", exact=True).wait_for()


def test_a_server_without_patches_says_how_to_load_some(
    serve: Serve, open_page: OpenPage, tiny_llama_export: Any
) -> None:
    page = open_page(serve(PatchedModel.from_pretrained(tiny_llama_export, "cpu")))
    page.get_by_text("Start the server with --patch NAME=FILE").wait_for()


def test_what_is_no_server_of_this_kind_is_asked_once(page: Any) -> None:
    asked: list[str] = []

    def nothing_here(route: Any) -> None:
        asked.append(route.request.url)
        route.fulfill(status=404, body="<h1>nothing here</h1>")

    page.route("**/v1/models", nothing_here)
    page.get_by_role("button", name="Reload").click()
    page.locator("#page-error .error").wait_for()
    said = page.locator("#page-error").text_content()
    assert "the server answered with status 404 and no explanation" in said and "<h1>" not in said
    assert len(asked) == 1


def test_a_form_that_changed_on_the_server_changes_the_choice(
    serve: Serve, open_page: OpenPage, chat_model: PatchedModel
) -> None:
    page = open_page(serve(chat_model))
    weights = chat_model.patches["pirate"]
    choose(page, "pirate", 0.5)
    try:
        chat_model.load_patch(chat_model.patches["facts"], "pirate", replace=True)
        page.get_by_role("button", name="Reload").click()
        page.locator("#patch-list input[type=range][max='1'] >> nth=2").wait_for()
        slider = row(page, "pirate").get_by_role("slider")
        assert slider.input_value() == "1" and row(page, "pirate").locator("output").text_content() == "1"
    finally:
        chat_model.load_patch(weights, "pirate", replace=True)
