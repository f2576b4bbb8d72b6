"""Loading the transformers model of a source: its own weights, every one of them, and nothing else.

transformers gets the parsed config and the tensors, and no path. So it reads no other file of the folder: an
adapter_config.json would make it load another folder's weights, and `auto_map` or custom_generate name code to run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import no_init_weights
from transformers.utils import logging

from tp_runtime.errors import DeviceUnavailableError, ModelFormatError, library_errors, shortened

from .matching import check_finite, check_tied, match_tensors, tied_names
from .offload import offload_layers
from .source import Source
from .weights import StoredTensor


def load_model(source: Source, device: str = "cpu", dtype: str = "float32", *, offload: bool = False) -> Any:
    """Return the transformers model of a source in eval mode.

    Args:
        source: the base model.
        device: a torch device, or `map` to spread the layers over all GPUs (accelerate's device map).
        dtype: the dtype of the weights, by its torch name.
        offload: whether the layers' weights stay on disk and each layer is loaded, in float32, only while it runs
            (offload.py). The values of a layer are then checked when it is loaded for the first time.

    Raises:
        ModelFormatError: the weights are missing or damaged, are not those that config.json describes, or hold NaN or
            infinity.
        UnsafePathError: the index of the weights names a file outside the folder.
        DeviceUnavailableError: `offload` is set together with the device `map`.
    """
    if offload and device == "map":
        raise DeviceUnavailableError(
            "a device map and --offload cannot be combined",
            field="--device",
            got="map",
            wanted="one device",
            fix="leave out --offload, or name a device",
        )
    tensors = source.tensors  # before transformers sees the config, so that damage of a file is reported as such
    if (source.path / "adapter_config.json").exists():
        note = f"note: the adapter in the folder of {source.name} is left out: the base is the folder's own weights"
        tqdm.write(note, file=sys.stderr)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    empty = _in_transformers(source, lambda: _empty_model(source))
    named = match_tensors(empty, tensors)
    files = {file: _opened(file, device if offload else "cpu") for file in {tensor.file for tensor in tensors}}
    for first, *others in tied_names(empty):
        for name in others:
            if named[name] is not named[first]:
                check_tied(named[name].name, _read(files, named[first]), _read(files, named[name]))
    if offload:
        return offload_layers(empty, {name: (files[held.file], held.name) for name, held in named.items()}, device)
    values = {name: _read(files, tensor) for name, tensor in named.items()}
    return _in_transformers(source, lambda: _filled_model(source, type(empty), values, device, dtype))


def _empty_model(source: Source) -> Any:
    """Return the model with its buffers, and with weights that have shapes and no memory."""
    config, attention = _config(source)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    return model


def _filled_model(source: Source, kind: Any, values: dict[str, Tensor], device: str, dtype: str) -> Any:
    """Return a model of the class `kind` with its weights, by name, on a device."""
    config, attention = _config(source)
    spread = {"device_map": "auto"} if device == "map" else {}
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=values,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        output_loading_info=True,
        **spread,
    )
    differing = [str(key) for keys in info.values() for key in keys]
    if differing:  # match_tensors has matched every name, so this finds only what a new transformers does otherwise
        raise ModelFormatError(
            "transformers does not load every weight as it is", field=str(source.path), got=shortened(differing)
        )
    model.config.name_or_path = str(source.path)  # as for a model loaded from a path: peft looks it up there
    model = model.eval().requires_grad_(False)
    model = model if spread else model.to(device)
    check_finite(model.named_parameters())
    return model


def _config(source: Source) -> tuple[PretrainedConfig, str | None]:
    """Return transformers' config of the model, and the attention to run it with; None lets transformers choose."""
    parsed = dict(source.config)
    if not parsed.get("quantization_config"):
        parsed.pop("quantization_config", None)  # transformers does not read null as "not quantised"
    # sdpa silently ignores Gemma 2's soft caps and GPT-2's unusual scales.
    unusual = parsed.get("scale_attn_by_inverse_layer_idx") or not parsed.get("scale_attn_weights", True)
    attention = "eager" if parsed.get("attn_logit_softcapping") or unusual else None
    return CONFIG_MAPPING[source.architecture].from_dict(parsed), attention


def _in_transformers(source: Source, build: Callable[[], Any]) -> Any:
    """Return what `build` returns; what transformers raises becomes a ModelFormatError."""
    with library_errors(
        ModelFormatError,
        "transformers cannot load the model",
        field=str(source.path),
        fix="fetch or save the model again",
        also=(OSError,),
    ):
        return build()


def _opened(file: Path, device: str) -> Any:
    fix = "delete it and fetch the model again"
    with library_errors(ModelFormatError, "the file is not a safetensors file", field=str(file), fix=fix):
        return safe_open(file, framework="pt", device=device)


def _read(files: dict[Path, Any], tensor: StoredTensor) -> Tensor:
    """Return a tensor of an opened file; on the CPU it is a view of the file, which is read when it is used."""
    return files[tensor.file].get_tensor(tensor.name)
