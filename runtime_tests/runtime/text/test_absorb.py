"""A system prompt absorbed at the edge: the patch of its own keys and values answers as the prompt does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime_tests.committed import FIXTURES, private_copy
from runtime_tests.logits import furthest
from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.errors import BaseMismatchError, PatchFormatError, PatchValueError, RequestError
from tp_runtime.generation import entries
from tp_runtime.model import ACTIVE, PatchedModel
from tp_runtime.patch import Patch, context_digest
from tp_runtime.text import TOKENIZER_FILES, TextCodec

SYSTEM = "Always talk like a pirate, and mention the sea in every single answer."
QUESTIONS = ["Hi", "How far is the moon?", "3 + 4 is what, and why?"]
FOLDERS = [
    *("tiny-llama", "tiny-gemma", "tiny-llama-optimum", "tiny-llama-int8", "tiny-llama-int4", "tiny-llama-repaired"),
    "tiny-llama-patched",
]
EXACT = 1e-4  # rounding; the prompt runs in the same session


@pytest.fixture(scope="module", params=FOLDERS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PatchedModel:
    """Every kind of folder: both routes, both styles, every precision, with a repair and with a default patch."""
    return PatchedModel.from_pretrained(private_copy(request.param, tmp_path_factory.mktemp("absorb")), "cpu")


def behind_the_prompt(model: PatchedModel, patch: Patch, question: str, under: Any = ACTIVE) -> float:
    """Return the largest difference between the logits under the patch and those behind the prompt, under `under`."""
    prompted, bare = model.codec.render(question, SYSTEM), model.codec.render(question)
    got = model.logits(bare, patch=patch)
    return furthest(got, model.logits(prompted, patch=under)[-len(got) :])


def test_the_patch_answers_as_the_prompt_does(opened: PatchedModel, tmp_path: Path) -> None:
    made = opened.absorb(SYSTEM, "pirate")
    made.save(tmp_path / "p.safetensors")
    patch = Patch.load(tmp_path / "p.safetensors")
    assert patch.identity == made.identity  # nothing is rounded
    # Quantised kernels round activations, and a run of the whole prompt rounds others than one of its parts.
    tolerance = EXACT if opened.graph.folder.precision == "fp32" else 0.1
    for question in QUESTIONS:
        assert behind_the_prompt(opened, patch, question) < tolerance
        wanted = opened.generate(question, system=SYSTEM, max_new_tokens=8)
        assert opened.generate(question, patch=patch, max_new_tokens=8) == wanted
    several = opened.generate(QUESTIONS, patch=[patch, None, patch], max_new_tokens=8, rows=3)
    assert several[0] == opened.generate(QUESTIONS[0], patch=patch, max_new_tokens=8)
    assert opened.check(patch).ok


def test_the_file_says_what_the_patch_is(opened: PatchedModel) -> None:
    patch, folder = opened.absorb(SYSTEM, "pirate"), opened.graph.folder
    config = patch.config
    assert (config.name, config.base_digest, config.architecture) == ("pirate", folder.base_digest, folder.architecture)
    assert config.precision == folder.precision and config.context_digest == context_digest(SYSTEM)
    assert config.context is None and config.created is not None and patch.dtype == "f32"
    weights = folder.default_patch is not None
    assert config.method == ("composed" if weights else "prefix")
    assert patch.capabilities.form == ("weights and entries" if weights else "entries")
    prefix = patch.prefix
    assert prefix is not None and prefix.position == len(opened.codec.render("Hi", SYSTEM)) - (
        len(opened.codec.render("Hi")) - len(prefix.replaces)
    )


def test_equal_values_in_another_place_are_not_taken_for_each_other(model: PatchedModel) -> None:
    """With Gemma's template, a prompt has the same entries in place of a system message and in front of one."""
    plain = model.absorb(SYSTEM)
    assert plain.prefix is not None
    before = replace(plain, prefix=replace(plain.prefix, before_system=True))
    assert plain.identity == before.identity
    model.generate("Hi", patch=plain, max_new_tokens=2)
    with pytest.raises(RequestError, match="the request has no system message"):
        model.generate("Hi", patch=before, max_new_tokens=2)
    with pytest.raises(RequestError, match="the request has a system message"):
        model.generate("Hi", system="Be brief.", patch=plain, max_new_tokens=2)


def test_windowed_layers_keep_what_their_window_shows(tiny_gemma_export: Path) -> None:
    model = PatchedModel.from_pretrained(tiny_gemma_export, "cpu")
    windowed = model.graph.folder.windowed
    assert windowed is not None
    prefix = model.absorb(SYSTEM).prefix
    assert prefix is not None and prefix.position > windowed.window
    for layer, count in enumerate(prefix.counts):
        assert count == (windowed.window - 1 if layer in windowed.layers else prefix.position)
    short = model.absorb("Be brief").prefix  # no longer than the window
    assert short is None or len(set(short.counts)) <= 2
    assert short is not None and short.longest == short.position


def test_a_patch_made_under_weights_holds_them(model: PatchedModel, patch: Patch) -> None:
    model.load_patch(patch, "w")
    with model.patched("w", 0.5):
        both = model.absorb(SYSTEM, "both")
    assert both.capabilities.form == "weights and entries"
    assert behind_the_prompt(model, both, QUESTIONS[1], 0.5 * patch) < EXACT
    base = model.absorb(SYSTEM, "base")
    assert base.capabilities.form == "entries"
    # Entries of the base with weights added are something else: they were computed without the weights.
    assert behind_the_prompt(model, base + 0.5 * patch, QUESTIONS[1], 0.5 * patch) > 10 * EXACT
    stopping = Patch(patch.deltas, patch.config.__class__(**{**patch.config.to_dict(), "stop": ("\n",)}))
    assert model.absorb(SYSTEM, patch=stopping).config.stop == ("\n",)


