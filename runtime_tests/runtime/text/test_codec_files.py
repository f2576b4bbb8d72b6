"""A codec is made of bytes by name: no file is opened, and a name without bytes does not exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime_tests.committed import FIXTURES
from tp_runtime.errors import ModelFormatError
from tp_runtime.text import TOKENIZER_FILES, TextCodec

MODEL = FIXTURES / "tiny-llama"
PROMPT = [{"role": "user", "content": "Hi there"}]


@pytest.fixture
def files() -> dict[str, bytes]:
    return {name: (MODEL / name).read_bytes() for name in TOKENIZER_FILES if (MODEL / name).exists()}


@pytest.fixture
def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_files_on_the_disk_are_not_read(files: dict[str, bytes], folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 'evil' }}")
    codec = TextCodec.from_files(files, str(folder))
    assert codec.template_source != "{{ 'evil' }}"


@pytest.mark.parametrize("name", TOKENIZER_FILES[:2])
def test_a_name_without_bytes_does_not_exist(files: dict[str, bytes], name: str) -> None:
    del files[name]
    with pytest.raises(ModelFormatError, match="the file is missing") as caught:
        TextCodec.from_files(files, "folder of the model")
    assert caught.value.field == str(Path("folder of the model") / name)


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_bytes_that_cannot_be_parsed_are_an_error_that_names_the_file(files: dict[str, bytes], name: str) -> None:
    with pytest.raises(ModelFormatError) as caught:
        TextCodec.from_files({**files, name: b"\xff"}, "m")
    assert caught.value.field == str(Path("m") / name)


def test_a_template_with_other_ends_of_lines_is_the_same_template(files: dict[str, bytes]) -> None:
    template = "{% for message in messages %}\n{{ message['content'] }}\n{% endfor %}"
    unix, windows = (
        TextCodec.from_files({**files, "chat_template.jinja": text.encode()}, "m")
        for text in (template, template.replace("\n", "\r\n"))
    )
    assert unix.template_source == windows.template_source and unix.render(PROMPT) == windows.render(PROMPT)


@pytest.mark.parametrize(
    ("stated", "taken"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"temperature": 0.2, "top_p": 0.9, "top_k": None}, {"temperature": 0.2, "top_k": 50, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 64, "min_p": 0.1}, {"temperature": 1.0, "top_k": 64, "min_p": 0.1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_the_models_own_sampling_is_that_of_transformers(
    files: dict[str, bytes], stated: dict[str, object], taken: dict[str, object]
) -> None:
    files["generation_config.json"] = json.dumps({"eos_token_id": 1, **stated}).encode()
    assert TextCodec.from_files(files, "m").sampling == taken


@pytest.mark.parametrize("setting", [{"temperature": "hot"}, {"top_k": True}, {"do_sample": True, "top_p": [1]}])
def test_a_sampling_setting_that_is_no_number_is_refused(files: dict[str, bytes], setting: dict[str, object]) -> None:
    files["generation_config.json"] = json.dumps({"eos_token_id": 1, **setting}).encode()
    with pytest.raises(ModelFormatError, match="is not a number"):
        TextCodec.from_files(files, "m")
