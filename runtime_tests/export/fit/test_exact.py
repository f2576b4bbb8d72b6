"""The reference test of correctness: exact token-dependent patches give the student the logits of the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_tests.export.tiny import VARIANTS, tiny_model
from tp_export.decoder import adapter_for, blocks_of
from tp_export.decoder.adapters import ADAPTERS
from tp_export.fit import verify
from tp_export.fit.exact import Token
from tp_export.source import Source, load_model, open_source

WINDOW = 32  # the window of sliding layers, wide enough for the last token to attend to the context
CHAT = (
    ("You are a pirate.", "Tell me about bees."),
    ("Answer in French.", "What is the capital of Italy?"),
    ("You are a rude robot. Answer with one word.", "How do I boil an egg?"),
    ("The office manager is Mrs. Okafor. The office closes at six.", "Who is the office manager?"),
    ("Write only in capital letters.", "Why is the sky blue?"),
)
COMPLETION = (
    ("dog: chien\ncat: chat\nhouse: maison", "tree:"),
    ("3 # 4 = 7\n5 # 2 = 7\n8 # 1 = 9", "6 # 3 ="),
    ("This is a story about a brave mouse.", "Once upon a time"),
    ("def add(a, b):\n    return a + b", "def sub(a, b):"),
    ("Paris is in France. Rome is in Italy.", "Berlin is in"),
)


def prompts(source: Source, context: str, query: str) -> tuple[list[int], list[int]]:
    return source.codec.render(query, context), source.codec.render(query)


@pytest.mark.parametrize("design", [*ADAPTERS, *VARIANTS])
def test_every_adapter_is_exact_on_a_tiny_model(design: str, tmp_path: Path) -> None:
    source = open_source(tiny_model(tmp_path, design, sliding_window=WINDOW))
    tokens = verify(load_model(source), *prompts(source, "Be brief.", "Why?"), 6)
    assert min(token.unpatched_logit_error for token in tokens) > 1e-2
    assert all(token.teacher == token.student for token in tokens)
    assert max(token.max_logit_error for token in tokens) < 1e-3
    assert len(tokens[0].residual_errors) == 3
    assert max(max(token.residual_errors) for token in tokens) < 1e-4


@pytest.mark.parametrize(
    ("model_type", "wrong"),
    [
        ("llama", {"mlp_norm": "input_layernorm"}),
        ("gemma3_text", {"mlp_norm": "input_layernorm"}),
        ("gemma3_text", {"mlp_norm": "post_attention_layernorm"}),
        ("gemma3_text", {"post_norm": None}),
        ("phi3", {"reads_z": {}}),
        ("gpt2", {"mlp_norm": "ln_1"}),
        ("gpt2", {"reads_z": {}}),
        ("gpt_neox", {"parallel": None}),
        ("gpt_neox", {"attention": "input_layernorm"}),
        ("mixtral", {"router": "experts.0.w1"}),
        ("mixtral", {"reads_z": {"gate": "w1"}}),
        ("qwen3_moe", {"mlp_norm": "input_layernorm"}),
    ],
)
def test_a_wrong_site_is_detected(model_type: str, wrong: dict[str, Any], tmp_path: Path) -> None:
    source = open_source(tiny_model(tmp_path, model_type, sliding_window=WINDOW))
    model = load_model(source)
    blocks = blocks_of(model, replace(adapter_for(model_type), **wrong))
    tokens = verify(model, *prompts(source, "Be brief.", "Why?"), 3, blocks=blocks)
    assert max(token.max_logit_error for token in tokens) > 1e-2


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.2)])
def test_post_norm_scales_near_zero_do_not_spoil_the_patch(dtype: str, bound: float, tiny_gemma: Path) -> None:
    """Real Gemma models have coordinates with a post-norm scale near zero, and a patch must not depend on them."""
    source = open_source(tiny_gemma)
    model = load_model(source, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in blocks_of(model):
            scale = torch.randn(model.config.hidden_size, generator=g)
            scale[:4] *= 1e-3
            block.post_norm.weight.copy_(scale - 1)
    tokens = verify(model, *prompts(source, "1+1=2", "2+3="), 4)
    assert max(max(token.residual_errors) for token in tokens) < bound


def test_the_weights_are_restored(tiny_gemma: Path) -> None:
    source = open_source(tiny_gemma)
    model = load_model(source)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    verify(model, *prompts(source, "Be brief.", "Why?"), 2)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def verified_tokens(folder: Path, pairs: tuple[tuple[str, str], ...], new_tokens: int = 20) -> list[Token]:
    source = open_source(folder)
    model = load_model(source)
    return [token for context, query in pairs for token in verify(model, *prompts(source, context, query), new_tokens)]


@pytest.mark.real_model
@pytest.mark.parametrize(("name", "pairs"), [("smollm2", CHAT), ("gemma3", COMPLETION)])
def test_100_of_100_tokens_agree_on_a_real_model(
    name: str, pairs: tuple[tuple[str, str], ...], request: pytest.FixtureRequest
) -> None:
    tokens = verified_tokens(request.getfixturevalue(name), pairs)
    assert len(tokens) == 100
    assert sum(token.teacher == token.student for token in tokens) == 100
    assert max(token.max_logit_error for token in tokens) < 1e-3


@pytest.mark.real_model
def test_a_wrong_site_is_detected_on_smollm2(smollm2: Path) -> None:
    source = open_source(smollm2)
    model = load_model(source)
    blocks = blocks_of(model, replace(adapter_for("llama"), mlp_norm="input_layernorm"))
    tokens = verify(model, *prompts(source, *CHAT[0]), 2, blocks=blocks)
    assert max(token.max_logit_error for token in tokens) > 1
