"""The config of a patch: what it accepts, and an error that names every bad key and value."""

from __future__ import annotations

import math

import pytest

from runtime_tests.patches import DIGEST, random_config
from tp_runtime.errors import PatchFormatError, PatchVersionError
from tp_runtime.patch import PatchConfig


def test_config_round_trip():
    config = random_config(context="line\nline")
    assert PatchConfig.from_dict(config.to_dict()) == config
    bare = PatchConfig("n", "vector", "b", DIGEST, "A", "fp32", "")
    assert PatchConfig.from_dict(bare.to_dict()) == bare
    assert "probe" not in bare.to_dict()


@pytest.mark.parametrize("where", ["top", "calibration", "probe"])
def test_an_unknown_config_key_is_refused(where):
    data = random_config().to_dict()
    (data if where == "top" else data[where])["learned"] = 1
    with pytest.raises(PatchVersionError, match=r"unknown key.*'learned'"):
        PatchConfig.from_dict(data)


def test_an_unknown_method_is_refused():
    with pytest.raises(PatchVersionError, match=r"config\.method.*'magic'.*vector \| output"):
        random_config(method="magic")


@pytest.mark.parametrize(
    "key", ["name", "method", "base_model", "base_digest", "architecture", "precision", "context_digest"]
)
def test_a_missing_config_key_is_refused(key):
    data = random_config().to_dict()
    del data[key]
    with pytest.raises(PatchFormatError, match=f"lacks a key.*wanted {key}"):
        PatchConfig.from_dict(data)


PROBE = {"token_ids": [1], "top1": [2], "top1_logits": [0.5], "logsumexp": [1.0]}
COUNTS = {"queries": 1, "rows": 2, "max_new_tokens": 3, "holdout": 0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 1),
        ("name", ""),
        ("name", "a\x1b[31mred"),
        ("name", "\ud800"),
        ("method", None),
        ("base_digest", "abc"),
        ("base_digest", "A" * 64),
        ("context_digest", "abc"),
        ("context_digest", None),
        ("precision", 32),
        ("context", ["text"]),
        ("ridge", "1"),
        ("ridge", True),
        ("ridge", math.nan),
        ("ridge", -1.0),
        ("ridge", 10**400),
        ("calibration", []),
        ("calibration", {**COUNTS, "rows": 1.5}),
        ("calibration", {**COUNTS, "rows": -1}),
        ("calibration", {"rows": 1}),
        ("fidelity", 0.9),
        ("fidelity", {"kl": "low"}),
        ("fidelity", {"kl": math.inf}),
        ("fidelity", {1: 0.5}),
        ("report", 0.9),
        ("report", {"kl": "low"}),
        ("report", {"kl": math.nan}),
        ("report", {str(i): 0.0 for i in range(65)}),
        ("licence", 2),
        ("created", "yesterday"),
        ("created", "2025-01-31T12:00:00"),
        ("created", "2025-01-31T12:00:00+02:00"),
        ("probe", [1, 2]),
        ("probe", {"token_ids": [1]}),
        ("probe", {**PROBE, "top1": 2}),
        ("probe", {**PROBE, "top1": [2.0]}),
        ("probe", {**PROBE, "top1": [2, 3]}),
        ("probe", {**PROBE, "logsumexp": [math.nan]}),
        ("probe", {name: [] for name in PROBE}),
    ],
)
def test_a_bad_config_value_is_refused(key, value):
    with pytest.raises(PatchFormatError, match=rf"config\.{key}.*got.*wanted.*Fix"):
        random_config(**{key: value})
