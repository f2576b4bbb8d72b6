"""The graph check: which graphs pass, and the error of each unsafe graph."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from onnx import TensorProto, helper, load, numpy_helper, save

from runtime_tests.committed import private_copy
from runtime_tests.folders import alter, describe
from tp_export.cli import check
from tp_export.graph_check import check_graph
from tp_runtime.errors import ModelFormatError, UnsafeGraphError, UnsafePathError
from tp_runtime.session import PREPARED, Graph, ModelFolder, describe_files, prepare, write_slots_file
from tp_runtime.session.description import SLOTS_FILE

BYTES = 4 * 4 * 4  # the size of the weight, [4, 4] in float32


def _external(name="w", **entries):
    """Return a [4, 4] tensor in external data; keyword arguments are its external-data entries."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "model.onnx_data"} | entries).items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _inline(name):
    return numpy_helper.from_array(np.zeros((4, 4), np.float32), name)


def _value(name, shape=("n", 4)):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _model(node=None, initializers=None, sparse=(), functions=(), imports=("",)):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), *([node] if node else [])]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [_value("x")],
        [_value("y")],
        [_external(offset=0, length=BYTES)] if initializers is None else initializers,
        sparse_initializer=list(sparse),
    )
    opsets = [helper.make_opsetid(domain, 1 if domain else 17) for domain in imports]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


@pytest.fixture
def folder_of(tmp_path):
    def write(model, **changes):
        path = tmp_path / "model"
        path.mkdir()
        (path / "model.onnx").write_bytes(model.SerializeToString())
        (path / "model.onnx_data").write_bytes(b"\0" * BYTES)
        write_slots_file(describe(path, **({"slots": {}} | changes)))
        return path

    return write


def _branch(**how):
    """Return an If node whose branches contain the given tensors or nodes."""
    nodes = how.get("nodes", [helper.make_node("Identity", ["inner"], ["out"])])
    graph = helper.make_graph(
        nodes,
        "branch",
        [],
        [_value("out")],
        how.get("initializers", []),
        sparse_initializer=how.get("sparse", []),
    )
    return helper.make_node("If", ["x"], ["z"], then_branch=graph, else_branch=graph)


def _sparse(values):
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    return helper.make_sparse_tensor(values, indices, [4, 4])


def test_an_exported_graph_passes(folder_of):
    lines = check_graph(folder_of(_model(helper.make_node("FastGelu", ["y"], ["g"], domain="com.microsoft"))))
    assert "domains: ai.onnx, com.microsoft" in lines
    assert "initializers: 1, 1 external and inside their files" in lines
    assert "data files: model.onnx_data" in lines


def test_a_graph_saved_by_onnx_passes(folder_of, tmp_path):
    """The graph has the onnx library's keys and offsets, and a 4-bit, an 8-bit and a float tensor."""
    model = _model(initializers=[_inline("w")])
    for bits in (4, 8):
        kind = getattr(TensorProto, f"UINT{bits}")
        model.graph.initializer.append(helper.make_tensor(f"q{bits}", kind, [3, 5], [1] * 15))
    for tensor in model.graph.initializer[1:]:
        packed = numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
        tensor.CopyFrom(packed)
    folder = tmp_path / "saved"
    folder.mkdir()
    save(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    write_slots_file(describe(folder, slots={}))
    assert "initializers: 3, 3 external and inside their files" in check_graph(folder)


def test_a_subgraph_without_external_data_passes(folder_of):
    check_graph(folder_of(_model(_branch(initializers=[_inline("inner")]))))


def test_a_function_of_a_known_domain_passes(folder_of):
    function = helper.make_function(
        "com.microsoft", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], []
    )
    assert "nodes: 2, subgraphs and 1 functions included" in check_graph(folder_of(_model(functions=[function])))


def test_an_unused_import_passes(folder_of):
    """A graph saved by ONNX Runtime imports every domain it knows."""
    check_graph(folder_of(_model(imports=("", "org.pytorch.aten", "ai.onnx.training"))))


# -- custom operators ----------------------------------------------------------------------------------------

CUSTOM = helper.make_node("Run", ["x"], ["out"], domain="evil.ops")


@pytest.mark.parametrize(
    "model",
    [
        _model(CUSTOM),
        _model(_branch(nodes=[CUSTOM])),
        _model(_branch(nodes=[_branch(nodes=[CUSTOM])])),
        _model(functions=[helper.make_function("", "F", ["x"], ["out"], [CUSTOM], [])]),
        _model(functions=[helper.make_function("", "F", ["x"], ["z"], [_branch(nodes=[CUSTOM])], [])]),
    ],
    ids=["node", "subgraph", "subgraph-of-subgraph", "function", "subgraph-of-function"],
)
def test_a_custom_operator_is_refused(folder_of, model):
    with pytest.raises(UnsafeGraphError, match=r"'Run'.*custom-op domain; got 'evil.ops'; wanted one of ai.onnx"):
        check_graph(folder_of(model))


