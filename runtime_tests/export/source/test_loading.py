"""A base is loaded with its own weights, every one of them, or refused; in memory and with its layers on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from runtime_tests.export.tiny import tiny_model
from runtime_tests.export.torch_logits import torch_logits
from runtime_tests.logits import furthest, token_ids
from tp_export.cli import main
from tp_export.decoder.adapters import ADAPTERS
from tp_export.source import load_model, open_source
from tp_runtime.errors import ModelFormatError

IDS = token_ids(12)
Weights = dict[str, Tensor]

both = pytest.mark.parametrize("offload", [False, True], ids=["memory", "disk"])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "src", "llama")


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> Path:
    """Change the tensors of a folder."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors")
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    """Change config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new, 1): value for name, value in weights.items()}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: value for name, value in weights.items()}


def plus(name: str, value: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: value}


def loads_as_transformers(folder: Path, offload: bool) -> bool:
    """Return whether the model computes what transformers computes, to the last bit."""
    model = load_model(open_source(folder), offload=offload)
    attention = model.config._attn_implementation  # eager for Gemma 2, whose soft caps transformers' default ignores
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return furthest(torch_logits(model, IDS), torch_logits(reference, IDS)) == 0


# -- names -----------------------------------------------------------------------------------------------------

QUERY = "model.layers.1.self_attn.q_proj.weight"
INCOMPLETE: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
    "no head, and the embeddings are not tied": ("missing from its files: lm_head.weight", without("lm_head.weight")),
    "one projection missing": (f"missing from its files: {QUERY}", without(QUERY)),
    "a layer missing": ("layers.2", lambda w: {n: v for n, v in w.items() if ".layers.2." not in n}),
    "a layer too many": (
        "no weights of the model: model.layers.3.input_layernorm.weight",
        lambda w: {**w, **{n.replace(".2.", ".3."): v for n, v in w.items() if ".layers.2." in n}},
    ),
    "saved from a compiled model": ("21 and|missing from its files", prefixed("_orig_mod.")),
    "saved from DataParallel": ("module.lm_head.weight", prefixed("module.")),
    "the language model of a multimodal one": ("language_model.lm_head.weight", prefixed("language_model.")),
    "an unmerged adapter": ("q_proj.base_layer.weight", renamed("q_proj.weight", "q_proj.base_layer.weight")),
    "a classifier": ("score.weight", lambda w: plus("score.weight", torch.ones(2, 64))(without("lm_head.weight")(w))),
    "a value head beside the model": ("no weights of the model: v_head.weight", plus("v_head.weight", torch.ones(3))),
    "biases that the config does not have": (
        "no weights of the model: model.layers.0.mlp.up_proj.bias",
        plus("model.layers.0.mlp.up_proj.bias", torch.ones(80)),
    ),
    "scales of a quantised cache": (
        "no weights of the model: model.layers.0.self_attn.k_proj.k_scale",
        plus("model.layers.0.self_attn.k_proj.k_scale", torch.ones(1)),
    ),
    "no tensor at all": ("hold no tensors", lambda w: {}),
}


@both
@pytest.mark.parametrize("fault", INCOMPLETE)
def test_files_that_do_not_hold_exactly_the_weights_are_refused_by_name(fault: str, offload: bool, llama: Path) -> None:
    text, change = INCOMPLETE[fault]
    rewrite(llama, change)
    with pytest.raises(ModelFormatError, match=text):
        load_model(open_source(llama), offload=offload)


@both
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_hidden_layers": 5}, "missing from its files: model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, "no weights of the model: model.layers.2.input_layernorm.weight"),
        ({"attention_bias": True}, "missing from its files: model.layers.0.self_attn.k_proj.bias"),
        ({"vocab_size": 321}, r"shape that config.json gives it; got \[320, 64\]; wanted \[321, 64\]"),
        ({"intermediate_size": 40}, "shape that config.json gives it"),
        ({"num_key_value_heads": 4}, "shape that config.json gives it"),
        ({"hidden_size": "big"}, "transformers cannot load the model"),
        ({"num_attention_heads": 0}, "transformers cannot load the model"),
        ({"rope_scaling": {"rope_type": "no such type", "factor": 2.0}}, "transformers cannot load the model"),
    ],
    ids=str,
)
def test_a_config_that_describes_another_model_is_refused(
    changes: dict[str, Any], text: str, offload: bool, llama: Path
) -> None:
    with pytest.raises(ModelFormatError, match=text):
        load_model(open_source(configure(llama, **changes)), offload=offload)


def test_the_message_names_few_weights_and_counts_the_rest(llama: Path) -> None:
    rewrite(llama, prefixed("module."))
    with pytest.raises(ModelFormatError) as caught:
        load_model(open_source(llama))
    assert "and 26 more; got 30 of 30 weights missing, 30 of 30 tensors left over" in str(caught.value)
    assert len(str(caught.value)) < 700


@both
@pytest.mark.parametrize("design", ADAPTERS)
def test_every_architecture_loads_as_in_transformers(design: str, offload: bool, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "src", design)
    assert loads_as_transformers(folder, offload)
    model = load_model(open_source(folder))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters(remove_duplicate=False)}


@both
def test_names_that_transformers_drops_on_purpose_are_dropped(offload: bool, tmp_path: Path) -> None:
    """These are the frequencies of old Llama files, and the masks of old GPT-2 and GPT-NeoX files, as integers too."""
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    assert loads_as_transformers(rewrite(tiny_model(tmp_path / "llama", "llama"), lambda w: w | frequencies), offload)
    mask, low = torch.ones(1, 1, 512, 512, dtype=torch.uint8), torch.tensor(-1e4)
    gpt2 = {f"transformer.h.{i}.attn.bias": mask for i in range(3)} | {"transformer.h.0.attn.masked_bias": low}
    assert loads_as_transformers(rewrite(tiny_model(tmp_path / "gpt2", "gpt2"), lambda w: w | gpt2), offload)
    neox = {"gpt_neox.layers.0.attention.bias": mask, "gpt_neox.layers.0.attention.masked_bias": low}
    folder = rewrite(tiny_model(tmp_path / "neox", "gpt_neox"), lambda w: w | neox)
    assert loads_as_transformers(folder, offload)


# -- tied weights ----------------------------------------------------------------------------------------------


@both
def test_a_model_without_its_head_loads_if_the_head_is_tied(offload: bool, tmp_path: Path) -> None:
    """GPT-2's own files have no `transformer.` in their names, and masks besides."""
    folder = tiny_model(tmp_path / "gpt2", "gpt2")
    whole = torch_logits(load_model(open_source(folder)), IDS)
    rewrite(folder, renamed("transformer.", ""))
    rewrite(folder, plus("h.0.attn.bias", torch.ones(1, 1, 512, 512)))
    assert furthest(torch_logits(load_model(open_source(folder), offload=offload), IDS), whole) == 0
    untied = rewrite(tiny_model(tmp_path / "llama", "llama"), without("lm_head.weight"))
    rewrite(untied, renamed("model.", ""))
    with pytest.raises(ModelFormatError, match=r"missing from its files: lm_head.weight; got 1 of"):
        load_model(open_source(untied), offload=offload)


