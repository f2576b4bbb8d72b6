"""Attention behind entries, on every block design: behind a cached beginning, a model answers as with all of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from runtime_tests.export.tiny import VARIANTS, tiny_model
from runtime_tests.logits import token_ids
from tp_export.decoder import Heads, TorchPrefix, attending, cached_prompt, layer_windows
from tp_export.decoder.adapters import ADAPTERS
from tp_export.decoder.kv_prefix import positions
from tp_export.source import load_model, open_source

WINDOW = 8
BEGINNING = token_ids(23, seed=1)  # both it and the text are longer than the window
TEXTS = [token_ids(19, seed=2), token_ids(12, seed=3), token_ids(19, seed=4)]
# The window of each layer, by the design's family.
WINDOWS = {
    "gemma2": (WINDOW, None, WINDOW),
    "gemma3_text": (WINDOW, None, WINDOW),
    "mistral": (WINDOW,) * 3,
    "phi3": (WINDOW,) * 3,
}


@pytest.fixture(scope="module", params=[*ADAPTERS, *VARIANTS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The name of a design, and a model of that design."""
    folder = tmp_path_factory.mktemp("design")
    return request.param, load_model(open_source(tiny_model(folder, request.param)))


@pytest.fixture(scope="module")
def model(case: tuple[str, Any]) -> Any:
    return case[1]


@pytest.fixture(scope="module")
def cached(model: Any) -> TorchPrefix:
    """All keys and values of the beginning."""
    return cached_prompt(model, BEGINNING, (5,))


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@torch.no_grad()
def whole(model: Any, text: list[int]) -> Tensor:
    """Return the logits [T, vocab] of the text, by transformers' own run of the whole prompt."""
    return model(torch.tensor([[*BEGINNING, *text]]), use_cache=False).logits[0, len(BEGINNING) :]


@torch.no_grad()
def behind(model: Any, prefix: TorchPrefix, text: list[int]) -> Tensor:
    ids = torch.tensor([text])
    with prefix.before(model):
        return model(ids, **prefix.model_inputs(ids)).logits[0]


def test_the_text_behind_the_cache_has_the_logits_of_the_whole_prompt(model: Any, cached: TorchPrefix) -> None:
    assert cached.counts == (len(BEGINNING),) * 3 and cached.position == len(BEGINNING)
    for text in TEXTS:
        assert close(behind(model, cached, text), whole(model, text))
        with torch.no_grad():
            alone = model(torch.tensor([text]), use_cache=False).logits[0]
        assert not close(alone, whole(model, text))


def test_windows_are_those_of_the_layers(case: tuple[str, Any]) -> None:
    design, model = case
    assert layer_windows(model) == WINDOWS.get(design.partition(" ")[0], (None,) * 3)


def test_counts_may_differ_between_layers(model: Any, cached: TorchPrefix) -> None:
    """Windowed layers can do without the entries that the window hides from the first token of the text."""
    windows = layer_windows(model)
    fewer = [
        (keys, values) if window is None else (keys[:, 1 - window :], values[:, 1 - window :])
        for (keys, values), window in zip(cached.entries, windows, strict=True)
    ]
    assert close(behind(model, replace(cached, entries=fewer), TEXTS[0]), whole(model, TEXTS[0]))
    for layer, (keys, values) in enumerate(fewer):  # every one of the others counts
        less = [*fewer[:layer], (keys[:, 1:], values[:, 1:]), *fewer[layer + 1 :]]
        assert not close(behind(model, replace(cached, entries=less), TEXTS[0]), whole(model, TEXTS[0]))


@torch.no_grad()
def test_rows_padded_on_the_left_run_in_steps_on_a_growing_cache(model: Any, cached: TorchPrefix) -> None:
    longest = max(map(len, TEXTS))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in TEXTS])
    valid = torch.tensor([[False] * (longest - len(text)) + [True] * len(text) for text in TEXTS])
    places = cached.position + (valid.cumsum(1) - 1).clamp(min=0)
    cache, parts = DynamicCache(), []
    for start, end in ((0, 11), (11, 12), (12, 13), (13, longest)):
        with cached.before(model, valid=valid[:, :end]):
            out = model(ids[:, start:end], position_ids=places[:, start:end], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
    for found, text in zip(torch.cat(parts, 1), TEXTS, strict=True):
        assert close(found[longest - len(text) :], whole(model, text))


@torch.no_grad()
def test_rows_padded_on_the_right_need_no_mask(model: Any, cached: TorchPrefix) -> None:
    longest = max(map(len, TEXTS))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in TEXTS])
    with cached.before(model):
        logits = model(ids, **cached.model_inputs(ids)).logits
    for found, text in zip(logits, TEXTS, strict=True):
        assert close(found[: len(text)], whole(model, text))


@torch.no_grad()
def test_without_entries_the_model_computes_what_it_does_by_itself(model: Any) -> None:
    ids = torch.tensor([BEGINNING])
    wanted = model(ids, use_cache=False).logits
    for entries in (None, [None] * 3):
        with attending(model, entries):
            assert close(model(ids, position_ids=positions(ids, 0), use_cache=False).logits, wanted)


@torch.no_grad()
def test_observers_get_the_heads_of_every_layer(model: Any, cached: TorchPrefix) -> None:
    seen: dict[int, Heads] = {}
    outputs: dict[int, Tensor] = {}
    ids = torch.tensor([TEXTS[0]])
    with attending(model, cached.entries, before=seen.__setitem__, after=outputs.__setitem__):
        model(ids, **cached.model_inputs(ids))
    assert list(seen) == list(outputs) == [0, 1, 2]
    kv_heads, _n, size = cached.entries[0][0].shape
    for layer, heads in seen.items():
        assert heads.query.shape == (1, 4, 19, size) and heads.key.shape == (1, kv_heads, 19, size)
        assert outputs[layer].shape == (1, 19, 4, size)


class OnPurpose(Exception):
    pass


def test_the_model_is_as_before_afterwards_even_after_an_error(model: Any, cached: TorchPrefix) -> None:
    before = model.config._attn_implementation

    def fail(_layer: int, _heads: Heads) -> None:
        raise OnPurpose

    ids = torch.tensor([TEXTS[0]])
    with pytest.raises(OnPurpose), attending(model, cached.entries, before=fail), torch.no_grad():
        model(ids, **cached.model_inputs(ids))
    assert model.config._attn_implementation == before
    assert close(behind(model, cached, TEXTS[0]), whole(model, TEXTS[0]))


def test_contexts_may_be_nested(model: Any, cached: TorchPrefix) -> None:
    few = replace(cached, entries=[(keys[:, -2:], values[:, -2:]) for keys, values in cached.entries])
    own, wanted, windows = behind(model, few, TEXTS[1]), whole(model, TEXTS[1]), layer_windows(model)
    ids = torch.tensor([TEXTS[1]])
    with cached.before(model), torch.no_grad():
        assert torch.equal(behind(model, few, TEXTS[1]), own) and layer_windows(model) == windows
        assert close(model(ids, **cached.model_inputs(ids)).logits[0], wanted)
    assert not close(own, wanted)


def test_the_entries_of_a_patch_are_those_of_the_cache(model: Any, cached: TorchPrefix) -> None:
    patch = cached.numpy()
    assert (patch.replaces, patch.position, patch.counts) == ((5,), len(BEGINNING), (len(BEGINNING),) * 3)
    for layer, (keys, values) in enumerate(cached.entries):
        for part, own in (("key", keys), ("value", values)):
            assert torch.equal(torch.tensor(patch.entries[layer, part]).transpose(0, 1), own)