def test_a_patch_of_a_quantised_folder_runs_on_its_precision_only(tiny_llama_export: Path) -> None:
    patch = PatchedModel.from_pretrained(FIXTURES / "tiny-llama-int4", "cpu").absorb(SYSTEM)
    other = PatchedModel.from_pretrained(tiny_llama_export, "cpu")
    with pytest.raises(BaseMismatchError, match="another precision"):
        other.load_patch(patch)


def test_dtypes_round_and_the_figures_are_those_of_the_file(model: PatchedModel, tmp_path: Path) -> None:
    for dtype, tolerance in {"f32": EXACT, "f16": 0.02, "i8": 0.2}.items():
        patch = model.absorb(SYSTEM, dtype=dtype)
        patch.save(tmp_path / "p.safetensors")
        loaded = Patch.load(tmp_path / "p.safetensors")
        assert loaded.dtype == dtype and loaded.identity == patch.identity
        assert behind_the_prompt(model, loaded, QUESTIONS[1]) < tolerance
        assert model.check(loaded).max_logit_error < 1e-3
    with pytest.raises(PatchFormatError, match="the dtype is unknown"):
        model.absorb(SYSTEM, dtype="f8")


def test_a_long_prompt_runs_in_parts_and_reports_them(model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    whole = model.absorb(SYSTEM)
    monkeypatch.setattr(entries, "STEP", 30)
    parts = model.absorb(SYSTEM, progress=lambda done, all_tokens: seen.append((done, all_tokens)))
    assert whole.prefix is not None and parts.prefix is not None
    length = whole.prefix.position
    assert seen == [(min(done, length), length) for done in range(30, length + 30, 30)]
    for entry, values in whole.prefix.entries.items():
        assert np.abs(values - parts.prefix.entries[entry]).max() < EXACT


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["", " \n", None, 5])
def test_an_empty_prompt_is_refused(model: PatchedModel, system: Any) -> None:
    with pytest.raises(RequestError, match="the prompt to absorb is empty"):
        model.absorb(system)


def test_a_prompt_that_fills_the_context_window_is_refused(model: PatchedModel) -> None:
    with pytest.raises(RequestError, match="leaves no room in the context window") as caught:
        model.absorb("a b " * 1000)
    assert caught.value.field == "system"


def test_a_prompt_that_leaves_little_room_is_absorbed(model: PatchedModel) -> None:
    window = model.graph.folder.context_window
    base = model.absorb("x").prefix
    assert base is not None
    for left in (3, 1):
        text = "x" + "y" * (window - left - base.position)
        patch = model.absorb(text)
        assert patch.prefix is not None and patch.prefix.position == window - left
        assert patch.config.probe is not None and len(patch.config.probe["top1"]) == left
        assert model.check(patch).ok


@pytest.mark.parametrize("how", ["named", "active", "default"])
def test_a_patch_with_entries_cannot_be_active(model: PatchedModel, tiny_llama_export: Path, how: str) -> None:
    first = model.absorb(SYSTEM, "first")
    with pytest.raises(PatchValueError, match="the active patch has entries"):
        if how == "named":
            model.absorb(SYSTEM, patch=first)
        elif how == "active":
            with model.patched(first):
                model.absorb(SYSTEM)
        else:
            PatchedModel.from_pretrained(tiny_llama_export, "cpu", patch=first).absorb(SYSTEM)
    random = with_prefix(patch_for(model.graph.folder), model.graph.folder, [1, 2])
    with pytest.raises(PatchValueError, match="adds with weights only"):
        model.absorb(SYSTEM, patch=random)


TEMPLATES = {
    "{{ raise_exception('no role') if messages[0].role == 'system' }}{{ messages[0].content }}": "no role",
    "{% for m in messages if m.role == 'user' %}<{{ m.content }}>{% endfor %}": "does not write the system message",
    "{% for m in messages | reverse %}<{{ m.content }}>{% endfor %}": "in front of every query",
    "{{ strftime_now('%d %B %Y') }}{% for m in messages %}<{{ m.content }}>{% endfor %}": "writes the date",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_cannot_carry_the_prompt_is_refused(model: PatchedModel, template: str) -> None:
    folder = model.graph.folder
    files = {name: folder.read(name) for name in TOKENIZER_FILES if name in folder.files}
    files["chat_template.jinja"] = template.encode()
    with pytest.raises(RequestError, match=TEMPLATES[template]):
        PatchedModel(model.graph, TextCodec.from_files(files, "here", "chat")).absorb(SYSTEM)


def test_a_template_with_a_default_system_message_is_served(model: PatchedModel) -> None:
    """Its default message is what the entries replace; without one, nothing is replaced."""
    folder = model.graph.folder
    files = {name: folder.read(name) for name in TOKENIZER_FILES if name in folder.files}
    body = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.content }}>{% endif %}{% endfor %}"
    own = "{{ '[' + messages[0].content + ']' if messages[0].role == 'system' else %s }}"
    for default, replaced in (("'[You are kind.]'", True), ("''", False)):
        files["chat_template.jinja"] = (own % default + body).encode()
        other = PatchedModel(model.graph, TextCodec.from_files(files, "here", "chat"))
        patch = other.absorb(SYSTEM)
        assert patch.prefix is not None and bool(patch.prefix.replaces) == replaced
        assert behind_the_prompt(other, patch, QUESTIONS[1]) < EXACT
