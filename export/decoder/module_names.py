"""What transformers calls the layers that the sites of a patch lie beside, from a config alone: no weights are read.

The model is built on torch's meta device, which allocates nothing, and the architecture's adapter says where things
are; the names are then the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .adapters import adapter_for, blocks_of
from .slot_modules import slots_of


@dataclass(frozen=True)
class SiteLinear:
    """The linear layer that a site lies beside.

    Attributes:
        module: its name in the model, such as `model.layers.0.mlp.down_proj`.
        inputs: size of its input, `outputs` of its output.
    """

    module: str
    inputs: int
    outputs: int


def model_without_weights(config: Mapping[str, Any]) -> nn.Module:
    """A causal language model without weights, from a parsed config.json; ModelFormatError if there is no adapter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter_for(str(config.get("model_type", "")))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def site_linears(model: nn.Module) -> dict[tuple[int, str], SiteLinear]:
    """(layer, site) to the linear layer it lies beside, for every site of the model that is a linear layer's own.

    `mlp_out` is the same as `down` where nothing follows `down` in the branch; behind a post-norm, and of a mixture of
    experts, it lies beside no linear layer, and is left out.
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
