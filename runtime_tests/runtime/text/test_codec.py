"""TextCodec on tokenizers that this module makes, and an error that names every bad input.

The tests in runtime_tests/export/parity compare its ids with those of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from runtime_tests.codecs import codec_of
from tp_runtime.errors import ModelFormatError, RequestError
from tp_runtime.text import TextCodec

CHATML = """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a tiny model<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else "") }}
    {{ message['content'] | trim }}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""


def save(folder: Path, tokenizer: Tokenizer, config: dict[str, Any], eos: object) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


def byte_level_folder(folder: Path, template: object = CHATML) -> Path:
    """Write a byte-level BPE tokenizer like SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the user and the assistant and the system, a token of the model\n"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(max_length=4)  # a setting left from training, which must not cut a prompt
    config = {
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken", "lstrip": False, "special": True},
        "extra_special_tokens": {"image_token": "<|image|>"},
        "additional_special_tokens": ["<|im_start|>"],
        "chat_template": template,
    }
    return save(folder, tokenizer, config, [0, 2])


def sentencepiece_folder(folder: Path) -> Path:
    """Write a byte-fallback BPE tokenizer like Gemma's."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    letters = [*"▁\n?.abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "th", "the", "▁the"]
    vocab = [*special, *(f"<0x{i:02X}>" for i in range(256)), *letters]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(vocab)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    config = {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "chat_template": GEMMA}
    return save(folder, tokenizer, config, 1)


@pytest.fixture
def chat(tmp_path: Path) -> TextCodec:
    return codec_of(sentencepiece_folder(tmp_path / "model"))


@pytest.fixture
def completion(tmp_path: Path) -> TextCodec:
    return codec_of(sentencepiece_folder(tmp_path / "model"), "completion")


def edit(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}), encoding="utf-8")


# ---- prompts


def test_a_string_is_one_user_message_and_the_system_message_comes_first(chat: TextCodec) -> None:
    user = {"role": "user", "content": "Why?"}
    assert chat.render("Why?") == chat.render([user])
    assert chat.render("Why?", "Be terse.") == chat.render([{"role": "system", "content": "Be terse."}, user])


def test_context_and_query_are_tokenised_separately(completion: TextCodec) -> None:
    query = completion.render(" the end")
    assert query[0] == completion.bos_id == 2
    for context in ("All of ", "All of \n", "All of \n\n\n"):
        ids = completion.render(" the end", context)
        assert ids[-len(query) + 1 :] == query[1:]
        assert completion.decode(ids) == "All of \n the end"
        assert ids.count(2) == 1


@pytest.mark.parametrize(
    ("prompt", "keywords", "field"),
    [
        ("", {}, "messages"),
        (" \n", {}, "messages"),
        ([], {}, "messages"),
        ([{"role": "user", "content": " "}], {}, "messages"),
        ([{"role": "user"}], {}, "messages[0].content"),
        ([{"content": "x"}], {}, "messages[0].role"),
        ([{"role": "user", "content": None}], {}, "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], {}, "messages[0].content"),
        (["x"], {}, "messages[0].role"),
        (3, {}, "messages"),
        ("x\ud800", {}, "messages"),
        ("x", {"system": 3}, "system"),
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "x"}], {"system": "b"}, "system"),
        ("x", {"system": "b", "raw": True}, "system"),
        ([{"role": "user", "content": "x"}], {"raw": True}, "messages"),
        ("", {"raw": True}, "messages"),
    ],
)
def test_a_bad_chat_prompt_is_refused(chat: TextCodec, prompt: Any, keywords: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as error:
        chat.render(prompt, **keywords)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("prompt", "system", "field"),
    [
        ("", None, "messages"),
        ("\n", "context", "messages"),
        ("x", "", "system"),
        ("x", "\n", "system"),
        ([{"role": "user", "content": "x"}], None, "messages"),
    ],
)
def test_a_bad_completion_prompt_is_refused(completion: TextCodec, prompt: Any, system: str | None, field: str) -> None:
    with pytest.raises(RequestError) as error:
        completion.render(prompt, system)
    assert error.value.field == field and error.value.fix


def test_the_error_of_a_template_contains_its_text(chat: TextCodec) -> None:
    with pytest.raises(RequestError, match="refuses this prompt: Conversation roles must alternate"):
        chat.render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ messages[0].missing.deeper }}", ModelFormatError),
        ("{{ 1 // 0 }}", ModelFormatError),
        ("", RequestError),  # the prompt would have no tokens
        ("{{ ''.__class__.__mro__ }}", ModelFormatError),
        ("{{ messages.append(1) }}", ModelFormatError),  # the sandbox is immutable
    ],
)
def test_a_template_that_fails_raises_an_error(tmp_path: Path, template: str, error: type[Exception]) -> None:
    codec = codec_of(byte_level_folder(tmp_path / "model", template))
    with pytest.raises(error):
        codec.render("x")


