"""The structure of a transformers decoder: its blocks and sites, the tensors of a slot, and patches applied by hooks.

This room knows nothing of files, of queries, or of how deltas are fitted.
"""

from .adapters import Block, Mlp, adapter_for, blocks_of, kv_shape, weight_of
from .attention import Entry, Heads, attending, attention_of, entries_seen, layer_windows, own_scale
from .hooks import PatchHooks, TorchDelta, applied, layer_deltas, patched
from .inputs import decoder_of, layer_inputs, plain_inputs
from .kv_prefix import TorchPrefix, cached_prompt, torch_prefix
from .module_names import SiteLinear, model_without_weights, site_linears
from .slot_modules import SLOT_SETS, SlotTensors, slots_of, slotted

__all__ = [
    "SLOT_SETS",
    "Block",
    "Entry",
    "Heads",
    "Mlp",
    "PatchHooks",
    "SiteLinear",
    "SlotTensors",
    "TorchDelta",
    "TorchPrefix",
    "adapter_for",
    "applied",
    "attending",
    "attention_of",
    "blocks_of",
    "cached_prompt",
    "decoder_of",
    "entries_seen",
    "kv_shape",
    "layer_deltas",
    "layer_inputs",
    "layer_windows",
    "model_without_weights",
    "own_scale",
    "patched",
    "plain_inputs",
    "site_linears",
    "slots_of",
    "slotted",
    "torch_prefix",
    "weight_of",
]
