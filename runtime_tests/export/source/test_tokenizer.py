"""A source's token ids are those of transformers, whatever changes them, and its export's files give the same ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from runtime_tests.codecs import codec_of
from runtime_tests.export.source.tokenizer_folders import (
    BOS,
    CONFIG,
    EOS,
    MAP,
    NEOX,
    PAD,
    TEMPLATE,
    byte_level,
    folder_of,
    with_templates,
)
from runtime_tests.export.tiny import CHATML, SPECIAL
from runtime_tests.runtime.text.test_codec import byte_level_folder, sentencepiece_folder
from tp_export.source import EffectiveTokenizer, compare_ids
from tp_export.source.tokenizer import effective_tokenizer
from tp_runtime.errors import ModelFormatError

TEXTS = ["hi", "a <tool>b", "a<new>b", " two  spaces\n", "漢字 e\u0301 👩‍👩‍👧", f"x{EOS} {BOS}y", "<unk> <s>"]


def unigram(scheme: str) -> Tokenizer:
    """Return a tokenizer like a SentencePiece one, which puts ▁ before words as the scheme says."""
    letters = [(c, -3.0 - i / 50) for i, c in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFG.,!?0123456789")]
    vocab = [*((token, 0.0) for token in SPECIAL), ("▁", -2.0), ("▁the", -2.5), *letters]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_pieces() -> Tokenizer:
    pieces = [*SPECIAL, "[UNK]", *"abcdefg", *(f"##{c}" for c in "abcdefg"), "what"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def added(text: str, **flags: bool) -> dict[str, Any]:
    off = dict.fromkeys(("special", "lstrip", "rstrip", "normalized", "single_word"), False)
    return {"259": {"content": text, **off, **flags}}


def exported(source: Path, effective: EffectiveTokenizer, out: Path) -> Path:
    """Write what an export of the source would hold beside its graph."""
    out.mkdir()
    for name, content in effective.files.items():
        (out / name).write_bytes(content)
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


def same_everywhere(source: Path, out: Path) -> EffectiveTokenizer:
    """Check that the source's codec, its export's codec and transformers on both agree; return the tokenizer."""
    effective = effective_tokenizer(source)
    folder = exported(source, effective, out)
    codec = codec_of(folder, effective.codec.style)
    wanted, again = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        full = wanted(text)["input_ids"]
        assert again(text)["input_ids"] == full
        ids = codec.render(text, raw=True)
        assert ids == effective.codec.render(text, raw=True)
        # An EOS after the prompt would end the text that the model continues.
        assert ids == full[: len(ids)] and full[len(ids) :] in ([], [wanted.eos_token_id])
        for skip in (True, False):
            decoded = wanted.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert codec.decode(ids, skip) == decoded
        if codec.style == "chat":
            chat = [{"role": "user", "content": text}]
            rendered = wanted.apply_chat_template(chat, add_generation_prompt=True)
            assert again.apply_chat_template(chat, add_generation_prompt=True) == rendered == codec.render(text)
    assert again.special_tokens_map == wanted.special_tokens_map
    assert compare_ids(codec, folder) is None
    return effective


# -- ids that earlier versions got wrong ---------------------------------------------------------------------

LLAMA = {"tokenizer_class": "LlamaTokenizer", "unk_token": PAD}
GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
TOOL = AddedToken("<tool>", normalized=False)
OTHER_IDS: dict[str, Callable[[Path], Path]] = {
    "no BOS in the config of LlamaTokenizer": lambda p: folder_of(
        p, byte_level(f"{BOS} $A"), **LLAMA, add_bos_token=False
    ),
    "BOS by the config of LlamaTokenizer only": lambda p: folder_of(p, byte_level(), **LLAMA, add_bos_token=True),
    "BOS by the config of GPTNeoXTokenizer only": lambda p: folder_of(p, byte_level(), **NEOX, add_bos_token=True),
    "BOS by the post-processor of GPTNeoXTokenizer only": lambda p: folder_of(p, byte_level(f"{BOS} $A"), **NEOX),
    "prefix space in the config only": lambda p: folder_of(p, byte_level(), **GPT2, add_prefix_space=True),
    "prefix space in tokenizer.json only": lambda p: folder_of(p, byte_level(prefix=True), **GPT2),
    "added token special and stripping in the config only": lambda p: folder_of(
        p, byte_level(extra=AddedToken("<tool>")), added_tokens_decoder=added("<tool>", special=True, lstrip=True)
    ),
    "additional special token in the config only": lambda p: folder_of(
        p, byte_level(), additional_special_tokens=["<new>"]
    ),
    "BOS and EOS in special_tokens_map.json only": lambda p: with_map(
        folder_of(
            p,
            byte_level(),
            bos_token=None,
            eos_token=None,
            pad_token=None,
            chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        ),
        {"bos_token": BOS, "eos_token": EOS},
    ),
    "BOS and EOS by the config of GPTNeoXTokenizer": lambda p: folder_of(
        p, byte_level(), **NEOX, add_bos_token=True, add_eos_token=True
    ),
    "class default for the unknown token": lambda p: folder_of(p, byte_level(), tokenizer_class="LlamaTokenizer"),
    "class default for BOS": lambda p: folder_of(p, byte_level(), **LLAMA, bos_token=None, chat_template=CHATML),
    "no class, so that config.json decides": lambda p: folder_of(p, byte_level(), tokenizer_class=None),
    "rstrip in the config only": lambda p: folder_of(
        p, byte_level(extra=TOOL), added_tokens_decoder=added("<tool>", rstrip=True)
    ),
    "single_word in the config only": lambda p: folder_of(
        p, byte_level(extra=TOOL), added_tokens_decoder=added("<tool>", single_word=True)
    ),
    "unknown padding token": lambda p: folder_of(p, byte_level(), pad_token="<new>"),
    "token named for templates only": lambda p: folder_of(
        p, byte_level(), extra_special_tokens={"tool_token": "<tool>"}, chat_template="{{ tool_token }}" + CHATML
    ),
    "Unigram with the post-processor of LlamaTokenizer": lambda p: folder_of(p, unigram("always"), **LLAMA),
    "another file for this version of transformers": lambda p: with_version(
        folder_of(p, byte_level(), fast_tokenizer_files=["tokenizer.4.0.0.json", "tokenizer.json"])
    ),
    "a template in a folder only": lambda p: with_templates(folder_of(p, byte_level()), default=CHATML),
    "a template in a folder that hides another": lambda p: with_templates(
        folder_of(p, byte_level(), chat_template="other"), default=CHATML
    ),
}


def with_map(folder: Path, tokens: dict[str, Any]) -> Path:
    (folder / MAP).write_text(json.dumps(tokens))
    return folder


def with_version(folder: Path) -> Path:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(folder / "tokenizer.4.0.0.json"))
    return folder


@pytest.mark.parametrize("name", OTHER_IDS)
def test_ids_that_tokenizer_json_alone_does_not_give_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    source = OTHER_IDS[name](tmp_path)
    effective = same_everywhere(source, tmp_path / "export")
    before = codec_of(source)
    assert before.style != effective.codec.style or compare_ids(before, source) is not None
    assert effective.reason is not None and "transformers" in effective.reason
    parsed = json.loads((source / "tokenizer.json").read_text())
    text = {"style": before.style, "template": before.template_source, "tokenizer": parsed}
    assert effective.digest_text_before == text
    assert effective.digest_text != text


# -- ids that are as before ----------------------------------------------------------------------------------

HEALTHY: dict[str, Callable[[Path], Path]] = {
    "completion": lambda p: folder_of(p, byte_level()),
    "BOS and EOS by the post-processor": lambda p: folder_of(p, byte_level(f"{BOS} $A {EOS}")),
    "two tokens before a text": lambda p: folder_of(p, byte_level(f"{BOS} {PAD} $A")),
    "BOS by the template and by the post-processor": lambda p: folder_of(
        p, byte_level(f"{BOS} $A"), chat_template="{{ bos_token }}" + CHATML
    ),
    "templates by name": lambda p: folder_of(
        p,
        byte_level(),
        chat_template=[{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}],
    ),
    "prefix space in both files": lambda p: folder_of(p, byte_level(prefix=True), add_prefix_space=True),
    "flags in both files": lambda p: folder_of(
        p,
        byte_level(extra=AddedToken("<tool>", lstrip=True, single_word=True, normalized=False)),
        added_tokens_decoder=added("<tool>", lstrip=True, single_word=True),
    ),
    "clean-up of decoded text": lambda p: folder_of(p, byte_level(), clean_up_tokenization_spaces=True),
    "a short model_max_length": lambda p: folder_of(p, byte_level(), model_max_length=2),
    "Unigram, ▁ always": lambda p: folder_of(p, unigram("always")),
    "Unigram, ▁ first": lambda p: folder_of(p, unigram("first"), chat_template=CHATML),
    "Unigram, ▁ never": lambda p: folder_of(p, unigram("never")),
    "WordPiece": lambda p: folder_of(p, word_pieces()),
    "a template that refuses system messages": lambda p: folder_of(
        p,
        byte_level(),
        chat_template="{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML,
    ),
    "a template with the time": lambda p: folder_of(
        p, byte_level(), chat_template="{{ strftime_now('%f') | length }}" + CHATML
    ),
    "byte-level with truncation": lambda p: with_config(byte_level_folder(p / "source")),
    "byte fallback": lambda p: with_config(sentencepiece_folder(p / "source")),
}


def with_config(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    return folder


@pytest.mark.parametrize("name", HEALTHY)
def test_a_source_that_earlier_versions_read_right_keeps_its_files_and_its_digest(name: str, tmp_path: Path) -> None:
    source = HEALTHY[name](tmp_path)
    effective = effective_tokenizer(source)
    assert compare_ids(effective.codec, exported(source, effective, tmp_path / "export")) is None
    assert all((source / file).read_bytes() == content for file, content in effective.files.items())
    codec, parsed = codec_of(source), json.loads((source / "tokenizer.json").read_text())
    assert effective.digest_text == {"style": codec.style, "template": codec.template_source, "tokenizer": parsed}
    assert effective.reason is None and effective.digest_text_before is None


def test_special_tokens_that_change_no_id_do_not_change_the_digest(tmp_path: Path) -> None:
    """The export still names them, so that other programs find them."""
    source = with_map(folder_of(tmp_path, byte_level(), bos_token=None), {"bos_token": BOS})
    effective = same_everywhere(source, tmp_path / "export")
    assert json.loads(effective.files[CONFIG])["bos_token"] == BOS
    assert effective.codec.bos_id == SPECIAL.index(BOS)
    assert effective.reason is None
    assert effective.digest_text["tokenizer"] == json.loads((source / "tokenizer.json").read_text())


def test_a_special_tokens_map_that_transformers_ignores_does_not_contradict_the_export(tmp_path: Path) -> None:
    tokens = {str(i): {"content": token, "special": True} for i, token in enumerate(SPECIAL)}
    source = with_map(folder_of(tmp_path, byte_level(), added_tokens_decoder=tokens), {"eos_token": PAD})
    effective = same_everywhere(source, tmp_path / "export")
    assert json.loads(effective.files[MAP])["eos_token"] == EOS


@pytest.mark.parametrize("layout", ["dict", "added token", "empty BOS", "unknown EOS"])
def test_what_the_edge_reader_refuses_and_transformers_accepts_is_written_as_the_edge_reads_it(
    layout: str, tmp_path: Path
) -> None:
    options: dict[str, dict[str, Any]] = {
        "dict": {"chat_template": {"tool_use": "no", "default": CHATML}},
        "added token": {"added_tokens_decoder": added("<tool>")},
        "empty BOS": {"bos_token": ""},
        "unknown EOS": {"eos_token": "<new>"},
    }
    source = folder_of(tmp_path, byte_level(), **options[layout])
    with pytest.raises(ModelFormatError):
        codec_of(source)
    effective = same_everywhere(source, tmp_path / "export")
    assert effective.before is None and effective.reason is None
    if layout == "dict":
        assert effective.codec.template_source == CHATML


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("layout", ["list", "dict", "folder"])
def test_a_template_for_tools_is_exported_and_used_for_requests_with_tools(layout: str, tmp_path: Path) -> None:
    template = "{{ tools[0].function.name }}" + CHATML
    if layout == "folder":
        source = with_templates(folder_of(tmp_path, byte_level()), tool_use=template)
        (source / TEMPLATE).write_text(CHATML)
    else:
        named: Any = {"tool_use": template, "default": CHATML}
        if layout == "list":
            named = [{"name": name, "template": text} for name, text in named.items()]
        source = folder_of(tmp_path, byte_level(), chat_template=named)
    effective = same_everywhere(source, tmp_path / "export")
    assert effective.reason is None and effective.codec.template_source == CHATML
    chat = [{"role": "user", "content": "x"}]
    codec, wanted = codec_of(tmp_path / "export"), AutoTokenizer.from_pretrained(source)
    for tools in (None, TOOLS):
        want = wanted.apply_chat_template(chat, tools=tools, add_generation_prompt=True)
        assert codec.render(chat, tools=tools) == want
    assert codec.render(chat) != codec.render(chat, tools=TOOLS)