# ---- the folder


def test_end_tokens_are_the_union_of_all_configs(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model")
    (folder / "config.json").write_text('{"eos_token_id": 3}')
    codec = codec_of(folder)
    assert codec.eos_ids == {0, 2, 3}
    assert codec.bos_id == 0


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ([0], 7, {0, 2}),  # 7 is a letter, and generation_config.json says where a text ends
        ([0], [7, 3], {0, 2, 3}),  # 3 is a special token
        ([0, 7], 7, {0, 2, 7}),
        (7, 0, {0, 2, 7}),
        (None, 7, {2, 7}),  # generation_config.json names no end
        ([], 7, {2, 7}),
    ],
)
def test_an_ordinary_token_of_config_json_ends_no_text_that_generation_config_json_ends_elsewhere(
    tmp_path: Path, generation: object, config: object, wanted: set[int]
) -> None:
    folder = byte_level_folder(tmp_path / "model")
    edit(folder, "generation_config.json", eos_token_id=generation)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert codec_of(folder).eos_ids == wanted


def test_the_template_file_has_priority_and_a_list_uses_its_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = byte_level_folder(tmp_path / "model", named)
    assert codec_of(folder).decode(codec_of(folder).render("x")) == "yes"
    (folder / "chat_template.jinja").write_text("from the file")
    assert codec_of(folder).decode(codec_of(folder).render("x")) == "from the file"


def test_requests_with_tools_have_the_template_for_tools(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "{{ tools | length }}"}, {"name": "default", "template": "yes"}]
    codec = codec_of(byte_level_folder(tmp_path / "model", named))
    tool = {"type": "function", "function": {"name": "f"}}
    assert [codec.decode(codec.render("x", tools=tools)) for tools in (None, [], [tool])] == ["yes", "0", "1"]


def test_a_folder_without_a_template_is_completion_style(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model", None)
    assert codec_of(folder).style == "completion"
    with pytest.raises(ModelFormatError, match="no chat template"):
        codec_of(folder, "chat")
    with pytest.raises(RequestError, match="style"):
        codec_of(folder, "prose")  # type: ignore[arg-type]


CONFIG = "tokenizer_config.json"
BREAKS: dict[str, Callable[[Path], object]] = {
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "no config": lambda f: (f / CONFIG).unlink(),
    "truncated tokenizer": lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"'),
    "not a tokenizer": lambda f: (f / "tokenizer.json").write_text("{}"),
    "truncated config": lambda f: (f / CONFIG).write_text("{"),
    "config is a list": lambda f: (f / CONFIG).write_text("[]"),
    "config is not UTF-8": lambda f: (f / CONFIG).write_bytes(b"\xff"),
    "broken generation config": lambda f: (f / "generation_config.json").write_text("{"),
    "eos is text": lambda f: edit(f, "generation_config.json", eos_token_id="2"),
    "eos is a bool": lambda f: edit(f, "generation_config.json", eos_token_id=[True]),
    "bos is a number": lambda f: edit(f, CONFIG, bos_token=1),
    "bos is unknown": lambda f: edit(f, CONFIG, bos_token="<nowhere>"),
    "eos is unknown": lambda f: edit(f, CONFIG, eos_token="<nowhere>"),
    "special tokens are a string": lambda f: edit(f, CONFIG, additional_special_tokens="<a>"),
    "added token elsewhere": lambda f: edit(f, CONFIG, added_tokens_decoder={"5": {"content": "<|im_end|>"}}),
    "added token unknown": lambda f: edit(f, CONFIG, added_tokens_decoder={"5": {"content": "<new>"}}),
    "added tokens are a list": lambda f: edit(f, CONFIG, added_tokens_decoder=["<new>"]),
    "template is a number": lambda f: edit(f, CONFIG, chat_template=1),
    "template list without default": lambda f: edit(f, CONFIG, chat_template=[{"name": "a", "template": "b"}]),
    "tool template is a number": lambda f: edit(
        f, CONFIG, chat_template=[{"name": "tool_use", "template": 1}, {"name": "default", "template": "x"}]
    ),
    "template is not Jinja": lambda f: edit(f, CONFIG, chat_template="{% if %}"),
    "template file is not UTF-8": lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = byte_level_folder(tmp_path / "model")
    BREAKS[name](folder)
    with pytest.raises(ModelFormatError) as error:
        codec_of(folder)
    assert str(folder) in error.value.field
    assert error.value.got is not None and error.value.wanted and error.value.fix


def test_a_folder_without_an_end_token_is_refused(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model")
    edit(folder, CONFIG, eos_token=None)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ModelFormatError, match="no end-of-sequence token"):
        codec_of(folder)
