"""Writes the screenshots of docs/page.md: one question under a patch, in both schemes.

Start `tp-runtime serve MODEL_DIR --patch-dir DIR --prefix-cache 0` on a machine that does nothing else, then run

    python -m runtime_tests.runtime.serve_page.screenshots URL PATCH PROMPT_FILE QUESTION OUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from runtime_tests.runtime.serve_page.chromium import FLAGS, find_chromium
from runtime_tests.runtime.serve_page.steps import ask, choose, wait


def write_screenshots(url: str, patch: str, prompt: str, question: str, out: Path) -> None:
    """Write page-light.png and page-dark.png.

    Args:
        url: the address of the server.
        patch: the name of the patch.
        prompt: the prompt that it replaces.
        question: the question.
        out: the folder to write to.
    """
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 860})
            page.set_default_timeout(300_000)
            page.goto(url)
            choose(page, patch)
            page.locator("#prompt").fill(prompt)
            page.locator("#prompt").evaluate("field => { field.scrollTop = 0; }")
            page.get_by_label("one after another").check()
            ask(page, question, tokens=48)
            wait(page)
            page.screenshot(path=out / f"page-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    address, name, file, asked, folder = sys.argv[1:]
    write_screenshots(address, name, Path(file).read_text(encoding="utf-8").rstrip("\n"), asked, Path(folder))
