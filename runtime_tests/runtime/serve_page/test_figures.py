"""The figures of a patch on the page: in numbers with their standard errors, in words, and as a frontier."""

from __future__ import annotations

from typing import Any

from runtime_tests.runtime.serve_page.steps import view


def article(page: Any, name: str) -> Any:
    return page.locator("article.figures").filter(has=page.get_by_role("heading", name=name, exact=True))


def test_the_stored_figures_stand_beside_their_standard_errors(page: Any) -> None:
    view(page, "Figures")
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="policy", exact=True))
    cells = row.get_by_role("cell").all_text_contents()
    assert cells[0] == "entries" and cells[2:] == ["0.9807 ± 0.0040", "1.000", "0.75 ± 0.10"]


def test_the_figures_are_said_in_words(page: Any) -> None:
    view(page, "Figures")
    said = article(page, "policy").text_content()
    assert "closes 98.1 % of the distance between no prompt and the prompt. The standard error is 0.4 points." in said
    assert "At the first token of an answer, which often is the one that chooses, it closes 99.96 %." in said
    assert "Of the answers that are right with the prompt, 75 % are right with the patch." in said
    assert "Measured on 16 held-out queries." in said
    assert "The file holds no figures of its fidelity." in article(page, "facts").text_content()


def test_a_frontier_is_drawn_where_the_figures_hold_one(page: Any) -> None:
    view(page, "Figures")
    drawn = article(page, "policy")
    assert drawn.get_by_role("img", name="Frontier of policy").is_visible()
    assert drawn.locator("svg circle").count() == 2 and drawn.locator("svg rect").count() == 1
    drawn.get_by_text("The numbers").click()
    rows = drawn.locator("tbody tr").all_text_contents()
    assert rows[:2] == ["entries4.0 kB0.800 ± 0.050", "all entries9.0 kB1.000"] and rows[2].startswith("this patch")
    assert not article(page, "facts").locator("svg").count()
