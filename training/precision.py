"""A float32 graph -> one that stands coarser numbers, or the same in float16: as its weights are
stored, or as it computes.

image ─► centre  │ teacher ─► bottleneck ─► decoder │ cosine distances ─► map, score
         float32 │             float16              │            float32
"""

from typing import Literal

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FloatType = Literal["float32", "float16"]

CONVOLUTIONS = ("Conv", "ConvTranspose")
SUMS = ("ReduceSum", "ReduceL2")  # over channels: of hundreds of squares, beyond float16's range


def keep_pixels_whole(graph: bytes) -> bytes:
    """The same graph with its normalisation folded into the first convolution.

    That sees whole numbers from -128 to 255, which float16 and bfloat16 hold exactly; normalised
    pixels they round by up to a quarter of a level of gray, and that teachers notice. What is left
    of the mean is the weight of a fourth channel, 1 in the image and 0 in its padding, so that
    borders stay as they were. The graph is returned as it is where it doesn't begin that way.
    """
    model = onnx.load_model_from_string(graph)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    convolution = next(node for node in model.graph.node if node.op_type == "Conv")
    begin = _nodes_before(model, convolution)
    users = [node for node in model.graph.node if begin and begin[-1].output[0] in node.input]
    if [n.op_type for n in begin] != ["Cast", "Sub", "Div", "Transpose"] or len(users) > 1:
        return graph
    mean, scale = (constants[node.input[1]].ravel().astype(np.float64) for node in begin[1:3])
    per_level = constants[convolution.input[1]] / scale[:, None, None]
    rest = (per_level * (np.round(mean) - mean)[:, None, None]).sum(axis=1, keepdims=True)
    tensors = {
        "pixels.channels": np.array([0, 1, 2, 0], np.int64),
        "pixels.kept": np.array([1, 1, 1, 0], np.float32),
        "pixels.added": np.append(-np.round(mean), 1).astype(np.float32),
        "pixels.weights": np.concatenate([per_level, rest], axis=1).astype(np.float32),
    }
    values = [begin[0].output[0], "pixels.four", "pixels.masked", "pixels.centred", "pixels"]
    nodes = [
        begin[0],
        helper.make_node("Gather", [values[0], "pixels.channels"], [values[1]], "gather", axis=3),
        helper.make_node("Mul", [values[1], "pixels.kept"], [values[2]], "mask"),
        helper.make_node("Add", [values[2], "pixels.added"], [values[3]], "centre"),
        helper.make_node("Transpose", [values[3]], [values[4]], "turn", perm=[0, 3, 1, 2]),
    ]
    convolution.input[0], convolution.input[1] = "pixels", "pixels.weights"
    nodes += [node for node in model.graph.node if node not in begin]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    made = [numpy_helper.from_array(np.asarray(v), name) for name, v in tensors.items()]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *made])
    return _with_nodes(model, nodes)


def _nodes_before(model: ModelProto, last: NodeProto) -> list[NodeProto]:
    """The chain of first inputs from the graph's input to `last`, which is left out."""
    makers = {name: node for node in model.graph.node for name in node.output}
    chain: list[NodeProto] = []
    node = last
    while (maker := makers.get(node.input[0])) is not None:
        chain.insert(0, maker)
        node = maker
    return chain


def halve_weights(graph: bytes) -> bytes:
    """The same graph with its convolutions' weights stored as float16; the runtime widens them.

    Biases and the map's operators stay float32: they are small, and the map is exact.
    """
    model = onnx.load_model_from_string(graph)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 4:
            continue
        narrow = _narrowed(tensor)
        casts.append(_cast(narrow.name, tensor.name, TensorProto.FLOAT))
        tensor.CopyFrom(narrow)
    return _with_nodes(model, [*casts, *model.graph.node])


def compute_in_float16(graph: bytes) -> bytes:
    """The same graph with its network in float16, between a float32 normalisation and map.

    Numbers' types flow as torch promotes them: a convolution gives float16, a sum (and the product
    that is summed) float32, and everything else the widest of what it is given.
    """
    model = onnx.load_model_from_string(graph)
    _widen_weights(model)
    model = onnx.shape_inference.infer_shapes(model)
    weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    floats = {*weights, *_values(model, TensorProto.FLOAT)}
    summed = {node.input[0] for node in model.graph.node if node.op_type in SUMS}
    halves: set[str] = set()
    copies: dict[str, TensorProto] = {}  # of weights, in float16
    casts: set[str] = set()
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        given = [name for name in node.input if name in floats and name not in weights]
        wide = node.op_type in SUMS or (node.op_type == "Mul" and node.output[0] in summed)
        narrow = node.op_type in CONVOLUTIONS or (not wide and {*given} <= halves and bool(given))
        for place, name in enumerate(node.input):
            if name not in floats or (name in halves) == narrow:
                continue
            node.input[place] = other = f"{name}.{'float16' if narrow else 'float32'}"
            if name in weights:
                copies.setdefault(other, _narrowed(weights[name]))
            elif other not in casts:
                casts.add(other)
                to = TensorProto.FLOAT16 if narrow else TensorProto.FLOAT
                nodes.append(_cast(name, other, to))
        nodes.append(node)
        if narrow:
            halves |= floats.intersection(node.output)

    read = {name for node in nodes for name in node.input}
    tensors = [t for t in (*model.graph.initializer, *copies.values()) if t.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    helper.set_model_props(model, {"precision": "float16"})  # for whom the manifest doesn't reach
    return _with_nodes(model, nodes)


def _widen_weights(model: ModelProto) -> None:
    """What `halve_weights` did is undone; what it rounded stays so."""
    halves = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
    for node in [node for node in model.graph.node if node.op_type == "Cast"]:
        if node.input[0] in halves and node.attribute[0].i == TensorProto.FLOAT:
            wide = numpy_helper.to_array(halves[node.input[0]]).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(wide, node.output[0]))
            model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in halves.values():
        if tensor.name not in read:
            model.graph.initializer.remove(tensor)


def round_activations(graph: bytes) -> bytes:
    """A graph that computes on the CPU, too, what `compute_in_float16`'s does on a GPU.

    The CPU has no float16 kernels: ONNX Runtime computes in float32 there and leaves out every
    rounding in between, so that numbers beyond float16's range pass unseen. It keeps those that
    enter an operator which it does have in float16, and Max of one number is that number.
    """
    model = onnx.load_model_from_string(graph)
    halves = _values(onnx.shape_inference.infer_shapes(model), TensorProto.FLOAT16)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in halves:
                node.output[place] = exact = f"{name}.exact"
                nodes.append(helper.make_node("Max", [exact, exact], [name]))
    return _with_nodes(model, nodes)


def _values(model: ModelProto, kind: int) -> set[str]:
    """Names of the values that the graph computes in this type; shapes must have been inferred."""
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == kind}


def _narrowed(tensor: TensorProto) -> TensorProto:
    with np.errstate(over="ignore"):  # becomes infinite, which the scores will tell
        values = numpy_helper.to_array(tensor).astype(np.float16)
    return numpy_helper.from_array(values, f"{tensor.name}.float16")


def _cast(name: str, other: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [name], [other], f"{other}.cast", to=to)


def _with_nodes(model: ModelProto, nodes: list[NodeProto]) -> bytes:
    """The checked model with these nodes; types and shapes between them are inferred anew."""
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
