"""What is mended in a file of torch's exporter: names, sizes, types, and what it tells of the machine that made it."""

import re
from collections.abc import Iterator
from typing import Any

from lrc.program import Program


def clean(model: Any) -> None:
    """Remove what tells of the machine and the code that made the file: stack traces, paths, notes of the exporter."""
    model.producer_name, model.producer_version, model.doc_string = "lrc", "", ""
    del model.metadata_props[:]
    for graph in graphs_of(model):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for value in [*graph.node, *getattr(graph, "initializer", ()), *graph.value_info, *graph.input, *graph.output]:
            if isinstance(value, str):  # inputs of a function
                continue
            value.doc_string = ""
            del value.metadata_props[:]


def name_sizes(model: Any, program: Program) -> None:
    """Call the dynamic sizes as the program calls them (`batch`, `sequence`), where torch.export has made up names."""
    names: dict[str, str] = {}
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        names |= {sizes[dim].dim_param: name for dim, name in program.inputs.dynamic.get(value.name, {}).items()}
    for graph in graphs_of(model):
        for value in [*graph.value_info, *graph.input, *graph.output]:
            if not isinstance(value, str):
                for size in (size for size in value.type.tensor_type.shape.dim if size.dim_param):  # setting one unfixes it
                    size.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.dim_param)


def expand_rotations(model: Any) -> None:
    """Give every text its own cosines and sines: ONNX Runtime's RotaryEmbedding refuses those of one for a whole batch."""
    from onnx import TensorProto, helper

    nodes, made = list(model.graph.node), []
    for place, node in enumerate(nodes):
        if node.op_type == "RotaryEmbedding" and len(node.input) == 3:  # with positions as a fourth input they are tables
            batch, shape = f"rotary_{place}_batch", f"rotary_{place}_shape"
            made.append(helper.make_node("Shape", [node.input[0]], [batch], start=0, end=1))
            made.append(helper.make_node("Pad", [batch, "rotary_pads", "rotary_one"], [shape]))
            for i in (1, 2):
                expanded = f"rotary_{place}_{i}"
                made.append(helper.make_node("Expand", [node.input[i], shape], [expanded]))
                node.input[i] = expanded
        made.append(node)
    if len(made) > len(nodes):
        for name, values in (("rotary_pads", [0, 2]), ("rotary_one", [1])):
            dims = [len(values)] if name == "rotary_pads" else []
            model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, dims, values))
        del model.graph.node[:]
        model.graph.node.extend(made)


def name_ties(model: Any, program: Program) -> None:
    """Call a tied weight by the first of its names, as the program does; torch.export keeps the last of a module's."""
    stored = {tensor.name for tensor in model.graph.initializer}
    first = {name: program.names.canonical.get(name, name) for name in stored}
    names = {name: other for name, other in first.items() if other not in stored}
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for graph in graphs_of(model):
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
        for value in graph.value_info:
            value.name = names.get(value.name, value.name)


def widen(model: Any) -> bool:
    """Turn every bfloat16 of a file into float32, which holds the same numbers. Returns whether there was one."""
    from onnx import TensorProto, numpy_helper

    found = False
    for graph in graphs_of(model):
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        for tensor in [*getattr(graph, "initializer", ()), *(a.t for a in attributes if a.HasField("t"))]:
            if tensor.data_type == TensorProto.BFLOAT16:
                found = True
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
        for attribute in attributes:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.BFLOAT16:
                found, attribute.i = True, TensorProto.FLOAT
        for value in [*graph.value_info, *graph.input, *graph.output]:
            if not isinstance(value, str) and value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                found, value.type.tensor_type.elem_type = True, TensorProto.FLOAT
    return found


def graphs_of(model: Any) -> Iterator[Any]:
    """Yield every graph and function of a file, those inside of nodes too."""
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        yield graph
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
