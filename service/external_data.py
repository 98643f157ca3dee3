"""Whether a graph has all its weights inside, asked before a runtime opens it.

ONNX lets a tensor be the bytes of another file. Runtimes read it from the folder that the service
was started in, where its database or keys may be, and the anomaly map shows what was in it.
"""

from collections.abc import Iterator

from service.errors import BundleError

# Message -> its fields that lead to tensors, and the message in each (onnx.proto, IR version 13).
_PATHS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
_TENSOR_NAME, _EXTERNAL_DATA = 8, 13
_MAX_DEPTH = 100  # as in Protocol Buffers
_MAX_FIELDS = 200_000  # the demo graph has some three thousand
_SHOWN_NAME_BYTES = 100


def check_self_contained(graph: bytes) -> None:
    """Raises BundleError where a tensor is in another file, or where this is no ONNX graph."""
    count = 0
    path = [("Model", memoryview(graph), _fields(memoryview(graph)))]
    while path:
        message, data, fields = path[-1]
        for number, value in fields:
            count += 1
            if count > _MAX_FIELDS:
                raise BundleError(f"can't load the graph: it has more than {_MAX_FIELDS} fields")
            if message == "Tensor" and number == _EXTERNAL_DATA:
                raise BundleError(
                    f"can't load the graph: its tensor {_name(data)!r} is in another file; export "
                    "it with all its weights inside"
                )
            if value is not None and (inner := _PATHS[message].get(number)):
                path.append((inner, value, _fields(value)))
                break
        else:
            path.pop()
        if len(path) > _MAX_DEPTH:
            raise _no_graph()


def _name(tensor: memoryview) -> str:
    names = (value for number, value in _fields(tensor) if number == _TENSOR_NAME)
    return bytes((next(names, None) or b"")[:_SHOWN_NAME_BYTES]).decode(errors="replace")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """Number of each field, and its bytes where it has a length. (Protocol Buffers, Encoding.)"""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        # What is beyond 32 bits some parsers leave away, and see another field.
        if not 8 <= key < 1 << 32:
            raise _no_graph()
        value = None
        match key & 7:
            case 0:
                _, place = _varint(data, place)
            case 1:
                place += 8
            case 2:
                size, place = _varint(data, place)
                value = data[place : place + size]
                place += size
            case 5:
                place += 4
            case _:
                raise _no_graph()
        if place > len(data):
            raise _no_graph()
        yield key >> 3, value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and the place behind it."""
    value = 0
    for count, byte in enumerate(data[place : place + 10]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, place + count + 1
    raise _no_graph()


def _no_graph() -> BundleError:
    return BundleError("can't load the graph: the file is no ONNX model, or is damaged")
