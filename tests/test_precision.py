"""float32 graphs in float16: what is narrow and what stays wide, and that overflow is seen."""

import importlib.util

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from training_fixtures import normal_picture, randomise

from service.detector import Detector
from service.devices import OpenVinoSession
from service.errors import InferenceFailed
from training.export import Scorer, relative_difference, to_onnx
from training.model import AnomalyMap, ReverseDistillation
from training.precision import (
    compute_in_float16,
    halve_weights,
    keep_pixels_whole,
    round_activations,
)

SIZE = (32, 64)
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
KINDS = {  # skips, bottleneck, refinement
    "rd4ad": ("none", "mff", False),
    "sk-rd4ad": ("sk", "mff", False),
    "gated": ("gated", "mff", False),
    "drd": ("none", "mfcf", True),
}


@pytest.fixture(scope="module", params=KINDS)
def wide(request):
    skips, bottleneck, refinement = KINDS[request.param]
    model = ReverseDistillation("resnet18", skips, 16, bottleneck)
    randomise(model, 0)
    return to_onnx(Scorer(model, AnomalyMap(SIZE, refinement=refinement)).eval(), SIZE)


@pytest.fixture(scope="module")
def narrow(wide):
    return compute_in_float16(wide)


def pictures(count: int = 3) -> np.ndarray:
    rng = np.random.default_rng(5)
    return np.stack([normal_picture(rng, SIZE) for _ in range(count)])


def answers(graph: bytes) -> tuple[np.ndarray, np.ndarray]:
    predictions = Detector(graph, SIZE, "cpu").run(pictures())
    return np.stack([p.anomaly_map for p in predictions]), np.array([p.score for p in predictions])


def typed(graph: bytes) -> tuple[onnx.GraphProto, dict[str, int]]:
    """The graph, and the type of each of its values."""
    model = onnx.load_model_from_string(graph)
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return graph, types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def test_weights_that_are_stored_in_float16_are_no_obstacle(wide, narrow):
    assert answers(compute_in_float16(halve_weights(wide)))[1] == pytest.approx(
        answers(narrow)[1], rel=1e-6
    )