@both
def test_a_tied_weight_may_have_either_name_or_both(offload: bool, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "src", "llama", tie_word_embeddings=True)
    wanted = torch_logits(load_model(open_source(folder)), IDS)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, plus("lm_head.weight", embedding))
    assert furthest(torch_logits(load_model(open_source(folder), offload=offload), IDS), wanted) == 0
    rewrite(folder, without("model.embed_tokens.weight"))
    assert furthest(torch_logits(load_model(open_source(folder), offload=offload), IDS), wanted) == 0


@both
def test_a_head_that_differs_from_the_embeddings_it_is_tied_to_is_refused(offload: bool, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "src", "llama", tie_word_embeddings=True)
    rewrite(folder, plus("lm_head.weight", torch.ones(320, 64)))
    with pytest.raises(ModelFormatError, match=r"lm_head.weight: config.json ties this weight .*tie_word_embeddings"):
        load_model(open_source(folder), offload=offload)
    assert loads_as_transformers(configure(folder, tie_word_embeddings=False), offload)


# -- values ----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("name", [QUERY, "model.norm.weight"])
def test_weights_that_are_not_finite_in_float32_are_refused_by_name(
    name: str, value: float, offload: bool, llama: Path
) -> None:
    weights = load_file(llama / "model.safetensors")
    weights[name] = weights[name].double()
    weights[name].view(-1)[7] = value
    save_file(weights, llama / "model.safetensors")
    with pytest.raises(ModelFormatError, match=f"{name}: a weight holds NaN or infinity in float32"):
        torch_logits(load_model(open_source(llama), offload=offload), IDS)


