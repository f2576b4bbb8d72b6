"""Which tensor of a base model's files is which weight of the model: every weight has one, and none is left over.

transformers draws a weight at random if no tensor has its name, and drops a tensor that no weight is named after. Here
either is an error. Two kinds of names differ in healthy files, and are matched as transformers matches them: files of
the model without its head lack the prefix of all names (`h.0.ln_1.weight` in GPT-2's own), and a tied weight may be
stored under either of its names or under both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tp_runtime.errors import ModelFormatError, shortened

from .weights import StoredTensor

_FLOATS = ("F64", "F32", "F16", "BF16")
_COMPLETE = "save the whole causal language model again with save_pretrained, and config.json with it"


def match_tensors(model: Any, tensors: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensor of every weight of a model.

    Args:
        model: a transformers causal language model, which may be on the meta device, with its weights tied.
        tensors: the tensors of its files.

    Returns:
        A mapping from the name of each weight, tied ones under all their names, to its tensor.

    Raises:
        ModelFormatError: a weight has no tensor or one of another shape, a tensor is no weight of this model, or a
            tensor has no float dtype.
    """
    weights = model.state_dict()
    named = _by_model_name(model, weights, tensors)
    integers = [tensor for tensor in named.values() if tensor.dtype not in _FLOATS]
    if integers:
        raise ModelFormatError(
            "the weights are quantised, and patches are fitted and exported from float weights",
            field=shortened([tensor.name for tensor in integers]),
            got=", ".join(sorted({tensor.dtype for tensor in integers})),
            wanted=" | ".join(_FLOATS),
            fix="give the float model that it was made from; --precision quantises the export",
        )
    for names in tied_names(model):
        if stored := [named[name] for name in names if name in named]:
            named |= {name: named.get(name, stored[0]) for name in names}
    missing = sorted(weights.keys() - named.keys())
    unused = sorted(tensor.name for name, tensor in named.items() if name not in weights)
    if missing or unused:
        raise ModelFormatError(
            f"{'weights of the model are missing from its files' if missing else 'tensors are no weights of the model'}"
            f": {shortened(missing or unused)}",
            field="weights",
            got=f"{len(missing)} of {len(weights)} weights missing, "
            f"{len(unused)} of {len(tensors)} tensors left over" + (f" ({shortened(unused, 2)})" if unused else ""),
            wanted="each weight that config.json describes, under the name that transformers gives it, and no other",
            fix=_COMPLETE,
        )
    for name, tensor in named.items():
        if tuple(weights[name].shape) != tensor.shape:
            raise ModelFormatError(
                "a weight does not have the shape that config.json gives it",
                field=tensor.name,
                got=list(tensor.shape),
                wanted=list(weights[name].shape),
                fix=_COMPLETE,
            )
    return named


def tied_names(model: Any) -> list[list[str]]:
    """Return the names of each weight that a model has under more than one name."""
    found: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(weight), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def check_tied(name: str, one: Tensor, other: Tensor) -> None:
    """Check that two tensors which the model uses as one are equal; transformers would take one without a word.

    Args:
        name: the name of the second tensor.
        one: the tensor that the model uses.
        other: the tensor that the file holds as well, of the same shape.

    Raises:
        ModelFormatError: they differ.
    """
    if not torch.equal(one.float(), other.float()):
        raise ModelFormatError(
            "config.json ties this weight to another one, but the file holds different values for it",
            field=name,
            got="two different tensors",
            wanted="equal tensors, or one of them",
            fix="if the file's values are meant, set tie_word_embeddings to false in config.json; "
            "if not, save the model again with save_pretrained",
        )


def check_finite(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Check that no weight holds NaN or infinity. This takes one pass over the weights and no memory.

    Raises:
        ModelFormatError: a weight holds NaN or infinity.
    """
    for name, weight in weights:
        if weight.is_floating_point() and weight.numel():
            low, high = torch.aminmax(weight.detach())
            if not (torch.isfinite(low) & torch.isfinite(high)):
                raise ModelFormatError(
                    f"a weight holds NaN or infinity in {str(weight.dtype).removeprefix('torch.')}",
                    field=name,
                    got=f"values from {float(low):.3g} to {float(high):.3g}",
                    wanted="finite numbers",
                    fix="fetch the model again, or save it from the last checkpoint with finite weights",
                )


def _by_model_name(
    model: Any, weights: Mapping[str, Tensor], tensors: Sequence[StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors by the names that the model gives them, without those that transformers drops on purpose."""
    buffers = {name for name, _ in model.named_buffers()}
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")  # older files hold the frequencies, which the config gives
    prefix = f"{model.base_model_prefix}."
    headless = not any(tensor.name.startswith(prefix) for tensor in tensors)
    named = {}
    for tensor in tensors:
        name = tensor.name
        if headless and (prefix + name in weights or prefix + name in buffers):
            name = prefix + name
        # A buffer that is no weight is computed from the config, such as GPT-2's attention mask `attn.bias`.
        if name in weights or not (name in buffers or any(re.search(pattern, name) for pattern in patterns)):
            named[name] = tensor
    return named
