"""Find transformers' names for the linear layers at the sites of a patch, from a config only: no weights are read.

The model is built on torch's meta device, which allocates nothing. The architecture's adapter identifies the linear
layers, and their names are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tp_runtime.patch import SlotKey

from .adapters import adapter_for, blocks_of
from .slot_modules import slots_of


@dataclass(frozen=True)
class SiteLinear:
    """The linear layer to whose output a site adds.

    Attributes:
        module: the layer's name in the model, such as `model.layers.0.mlp.down_proj`.
        inputs: the size of the layer's input.
        outputs: the size of the layer's output.
    """

    module: str
    inputs: int
    outputs: int


def model_without_weights(config: Mapping[str, Any]) -> nn.Module:
    """Build a causal language model without weights from a parsed config.json.

    Raises:
        ModelFormatError: there is no adapter for the architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter_for(str(config.get("model_type", "")))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)


def site_linears(model: nn.Module) -> dict[SlotKey, SiteLinear]:
    """Return (layer, site) -> linear layer, for every site of the model that adds to the output of one linear layer.

    `mlp_out` is the same as `down` if nothing follows `down` in the MLP branch. After a post-norm, and in a mixture of
    experts, `mlp_out` does not add to a linear layer's output, so it is left out.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = blocks_of(model)
    found = {}
    for slot in slots_of(model, "all"):
        block = blocks[slot.layer]
        if slot.site == "mlp_out":
            if block.post_norm is not None or block.router is not None:
                continue
            module = block.mlps[0].down
        else:
            module = block.layer.get_submodule(block.linears[slot.site])
        found[slot.layer, slot.site] = SiteLinear(names[module], slot.inputs, slot.outputs)
    return found
