"""Names and counts against the published checkpoint; block FP8 against brute force."""

import ast
from pathlib import Path

import numpy as np
import pytest

from .cases import V3_671B, tiny_config
from .weights import (
    dequantize_blocks,
    e4m3_values,
    quantize_blocks,
    random_weights,
    round_to_e4m3,
    weight_shapes,
)


def count(shapes):
    return sum(int(np.prod(shape)) for shape in shapes.values())


def test_published_parameter_counts_of_the_671b_model():
    """Reference facts, 1.2: counted there from a dump of the released checkpoint."""
    main = weight_shapes(V3_671B | {"num_nextn_predict_layers": 0})
    assert count(main) == 671_026_419_200
    assert count(weight_shapes(V3_671B)) - count(main) == 11_610_068_224
    stored = weight_shapes(V3_671B, copies=True)
    assert count(stored) == 684_489_845_504
    matrices = [shape for name, shape in stored.items() if is_quantized(name)]
    assert len(stored) + len(matrices) == 91_991
    assert sum(-(-rows // 128) * -(-columns // 128) for rows, columns in matrices) == 41_540_496


def is_quantized(name):
    return (name.endswith("_proj.weight") and "eh_proj" not in name) or "with_mqa" in name


def test_random_weights_are_exact_in_float32_and_repeat():
    config = tiny_config()
    weights = random_weights(config, seed=0, copies=True)
    again = random_weights(config, seed=0)
    assert {name: value.shape for name, value in weights.items()} == weight_shapes(config, True)
    for name, value in again.items():
        np.testing.assert_array_equal(value, weights[name])
        assert value.dtype == np.float64
        np.testing.assert_array_equal(value, value.astype(np.float32))
    copy = weights["model.layers.2.shared_head.head.weight"]
    np.testing.assert_array_equal(copy, weights["lm_head.weight"])


def test_e4m3_has_the_right_numbers():
    values = e4m3_values()
    assert values[0] == 0 and values[1] == 2.0**-9 and values[8] == 2.0**-6
    assert values[-1] == 448 and np.all(np.diff(values) > 0)


def test_e4m3_rounding_equals_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = e4m3_values()
    ties = (values[1:] + values[:-1]) / 2
    generator = np.random.default_rng(0)
    x = np.concatenate([values, ties, 2.0 ** generator.uniform(-12, 8.8, 2000)])
    x = np.concatenate([x, -x]).astype(np.float32)
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(round_to_e4m3(x.astype(np.float64)), expected)
    np.testing.assert_array_equal(round_to_e4m3(np.array([460.0, -1e9])), [448.0, -448.0])


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 57), (1, 300), (576, 128)])
def test_blocks_come_back_within_half_a_step(shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    values, scales = quantize_blocks(matrix)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert np.abs(values).max() == 448
    error = np.abs(dequantize_blocks(values, scales) - matrix)
    allowed = np.maximum(np.abs(matrix) / 16, 2.0**-10 * scales.max())
    assert np.all(error <= allowed * (1 + 1e-6))


def test_each_block_has_its_own_scale():
    matrix = np.ones((130, 257))
    matrix[128:, 256] = 56.0
    matrix[:128, 128:256] = 0.0
    values, scales = quantize_blocks(matrix)
    one = np.float64(np.float32(1 / 448))
    np.testing.assert_array_equal(scales, [[one, 1.0, one], [one, one, 0.125]])
    np.testing.assert_allclose(dequantize_blocks(values, scales), matrix, rtol=1e-7)
    swapped = scales.copy()
    swapped[[0, 1], 2] = swapped[[1, 0], 2]  # negative control: the check above can fail
    assert not np.allclose(dequantize_blocks(values, swapped), matrix, rtol=1e-2)


def test_scales_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"need \(2, 1\)"):
        dequantize_blocks(np.ones((129, 128)), np.ones((1, 1)))


def test_the_oracle_is_independent():
    """No file here, tests apart, imports anything but NumPy and the standard library."""
    allowed = {"collections", "dataclasses", "itertools", "math", "numpy", "typing"}
    for path in Path(__file__).parent.glob("*.py"):
        if path.name.startswith("test_"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in allowed, path
