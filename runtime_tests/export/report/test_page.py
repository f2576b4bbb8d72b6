"""The page of `tp-export report`: it is complete, loads nothing, escapes markup, and says what was not measured."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from tp_export.report.figures import Fits, PatchReport, Report, Turns
from tp_export.report.page import render_page

SECTIONS = (
    *("The four variants", "Along the answer", "Long answers", "Dialogues", "Layers"),
    *("Strength", "Against the heuristics", "Answers", "The worst answers", "Their sum", "How it was measured"),
)


class _Page(HTMLParser):
    """A parser that collects open tags, titles, and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.titles.append(data)


def test_the_page_is_complete_and_loads_nothing(whole: tuple[dict[str, Any], str]) -> None:
    page = _Page()
    page.feed(whole[1])
    assert page.open == [] and set(SECTIONS) <= set(page.titles)
    assert all(reference.startswith("#") for reference in page.references)
    addresses = set(re.findall(r"https?://[^\"'\s)<]+", whole[1]))
    assert addresses <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # these are names of XML namespaces, which nothing loads
    assert not re.search(r"url\((?!#)", whole[1]) and "@import" not in whole[1]
    ids = re.findall(r'clipPath id="([^"]+)"', whole[1])
    assert whole[1].count("<svg") == 14 and len(ids) >= 12


def test_markup_in_queries_is_escaped(whole: tuple[dict[str, Any], str]) -> None:
    assert "<b>tag</b>" not in whole[1] and "&lt;b&gt;tag&lt;/b&gt;" in whole[1]


def test_missing_measurements_are_explained(report: Report) -> None:
    one = report.patches[0]
    variants = [replace(variant, first_token_ms=None, token_ms=None) for variant in one.variants]
    fits = Fits(0, 0, False, [], "left out with --baselines none")
    turns = Turns(0, 64, [], {}, "the model is completion-style, so it has no chat turns")
    layers = [replace(layer, retained={}) for layer in one.layers]
    reduced = replace(one, variants=variants, fits=fits, turns=turns, layers=layers, long=None)
    text = render_page(replace(report, patches=[reduced], composition=[], runtime=None))
    for message in ("--runtime)", "--baselines none", "it has no chat turns", "The energy kept is not known"):
        assert message in text
    assert "Long answers" not in text and "Their sum" not in text


def without_plots(patch: PatchReport, **more: Any) -> PatchReport:
    """Return a report with changed figures and few plots, so that the page is quickly drawn."""
    nothing = Turns(0, 64, [], {}, "left out"), Fits(0, 0, False, [], "left out")
    left_out: dict[str, Any] = {"turns": nothing[0], "fits": nothing[1], "layers": [], "sweep": None, "long": None}
    return replace(patch, **left_out, frontier=None, **more)


def test_the_page_states_the_answers_kept_and_the_stop(report: Report) -> None:
    one = report.patches[0]
    variants = [replace(v, held_out=replace(v.held_out, right=0.5, kept=0.8125, kept_se=0.0421)) for v in one.variants]
    text = render_page(replace(report, patches=[without_plots(one, variants=variants, known_answers=3, stop=["\n<"])]))
    assert "of the prompted model's right answers are kept ± 4.2" in " ".join(text.split())
    assert "81.2\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}4.2" in text and "equals the expected one up to the stop" in text
    assert '<code>"\\n\\u003c"</code>' in text
    nothing = [replace(v, held_out=replace(v.held_out, right=0.0, kept=None, kept_se=None)) for v in one.variants]
    text = render_page(replace(report, patches=[without_plots(one, variants=nothing, known_answers=3)]))
    assert "gives no right answer that could be" in text and "contains the expected text" in text


def test_the_page_states_that_the_prompt_has_no_effect_on_the_first_token(report: Report) -> None:
    one = report.patches[0]
    variants = [
        replace(v, held_out=replace(v.held_out, gap_closed_first=None, gap_closed_first_se=None)) for v in one.variants
    ]
    text = " ".join(render_page(replace(report, patches=[without_plots(one, variants=variants)])).split())
    assert "the prompt has no effect on the first token of the answers" in text
