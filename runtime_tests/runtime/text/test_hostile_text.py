"""Templates and tokenizers that fail in every way: the error is a ModelFormatError or a RequestError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.codecs import codec_of
from runtime_tests.hostile import check_error, some_variants
from runtime_tests.runtime.text.test_codec import byte_level_folder
from tp_runtime.errors import ModelFormatError, RequestError, TPError
from tp_runtime.text import TextCodec

# -- templates -----------------------------------------------------------------------------------------------

NO_TEMPLATE = {
    "nested too deep for the parser": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested too deep for Python": "{% for i in [1] %}" * 40 + "x" + "{% endfor %}" * 40,
    "too many terms": "{{ " + "+".join(["1"] * 5000) + " }}",
    "a break outside a loop": "{% break %}",
    "an unknown filter": "{{ 1 | nothing }}",
    "an open string": "{{ '",
}
RENDERS_NOTHING = {
    "a power of powers": "{{ 10 ** 9999 ** 9 }}",
    "a text of 10 GB": "{{ 'a' * 10 ** 10 }}",
    "a list of 10 GB": "{{ ([0] * 10 ** 10) | length }}",
    "a long loop": "{% for i in range(10 ** 12) %}{% endfor %}",
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "text for placeholders": "{{ lipsum(n=10 ** 9) }}",
    "a long text": "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "a macro that calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a block that shows itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "another template": "{% include 'x' %}",
    "half a surrogate pair": r"{{ '\ud800' }}",
    "a time in no form": "{{ strftime_now(3) }}",
    "JSON of no value": "{{ namespace() | tojson }}",
    "a refusal without a reason": "{{ raise_exception() }}",
}


@pytest.mark.parametrize("name", NO_TEMPLATE)
def test_a_template_that_cannot_be_compiled_is_refused_when_the_folder_is_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelFormatError, match="the chat template is not valid Jinja; got ") as caught:
        codec_of(byte_level_folder(tmp_path / "model", NO_TEMPLATE[name]))
    check_error(caught.value, name)


@pytest.mark.parametrize("name", RENDERS_NOTHING)
def test_a_template_that_can_render_no_prompt_is_a_fault_of_the_model(tmp_path: Path, name: str) -> None:
    codec = codec_of(byte_level_folder(tmp_path / "model", RENDERS_NOTHING[name]))
    with pytest.raises(ModelFormatError, match="the chat template cannot render any prompt: ") as caught:
        codec.render("hi")
    check_error(caught.value, name)


def test_a_template_that_cannot_render_these_messages_is_a_fault_of_the_request(tmp_path: Path) -> None:
    codec = codec_of(byte_level_folder(tmp_path / "model", "{{ 1 // (messages[0].content != 'no') }}"))
    assert codec.decode(codec.render("yes")) == "1"
    with pytest.raises(RequestError, match="cannot render this prompt: ZeroDivisionError"):
        codec.render("no")


def test_the_variables_of_a_loop_are_those_of_jinja2(tmp_path: Path) -> None:
    """The loops are counted through an iterator, which has no length of its own."""
    loop = "{% for c in 'abc' if c != 'b' %}{{ c }}{{ loop.index }}{{ loop.length }}{{ loop.last }}{{ loop.revindex }} "
    template = loop + "{% else %}none{% endfor %}{% for x in nothing %}{% else %}none{% endfor %}"
    codec = codec_of(byte_level_folder(tmp_path / "model", template))
    for _ in range(2):
        assert codec.decode(codec.render("x")) == "a12False2 c22True1 none"


@pytest.mark.parametrize(
    ("argument", "reason"),
    [("{'a': [1]}", r"\{'a': \[1\]\}"), (r"'\x1b[2J\nerror: b'", r"\\x1b\[2J error: b$"), (r"'\ud800'", r"\\ud800$")],
)
def test_a_refusal_with_any_value_is_one_printable_line(tmp_path: Path, argument: str, reason: str) -> None:
    codec = codec_of(byte_level_folder(tmp_path / "model", f"{{{{ raise_exception({argument}) }}}}"))
    with pytest.raises(RequestError, match=f"refuses this prompt: {reason}") as caught:
        codec.render("hi")
    assert str(caught.value).isprintable()


def test_half_a_surrogate_pair_in_a_message_is_a_fault_of_the_request(tmp_path: Path) -> None:
    codec = codec_of(byte_level_folder(tmp_path / "model"))
    for message in ({"role": "user", "content": "\ud800"}, {"role": "\ud800", "content": "x"}):
        with pytest.raises(RequestError, match="not valid Unicode"):
            codec.render([message])
    with pytest.raises(RequestError, match="system: the text is not valid Unicode"):
        codec.render("hi", system="\ud800")


# -- tokenizers ----------------------------------------------------------------------------------------------

WORDS = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}


def codec_with(folder: Path, **parts: Any) -> TextCodec:
    """Return the codec of a tokenizer with these parts; the others are left out."""
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    tokenizer = {"version": "1.0", "added_tokens": [], **dict.fromkeys(names), "model": WORDS, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    return codec_of(folder)


def test_a_panic_of_tokenizers_while_it_reads_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json: the file is not a tokenizer; got PanicException: "):
        codec_with(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})


def test_a_panic_of_tokenizers_on_every_text_is_an_error_when_the_folder_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="the tokenizer cannot encode text; got PanicException: "):
        codec_with(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8AAAAA"})


def test_a_tokenizer_that_fails_on_some_text_is_an_error_of_the_model(tmp_path: Path) -> None:
    codec = codec_with(tmp_path, model={"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]})
    assert codec.render("a") == [0]
    with pytest.raises(ModelFormatError, match="the tokenizer cannot encode the text; got Exception: "):
        codec.render("b")


def test_a_panic_of_tokenizers_while_it_decodes_is_an_error(tmp_path: Path) -> None:
    codec = codec_with(tmp_path, decoder={"type": "Strip", "content": "a", "start": 9, "stop": 9})
    with pytest.raises(ModelFormatError, match="the tokenizer cannot decode the ids; got PanicException: "):
        codec.decode([0])


@pytest.mark.parametrize("ids", [[-1], [2**32], [10**5000], ["a"], [1.5], None, 5])
def test_a_value_that_is_no_list_of_ids_is_refused(tmp_path: Path, ids: Any) -> None:
    with pytest.raises(RequestError, match="ids: the value is not a list of token ids"):
        codec_with(tmp_path).decode(ids)


def test_an_id_past_the_vocabulary_has_no_text(tmp_path: Path) -> None:
    assert codec_with(tmp_path).decode([0, 2**32 - 1]) == "a"


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_any_hostile_value_in_a_tokenizer_file_opens_or_raises_an_error(tmp_path: Path, name: str) -> None:
    folder = byte_level_folder(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": [{"name": "default", "template": "x"}], "additional_special_tokens": ["<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for what, text in some_variants(json.loads((folder / name).read_text()), 150):
        (folder / name).write_text(text, encoding="utf-8")
        try:
            codec = codec_of(folder)
            codec.decode(codec.render("hi é", "system"))
        except TPError as error:
            check_error(error, what)
