"""Every operation's pullback against central differences."""

import numpy as np
import pytest

from . import tape

MASK = np.array([[True, False, True], [False, True, True]])
ROWS = np.array([[0, 2, 2], [3, 0, 2]])

OPERATIONS = {
    "add": (lambda a, b: a + b, [(2, 3), (2, 3)]),
    "add, broadcast both ways": (lambda a, b: a + b, [(2, 1), (4, 1, 3)]),
    "subtract": (lambda a, b: 2.0 - a - b, [(2, 3), (3,)]),
    "multiply": (lambda a, b: a * b, [(2, 3), (1, 3)]),
    "multiply by an array on the left": (lambda a: np.arange(3.0) * a, [(2, 3)]),
    "a tensor used twice": (lambda a: a * a * a + a, [(2, 3)]),
    "divide": (lambda a, b: a / (b * b + 1.0) + 1.0 / (a * a + 1.0), [(2, 3), (2, 1)]),
    "power": (lambda a: (a * a + 0.5) ** -0.5, [(2, 3)]),
    "exp": (tape.exp, [(2, 3)]),
    "log": (lambda a: tape.log(a * a + 1.0), [(2, 3)]),
    "sigmoid": (tape.sigmoid, [(2, 3)]),
    "where": (lambda a, b: tape.where(MASK, a, b * 2.0), [(2, 3), (3,)]),
    "matmul": (tape.matmul, [(2, 3), (3, 4)]),
    "matmul, batched": (tape.matmul, [(5, 2, 3), (3, 4)]),
    "einsum, attention scores": (
        lambda a, b: tape.einsum("bqhd,bkhd->bhqk", a, b),
        [(2, 3, 2, 4), (2, 5, 2, 4)],
    ),
    "einsum, a shared key": (
        lambda a, b: tape.einsum("bqhd,bkd->bhqk", a, b),
        [(2, 3, 2, 4), (2, 5, 4)],
    ),
    "total": (tape.total, [(2, 3)]),
    "total of two axes": (lambda a: tape.total(a, axis=(0, 2)), [(2, 3, 4)]),
    "mean of an axis, kept": (lambda a: tape.mean(a, axis=-1, keepdims=True), [(2, 3)]),
    "softmax": (tape.softmax, [(2, 3)]),
    "softmax with a masked entry": (
        lambda a: tape.softmax(tape.where(MASK, a, -np.inf)),
        [(2, 3)],
    ),
    "log_softmax": (tape.log_softmax, [(2, 3)]),
    "reshape": (lambda a: tape.reshape(a, (3, 2)), [(2, 3)]),
    "transpose": (lambda a: tape.transpose(a, (2, 0, 1)), [(2, 3, 4)]),
    "concatenate": (lambda a, b: tape.concatenate([a, b], axis=1), [(2, 3), (2, 1)]),
    "slice": (lambda a: a[..., 1:3], [(2, 4)]),
    "column": (lambda a: a[:, 0], [(2, 4)]),
    "gather with repeated rows": (lambda a: a[ROWS], [(4, 2)]),
    "gather by pairs": (lambda a: a[np.array([0, 1, 1]), np.array([2, 0, 0])], [(2, 3)]),
    "scatter_add": (lambda a: tape.scatter_add(a, np.array([1, 3, 1]), 5), [(3, 2)]),
}


def numeric_gradient(function, arrays, which, cotangent, step=1e-6):
    """Central differences of sum(cotangent * function(*arrays)) in arrays[which]."""
    gradient = np.zeros(arrays[which].shape)
    for place in np.ndindex(gradient.shape):
        ends = []
        for sign in (1.0, -1.0):
            moved = [array.copy() for array in arrays]
            moved[which][place] += sign * step
            output = function(*(tape.parameter(array) for array in moved))
            ends.append(np.sum(cotangent * output.value))
        gradient[place] = (ends[0] - ends[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", OPERATIONS)
def test_pullback_equals_central_differences(name):
    function, shapes = OPERATIONS[name]
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(shape) for shape in shapes]
    leaves = [tape.parameter(array) for array in arrays]
    output = function(*leaves)
    cotangent = generator.standard_normal(output.shape)
    found = tape.gradients(output, leaves, cotangent)
    for which in range(len(arrays)):
        expected = numeric_gradient(function, arrays, which, cotangent)
        np.testing.assert_allclose(found[which], expected, rtol=1e-7, atol=1e-8)


def test_a_leaf_the_output_ignores_has_gradient_zero():
    used, ignored = tape.parameter([1.0, 2.0]), tape.parameter([[3.0]])
    found = tape.gradients(tape.total(used * used), [used, ignored])
    np.testing.assert_array_equal(found[0], [2.0, 4.0])
    np.testing.assert_array_equal(found[1], [[0.0]])


def test_constants_keep_no_graph():
    result = tape.exp(tape.as_tensor([1.0])) * 2.0
    assert not result.tracked and result.parents == ()


def test_a_graph_with_shared_parts_is_walked_once_a_tensor():
    x = tape.parameter(np.ones(()))
    y = x
    for _ in range(60):  # 2^60 paths from y to x
        y = y + y
    assert tape.gradients(y, [x])[0] == 2.0**60


def test_einsum_refuses_an_equation_it_cannot_transpose():
    with pytest.raises(AssertionError):
        tape.einsum("ab,cd->ac", np.ones((2, 2)), np.ones((2, 2)))
