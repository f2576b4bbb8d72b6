"""`tp-runtime generate`: its output, its options and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime_tests.cli import Cli
from runtime_tests.committed import private_copy, with_settings
from runtime_tests.patches import patch_for
from tp_runtime.model import PatchedModel
from tp_runtime.patch import Patch
from tp_runtime.session import DEFAULT_FILE, ModelFolder

SHORT = ("--max-new-tokens", "12", "--device", "cpu")


@pytest.fixture(scope="module")
def files(tiny_llama_export: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, where = ModelFolder.open(tiny_llama_export), tmp_path_factory.mktemp("patches")
    for seed in (1, 2):
        patch_for(folder, seed, rank=3, scale=0.3).save(where / f"{seed}.safetensors")
    return where / "1.safetensors", where / "2.safetensors"


@pytest.fixture(scope="module")
def model(tiny_llama_export: Path) -> PatchedModel:
    return PatchedModel.from_pretrained(tiny_llama_export, "cpu")


def test_only_the_text_is_printed_on_stdout(cli: Cli, tiny_llama_export: Path, model: PatchedModel) -> None:
    result = cli("generate", tiny_llama_export, "hello", *SHORT)
    assert result.code == 0
    assert result.out == model.generate("hello", max_new_tokens=12) + "\n"
    assert result.err == "stopped after 12 tokens: --max-new-tokens\n"


def test_several_patches_are_added(
    cli: Cli, tiny_llama_export: Path, model: PatchedModel, files: tuple[Path, Path]
) -> None:
    one, two = map(Patch.load, files)
    result = cli("generate", tiny_llama_export, "hello", *SHORT, "--patch", f"{files[0]}@0.5", "--patch", files[1])
    assert result.out == model.generate("hello", max_new_tokens=12, patch=0.5 * one + two) + "\n"
    assert result.out != model.generate("hello", max_new_tokens=12) + "\n"


def test_json_contains_the_text_and_its_timings(cli: Cli, tiny_llama_export: Path, files: tuple[Path, Path]) -> None:
    result = cli("generate", tiny_llama_export, "hello", *SHORT, "--json", "--patch", f"{files[0]}@-0.5")
    report = result.json
    assert set(report) == {
        "text",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "patches",
        "device",
        "provider",
        "seconds_to_first_token",
        "ms_per_token",
    }
    assert report["completion_tokens"] == 12
    assert report["finish_reason"] == "length"
    assert (report["device"], report["provider"]) == ("cpu", "CPUExecutionProvider")
    assert report["patches"] == [{"name": "random-1", "identity": Patch.load(files[0]).identity, "strength": -0.5}]
    assert report["seconds_to_first_token"] > 0
    assert report["ms_per_token"] > 0
    assert result.err == ""


def test_one_token_has_no_time_per_token(cli: Cli, tiny_llama_export: Path) -> None:
    report = cli("generate", tiny_llama_export, "hi", "--max-new-tokens", "1", "--device", "cpu", "--json").json
    assert report["ms_per_token"] is None


def test_text_and_options_reach_the_model(cli: Cli, tiny_llama_export: Path, model: PatchedModel) -> None:
    sampled = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.5, "repetition_penalty": 1.1, "seed": 7}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sampled.items()]
    result = cli("generate", tiny_llama_export, "-", *SHORT, "--system", "Be brief.", *flags, typed="a\nb\n")
    assert result.out == model.generate("a\nb", system="Be brief.", max_new_tokens=12, **sampled) + "\n"


def test_raw_text_and_stop_strings_reach_the_model(cli: Cli, tiny_llama_export: Path, model: PatchedModel) -> None:
    whole = model.generate("x", raw=True, max_new_tokens=12)
    stop = whole[3:5]
    result = cli("generate", tiny_llama_export, "x", "--raw", *SHORT, "--stop", stop, "--stop", "never there")
    assert result.out == whole[: whole.index(stop)] + "\n"
    assert result.err == ""


@pytest.mark.parametrize("expected", [True, False])
def test_auto_warns_in_one_line_that_it_runs_on_the_cpu_only_where_cuda_was_expected(
    cli: Cli, tiny_llama_export: Path, monkeypatch: pytest.MonkeyPatch, expected: bool
) -> None:
    monkeypatch.setattr("tp_runtime.opening.cuda_is_expected", lambda: expected)
    result = cli("generate", tiny_llama_export, "hi", "--max-new-tokens", "1", "--json")
    if result.json["device"] == "cpu" and expected:
        assert result.err.startswith("warning: running on the CPU: ")
        assert result.err.count("\n") == 1
    else:
        assert result.err == ""


def test_a_folders_own_patch_is_used_and_named(cli: Cli, tiny_llama_patched: Path) -> None:
    patch = Patch.load(tiny_llama_patched / DEFAULT_FILE)
    own = cli("generate", tiny_llama_patched, "hello", *SHORT, "--json").json
    base = cli("generate", tiny_llama_patched, "hello", *SHORT, "--json", "--patch", "none").json
    assert own["patches"] == [{"name": "random-1", "identity": patch.identity, "strength": 1.0}]
    assert base["patches"] == []
    assert own["text"] != base["text"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["  "], "the prompt is empty"),
        (["-"], "the prompt is empty"),
        (["hi", "--temperature", "nan"], "temperature"),
        (["hi", "--top-k", "-1"], "top_k"),
        (["hi", "--top-p", "0"], "top_p"),
        (["hi", "--min-p", "1"], "min_p"),
        (["hi", "--repetition-penalty", "0"], "repetition_penalty"),
        (["hi", "--seed", "-1"], "seed"),
        (["hi", "--max-new-tokens", "0"], "max_new_tokens"),
        (["hi", "--stop", ""], "stop"),
        (["hi", "--threads", "0"], "threads"),
        (["hi", "--threads", "100000"], "threads"),
        (["hi", "--raw", "--system", "x"], "system"),
        (["x" * 100_000], "context window"),
        (["\udcff"], "not valid Unicode"),
        (["hi", "--patch", "nothing.safetensors"], "no such file"),
        (["hi", "--device", "cuda"], "CUDA was asked for"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    cli: Cli, tiny_llama_export: Path, args: list[str], message: str
) -> None:
    device = [] if "--device" in args else ["--device", "cpu"]
    result = cli("generate", tiny_llama_export, *args, *device)
    if "--device" in args and result.code == 0:
        pytest.skip("this machine has CUDA")
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_a_patch_of_another_base_is_refused(cli: Cli, tiny_gemma_export: Path, files: tuple[Path, Path]) -> None:
    result = cli("generate", tiny_gemma_export, "hi", *SHORT, "--patch", files[0])
    assert result.code == 2
    assert "another base model" in result.err


def test_several_answers_share_a_command(cli: Cli, tiny_llama_export: Path, model: PatchedModel) -> None:
    sampled = ("--temperature", "1.5", "--seed", "3")
    result = cli("generate", tiny_llama_export, "hello", *SHORT, *sampled, "-n", "2")
    answers = model.complete("hello", n=2, temperature=1.5, seed=3, max_new_tokens=12)
    assert result.out == answers[0].text + "\n\n---\n\n" + answers[1].text + "\n"
    report = cli("generate", tiny_llama_export, "hello", *SHORT, *sampled, "-n", "2", "--json").json
    assert [one["text"] for one in report["answers"]] == [answer.text for answer in answers]


def test_json_has_the_logprobs_that_were_asked_for(cli: Cli, tiny_llama_export: Path) -> None:
    report = cli("generate", tiny_llama_export, "hi", *SHORT, "--json", "--logprobs", "2", "--logit-bias", "5=100").json
    assert len(report["logprobs"]) == 12
    first = report["logprobs"][0]
    assert first["token"] == 5 and set(first) == {"token", "text", "logprob", "top"} and len(first["top"]) == 2


def test_settings_that_are_not_given_are_the_models_own(
    cli: Cli, tiny_llama_export: Path, model: PatchedModel, tmp_path: Path
) -> None:
    greedy = cli("generate", tiny_llama_export, "hello", *SHORT, "--sampling", "model")
    assert greedy.out == model.generate("hello", max_new_tokens=12) + "\n"  # the tiny model states none
    folder = private_copy("tiny-llama", tmp_path)
    with_settings(folder, "generation_config.json", do_sample=True, temperature=0.7, top_k=20)
    sampling = PatchedModel.from_pretrained(folder, "cpu")
    own = sampling.generate("hello", max_new_tokens=12, sampling="model", seed=3)
    assert own != model.generate("hello", max_new_tokens=12)
    assert cli("generate", folder, "hello", *SHORT, "--sampling", "model", "--seed", "3").out == own + "\n"


def test_template_arguments_and_tools_are_files_and_json(cli: Cli, tmp_path: Path) -> None:
    folder = private_copy("tiny-llama", tmp_path)
    template = "{{ messages[0].content }} {{ tools | tojson }} {{ enable_thinking }}"
    with_settings(folder, "tokenizer_config.json", chat_template=template)
    model = PatchedModel.from_pretrained(folder, "cpu")
    tools = [{"type": "function", "function": {"name": "look"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    both = ("--tools", tmp_path / "tools.json", "--template-arg", "enable_thinking=false")
    for given, args in (({"tools": tools, "template_args": {"enable_thinking": False}}, both), ({}, ())):
        wanted = model.complete("hello", max_new_tokens=12, **given)
        result = cli("generate", folder, "hello", *SHORT, "--json", *args).json
        assert (result["text"], result["prompt_tokens"]) == (wanted.text, wanted.usage.prompt_tokens)
    assert wanted.usage.prompt_tokens != len(model.codec.render("hello", tools=tools))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tools", "{folder}"], "--tools: the path is not a regular file"),
        (["--tools", "{bad}"], "--tools: the text is not valid JSON"),
        (["--json-schema", "{binary}"], "--json-schema: the file is not text"),
        (["--template-arg", "x"], "--template-arg x: the text is not valid JSON"),
        (["--logit-bias", "5"], "logit_bias: the value is not ID=BIAS"),
        (["--logit-bias", "5=101"], "logit_bias[5]: the bias is not valid"),
        (["--tool-choice", "required"], "tool_choice: the request has no tools to call"),
        (["-n", "0"], "n: the value is not a positive integer"),
        (["--lookup", "-1"], "lookup: the value is not a number of tokens"),
        (["--json", "--logprobs", "-1"], "logprobs: the value is not a number of tokens"),
    ],
)
def test_bad_forms_are_one_line_and_exit_code_2(
    cli: Cli, tiny_llama_export: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    (tmp_path / "bad").write_text("{")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    places = {name: tmp_path / name for name in ("bad", "binary")} | {"folder": tmp_path}
    result = cli("generate", tiny_llama_export, "hi", *(arg.format(**places) for arg in args), "--device", "cpu")
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
    assert message in result.err
