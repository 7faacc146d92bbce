"""A weight that an ONNX file holds twice, once transposed: torch's exporter folds the transpose of a tied head into a constant.

The file keeps one of them; ONNX Runtime makes the other one when it loads the file, so that running it is as fast.
"""

from typing import Any


def share_transposes(model: Any) -> None:
    """Replace every matrix that is the transpose of another one of the file by a Transpose of that one."""
    from onnx import helper, numpy_helper

    first: dict[tuple[Any, ...], list[Any]] = {}
    made, dropped = [], []
    for tensor in model.graph.initializer:
        if len(tensor.dims) != 2 or 1 in tensor.dims:
            continue
        rows, columns = tensor.dims
        values = numpy_helper.to_array(tensor)
        others = first.get((columns, rows, tensor.data_type), [])
        twin = next((other for other in others if (values == numpy_helper.to_array(other).T).all()), None)
        if twin is None:
            first.setdefault((rows, columns, tensor.data_type), []).append(tensor)
            continue
        made.append(helper.make_node("Transpose", [twin.name], [tensor.name], perm=[1, 0]))
        dropped.append(tensor.name)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in dropped]
    if made:
        nodes = [*made, *model.graph.node]
        del model.graph.initializer[:], model.graph.node[:]
        model.graph.initializer.extend(kept)
        model.graph.node.extend(nodes)
