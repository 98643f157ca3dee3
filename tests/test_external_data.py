"""Graphs that would read other files, wherever in them the reference is."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from conftest import SIZE, brightness_graph
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper

from service.detector import Detector
from service.errors import BundleError
from service.external_data import check_self_contained

GRAPH = brightness_graph()
SECRET = 0.25


def external(location: str) -> TensorProto:
    """An image of floats that is in another file."""
    tensor = TensorProto(name="other", data_type=TensorProto.FLOAT, dims=(1, *SIZE))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", str(4 * SIZE[0] * SIZE[1]))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model() -> ModelProto:
    return onnx.load_from_string(GRAPH)


def leaking(location: str) -> bytes:
    """Adds the other file's numbers to its map."""
    leak = model()
    leak.graph.initializer.append(external(location))
    *before, maximum = leak.graph.node
    before[-1].output[0] = "own"
    add = helper.make_node("Add", ["own", "other"], ["anomaly_map"])
    del leak.graph.node[:]
    leak.graph.node.extend([*before, add, maximum])
    return leak.SerializeToString()


def in_constant() -> ModelProto:
    leak = model()
    leak.graph.node.append(helper.make_node("Constant", [], ["other"], value=external("other")))
    return leak


def in_branch() -> ModelProto:
    leak = model()
    branch = GraphProto(name="branch", initializer=[external("other")])
    leak.graph.node.append(helper.make_node("If", ["yes"], ["other"], then_branch=branch))
    return leak


def in_lists() -> ModelProto:
    leak = model()
    branch = GraphProto(name="branch", initializer=[external("other")])
    attribute = AttributeProto(name="branches", type=AttributeProto.GRAPHS, graphs=[branch])
    leak.graph.node.append(onnx.NodeProto(op_type="Any", attribute=[attribute]))
    return leak


def in_sparse() -> ModelProto:
    leak = model()
    leak.graph.sparse_initializer.add().values.CopyFrom(external("other"))
    return leak


def in_function() -> ModelProto:
    leak = model()
    constant = helper.make_node("Constant", [], ["other"], value=external("other"))
    leak.functions.add(name="Leak", domain="own", node=[constant])
    return leak


def in_training() -> ModelProto:
    leak = model()
    leak.training_info.add().algorithm.initializer.append(external("other"))
    return leak


@pytest.mark.parametrize(
    "make", [in_constant, in_branch, in_lists, in_sparse, in_function, in_training]
)
def test_a_tensor_of_another_file_is_found_wherever_it_is(make: Callable[[], ModelProto]) -> None:
    with pytest.raises(BundleError, match="tensor 'other' is in another file"):
        check_self_contained(make().SerializeToString())


@pytest.mark.parametrize("device", ["cpu", "openvino", "auto"])
@pytest.mark.parametrize("kind", ["beside", "above", "absolute"])
def test_no_runtime_opens_another_file(tmp_path, monkeypatch, device: str, kind: str) -> None:
    """Each of them would read at least one of these, and the map would show it."""
    folder = tmp_path / "service"
    folder.mkdir()
    monkeypatch.chdir(folder)
    secret = {"beside": folder, "above": tmp_path, "absolute": tmp_path}[kind] / "secret"
    secret.write_bytes(np.full(SIZE, SECRET, np.float32).tobytes())
    location = {"beside": "secret", "above": "../secret", "absolute": str(secret)}[kind]

    with pytest.raises(BundleError, match="tensor 'other' is in another file"):
        Detector(leaking(location), SIZE, device)


def test_weights_inside_are_let_through() -> None:
    check_self_contained(GRAPH)


@given(st.binary(max_size=200) | st.builds(lambda cut: GRAPH[:cut], st.integers(1, len(GRAPH) - 1)))
def test_what_is_no_graph_is_let_through_or_refused_and_never_fails(data: bytes) -> None:
    try:
        check_self_contained(data)
    except BundleError as error:
        assert "can't load the graph" in str(error)


@given(st.integers(0, len(leaking("other")) - 1), st.integers(0, 7))
def test_a_flipped_bit_hides_no_reference_from_the_check_that_a_parser_sees(
    place: int, bit: int
) -> None:
    data = bytearray(leaking("other"))
    data[place] ^= 1 << bit
    try:
        parsed = onnx.load_from_string(bytes(data))
    except Exception:  # whatever protobuf raises: no runtime reads it either
        return
    if any(tensor.external_data for tensor in parsed.graph.initializer):
        with pytest.raises(BundleError):
            check_self_contained(bytes(data))


@pytest.mark.parametrize(
    "data",
    [b"not onnx", b"\x0a", b"\x3a\x05ab", b"\x0d\x00", b"\xff" * 20, b"\x0b\x0c"],
    ids=["text", "no length", "too long", "half a number", "endless number", "group"],
)
def test_what_protobuf_could_not_read_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="no ONNX model, or is damaged"):
        check_self_contained(data)
