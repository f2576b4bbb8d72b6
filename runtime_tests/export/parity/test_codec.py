"""The edge half compared with transformers: the ids and the text of TextCodec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime_tests.codecs import codec_of
from runtime_tests.runtime.text.test_codec import byte_level_folder, sentencepiece_folder

# This template uses everything that transformers offers beyond plain Jinja.
EVERYTHING = """{% set ns = namespace(n=0) %}
    {% for message in messages %}
        {% if message.role == 'tool' %}{% continue %}{% endif %}
        {% generation %}{{ message.content }}{% endgeneration %}
        {% set ns.n = ns.n + 1 %}
    {% endfor %}
{{ messages[0] | tojson }}{{ {'é<': 1} | tojson(indent=2) }}{{ ns.n }}{{ strftime_now('%Y') }}
{% if tools is not none or documents is not none %}tools{% endif %}
{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ image_token }}
{{ additional_special_tokens }}"""

CONVERSATIONS = [
    [{"role": "user", "content": "What is a token?"}],
    [{"role": "user", "content": "  漢字 👩‍👩‍👧 e\u0301 \n\n trailing  "}],
    [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Why?"}],
    [
        {"role": "user", "content": "one <|im_end|> <bos>"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
]

FOLDERS = [byte_level_folder, sentencepiece_folder]


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path / "model")


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_ids_equal_those_of_transformers(folder: Path, messages: list[Any], add_generation_prompt: bool) -> None:
    reference = AutoTokenizer.from_pretrained(str(folder))
    codec = codec_of(folder)
    assert codec.style == "chat"
    want = reference.apply_chat_template(messages, tokenize=True, add_generation_prompt=add_generation_prompt)
    assert codec.render(messages, add_generation_prompt=add_generation_prompt) == want
    assert codec.decode(want) == reference.decode(want, skip_special_tokens=True)
    assert codec.decode(want, skip_special_tokens=False) == reference.decode(want)


def test_everything_a_template_may_use_is_supported(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "model", EVERYTHING)
    reference = AutoTokenizer.from_pretrained(str(folder))
    messages = [{"role": "user", "content": "é <b>", "name": "x"}, {"role": "tool", "content": "skipped"}]
    messages.append({"role": "user", "content": "end"})
    want = reference.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    assert codec_of(folder).render(messages) == want


@pytest.mark.parametrize("text", ["What is the token?", " two  spaces\n", "漢字 👩‍👩‍👧 e\u0301"])
def test_raw_ids_equal_those_of_transformers(folder: Path, text: str) -> None:
    reference = AutoTokenizer.from_pretrained(str(folder))
    codec = codec_of(folder)
    want = reference(text)["input_ids"]
    if want[-1] == reference.convert_tokens_to_ids("<eos>"):
        want = want[:-1]  # an EOS after the prompt would end the text that the model continues
    assert codec.render(text, raw=True) == want
    assert codec_of(folder, "completion").render(text) == want
    assert codec.decode(want) == text
