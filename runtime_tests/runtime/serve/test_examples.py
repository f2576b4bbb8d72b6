"""The examples of docs/server.md run: the script of the `openai` client, the curl command, and the tables' claims."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from runtime_tests.pages import examples, page
from tp_runtime.cli import serve as command
from tp_runtime.serve.failures import _MEANINGS

from .conftest import CHAT, Running

PAGE = page("server.md")


def test_the_script_of_the_openai_client_runs(served: Running, capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = examples(PAGE)
    exec(compile(script.replace("http://127.0.0.1:8000", served.url), "docs/server.md", "exec"), {})
    assert "['tiny-llama', 'french', 'pirate']" in capsys.readouterr().out


def test_the_curl_command_is_a_request(served: Running) -> None:
    (found,) = re.findall(r"^    (curl .*?'\{.*?\}')$", PAGE, re.DOTALL | re.MULTILINE)
    words = shlex.split(found.replace("\\\n", " "))
    name, _colon, value = words[words.index("-H") + 1].partition(": ")
    path = words[1].removeprefix("http://127.0.0.1:8000")
    with served.http() as http:
        response = http.post(path, content=words[words.index("-d") + 1], headers={name: value})
    assert response.status_code == 200, response.text


def test_the_table_of_errors_has_every_status() -> None:
    assert {int(status) for status in re.findall(r"^\| (\d{3}) \|", PAGE, re.MULTILINE)} == _MEANINGS.keys() - {405}


def test_the_options_and_metrics_that_the_page_names_exist(served: Running) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    options = parser._subparsers._group_actions[0].choices["serve"]._option_string_actions  # type: ignore[union-attr, index]
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.split("## Under load")[0]))
    assert named <= set(options), named - set(options)
    with served.http() as http:
        http.post("/v1/chat/completions", json=CHAT)
        text = http.get("/metrics").text
    for metric in re.findall(r"`(tp_\w+)`", PAGE):
        assert f"{metric}" in text, metric


def test_the_example_of_an_error_has_the_fields_of_one(served: Running) -> None:
    with served.http() as http:
        error = http.post("/v1/chat/completions", json={**CHAT, "model": "nobody"}).json()["error"]
    shown = PAGE.split('{"error": ')[1].split("}}")[0] + "}"
    shown = json.loads(shown)
    assert list(error) == list(shown)
    for field in ("type", "param", "code", "field", "got", "fix"):
        assert error[field] == shown[field]