def test_a_layer_on_disk_that_is_refused_is_refused_again(llama: Path) -> None:
    rewrite(llama, lambda w: {**w, QUERY: w[QUERY] * float("nan")})
    model = load_model(open_source(llama), offload=True)
    for _ in range(2):
        with pytest.raises(ModelFormatError, match=QUERY):
            torch_logits(model, IDS)
        assert all(weight.device.type == "meta" for weight in model.model.layers.parameters())


@both
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_quantised_tensors_without_a_config_are_refused(dtype: torch.dtype, offload: bool, llama: Path) -> None:
    rewrite(llama, lambda w: {**w, QUERY: w[QUERY].to(dtype)})
    with pytest.raises(ModelFormatError, match=f"{QUERY}: the weights are quantised"):
        load_model(open_source(llama), offload=offload)


def test_tensors_of_a_quantiser_are_called_quantised_and_not_missing(llama: Path) -> None:
    rewrite(llama, renamed("q_proj.weight", "q_proj.qweight"))
    rewrite(llama, plus("model.layers.0.self_attn.q_proj.qzeros", torch.ones(4, 4, dtype=torch.int32)))
    with pytest.raises(ModelFormatError, match="the weights are quantised"):
        load_model(open_source(llama))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_weights_of_every_precision_load_as_in_transformers(dtype: torch.dtype, llama: Path) -> None:
    assert loads_as_transformers(rewrite(llama, lambda w: {n: v.to(dtype) for n, v in w.items()}), offload=False)


# -- other files in the folder ---------------------------------------------------------------------------------


@both
def test_an_adapter_in_the_folder_is_left_out_and_that_is_said(
    offload: bool, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    wanted = torch_logits(load_model(open_source(llama)), IDS)
    other = tiny_model(tmp_path / "other", "llama", seed=7)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(other), lora).save_pretrained(llama)
    assert json.loads((llama / "adapter_config.json").read_text())["base_model_name_or_path"] == str(other)
    assert furthest(torch_logits(load_model(open_source(llama), offload=offload), IDS), wanted) == 0
    assert "note: the adapter in the folder of src is left out" in capsys.readouterr().err


def test_code_in_the_folder_is_never_run_or_offered(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for an unknown type with `auto_map`, for a known one with it, and for a generate function."""
    mark = llama / "ran"
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    (llama / "own.py").write_text(code)
    (llama / "custom_generate").mkdir()
    (llama / "custom_generate" / "generate.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on stdin"))
    auto = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.C", None]}
    wanted = torch_logits(load_model(open_source(llama)), IDS)
    configure(llama, auto_map=auto)
    for offload in (False, True):
        assert furthest(torch_logits(load_model(open_source(llama), offload=offload), IDS), wanted) == 0
    for unknown in ("own", "", None, ["llama"], "gpt_bigcode"):
        with pytest.raises(ModelFormatError, match="there is no adapter for this architecture"):
            open_source(configure(llama, model_type=unknown))
    assert not mark.exists()


def test_another_config_file_in_the_folder_is_not_read(llama: Path) -> None:
    """transformers follows `configuration_files` to the config of its version, which the digest does not cover."""
    wanted = torch_logits(load_model(open_source(llama)), IDS)
    (llama / "config.4.0.0.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    configure(llama, configuration_files=["config.4.0.0.json"])
    assert furthest(torch_logits(load_model(open_source(llama)), IDS), wanted) == 0


METHODS = ("bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "torchao", "no-such-method")


@pytest.mark.parametrize(
    "config",
    [
        *({"quantization_config": {"quant_method": method, "bits": 4}} for method in METHODS),
        {"quantization_config": {"load_in_8bit": True}},
        {"quantization_config": "gptq"},
        {"compression_config": {"format": "pack-quantized"}},
        {"quantization": {"group_size": 64, "bits": 4}},
    ],
    ids=str,
)
def test_a_quantised_source_is_refused_in_one_line_before_anything_is_loaded(
    config: dict[str, Any], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(llama, **config)
    (llama / "model.safetensors").unlink()
    assert main(["model", str(llama), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the model is quantised" in error and "give the float model" in error


def test_a_config_that_says_not_quantised_is_loaded(llama: Path) -> None:
    wanted = torch_logits(load_model(open_source(llama)), IDS)
    for empty in (None, {}):
        configure(llama, quantization_config=empty)
        assert furthest(torch_logits(load_model(open_source(llama)), IDS), wanted) == 0
