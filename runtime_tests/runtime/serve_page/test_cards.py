"""What /v1/models says beyond OpenAI's form. These tests need no browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastapi.testclient import TestClient

from runtime_tests.patches import patch_for
from runtime_tests.prefixes import with_prefix
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.serve import ServerSettings, create_app

URL = "http://127.0.0.1"  # the server is called by this name alone


def test_the_model_says_what_a_token_costs_and_how_it_is_asked(
    tiny_llama_export: Path, tiny_gemma_export: Path
) -> None:
    for export, style, cache in ((tiny_llama_export, "chat", 2**20), (tiny_gemma_export, "completion", 0)):
        model = PatchedModel.from_pretrained(export, "cpu", prefix_cache_bytes=cache)
        with TestClient(create_app(model, ServerSettings(max_tokens=7)), base_url=URL) as client:
            own, *patches = client.get("/v1/models").json()["data"]
        folder = model.graph.folder
        one_token = 2 * folder.layers * folder.kv.heads * folder.kv.head_dim * folder.kv.numpy_dtype.itemsize
        assert "patch" not in own and not patches
        assert own["model"] == {
            "style": style,
            "precision": folder.precision,
            "context_window": folder.context_window,
            "max_tokens": 7,
            "kv_bytes_per_token": one_token,
            "keeps_prompts": cache > 0,
        }


def test_a_patch_says_its_entries_its_report_and_the_digest_of_its_context(tiny_llama_export: Path) -> None:
    model = PatchedModel.from_pretrained(tiny_llama_export, "cpu")
    weights = patch_for(model.graph.folder)
    reported = Patch(weights.deltas, replace(weights.config, report={"gap_closed": 0.5}, context_digest=""))
    model.load_patch(reported, "weights")
    model.load_patch(with_prefix(weights, model.graph.folder, [1, 2], entries=5), "entries")
    with TestClient(create_app(model, ServerSettings()), base_url=URL) as client:
        cards = {card["id"]: card.get("patch") for card in client.get("/v1/models").json()["data"]}
    assert cards["weights"]["entries"] is None and cards["weights"]["report"] == {"gap_closed": 0.5}
    assert cards["weights"]["context_digest"] is None
    assert cards["entries"]["entries"] == {"mean": 5.0, "replaces": 2} and cards["entries"]["report"] is None
    assert cards["entries"]["context_digest"] == weights.config.context_digest
