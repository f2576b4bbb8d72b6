"""A model bigger than memory: its layers' weights stay in their files, and one layer is loaded while it runs.

Everything outside the layers (embeddings, final norm, head) is resident. Running the model, transformers' own generate
included, loads each layer before it and frees it after; the lock-step fit holds a layer for as long as it works on it.
Reading is through memory maps, so what the operating system has cached is not read from disk again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tp_runtime.errors import DeviceUnavailableError, ModelFormatError

from ..decoder import adapter_for

_WEIGHTS = "_tp_weights"


class _LayerWeights:
    """Where one layer's weights lie, and whether they are loaded."""

    def __init__(self, layer: nn.Module, name: str, files: dict[str, Path], device: str) -> None:
        self._layer, self._name, self._files, self._device = layer, name, files, device
        self._users = 0

    def load(self) -> None:
        """Load the weights unless they are loaded."""
        self._users += 1
        if self._users == 1:
            for name, file in self._files.items():
                _load(self._layer, name, file, f"{self._name}.{name}", self._device)

    def release(self) -> None:
        """Free them once nobody uses them."""
        self._users -= 1
        if self._users == 0:
            for name in self._files:
                set_module_tensor_to_device(self._layer, name, "meta")


def load_offloaded(path: Path, device: str, attention: str | None) -> Any:
    """The transformers model of a Hugging Face folder, float32, in eval mode, its layers on disk.

    Args:
        path: a folder with safetensors weights.
        device: where layers are loaded to while they run, and where all the rest is.
        attention: transformers' `attn_implementation`; None is its own choice.

    Raises:
        ModelFormatError: no adapter for the architecture, or a weight is missing from the files.
        DeviceUnavailableError: the device is `map`.
    """
    if device == "map":
        raise DeviceUnavailableError(
            "a device map and --offload are two ways to the same end",
            field="--device",
            got="map",
            wanted="one device",
            fix="go without --offload, or name a device",
        )
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    adapter = adapter_for(config.model_type)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    files = _where_weights_are(path)
    model.tie_weights()
    layers = list(model.get_submodule(adapter.layers).children())
    offloaded: dict[int, dict[str, Path]] = {i: {} for i in range(len(layers))}
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    for name, _parameter in list(model.named_parameters()):
        if name not in files:
            if name in tied:
                continue
            raise ModelFormatError(
                "a weight is not in the model's files under the name the model gives it",
                field=name,
                got=f"{len(files)} other names",
                wanted="a folder written by save_pretrained",
                fix="load the model with transformers and save_pretrained it, or go without --offload",
            )
        if name.startswith(f"{adapter.layers}."):
            index, _, rest = name.removeprefix(f"{adapter.layers}.").partition(".")
            offloaded[int(index)][rest] = files[name]
        else:
            _load(model, name, files[name], name, device)
    model.tie_weights()
    for index, layer in enumerate(layers):
        _offload(layer, f"{adapter.layers}.{index}", offloaded[index], device)
    for name, buffer in model.named_buffers():
        set_module_tensor_to_device(model, name, device, buffer)
    return model.eval().requires_grad_(False)


@contextmanager
def resident(layer: nn.Module) -> Iterator[None]:
    """Within the context a layer's weights are loaded; of a model that is not offloaded they always are."""
    weights: _LayerWeights | None = getattr(layer, _WEIGHTS, None)
    if weights is None:
        yield
        return
    weights.load()
    try:
        yield
    finally:
        weights.release()


def _offload(layer: nn.Module, name: str, files: dict[str, Path], device: str) -> None:
    weights = _LayerWeights(layer, name, files, device)
    object.__setattr__(layer, _WEIGHTS, weights)
    layer.register_forward_pre_hook(lambda *_: weights.load())
    # Also where the forward raises: the fit stops layers halfway.
    layer.register_forward_hook(lambda *_: weights.release(), always_call=True)


def _where_weights_are(path: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    return files


def _load(module: nn.Module, name: str, file: Path, stored: str, device: str) -> None:
    with safe_open(file, framework="pt", device=device) as tensors:
        set_module_tensor_to_device(module, name, device, tensors.get_tensor(stored), dtype=torch.float32)
