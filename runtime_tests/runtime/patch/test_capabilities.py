"""What a patch can do is said by its capabilities, and every refusal uses their words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.cli import Cli
from runtime_tests.patches import patch_for, random_config, random_patch
from runtime_tests.prefixes import with_prefix
from runtime_tests.runtime.patch.test_kv_prefix import arrays
from tp_runtime.errors import PatchTargetError, PatchValueError, RequestError, TPError
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Capabilities, KVPrefix, Patch

PREFIX = KVPrefix(arrays(), (1, 2), 5)
WEIGHTS = random_patch()
ENTRIES = Patch({}, random_config(name="facts", method="prefix"), PREFIX)
BOTH = Patch(WEIGHTS.deltas, WEIGHTS.config, PREFIX)

ALL = {
    "strength": "any",
    "sums": "with anything",
    "system": "allowed",
    "exports": "LoRA, control vector, ONNX adapter, merge",
    "precision": "any",
}
LESS = {
    "strength": "0 or 1",
    "sums": "with weights only",
    "system": "none: the entries stand where a system message or tools would be",
    "exports": "none: only weights travel to other formats",
    "precision": "any, but int8 and int4 at a cost",
}


@pytest.mark.parametrize(
    ("patch", "form", "words"),
    [
        (WEIGHTS, "weights", ALL),
        (random_patch(ranks=0), "weights", ALL),
        (WEIGHTS + random_patch(2), "weights", ALL),
        (ENTRIES, "entries", LESS),
        (BOTH, "weights and entries", LESS),
        (WEIGHTS + ENTRIES, "weights and entries", LESS),
        (0 * ENTRIES, "nothing", ALL),
    ],
)
def test_weights_can_do_more_than_entries(patch: Patch, form: str, words: dict[str, str]) -> None:
    assert patch.capabilities == Capabilities(form=form, **words)


@pytest.mark.parametrize("entries", [False, True])
def test_a_patch_of_a_quantised_base_runs_on_that_precision_only(entries: bool) -> None:
    config = random_config(precision="int4")
    patch = Patch(WEIGHTS.deltas, config, PREFIX if entries else None)
    assert patch.capabilities.precision == "int4 only"


def words_after(word: str) -> str:
    """Return the part of a capability that a refusal repeats: what follows "none: "."""
    return word.removeprefix("none: ")


@pytest.mark.parametrize(
    ("refused", "error", "field"),
    [
        (lambda: 0.5 * ENTRIES, PatchValueError, "strength"),
        (lambda: -BOTH, PatchValueError, "strength"),
        (lambda: ENTRIES + BOTH, PatchValueError, "sums"),
        (lambda: ENTRIES.require_weights_only("LoRA"), PatchTargetError, "exports"),
        (lambda: BOTH.require_weights_only("control vector"), PatchTargetError, "exports"),
    ],
)
def test_a_refusal_uses_the_words_of_the_capability(
    refused: Callable[[], Any], error: type[TPError], field: str
) -> None:
    with pytest.raises(error) as caught:
        refused()
    assert words_after(getattr(ENTRIES.capabilities, field)) in str(caught.value)
    assert "tp-export patch --method output" in caught.value.fix


def test_a_system_message_under_entries_is_refused_with_the_words_of_the_capability(model: PatchedModel) -> None:
    patch = with_prefix(patch_for(model.graph.folder), model.graph.folder, [1, 2])
    for request in ({"system": "Be brief."}, {"prompt": [{"role": "system", "content": "No."}]}):
        with pytest.raises(RequestError) as caught:
            model.generate(**{"prompt": "Hi", "patch": patch, **request})  # type: ignore[call-overload]
        assert words_after(patch.capabilities.system) in str(caught.value)
    weights = patch_for(model.graph.folder)
    assert weights.capabilities.system == "allowed"
    model.generate("Hi", patch=weights, system="Be brief.", max_new_tokens=1)


def test_entries_in_front_of_a_system_message_need_one(model: PatchedModel) -> None:
    folder = model.graph.folder
    start = model.codec.render("Hi", "Be brief.")[:3]
    patch = with_prefix(patch_for(folder), folder, start)
    assert patch.prefix is not None
    patch = replace(patch, prefix=replace(patch.prefix, before_system=True))
    assert patch.capabilities.system == "needed: the entries stand in front of a system message"
    for prompt in ("Hi", [{"role": "user", "content": "Hi"}]):
        with pytest.raises(RequestError, match="no system message, but the entries stand in front of a system message"):
            model.generate(prompt, patch=patch)
    asked = {"patch": patch, "max_new_tokens": 2}
    first = model.generate("Hi", system="Be brief.", **asked)
    assert model.generate([{"role": "system", "content": "Be brief."}, *said("Hi")], **asked) == first
    # A raw prompt says with its ids what it has.
    with pytest.raises(RequestError, match="the prompt does not start as the patch's KV prefix requires"):
        model.generate("no such beginning", raw=True, **asked)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(("patch", "words"), [(WEIGHTS, ALL), (ENTRIES, LESS), (BOTH, LESS)])
def test_inspect_prints_the_capabilities(cli: Cli, tmp_path: Path, patch: Patch, words: dict[str, str]) -> None:
    file = tmp_path / "p.safetensors"
    patch.save(file)
    wanted = {"form": patch.capabilities.form, **words}
    assert cli("inspect", file, "--json").json["capabilities"] == wanted
    rows = dict(line.split("  ", 1) for line in cli("inspect", file).out.splitlines())
    shown = {name: value.strip() for name, value in rows.items()}
    assert {name: shown["precisions" if name == "precision" else name] for name in wanted} == wanted


@pytest.mark.parametrize("dtype", ["f16", "i8"])
def test_inspect_shows_the_bytes_and_the_dtype_of_the_file(cli: Cli, tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "p.safetensors"
    BOTH.save(file, dtype)
    found = cli("inspect", file, "--json").json
    assert (found["bytes"], found["dtype"]) == (file.stat().st_size, dtype)
    assert f"({file.stat().st_size} bytes), {dtype}\n" in cli("inspect", file).out
