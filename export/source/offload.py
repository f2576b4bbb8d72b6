"""A model bigger than memory: the weights of its layers stay in their files, and a layer is loaded while it runs.

Everything outside the layers (embeddings, final norm, head) stays in memory. Whenever the model runs, which includes
transformers' own generate, each layer is loaded before it runs and freed after it. The lock-step fit holds a layer for
as long as it works on it. The files are read through memory maps, so that data which the operating system has cached is
not read from disk again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from ..decoder import adapter_for
from .matching import check_finite

_WEIGHTS = "_tp_weights"


class _LayerWeights:
    """The files of one layer's weights, and the number of users for whom the weights are loaded."""

    def __init__(self, layer: nn.Module, name: str, files: dict[str, tuple[Any, str]], device: str) -> None:
        self._layer, self._name, self._files, self._device = layer, name, files, device
        self._users, self._checked = 0, False

    def load(self) -> None:
        """Add one user, and load the weights if they are not loaded yet.

        Raises:
            ModelFormatError: a weight holds NaN or infinity. Only the first time looks for them.
        """
        self._users += 1
        if self._users == 1:
            for name, stored in self._files.items():
                _load(self._layer, name, stored, self._device)
            if not self._checked:
                check_finite((f"{self._name}.{name}", self._layer.get_parameter(name)) for name in self._files)
                self._checked = True

    def release(self) -> None:
        """Remove one user, and free the weights if there are no users left."""
        self._users -= 1
        if self._users == 0:
            for name in self._files:
                set_module_tensor_to_device(self._layer, name, "meta")


def offload_layers(model: Any, weights: Mapping[str, tuple[Any, str]], device: str) -> Any:
    """Give a model its weights in float32, but leave those of its layers on disk.

    Args:
        model: a transformers causal language model whose weights are on the meta device and whose buffers are not.
        weights: for the name of each weight, the opened safetensors file that holds it and its name there. The files
            stay open, because each header lists the weights of all layers.
        device: the device that the files are opened for; layers are loaded to it while they run, and everything else
            is on it.

    Returns:
        The model in eval mode.

    Raises:
        ModelFormatError: a weight outside the layers holds NaN or infinity. The weights of a layer are checked when it
            is loaded for the first time, and then the model's run raises this error.
    """
    prefix = f"{adapter_for(model.config.model_type).layers}."
    layers = list(model.get_submodule(prefix.rstrip(".")).children())
    offloaded: dict[int, dict[str, tuple[Any, str]]] = {i: {} for i in range(len(layers))}
    for name, _ in list(model.named_parameters()):
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            offloaded[int(index)][rest] = weights[name]
        else:
            _load(model, name, weights[name], device)
            check_finite([(name, model.get_parameter(name))])
    model.tie_weights()
    for index, layer in enumerate(layers):
        _offload(layer, f"{prefix}{index}", offloaded[index], device)
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
    try:
        weights.load()
        yield
    finally:
        weights.release()


def _offload(layer: nn.Module, name: str, files: dict[str, tuple[Any, str]], device: str) -> None:
    weights = _LayerWeights(layer, name, files, device)
    object.__setattr__(layer, _WEIGHTS, weights)
    layer.register_forward_pre_hook(lambda *_: weights.load())
    # The weights are also released if the forward raises, because the fit stops layers halfway.
    layer.register_forward_hook(lambda *_: weights.release(), always_call=True)


def _load(module: nn.Module, name: str, stored: tuple[Any, str], device: str) -> None:
    file, stored_name = stored
    set_module_tensor_to_device(module, name, device, file.get_tensor(stored_name), dtype=torch.float32)
