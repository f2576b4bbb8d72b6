"""Fixtures: Chromium, servers of tiny models with patches of every form, and pages that may say nothing is wrong.

Playwright runs an event loop in the thread of the tests as long as it is open, so it is closed after this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.patches import patch_for
from runtime_tests.runtime.pace import Pace, set_pace
from runtime_tests.runtime.serve_page.chromium import FLAGS, NAMES, find_chromium
from runtime_tests.runtime.serve_page.serving import Served
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch

PROMPT = "Answer in rhymes."
FIDELITY = {
    "gap_closed": 0.9807,
    "gap_closed_se": 0.004039,
    "gap_closed_first": 0.99962,
    "accuracy_kept": 0.75,
    "accuracy_kept_se": 0.1,
    "queries": 16,
}
FRONTIER = {"frontier_entries_4000": 0.8, "frontier_entries_4000_se": 0.05, "frontier_exact_9000": 1.0}


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    """Headless Chromium with a profile of its own, which is deleted at the end."""
    found = find_chromium()
    if found is None:
        pytest.skip(f"the page's tests need a browser: none of {', '.join(NAMES)} is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def pace() -> Iterator[Pace]:
    """The pace of every batch of this package."""
    with pytest.MonkeyPatch.context() as patched:
        yield set_pace(patched)


def loaded(model: PatchedModel) -> PatchedModel:
    """Load a patch of weights, one of entries with figures, and one whose name is markup."""
    model.codec.eos_ids = frozenset()
    folder = model.graph.folder
    policy = model.absorb(PROMPT, "policy")
    figures = {"gap_closed": 0.9807, **FRONTIER}
    policy = Patch(
        policy.deltas, replace(policy.config, fidelity=FIDELITY, report=figures), policy.prefix, policy.dtype
    )
    model.load_patch(patch_for(folder, seed=1, scale=0.5), "pirate")
    model.load_patch(policy, "policy")
    model.load_patch(model.absorb("Another prompt.", "facts"), "facts")
    model.load_patch(patch_for(folder, seed=2), "<b onclick=alert(1)>bold")
    return model


@pytest.fixture(scope="package")
def chat_model(tiny_llama_export: Path) -> PatchedModel:
    return loaded(PatchedModel.from_pretrained(tiny_llama_export, "cpu", prefix_cache_bytes=2**20))


@pytest.fixture(scope="package")
def completion_model(tiny_gemma_export: Path) -> PatchedModel:
    return loaded(PatchedModel.from_pretrained(tiny_gemma_export, "cpu"))


@pytest.fixture(scope="package")
def shared_server(chat_model: PatchedModel, pace: Pace) -> Iterator[Served]:
    served = Served(chat_model)
    yield served
    served.stop()


@pytest.fixture
def serve(pace: Pace) -> Iterator[Callable[..., Served]]:
    """A function that starts a server of a test's own."""
    started: list[Served] = []

    def begin(model: PatchedModel, **settings: Any) -> Served:
        started.append(Served(model, **settings))
        return started[-1]

    yield begin
    pace.allow(None)
    for served in started:
        served.stop()


@pytest.fixture
def open_page(chromium: Any, pace: Pace) -> Iterator[Callable[..., Any]]:
    """A function that opens the page of a server in a new profile; the test fails if a script of the page did."""
    contexts, wrong = [], []

    def opened(served: Served, **options: Any) -> Any:
        context = chromium.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: "Content Security" in message.text and wrong.append(message.text))
        page.goto(served.url)
        return page

    yield opened
    pace.allow(None)
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def page(open_page: Callable[..., Any], shared_server: Served) -> Any:
    """The page of a chat model with its patches, loaded."""
    opened = open_page(shared_server)
    opened.get_by_text("connected", exact=True).wait_for()
    return opened
