"""Graphs that would read other files, wherever in them the reference is."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import SIZE, added_to_map, brightness_graph
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper

from service import devices
from service.detector import Detector
from service.errors import BundleError, DeviceUnavailable
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
    return added_to_map(external(location))


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
def test_no_runtime_opens_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, kind: str
) -> None:
    """Each of them would read the one beside, and the map would show it."""
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


def test_no_flipped_bit_hides_the_reference_from_the_check_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is let through, ONNX Runtime by itself doesn't read the file for either."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(np.full(SIZE, SECRET, np.float32).tobytes())
    attack = leaking("secret")
    assert scored(attack) == pytest.approx(SECRET)  # else the attack has lost its bite

    for place in range(8 * len(attack)):
        data = bytearray(attack)
        data[place // 8] ^= 1 << place % 8
        with contextlib.suppress(BundleError):
            check_self_contained(bytes(data))
            with contextlib.suppress(Exception):  # no graph any more
                assert scored(bytes(data)) != pytest.approx(SECRET)


def scored(graph: bytes) -> float:
    """Of a black picture, by ONNX Runtime as it comes."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    black = np.zeros((1, *SIZE, 3), np.uint8)
    return float(session.run(["image_score"], {"image": black})[0][0])


def field(tag: bytes, data: bytes) -> bytes:
    """A field as Protocol Buffers write it, however its tag is spelt."""
    size, rest = b"", len(data)
    while rest > 0x7F:
        size += bytes([rest & 0x7F | 0x80])
        rest >>= 7
    return tag + size + bytes([rest]) + data


@pytest.mark.parametrize("device", ["cpu", "openvino"])
@pytest.mark.parametrize(
    "tag",
    [
        b"\x6a",
        b"\xea\x00",
        b"\xea\x80\x80\x80\x00",
        b"\xea\x80\x80\x80\x10",  # bit 32 is set, which parsers in C++ drop
        b"\xea\x80\x80\x80\x80\x00",
        b"\xea\x80\x80\x80\x80\x80\x80\x80\x80\x00",
    ],
    ids=bytes.hex,
)
def test_a_reference_is_seen_however_its_tag_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: bytes, device: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(np.full(SIZE, SECRET, np.float32).tobytes())
    leak = onnx.load_from_string(leaking("secret"))
    tensor = leak.graph.initializer.pop()
    entries = [each.SerializeToString() for each in tensor.external_data]
    tensor.ClearField("external_data")
    spelt = tensor.SerializeToString() + b"".join(field(tag, each) for each in entries)
    graph = leak.graph.SerializeToString() + field(b"\x2a", spelt)
    leak.ClearField("graph")

    with pytest.raises(BundleError):
        Detector(leak.SerializeToString() + field(b"\x3a", graph), SIZE, device)


def test_more_fields_than_any_network_has_are_refused_before_they_take_memory() -> None:
    with pytest.raises(BundleError, match="more than 200000 fields"):
        check_self_contained(b"\x12\x00" * 200_001)


def test_graphs_in_graphs_without_end_are_refused() -> None:
    graph = b""
    for _ in range(60):  # each is a graph in an attribute of a node
        graph = field(b"\x0a", field(b"\x2a", field(b"\x32", graph)))
    with pytest.raises(BundleError, match="no ONNX model"):
        check_self_contained(field(b"\x3a", graph))


def test_of_a_long_name_the_beginning_is_told() -> None:
    leak = model()
    leak.graph.initializer.append(external("other"))
    leak.graph.initializer[-1].name = "n" * 5000

    with pytest.raises(BundleError) as refusal:
        check_self_contained(leak.SerializeToString())
    assert len(str(refusal.value)) < 300


def test_openvinos_own_format_is_not_taken_for_a_graph(tmp_path: Path) -> None:
    """Its XML, in a field that ONNX would take for the name of who made the graph."""
    openvino = pytest.importorskip("openvino")
    parameter = openvino.opset13.parameter([1, 4], np.float32, name="image")
    openvino.save_model(
        openvino.Model([openvino.opset13.relu(parameter)], [parameter]), tmp_path / "model.xml"
    )
    data = field(b"\x12", (tmp_path / "model.xml").read_bytes())
    assert devices.openvino_core().read_model(data, b"").inputs  # else it has lost its bite

    with pytest.raises((BundleError, DeviceUnavailable)):
        Detector(data, SIZE, "openvino")
    assert not devices._read_onnx(data).inputs


def test_onnx_runtimes_own_format_is_not_taken_for_a_graph(tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(GRAPH, options, providers=["CPUExecutionProvider"])
    data = (tmp_path / "model.ort").read_bytes()
    assert scored(data) == 0  # else it has lost its bite

    with pytest.raises(Exception, match="INVALID_PROTOBUF"):
        ort.InferenceSession(data, devices._session_options(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "data",
    [b"not onnx", b"\x0a", b"\x3a\x05ab", b"\x0d\x00", b"\xff" * 20, b"\x0b\x0c"],
    ids=["text", "no length", "too long", "half a number", "endless number", "group"],
)
def test_what_protobuf_could_not_read_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="no ONNX model, or is damaged"):
        check_self_contained(data)
