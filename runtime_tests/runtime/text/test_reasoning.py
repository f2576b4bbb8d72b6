"""Reasoning between tags and the answer after it, however the text is divided, and readers of whole answers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_tests.runtime.text.notations import ANSWERS, ARGUMENTS, TOOLS, form_of
from tp_runtime.text import AnswerChunk, AnswerReader
from tp_runtime.text.reasoning import PromptTail, ReasoningSplitter, ReasoningTags, recognise_reasoning_tags

THINK = ReasoningTags("<think>", "</think>", {})


def split(chunks: list[str], tail: PromptTail = "none", tags: ReasoningTags | None = THINK) -> tuple[str, str]:
    splitter = ReasoningSplitter(tags, tail)
    parts = [splitter.push(chunk) for chunk in chunks] + [splitter.flush()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


CASES: list[tuple[str, PromptTail, tuple[str, str]]] = [
    ("<think>\nso it is\n</think>\n\nIt is.", "none", ("so it is", "It is.")),
    ("\n<think>a</think>b", "none", ("a", "b")),
    ("<think>\n\n</think>\n\nYes.\n", "none", ("", "Yes.\n")),
    ("so it is\n</think>\n\nIt is.", "open", ("so it is", "It is.")),
    ("<think>\n so it is </think>It is.", "open", ("so it is", "It is.")),  # the model repeats the tag
    ("no end, a < b </thin", "open", ("no end, a < b </thin", "")),
    ("<think>cut off  \n", "none", ("cut off", "")),
    ("  A tag is <think>x</think>.", "none", ("", "  A tag is <think>x</think>.")),
    ("<think>a</think> b </think> c", "none", ("a", "b </think> c")),
    ("<think>a</think>", "closed", ("", "<think>a</think>")),
    ("<thin", "none", ("", "<thin")),
    ("", "open", ("", "")),
    ("<", "open", ("<", "")),
    (" \n ", "none", ("", " \n ")),
]


@pytest.mark.parametrize(("text", "tail", "want"), CASES)
def test_reasoning_is_split_off_however_the_text_is_divided(text: str, tail: PromptTail, want: tuple[str, str]) -> None:
    assert split([text], tail) == want
    assert split(list(text), tail) == want
    for i in range(len(text)):
        assert split([text[:i], text[i:]], tail) == want


def test_without_tags_everything_is_answer() -> None:
    assert split(["<think>a</think>", "b"], tags=None) == ("", "<think>a</think>b")


def test_reasoning_comes_out_before_its_end() -> None:
    splitter = ReasoningSplitter(THINK)
    assert splitter.push("<think>one ") == ("one", "")
    copy = splitter.copy()
    assert splitter.push("two") == (" two", "")
    assert copy.push("</think>x") == ("", "x")


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        ("{% if '</think>' in content %}{{ '<think>' }}{% endif %}", "<think>"),
        ("[THINK]x[/THINK]", "[THINK]"),
        ("<|START_THINKING|><|END_THINKING|><think></think>", "<|START_THINKING|>"),
        ("<seed:think></seed:think>", "<seed:think>"),
        ("<|channel>thought\n<channel|>", "<|channel>thought"),
    ],
)
def test_the_template_shows_the_tags(template: str, opening: str) -> None:
    special = {"<think>": 1, "[THINK]": 2, "<|channel>": 3, "<other>": 4}
    tags = recognise_reasoning_tags(template, special)
    assert tags is not None and tags.opening == opening
    assert set(tags.special_ids) == {text for text in special if text in opening}


def test_a_template_without_tags_has_no_reasoning() -> None:
    assert recognise_reasoning_tags("<think> is never closed", {}) is None
    assert recognise_reasoning_tags(None, {}) is None


# ---- whole answers


def read(chunks: list[str], reader: AnswerReader) -> AnswerChunk:
    parts = [reader.push(chunk) for chunk in chunks]
    assert not any(part.tool_calls for part in parts)
    parts.append(reader.end())
    return AnswerChunk(
        "".join(part.text for part in parts), "".join(part.reasoning for part in parts), parts[-1].tool_calls
    )


@pytest.mark.parametrize("family", ANSWERS)
def test_reasoning_text_and_calls_are_told_apart_in_every_notation(family: str) -> None:
    marked = family not in ("llama3", "json")
    answer = "<think>\nhm\n</think>\n\n" + ("Let me see. \n" if marked else "") + ANSWERS[family][1] + "\n"
    for chunks in ([answer], list(answer), [answer[i : i + 5] for i in range(0, len(answer), 5)]):
        got = read(chunks, AnswerReader(THINK, "none", form_of(family), TOOLS))
        assert got[:2] == ("Let me see." if marked else "", "hm")
        assert [(call.name, call.arguments) for call in got.tool_calls] == [("get_weather", ARGUMENTS)]


def test_text_before_a_call_comes_out_at_once() -> None:
    reader = AnswerReader(None, "none", form_of("hermes"), TOOLS)
    assert reader.push("Let me").text == "Let me"
    assert reader.push(" see <to").text == " see"
    copy = reader.copy()
    assert reader.push("day>").text == " <today>"
    assert copy.push('ol_call>{"name": "now"}</tool_call>') == AnswerChunk()
    assert [call.name for call in copy.end().tool_calls] == ["now"]
    assert reader.end() == AnswerChunk()


def test_without_a_notation_calls_are_text() -> None:
    answer = ANSWERS["hermes"][1]
    assert read(list(answer), AnswerReader()) == AnswerChunk(answer)


@given(st.sampled_from(sorted(ANSWERS)), st.text("<tol_ca>{}[]\n |think/", max_size=30), st.integers(0, 30))
@settings(max_examples=300, deadline=None)
def test_text_without_calls_is_the_same_in_parts(family: str, text: str, cut: int) -> None:
    whole = read([text], AnswerReader(THINK, "none", form_of(family), TOOLS))
    assert whole == read([text[:cut], text[cut:]], AnswerReader(THINK, "none", form_of(family), TOOLS))
    if "think>" not in text:
        assert whole == AnswerChunk(text)
