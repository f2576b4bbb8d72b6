"""Check an exported ONNX graph for everything that would make ONNX Runtime do more than arithmetic.

A graph can name code (custom-op domains) and files (external data). The edge only finds the names of the files, so the
check of the whole graph runs where `onnx` is installed, in `tp-export check`. It reads the graph and the default values
of the slots, and no other weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from tp_runtime.errors import ModelFormatError, UnsafeGraphError, UnsafePathError, library_errors, shown
from tp_runtime.session import (
    GRAPH_FILE,
    LARGEST_GRAPH,
    WINDOWED_SHIFT,
    WINDOWED_TOTAL,
    ModelFolder,
    check_interface,
    past_name,
    read_default_patch,
    slot_arrays,
)
from tp_runtime.storage import REEXPORT, StrictJSONError, check_name, checked_file, parse_json_object

_GENAI = "genai_config.json"
# What the exporter writes: standard ONNX, and the fused operators compiled into ONNX Runtime itself.
DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})

# ONNX Runtime marks a tensor in its own memory with the location */_ORT_MEM_ADDR_/*; the offset is then an address.
_ADDRESS_MARKER = "*/"
_LARGEST = 2**63 - 1
_SUB_BYTE_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
_UNTRUSTED = "do not run this graph unless you trust its source; export the model again with tp-export"


def check_graph(folder: Path) -> list[str]:
    """Check the `model.onnx` of a model folder.

    Args:
        folder: the exported folder, with its `patch_slots.json`.

    Returns:
        One line for each check that the graph passed.

    Raises:
        ModelFormatError: the folder or the graph cannot be read, or the slots have other default values than the
            folder states.
        UnsafeGraphError: the graph uses a custom-op domain, or has external data in a place or of a kind that the
            exporter does not write.
        PatchError: the folder's default patch is damaged or does not fit.
        UnsafePathError: external data is outside the folder's listed files, or outside the range of its file.
    """
    described = ModelFolder.open(folder)
    model = _load(described)
    _check_domains(model)
    _refuse_hidden_external(model)
    tensors = [tensor for tensor in model.graph.initializer if _is_external(tensor)]
    names = sorted({_check_external(tensor, described) for tensor in tensors})
    domains = {node.domain or "ai.onnx" for node in _nodes(model)}
    return [
        f"nodes: {sum(1 for _ in _nodes(model))}, subgraphs and {len(model.functions)} functions included",
        f"domains: {', '.join(sorted(domains)) or 'none'}",
        f"initializers: {len(model.graph.initializer)}, {len(tensors)} external and inside their files",
        f"data files: {', '.join(names) or 'none'}",
        _check_defaults(model, described),
    ]


def check_description(folder: Path) -> str:
    """Compare the inputs, outputs and slots of a model folder's `model.onnx` with its `patch_slots.json`.

    Returns:
        A line that says what fits.

    Raises:
        ModelFormatError: the folder or the graph cannot be read, the two contradict each other, or the file for
            onnxruntime-genai states another context window than the graph has.
    """
    described = ModelFolder.open(folder)
    graph = _load(described).graph
    interface = _Interface(graph)
    check_interface(interface, described)
    _check_windowed_layers(graph, described)
    _check_window(described)
    inputs, slots = len(interface.get_inputs()), len(interface.get_overridable_initializers())
    return f"inputs and outputs: {inputs} inputs and {slots} inputs with defaults, as patch_slots.json describes them"


def _check_windowed_layers(graph: GraphProto, folder: ModelFolder) -> None:
    """Compare the windowed layers of a description with the windows of the attention operators and what they read."""
    if folder.windowed is None:
        return
    shifted = {node.output[0] for node in graph.node if WINDOWED_SHIFT in node.input}
    found = {}
    for node in graph.node:
        windows = [attribute.i for attribute in node.attribute if attribute.name == "local_window_size"]
        if node.op_type == "GroupQueryAttention" and (windows or shifted & set(node.input)):
            found[node.input[3]] = windows if shifted & set(node.input) else "a length that is not its own"
    wanted = {past_name(layer, "key"): [folder.windowed.window] for layer in folder.windowed.layers}
    if found != wanted:
        differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ModelFormatError(
            "the graph's windowed layers are not those of patch_slots.json",
            field=differing[0],
            got=found.get(differing[0], "no window"),
            wanted=wanted.get(differing[0], "no window"),
            fix=REEXPORT,
        )


def _check_window(folder: ModelFolder) -> None:
    """Compare the context window that onnxruntime-genai would use with the one of the graph."""
    if _GENAI not in folder.files:
        return
    try:
        window = parse_json_object(folder.read(_GENAI), lenient=True)["model"]["context_length"]
    except (StrictJSONError, KeyError, TypeError) as error:
        raise ModelFormatError(
            "the file states no context window", field=_GENAI, got=error, wanted="model.context_length", fix=REEXPORT
        ) from error
    if window != folder.context_window:
        raise ModelFormatError(
            "onnxruntime-genai would use another context window than the graph has",
            field=f"{_GENAI} model.context_length",
            got=window,
            wanted=folder.context_window,
            fix=REEXPORT,
        )


@dataclass(frozen=True)
class _Value:
    """An input or output in the form in which a session gives it."""

    name: str
    type: str
    shape: list[int | str]


class _Interface:
    """The inputs and outputs of a graph, as a session over it would give them."""

    def __init__(self, graph: GraphProto) -> None:
        self._graph, self._defaults = graph, {tensor.name for tensor in graph.initializer}

    def get_inputs(self) -> list[_Value]:
        return [_value(item) for item in self._graph.input if item.name not in self._defaults]

    def get_overridable_initializers(self) -> list[_Value]:
        return [_value(item) for item in self._graph.input if item.name in self._defaults]

    def get_outputs(self) -> list[_Value]:
        return [_value(item) for item in self._graph.output]


def _value(info: ValueInfoProto) -> _Value:
    tensor = info.type.tensor_type
    known = tensor.elem_type in TensorProto.DataType.values()
    kind = TensorProto.DataType.Name(tensor.elem_type).lower() if known else "unknown"
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
    return _Value(info.name, f"tensor({kind})", shape)


def _load(folder: ModelFolder) -> onnx.ModelProto:
    fix = "export the model again with tp-export"
    with library_errors(ModelFormatError, "the file is not an ONNX graph", field=GRAPH_FILE, fix=fix):
        return onnx.load_model_from_string(folder.read(GRAPH_FILE, LARGEST_GRAPH))


def _check_domains(model: onnx.ModelProto) -> None:
    # Check the domains that run, not the imported ones: a graph saved by ONNX Runtime imports every domain it knows.
    used = [(f"function {function.name!a}", function.domain) for function in model.functions]
    used.extend((f"node {node.name!a} ({node.op_type!a})", node.domain) for node in _nodes(model))
    for field, domain in used:
        if domain not in DOMAINS:
            raise UnsafeGraphError(
                "the graph uses a custom-op domain",
                field=field,
                got=ascii(domain),
                wanted="one of " + ", ".join(sorted(DOMAINS - {""})),
                fix=_UNTRUSTED,
            )


def _refuse_hidden_external(model: onnx.ModelProto) -> None:
    """Refuse external data outside the main graph's dense initializers, where the exporter puts it."""
    hidden = [("a sparse initializer", part) for part in _sparse_parts(model.graph.sparse_initializer)]
    for node in _nodes(model):
        for attribute in node.attribute:
            hidden.extend(("an attribute", tensor) for tensor in _attribute_tensors(attribute))
            for graph in _attribute_graphs(attribute):
                hidden.extend(("a subgraph", tensor) for tensor in graph.initializer)
                hidden.extend(("a subgraph", tensor) for tensor in _sparse_parts(graph.sparse_initializer))
    for place, tensor in hidden:
        if _is_external(tensor):
            raise UnsafeGraphError(
                f"the graph has external data in {place}",
                field=f"tensor {tensor.name!a}",
                wanted="external data in initializers of the main graph only",
                fix=_UNTRUSTED,
            )
    # The exporter writes no training graphs and nothing runs them. They can hold graphs that the checks above miss.
    if len(model.training_info):
        raise UnsafeGraphError("the graph holds training graphs", field="training_info", wanted="none", fix=_UNTRUSTED)