def test_a_function_of_a_custom_domain_is_refused(folder_of):
    function = helper.make_function("evil.ops", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [])
    with pytest.raises(UnsafeGraphError, match="function 'F': the graph uses a custom-op domain"):
        check_graph(folder_of(_model(functions=[function])))


def test_training_graphs_are_refused(folder_of):
    model = _model()
    model.training_info.add()
    with pytest.raises(UnsafeGraphError, match="the graph holds training graphs"):
        check_graph(folder_of(model))


# -- external data in places where the exporter writes none --------------------------------------------------


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (_model(_branch(initializers=[_external("inner")])), "a subgraph"),
        (_model(_branch(sparse=[_sparse(_external("inner"))])), "a subgraph"),
        (_model(sparse=[_sparse(_external("inner"))]), "a sparse initializer"),
        (_model(helper.make_node("Constant", [], ["c"], value=_external("inner"))), "an attribute"),
        (_model(helper.make_node("Constant", [], ["c"], sparse_value=_sparse(_external("v")))), "an attribute"),
    ],
    ids=["subgraph", "subgraph-sparse", "sparse", "attribute", "sparse-attribute"],
)
def test_external_data_outside_the_main_initializers_is_refused(folder_of, model, place):
    with pytest.raises(UnsafeGraphError, match=f"the graph has external data in {place}"):
        check_graph(folder_of(model))


def test_external_data_that_is_not_marked_as_external_is_checked(folder_of):
    tensor = _external(location="../outside")
    tensor.data_location = TensorProto.DEFAULT
    with pytest.raises(UnsafePathError, match="is not a plain name"):
        check_graph(folder_of(_model(initializers=[tensor])))


# -- external data: keys -------------------------------------------------------------------------------------


def _check_entries(folder_of, **entries):
    return check_graph(folder_of(_model(initializers=[_external(**entries)])))


def test_the_key_checksum_is_accepted(folder_of):
    _check_entries(folder_of, checksum="a" * 40)


def test_an_unknown_external_data_key_is_refused(folder_of):
    with pytest.raises(UnsafeGraphError, match=r"has unknown, repeated or missing keys.*prepacked"):
        _check_entries(folder_of, prepacked_0="x")


def test_a_repeated_external_data_key_is_refused(folder_of):
    tensor = _external()
    tensor.external_data.add(key="location", value="../outside")
    with pytest.raises(UnsafeGraphError, match="has unknown, repeated or missing keys"):
        check_graph(folder_of(_model(initializers=[tensor])))


def test_external_data_without_a_location_is_refused(folder_of):
    tensor = _external()
    tensor.ClearField("external_data")
    with pytest.raises(UnsafeGraphError, match="has unknown, repeated or missing keys"):
        check_graph(folder_of(_model(initializers=[tensor])))


def test_the_memory_address_marker_is_refused(folder_of):
    with pytest.raises(UnsafeGraphError, match="points into memory"):
        _check_entries(folder_of, location="*/_ORT_MEM_ADDR_/*", offset=140737353871360, length=BYTES)


# -- external data: locations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../model.onnx_data",
        "sub/../../x",
        "C:\\weights",
        "C:weights",
        "\\\\server\\x",
        "a\0b",
        "",
    ],
    ids=["absolute", "parent", "parent-inside", "drive", "drive-relative", "unc", "nul", "empty"],
)
def test_an_unsafe_location_is_refused(folder_of, location):
    with pytest.raises(UnsafePathError, match="is not a plain name"):
        _check_entries(folder_of, location=location)


def test_a_location_that_is_not_listed_is_refused(folder_of):
    folder = folder_of(_model(initializers=[_external(location="other.bin")]))
    (folder / "other.bin").write_bytes(b"\0" * BYTES)
    with pytest.raises(UnsafePathError, match=r"does not list; got other.bin"):
        check_graph(folder)


def test_a_location_that_is_a_symlink_out_of_the_folder_is_refused(folder_of):
    folder = folder_of(_model())
    shutil.move(folder / "model.onnx_data", folder.parent / "outside")
    (folder / "model.onnx_data").symlink_to(folder.parent / "outside")
    with pytest.raises(UnsafePathError, match="resolves outside"):
        check_graph(folder)


# -- external data: ranges -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [{"offset": 1}, {"offset": BYTES, "length": BYTES}, {"offset": 2**63 - 1, "length": BYTES}],
    ids=["by-one", "by-all", "sum-over-64-bits"],
)
def test_a_range_past_the_end_of_the_file_is_refused(folder_of, entries):
    with pytest.raises(UnsafePathError, match=r"ends past the end of model.onnx_data"):
        _check_entries(folder_of, **entries)


@pytest.mark.parametrize("text", ["-1", "+1", "1_0", " 1", "0x10", "", "²", str(2**63), "9" * 5000])
@pytest.mark.parametrize("key", ["offset", "length"])
def test_a_number_that_is_not_a_size_is_refused(folder_of, key, text):
    with pytest.raises(UnsafePathError, match=f"{key}: the text is not a number of bytes"):
        _check_entries(folder_of, **{key: text})


