"""Hugging Face folders that have a tokenizer and no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from runtime_tests.export.tiny import SPECIAL

PAD, BOS, EOS = SPECIAL
CONFIG, MAP, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
NEOX = {"tokenizer_class": "GPTNeoXTokenizer"}


def folder_of(parent: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Write a Hugging Face folder without weights; an entry of the config that is None is left out."""
    folder = parent / "source"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    kept = {name: value for name, value in {**named, **config}.items() if value is not None}
    (folder / CONFIG).write_text(json.dumps(kept))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320, "eos_token_id": 2}))
    return folder


def byte_level(post: str | None = None, prefix: bool = False, extra: AddedToken | None = None) -> Tokenizer:
    """Return a tokenizer of bytes, whose post-processor is given as the template of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if post is not None:
        special = [(token, SPECIAL.index(token)) for token in post.split() if token in SPECIAL]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=special)
    if extra is not None:
        tokenizer.add_tokens([extra])
    return tokenizer


def with_templates(folder: Path, **templates: str) -> Path:
    (folder / "additional_chat_templates").mkdir()
    for name, template in templates.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    return folder