def _check_external(tensor: TensorProto, folder: ModelFolder) -> str:
    """Check the location and range of one tensor's external data, and return the file's name."""
    field = f"external data of {tensor.name!a}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    keys = [entry.key for entry in tensor.external_data]
    # Refuse a repeated key like an unknown one, because two readers may take different values.
    if len(keys) != len(entries) or not EXTERNAL_KEYS.issuperset(keys) or "location" not in entries:
        raise UnsafeGraphError(
            "the external data has unknown, repeated or missing keys",
            field=field,
            got=ascii(keys),
            wanted="location, and at most one each of offset, length, checksum",
            fix=_UNTRUSTED,
        )
    location = entries["location"]
    if location.startswith(_ADDRESS_MARKER):
        raise UnsafeGraphError(
            "the tensor points into memory", field=field, got=ascii(location), wanted="a file", fix=_UNTRUSTED
        )
    check_name(location, field)
    if location not in folder.files:
        raise UnsafePathError(
            "the tensor is in a file that patch_slots.json does not list",
            field=field,
            got=location,
            wanted="one of " + ", ".join(sorted(folder.files)),
            fix=_UNTRUSTED,
        )
    checked_file(folder.path, location)
    offset = _bounded(entries.get("offset", "0"), f"{field}, offset")
    needed = _bytes_of(tensor, field)
    length = _bounded(entries.get("length", str(needed)), f"{field}, length")
    if length != needed:
        raise UnsafeGraphError(
            "the length does not fit the tensor's shape and type",
            field=field,
            got=length,
            wanted=needed,
            fix=_UNTRUSTED,
        )
    if offset + length > (size := folder.files[location].bytes):
        raise UnsafePathError(
            f"the tensor ends past the end of {location}",
            field=field,
            got=f"{offset} + {length} bytes",
            wanted=f"at most {size}",
            fix="the file is truncated or the graph altered: export the model again with tp-export",
        )
    return location


