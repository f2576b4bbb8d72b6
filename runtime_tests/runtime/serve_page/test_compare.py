"""The page asks one question three times: the answers, what they cost, and what the choice of patches changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from runtime_tests.runtime.pace import Pace
from runtime_tests.runtime.serve_page.conftest import PROMPT
from runtime_tests.runtime.serve_page.serving import Served
from runtime_tests.runtime.serve_page.steps import ARMS, answer, arm, ask, begin_answer, choose, row, wait
from tp_runtime.model import PatchedModel


def figures(page: Any, name: str) -> dict[str, str]:
    column = arm(page, name)
    return dict(zip(column.locator("dt").all_text_contents(), column.locator("dd").all_text_contents(), strict=True))


def test_the_three_answers_are_those_of_the_model(page: Any, chat_model: PatchedModel) -> None:
    choose(page, "policy")
    choose(page, "pirate", 0.5)
    page.locator("#prompt").fill(PROMPT)
    ask(page)
    wait(page)
    both = chat_model.patches["policy"] + 0.5 * chat_model.patches["pirate"]
    asked: list[dict[str, Any]] = [{"patch": None}, {"patch": None, "system": PROMPT}, {"patch": both}]
    for name, options in zip(ARMS, asked, strict=True):
        expected = chat_model.generate("Who are you?", max_new_tokens=8, **options)
        assert answer(page, name) == expected


def test_the_costs_are_the_tokens_and_bytes_of_a_session(page: Any, chat_model: PatchedModel) -> None:
    choose(page, "policy")
    page.locator("#prompt").fill(PROMPT)
    page.get_by_label("one after another").check()
    ask(page)
    wait(page)
    none, prompt, patch = (figures(page, name) for name in ARMS)
    codec, policy = chat_model.codec, chat_model.patches["policy"]
    assert policy.prefix is not None
    tokens = len(codec.render("Who are you?"))
    assert none["Tokens of context"] == f"{tokens} tokens" and none["Patch file"] == "none"
    assert prompt["Tokens of context"] == f"{len(codec.render('Who are you?', PROMPT))} tokens"
    held = tokens + policy.prefix.longest - len(policy.prefix.replaces)
    assert patch["Tokens of context"] == f"{held} tokens"
    assert patch["Patch file"] == f"{policy.nbytes / 1000:.1f} kB"
    kv = chat_model.graph.folder.kv
    size = held * 2 * kv.heads * kv.head_dim * kv.numpy_dtype.itemsize * chat_model.graph.folder.layers
    assert patch["Keys and values"] == f"{size / 1000:.1f} kB"
    assert all(row[name].endswith(" ms") for row in (none, prompt, patch) for name in ("First token",))


def test_a_prompt_and_its_own_entries_are_said_to_answer_alike(page: Any) -> None:
    choose(page, "policy")
    page.locator("#prompt").fill(PROMPT)
    page.get_by_text("policy was made from this text.").wait_for()
    ask(page)
    wait(page)
    said = page.locator("#difference").text_content()
    assert "same, letter for letter" in said and "ran in one batch" in said
    page.locator("#prompt").fill("Something else.")
    page.get_by_text("policy was made from another text").wait_for()


def test_answers_grow_side_by_side(page: Any, pace: Pace) -> None:
    choose(page, "pirate")
    page.locator("#prompt").fill(PROMPT)
    pace.allow(0)
    ask(page, tokens=200)
    begin_answer(page, pace, *ARMS)
    for name in ARMS:
        assert arm(page, name).locator(".answer").get_attribute("aria-busy") == "true"
        assert arm(page, name).locator(".answer").get_attribute("aria-live") == "polite"
    assert page.get_by_role("button", name="Ask all three").is_disabled()


def test_one_after_another_asks_each_alone(page: Any, pace: Pace) -> None:
    sent: list[str] = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data))
    choose(page, "pirate")
    page.locator("#prompt").fill(PROMPT)
    page.get_by_label("one after another").check()
    pace.allow(0)
    ask(page)
    begin_answer(page, pace, "No patch")
    assert len(sent) == 1
    pace.allow(None)
    wait(page)
    assert [json.loads(one).get("patch") for one in sent] == [None, None, {"pirate": 1}]
    assert "first token came" in page.locator("#difference").text_content()


def test_stop_ends_all_three_and_keeps_their_text(page: Any, pace: Pace) -> None:
    choose(page, "pirate")
    page.locator("#prompt").fill(PROMPT)
    pace.allow(0)
    ask(page, tokens=200)
    begin_answer(page, pace, *ARMS)
    page.locator("#ask-stop").click()
    wait(page)
    pace.allow(None)
    for name in ARMS:
        assert arm(page, name).locator(".status").text_content() == "stopped" and answer(page, name)
    ask(page)
    wait(page)
    assert "done" in arm(page, "Patch").locator(".status").text_content()


def test_without_a_prompt_or_a_patch_there_is_nothing_to_ask_under_them(page: Any) -> None:
    ask(page)
    wait(page)
    assert answer(page, "No patch") and not answer(page, "Prompt") and not answer(page, "Patch")
    assert arm(page, "Prompt").locator(".about").text_content() == "no prompt is given"
    assert arm(page, "Patch").locator(".about").text_content() == "no patch is chosen"


def test_a_form_says_what_it_does_not_allow_before_it_is_asked(page: Any) -> None:
    entries, weights = row(page, "policy"), row(page, "pirate")
    slider = entries.get_by_role("slider")
    assert [slider.get_attribute(name) for name in ("min", "max", "step")] == ["0", "1", "1"]
    assert "none: the entries stand where a system message or tools would be" in entries.text_content()
    assert slider.is_disabled()
    choose(page, "policy", 0)
    assert arm(page, "Patch").locator(".about").text_content() == "no patch is chosen"
    choose(page, "policy", 1)
    other = row(page, "facts")
    assert other.get_by_role("checkbox").is_disabled()
    assert other.locator(".refusal").text_content() == "adds up with weights only, and policy has entries too"
    choose(page, "pirate", -0.5)
    assert weights.locator("output").text_content() == "-0.50"
    assert arm(page, "Patch").locator(".about").text_content() == "policy+pirate@-0.5"
    entries.get_by_role("checkbox").uncheck()
    assert other.get_by_role("checkbox").is_enabled()


def test_names_and_answers_are_text_and_never_markup(page: Any) -> None:
    choose(page, "<b onclick=alert(1)>bold")
    ask(page, "<img src=x onerror=alert(1)>")
    wait(page)
    assert not page.locator("b, img").count()


def test_a_completion_style_model_continues_a_text(
    serve: Callable[..., Served], open_page: Callable[..., Any], completion_model: PatchedModel
) -> None:
    page = open_page(serve(completion_model))
    paths: list[str] = []
    page.on("request", lambda request: request.method == "POST" and paths.append(request.url))
    page.get_by_label("Text to continue").wait_for()
    assert "continues a text (/v1/completions)" in page.locator("#keys-help").text_content()
    choose(page, "policy")
    page.locator("#prompt").fill(PROMPT)
    ask(page, "Once upon")
    wait(page)
    assert all(path.endswith("/v1/completions") for path in paths) and len(paths) == 3
    assert answer(page, "Prompt") == completion_model.generate("Once upon", system=PROMPT, patch=None, max_new_tokens=8)
    assert answer(page, "Patch") == completion_model.generate("Once upon", patch="policy", max_new_tokens=8)