def test_openvino_keeps_the_cosines_out_of_bfloat16(wide):
    """Those of the map: the gates', which only weigh skips, lie within the network."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    session = OpenVinoSession(keep_pixels_whole(wide))
    if session.precision != "bfloat16":
        pytest.skip("this CPU has no bfloat16")
    network, cosines = session._requests
    assert len(cosines.model_inputs) == len(network.model_outputs) == 6
    for port in cosines.model_inputs:
        assert len(port.partial_shape) == 4

    maps, scores = session.run(pictures())

    expected_maps, expected_scores = answers(wide)
    assert scores == pytest.approx(expected_scores, rel=1e-2)
    assert relative_difference(maps, expected_maps) < 1e-2


def test_whole_pixels_change_no_answer(wide):
    """Borders included: SIZE is so small that every feature sees one."""
    maps, scores = answers(keep_pixels_whole(wide))
    expected_maps, expected_scores = answers(wide)

    assert relative_difference(maps, expected_maps) < 1e-5
    assert scores == pytest.approx(expected_scores, rel=1e-5)


def test_the_first_convolution_sees_whole_numbers_that_bfloat16_holds(wide):
    model = onnx.load_model_from_string(keep_pixels_whole(wide))
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    model.graph.output.append(
        helper.make_tensor_value_info(first.input[0], FLOAT, ["free", 4, *SIZE])
    )
    extremes = np.stack([np.zeros((*SIZE, 3), np.uint8), np.full((*SIZE, 3), 255, np.uint8)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    (seen,) = session.run([first.input[0]], {"image": extremes})

    assert (seen == np.round(seen)).all() and np.abs(seen).max() <= 256
    assert (seen[:, 3] == 1).all()
    assert (seen[1] - seen[0])[:3].min() == (seen[1] - seen[0])[:3].max() == 255


def test_whole_pixels_are_what_bfloat16_needs(wide):
    """Rounding what the first convolution is given, as bfloat16 does, changes nothing then."""

    def rounded(graph: bytes) -> np.ndarray:
        model = onnx.load_model_from_string(graph)
        first = next(node for node in model.graph.node if node.op_type == "Conv")
        place = list(model.graph.node).index(first)
        given = first.input[0]
        casts = [
            helper.make_node("Cast", [given], ["coarse"], to=TensorProto.BFLOAT16),
            helper.make_node("Cast", ["coarse"], ["wide"], to=FLOAT),
        ]
        first.input[0] = "wide"
        for cast in reversed(casts):
            model.graph.node.insert(place, cast)
        return answers(model.SerializeToString())[0]

    whole = keep_pixels_whole(wide)

    assert np.array_equal(rounded(whole), answers(whole)[0])
    assert relative_difference(rounded(wide), answers(wide)[0]) > 1e-5


def test_a_graph_that_begins_otherwise_is_left_as_it_is():
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["levels"], to=FLOAT),
            helper.make_node("Conv", ["levels", "weights"], ["anomaly_map"]),
        ],
        "other",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("anomaly_map", FLOAT, ["n", 1, 8, 8])],
        [numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "weights")],
    )
    other = helper.make_model(graph).SerializeToString()

    assert keep_pixels_whole(other) == other


def test_convolutions_are_float16_and_normalisation_cosine_and_map_float32(narrow):
    graph, types = typed(narrow)

    convolutions = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose")]
    assert len(convolutions) == 38
    for node in convolutions:
        assert {types[name] for name in (*node.input, *node.output)} == {FLOAT16}
    for node in graph.node:
        if node.op_type in ("Relu", "MaxPool"):
            assert types[node.output[0]] == FLOAT16, node.name
        if node.op_type in ("Transpose", "ReduceSum", "ReduceL2", "Sqrt", "MatMul", "ReduceMax"):
            assert {types[node.input[0]], types[node.output[0]]} == {FLOAT}, node.name


def test_casts_stand_only_where_the_types_meet(narrow):
    """One after normalisation, one for each of six feature maps, one behind each of two gates."""
    graph, _ = typed(narrow)
    casts = [node for node in graph.node if node.op_type == "Cast"]

    gated = any(node.op_type == "ReduceL2" for node in graph.node)
    assert len(casts) == 1 + 1 + 6 + 2 * gated  # the first makes numbers of the pixels
    assert len({node.name for node in graph.node}) == len(graph.node)


def test_the_interface_stays_and_nothing_is_added_but_casts(wide, narrow):
    (before, _), (after, _) = typed(wide), typed(narrow)

    assert list(after.input) == list(before.input) and list(after.output) == list(before.output)
    operators = [node.op_type for node in after.node if node.op_type != "Cast"]
    assert operators == [node.op_type for node in before.node if node.op_type != "Cast"]
    assert len(narrow) < 0.51 * len(wide)


def test_weights_are_rounded_once_from_the_folded_float32_ones(wide, narrow):
    (before, _), (after, _) = typed(wide), typed(narrow)

    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.initializer}
    for tensor in after.initializer:
        original = exact[tensor.name.removesuffix(".float16")]
        value = numpy_helper.to_array(tensor)
        assert (value == original.astype(value.dtype)).all(), tensor.name


def test_the_graph_itself_says_what_it_computes_in(wide, narrow):
    """The service reads it without the manifest."""
    properties = onnx.load_model_from_string(narrow).metadata_props
    assert [(entry.key, entry.value) for entry in properties] == [("precision", "float16")]
    assert not onnx.load_model_from_string(wide).metadata_props


def test_openvino_runs_it_in_its_own_precision(wide, narrow):
    """float16 is how its weights are stored then."""
    pytest.importorskip("openvino")
    _, scores = answers(wide)
    for precision in ("float32", "auto"):
        detector = Detector(narrow, SIZE, "openvino", precision=precision)
        found = np.array([p.score for p in detector.run(pictures())])
        assert relative_difference(found, scores) < (5e-3 if precision == "float32" else 5e-2)


def test_scores_and_maps_hardly_change(wide, narrow):
    maps, scores = answers(wide)
    for graph in (narrow, round_activations(narrow)):
        other_maps, other_scores = answers(graph)
        assert 0 < relative_difference(other_maps, maps) < 5e-3
        assert relative_difference(other_scores, scores) < 5e-3


def test_activations_are_rounded_on_the_cpu_too(narrow):
    """Else their change would be that of the weights alone."""
    maps, _ = answers(narrow)
    rounded, _ = answers(round_activations(narrow))

    assert relative_difference(rounded, maps) > 1e-5


def louder(graph: bytes, scale: float) -> bytes:
    """The network with a first convolution whose numbers are `scale` times as large."""
    model = onnx.load_model_from_string(graph)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    for tensor in model.graph.initializer:
        if tensor.name in first.input:
            values = numpy_helper.to_array(tensor) * np.float32(scale)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model.SerializeToString()


def test_activations_beyond_float16s_range_are_seen_though_the_cpu_has_no_float16(wide):
    """Their weights fit: without the roundings spelled out, the CPU would answer as if all did."""
    narrow = compute_in_float16(louder(wide, 2e4))

    assert np.isfinite(answers(narrow)[1]).all()
    with pytest.raises(InferenceFailed, match="a score that is no number"):
        answers(round_activations(narrow))


@pytest.mark.parametrize("change", [halve_weights, compute_in_float16])
def test_weights_beyond_float16s_range_are_seen(wide, change):
    with pytest.raises(InferenceFailed, match="a score that is no number"):
        answers(change(louder(wide, 1e7)))


def test_a_weight_read_in_both_types_is_kept_in_both():
    """No exported network shares one so far; the exporter merges equal constants."""
    weight = numpy_helper.from_array(np.full((3, 3, 1, 1), 0.1, np.float32), "weight")
    axes = numpy_helper.from_array(np.array([1]), "axes")
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["features"]),
        helper.make_node("ReduceSum", ["features", "axes"], ["sum"], keepdims=1),
        helper.make_node("Add", ["sum", "weight"], ["map"]),
    ]
    shape = (3, 3, 8, 8)
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "shared",
            [helper.make_tensor_value_info("image", FLOAT, shape)],
            [helper.make_tensor_value_info("map", FLOAT, shape)],
            [weight, axes],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
    )

    graph, types = typed(compute_in_float16(model.SerializeToString()))

    assert {types["weight"], types["weight.float16"]} == {FLOAT, FLOAT16}
    assert [node.op_type for node in graph.node] == ["Cast", "Conv", "Cast", "ReduceSum", "Add"]


def test_halving_rounds_each_weight_to_float16_and_no_more(wide):
    before = {t.name: numpy_helper.to_array(t) for t in typed(wide)[0].initializer}
    after = typed(halve_weights(wide))[0].initializer

    assert len(after) == len(before)
    for tensor in after:
        value = numpy_helper.to_array(tensor)
        original = before[tensor.name.removesuffix(".float16")]
        assert (value == original.astype(value.dtype)).all()
