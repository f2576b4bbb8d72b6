"""Hostile values in every place of `patch_slots.json`: it is read, or an error names the value."""

from __future__ import annotations

import json
from pathlib import Path

from runtime_tests.folders import fill
from runtime_tests.hostile import check_error, some_variants
from tp_runtime.errors import ModelError
from tp_runtime.session.description import SLOTS_FILE, parse_description


def test_any_hostile_value_in_the_description_parses_or_raises_a_model_error(tmp_path: Path) -> None:
    document = json.loads((fill(tmp_path / "model") / SLOTS_FILE).read_text())
    document["default_patch"] = {"name": "a", "identity": "0" * 64, "terms": [["0" * 64, 1.0]], "repair": False}
    parse_description(json.dumps(document).encode())
    for what, text in some_variants(document, 800):
        try:
            parse_description(text.encode())
        except ModelError as error:
            check_error(error, what)
