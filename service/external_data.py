"""Whether a graph has all its weights inside, asked before a runtime opens it.

ONNX lets a tensor be the bytes of another file. Runtimes read any file of the folder they were
started in, or of the whole system, and the graph's answer shows what was in it.
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


def check_self_contained(graph: bytes) -> None:
    """Raises BundleError where a tensor is in another file, or where this is no ONNX graph."""
    pending = [("Model", memoryview(graph))]
    while pending:
        message, data = pending.pop()
        fields = list(_fields(data))
        if message == "Tensor" and any(number == _EXTERNAL_DATA for number, _ in fields):
            raise BundleError(
                f"can't load the graph: its tensor {_name(fields)!r} is in another file; export it "
                "with all its weights inside"
            )
        paths = _PATHS[message]
        pending += [(paths[number], value) for number, value in fields if number in paths]


def _name(tensor: list[tuple[int, memoryview]]) -> str:
    names = [bytes(value) for number, value in tensor if number == _TENSOR_NAME]
    return b"".join(names).decode(errors="replace")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field with a length; others are left out, as no tensor is in them.
    (Protocol Buffers, Encoding.)"""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        wire = key & 7
        if wire == 0:
            _, place = _varint(data, place)
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _no_graph()
        if size > len(data) - place:
            raise _no_graph()
        if wire == 2:
            yield key >> 3, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and the place behind it."""
    value = 0
    for count, byte in enumerate(data[place : place + 10]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, place + count + 1
    raise _no_graph()


def _no_graph() -> BundleError:
    return BundleError("can't load the graph: the file is no ONNX model, or is damaged")