@pytest.mark.parametrize("length", [0, BYTES - 1])
def test_a_length_that_does_not_fit_the_tensor_is_refused(folder_of, length):
    with pytest.raises(UnsafeGraphError, match="the length does not fit the tensor's shape"):
        _check_entries(folder_of, length=length)


@pytest.mark.parametrize(
    "change", [{"dims": [-4, 4]}, {"data_type": TensorProto.STRING}, {"data_type": 99}, {"data_type": 0}]
)
def test_a_tensor_without_a_size_is_refused(folder_of, change):
    tensor = _external()
    for key in change:
        tensor.ClearField(key)
    tensor.MergeFrom(TensorProto(**change))
    with pytest.raises(UnsafeGraphError, match="has no size in bytes"):
        check_graph(folder_of(_model(initializers=[tensor])))


def test_a_shape_whose_product_overflows_is_refused(folder_of):
    tensor = _external()
    tensor.dims[:] = [2**62, 2**62]
    with pytest.raises(UnsafePathError, match="the text is not a number of bytes"):
        check_graph(folder_of(_model(initializers=[tensor])))


def test_a_file_that_is_not_a_graph_is_refused(folder_of):
    folder = folder_of(_model())
    (folder / "model.onnx").write_bytes(b"\xff" * 50)
    write_slots_file(describe(folder, slots={}))
    with pytest.raises(ModelFormatError, match="the file is not an ONNX graph"):
        check_graph(folder)


# -- the command ---------------------------------------------------------------------------------------------


def _run(folder, *flags):
    parser = argparse.ArgumentParser()
    check.add_parser(parser.add_subparsers())
    args = parser.parse_args(["check", str(folder), *flags])
    return args.run(args)


@pytest.fixture
def exported(tmp_path, monkeypatch):
    monkeypatch.setenv("TP_HOME", str(tmp_path / "home"))
    return private_copy("tiny-llama", tmp_path)


def test_the_command_prints_a_line_for_each_check(exported, capsys):
    (exported / "notes.txt").write_text("x")
    assert _run(exported) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("OK files: 8, ") and lines[0].endswith("all digests match")
    assert lines[7].startswith("OK inputs and outputs: 9 inputs and 10 inputs with defaults")
    assert lines[-1] == "-- 'notes.txt' is not listed, so nothing reads it"


def test_the_command_prints_json(exported, capsys):
    assert _run(exported, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["unlisted"] == [] and len(report["checks"]) == 9
    assert report["prepared_not_used"] is None


def test_the_command_refuses_a_graph_that_contradicts_its_description(exported):
    alter(exported, lambda data: data.update(vocab_size=1000, layers=4))
    with pytest.raises(ModelFormatError, match=r"no input past_key_values\.3\.key"):
        _run(exported)


def test_the_command_refuses_a_slot_without_a_default(exported):
    model = load(exported / "model.onnx", load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "tp.1.mlp_out.a"]
    model.graph.initializer.remove(tensor)
    (exported / "model.onnx").write_bytes(model.SerializeToString())
    record = describe_files(exported, ["model.onnx"])["model.onnx"]
    alter(exported, lambda data: data["files"].update({"model.onnx": asdict(record)}))
    for refuse in (_run, lambda folder: Graph(ModelFolder.open(folder), "cpu")):
        with pytest.raises(
            ModelFormatError,
            match=r"no input with a default tp\.1\.mlp_out\.a|unknown input|lacks a slot that the description lists",
        ):
            refuse(exported)


def test_the_command_checks_a_prepared_graph_that_this_machine_made(exported, capsys, monkeypatch, tmp_path):
    prepare(ModelFolder.open(exported))
    assert _run(exported) == 0
    assert "OK prepared: this machine made it, all digests match" in capsys.readouterr().out
    weights = exported / PREPARED / "weights"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(ModelFormatError, match="the prepared graph has changed since it was made"):
        _run(exported)
    monkeypatch.setenv("TP_HOME", str(tmp_path / "another machine"))
    assert _run(exported) == 0
    assert "-- the prepared graph is not used, and not checked: there is no record" in capsys.readouterr().out


def test_the_command_verifies_all_digests(folder_of):
    folder = folder_of(_model())
    (folder / "model.onnx_data").write_bytes(b"\1" * BYTES)
    with pytest.raises(ModelFormatError, match="SHA-256 differs"):
        _run(folder)


def test_the_graph_of_these_tests_can_be_read_by_onnx(folder_of):
    """The tests above rely on this: their base model loads with its external data."""
    folder = folder_of(_model())
    assert numpy_helper.to_array(load(folder / "model.onnx").graph.initializer[0]).shape == (4, 4)
    assert (folder / SLOTS_FILE).exists()
