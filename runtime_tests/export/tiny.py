"""This module writes tiny random models with a tokenizer as Hugging Face folders, so no test downloads weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 320  # 3 special tokens, 256 bytes, and rows that no token uses, as in real models

_SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OWN = {
    "llama": {"hidden_size": 64},  # so that head_dim is hidden_size / heads, as optimum derives it; with 48 it is not
    "gemma2": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attn_logit_softcapping": 1.0,  # low enough to have an effect
        "final_logit_softcapping": 0.5,
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral": {"sliding_window": 8},
    "phi3": {"hidden_size": 64, "partial_rotary_factor": 0.5, "sliding_window": 8},
    "gpt2": {"hidden_size": 64, "num_key_value_heads": 4, "n_inner": 80},
    "gpt_neox": {"hidden_size": 64, "num_key_value_heads": 4, "rotary_pct": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {  # the middle layer has an ordinary MLP; routing weights are not normalised
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
}
# Block designs that share a model type with another design: each one's model type and different settings, by name.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "phi3 longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 256,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [9.0] * 4},
        },
    ),
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "qwen3_moe normalised": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": []}),
}


def tiny_model(folder: Path, design: str, *, chat: bool = True, seed: int = 0, **options: Any) -> Path:
    """Write a random model to `folder`, with weights large enough for every branch to have an effect.

    Args:
        folder: the folder to write.
        design: a model type, or one of VARIANTS.
        chat: whether the tokenizer has a chat template.
        seed: equal seeds give equal models.
        options: further settings of the architecture's config.
    """
    torch.manual_seed(seed)
    model_type, own = VARIANTS.get(design, (design, {}))
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **_OWN.get(model_type, {}), **own, **options})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
            elif "embed" not in name:
                weight.mul_(4)
    model.save_pretrained(folder)
    _write_tokenizer(folder, chat)
    return folder


def _write_tokenizer(folder: Path, chat: bool) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if not chat:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_input_names": ["input_ids", "attention_mask"],
        **({"chat_template": CHATML} if chat else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
