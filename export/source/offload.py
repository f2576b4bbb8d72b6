"""A model bigger than memory: the weights of its layers stay in their files, and a layer is loaded while it runs.

Everything outside the layers (embeddings, final norm, head) stays in memory. Whenever the model runs, which includes
transformers' own generate, each layer is loaded before it runs and freed after it. The lock-step fit holds a layer for
as long as it works on it. The files are read through memory maps, so that data which the operating system has cached is
not read from disk again.
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
    """The files of one layer's weights, and the number of users for whom the weights are loaded."""

    def __init__(self, layer: nn.Module, name: str, files: dict[str, Any], device: str) -> None:
        self._layer, self._name, self._files, self._device = layer, name, files, device
        self._users = 0

    def load(self) -> None:
        """Add one user, and load the weights if they are not loaded yet."""
        self._users += 1
        if self._users == 1:
            for name, file in self._files.items():
                _load(self._layer, name, file, f"{self._name}.{name}", self._device)

    def release(self) -> None:
        """Remove one user, and free the weights if there are no users left."""
        self._users -= 1
        if self._users == 0:
            for name in self._files:
                set_module_tensor_to_device(self._layer, name, "meta")


def load_offloaded(path: Path, device: str, attention: str | None) -> Any:
    """Load the transformers model of a Hugging Face folder in float32 and eval mode, but leave its layers on disk.

    Args:
        path: a folder with safetensors weights.
        device: the device that layers are loaded to while they run, and that everything else is on.
        attention: transformers' `attn_implementation`; with None, transformers chooses.

    Returns:
        The model.

    Raises:
        ModelFormatError: there is no adapter for the architecture, or a weight is missing from the files.
        DeviceUnavailableError: the device is `map`.
    """
    if device == "map":
        raise DeviceUnavailableError(
            "a device map and --offload cannot be combined",
            field="--device",
            got="map",
            wanted="one device",
            fix="leave out --offload, or name a device",
        )
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    adapter = adapter_for(config.model_type)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    files = _files_of_weights(path, device)
    model.tie_weights()
    layers = list(model.get_submodule(adapter.layers).children())
    offloaded: dict[int, dict[str, Any]] = {i: {} for i in range(len(layers))}
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    for name, _parameter in list(model.named_parameters()):
        if name not in files:
            if name in tied:
                continue
            raise ModelFormatError(
                "the model's files do not hold a weight under the name the model gives it",
                field=name,
                got=f"{len(files)} other names",
                wanted="a folder written by save_pretrained",
                fix="load the model with transformers and write it with save_pretrained, or leave out --offload",
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
    """Keep a layer's weights loaded within the context. In a model that is not offloaded they are always loaded."""
    weights: _LayerWeights | None = getattr(layer, _WEIGHTS, None)
    if weights is None:
        yield
        return
    weights.load()
    try:
        yield
    finally:
        weights.release()


def _offload(layer: nn.Module, name: str, files: dict[str, Any], device: str) -> None:
    weights = _LayerWeights(layer, name, files, device)
    object.__setattr__(layer, _WEIGHTS, weights)
    layer.register_forward_pre_hook(lambda *_: weights.load())
    # The weights are also released if the forward raises, because the fit stops layers halfway.
    layer.register_forward_hook(lambda *_: weights.release(), always_call=True)


def _files_of_weights(path: Path, device: str) -> dict[str, Any]:
    """Return the opened file of each weight. Files stay open, because each header lists the weights of all layers."""
    files: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        opened = safe_open(file, framework="pt", device=device)
        files |= dict.fromkeys(opened.keys(), opened)
    return files


def _load(module: nn.Module, name: str, file: Any, stored: str, device: str) -> None:
    set_module_tensor_to_device(module, name, device, file.get_tensor(stored), dtype=torch.float32)