def _check_defaults(model: onnx.ModelProto, folder: ModelFolder) -> str:
    """Compare the slots' initializers with the file of the default patch, or with the base; return the line on it.

    The runtime gives the session the values of that file. Other programs run the graph's own values. What the lengths
    of windowed layers differ by must be zero, because nobody binds these inputs for a patch without entries.
    """
    patch = read_default_patch(folder)
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = {value.name for value in model.graph.input}
    _check_lengths(found, inputs, folder)
    stated = "the base" if patch is None else f"the patch {patch.name!r}, identity {patch.identity[:16]}"
    for key, slot in folder.slots.items():
        delta = None if patch is None else patch.deltas.get(key)
        for name, wanted in slot_arrays(delta, slot, folder.kv.numpy_dtype).items():
            if name not in found or name not in inputs:
                raise ModelFormatError(
                    "the graph lacks a slot that the description lists",
                    field=name,
                    got="no initializer" if name not in found else "an initializer that is no input",
                    wanted="an input with an initializer",
                    fix=_UNTRUSTED,
                )
            values = _values(found[name], folder)
            if values.dtype != wanted.dtype or values.shape != wanted.shape or values.tobytes() != wanted.tobytes():
                raise ModelFormatError(
                    "the graph's default values are not those of the folder's default patch",
                    field=name,
                    got=f"other values, {values.dtype} {list(values.shape)}",
                    wanted=f"{stated}, {wanted.dtype} {list(wanted.shape)}",
                    fix=_UNTRUSTED,
                )
    return f"defaults: {stated}"


def _check_lengths(found: Mapping[str, TensorProto], inputs: Set[str], folder: ModelFolder) -> None:
    for name in () if folder.windowed is None else (WINDOWED_SHIFT, WINDOWED_TOTAL):
        values = _values(found[name], folder).tolist() if name in found and name in inputs else "no default"
        if values != [0]:
            raise ModelFormatError(
                "the graph gives windowed layers another cache length than full ones, with nothing bound",
                field=name,
                got=values,
                wanted=[0],
                fix=_UNTRUSTED,
            )


def _values(tensor: TensorProto, folder: ModelFolder) -> NDArray[Any]:
    """Return an initializer's values; if they are external, `_check_external` has checked their place."""
    if not _is_external(tensor):
        return numpy_helper.to_array(tensor)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    with open(folder.path / entries["location"], "rb") as file:
        file.seek(int(entries.get("offset", "0")))
        return np.frombuffer(file.read(_bytes_of(tensor, tensor.name)), dtype).reshape(tuple(tensor.dims))


def _bounded(text: str, field: str) -> int:
    # Accept digits only: int() also takes signs, spaces and underscores, which other readers interpret differently.
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 19 else -1
    if not 0 <= value <= _LARGEST:
        raise UnsafePathError(
            "the text is not a number of bytes",
            field=field,
            got=shown(text),
            wanted=f"an integer from 0 to {_LARGEST}",
            fix=_UNTRUSTED,
        )
    return value


def _bytes_of(tensor: TensorProto, field: str) -> int:
    known = tensor.data_type in TensorProto.DataType.values() and tensor.data_type not in (
        TensorProto.UNDEFINED,
        TensorProto.STRING,
    )
    if not known or any(dim < 0 for dim in tensor.dims):
        raise UnsafeGraphError(
            "the tensor has no size in bytes",
            field=field,
            got=f"type {tensor.data_type}, shape {list(tensor.dims)}",
            wanted="a numeric type and dimensions of at least 0",
            fix=_UNTRUSTED,
        )
    kind = TensorProto.DataType.Name(tensor.data_type)
    bits = _SUB_BYTE_BITS.get(kind) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


def _is_external(tensor: TensorProto) -> bool:
    # Either field marks external data, because readers differ in which one they look at.
    return tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data) > 0


def _nodes(model: onnx.ModelProto) -> Iterator[NodeProto]:
    """Yield every node of the graph, of its subgraphs at any depth, and of its functions."""
    pending = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            for graph in _attribute_graphs(attribute):
                pending.extend(graph.node)


def _attribute_graphs(attribute: AttributeProto) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _attribute_tensors(attribute: AttributeProto) -> list[TensorProto]:
    sparse = [
        *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
        *attribute.sparse_tensors,
    ]
    return [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors, *_sparse_parts(sparse)]


def _sparse_parts(sparse: list[SparseTensorProto]) -> list[TensorProto]:
    return [part for tensor in sparse for part in (tensor.values, tensor.indices)]
