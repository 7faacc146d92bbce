"""A matrix that a file holds twice, once transposed."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from lrc.lower.transposes import share_transposes


def test_the_transpose_of_a_stored_matrix_is_made_on_loading() -> None:
    generator = np.random.default_rng(0)
    W, other = generator.normal(size=(5, 3)).astype(np.float32), generator.normal(size=(5, 3)).astype(np.float32)
    tensors = {"W": W, "W_t": np.ascontiguousarray(W.T), "other": other, "row": W[:1], "column": np.ascontiguousarray(W[:1].T)}
    names = {"x": ["batch", 5], "h": ["batch", 3], "y": ["batch", 5]}
    x, h, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in names.items())
    nodes = [helper.make_node("MatMul", ["x", "W"], ["h"]), helper.make_node("MatMul", ["h", "W_t"], ["y"])]
    stored = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [h, y], stored), opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 9
    share_transposes(model)
    onnx.checker.check_model(model, full_check=True)
    assert [tensor.name for tensor in model.graph.initializer] == ["W", "other", "row", "column"]
    given = generator.normal(size=(2, 5)).astype(np.float32)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": given})
    assert np.allclose(found[1], given @ W @ W.T, atol=1e-5)
    before = model.SerializeToString()
    share_transposes(model)
    assert model.SerializeToString() == before
