"""A source whose token ids cannot be those of transformers is refused, with the text or the token that differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime_tests.codecs import codec_of
from runtime_tests.export.source.tokenizer_folders import (
    BOS,
    CONFIG,
    MAP,
    NEOX,
    TEMPLATE,
    byte_level,
    folder_of,
    with_templates,
)
from runtime_tests.export.tiny import CHATML
from runtime_tests.runtime.text.test_codec import edit
from tp_export.source import compare_ids
from tp_export.source.tokenizer import effective_tokenizer
from tp_runtime.errors import ModelFormatError

REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "templates without a default": (
        lambda p: folder_of(p, byte_level(), chat_template={"tool_use": CHATML}),
        "none of them is the default; got tool_use",
    ),
    "a folder of templates that hides the only default": (
        lambda p: with_templates(folder_of(p, byte_level(), chat_template=CHATML), tool_use="no"),
        "none of them is the default; got tool_use",
    ),
    "a template with a lone surrogate": (
        lambda p: folder_of(p, byte_level(), chat_template="\ud800" + CHATML),
        "the file holds half of a surrogate pair",
    ),
    "special tokens split in text": (
        lambda p: folder_of(p, byte_level(), split_special_tokens=True),
        r"cannot give the token ids .*; got \[.*\] for 'a<\|endoftext\|>b.*; wanted \[",
    ),
    "ids at random": (lambda p: with_dropout(folder_of(p, byte_level())), "at random, .* got a dropout of 0.5"),
    "an added token under another id": (
        lambda p: folder_of(p, byte_level(), added_tokens_decoder={"300": {"content": "<tool>"}}),
        "'<tool>' has another id .*; got id 300; wanted id 259",
    ),
    "an added token without text": (
        lambda p: folder_of(p, byte_level(), added_tokens_decoder={"7": {}}),
        "has another id",
    ),
    "a class that transformers does not know": (
        lambda p: folder_of(p, byte_level(), tokenizer_class="Nonsense"),
        "transformers cannot load the tokenizer; got .*Nonsense",
    ),
    "a class in the folder's own code": (
        lambda p: folder_of(p, byte_level(), tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]}),
        "transformers cannot load the tokenizer; got .*custom code",
    ),
    "a class without a fast form": (
        lambda p: folder_of(p, byte_level(), tokenizer_class="ByT5Tokenizer"),
        "the tokenizer has no fast form; got ByT5Tokenizer",
    ),
    "a special token that is a number": (lambda p: folder_of(p, byte_level(), bos_token=1), "cannot load .*bos_token"),
    "a broken special_tokens_map.json": (
        lambda p: broken(folder_of(p, byte_level()), MAP),
        "transformers cannot load the tokenizer; got JSONDecodeError",
    ),
    "a broken tokenizer_config.json": (lambda p: broken(folder_of(p, byte_level()), CONFIG), f"{CONFIG}: .*not valid"),
    "a broken tokenizer.json": (lambda p: broken(folder_of(p, byte_level()), "tokenizer.json"), "cannot load"),
    "a broken template": (
        lambda p: broken(folder_of(p, byte_level()), TEMPLATE),
        r"source: the chat template is not valid Jinja",
    ),
    "an EOS that the model has no row for": (
        lambda p: with_end(folder_of(p, byte_level()), 320),
        "the EOS token is not in the model's vocabulary; got id 320; wanted an id below 320",
    ),
    "a BOS that the model has no row for": (
        lambda p: with_size(folder_of(p, byte_level(), bos_token="<new>"), 259),
        "the BOS token is not in the model's vocabulary; got id 259; wanted an id below 259",
    ),
}


def broken(folder: Path, name: str) -> Path:
    (folder / name).write_text("{%")
    return folder


def with_dropout(folder: Path) -> Path:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def with_end(folder: Path, index: int) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": index}))
    return folder


def with_size(folder: Path, size: int) -> Path:
    edit(folder, "config.json", vocab_size=size)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_cannot_be_matched_is_refused(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    source = make(tmp_path)
    with pytest.raises(ModelFormatError, match=message) as error:
        effective_tokenizer(source)
    assert str(source) in error.value.field and error.value.fix


def test_the_comparison_names_the_text_and_both_answers(tmp_path: Path) -> None:
    source = folder_of(tmp_path, byte_level(f"{BOS} $A"), **NEOX)
    difference = compare_ids(codec_of(source), source)
    assert difference is not None
    assert (difference.text, difference.got[:3]) == ("'What is a token?'", "[1,")
    assert str(difference) == f"'What is a token?' gives {difference.got}, and in transformers {difference.wanted}"
