"""Reverse-mode differentiation over float64 NumPy arrays, in one small file.

Every operation returns a `Tensor` that remembers its parents and a pullback: the function that
turns the gradient of its own value into one gradient a parent. `gradients` visits the tensors in
the reverse order of their making, which is a topological order, and adds up what arrives.

    >>> x = parameter([1.0, 2.0])
    >>> gradients(total(x * x), [x])
    [array([2., 4.])]

A tensor made from constants only is not tracked and keeps no parents, so plain evaluation costs
no memory. Arrays and numbers mix freely with tensors and count as constants.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

_serials = itertools.count()

Pullback = Callable[[np.ndarray], tuple[np.ndarray, ...]]


class Tensor:
    """A float64 array and the way back to what it was computed from."""

    __slots__ = ("parents", "pullback", "serial", "tracked", "value")
    __array_ufunc__ = None  # so that `array * tensor` calls Tensor.__rmul__, not NumPy's loop

    def __init__(
        self,
        value,
        parents: tuple["Tensor", ...] = (),
        pullback: Pullback | None = None,
        tracked: bool = False,
    ):
        self.value = np.asarray(value, dtype=np.float64)
        self.tracked = tracked or any(parent.tracked for parent in parents)
        self.parents = parents if self.tracked else ()
        self.pullback = pullback if self.tracked else None
        self.serial = next(_serials)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __add__(self, other):
        return add(self, other)

    def __radd__(self, other):
        return add(self, other)

    def __mul__(self, other):
        return multiply(self, other)

    def __rmul__(self, other):
        return multiply(self, other)

    def __neg__(self):
        return multiply(self, -1.0)

    def __sub__(self, other):
        return add(self, multiply(other, -1.0))

    def __rsub__(self, other):
        return add(other, multiply(self, -1.0))

    def __truediv__(self, other):
        return multiply(self, power(other, -1.0))

    def __rtruediv__(self, other):
        return multiply(other, power(self, -1.0))

    def __pow__(self, exponent: float):
        return power(self, exponent)

    def __getitem__(self, index):
        return take(self, index)


def parameter(value) -> Tensor:
    """A leaf that gradients can be asked for."""
    return Tensor(value, tracked=True)


def as_tensor(value) -> Tensor:
    """The tensor itself, or a constant made of an array or number."""
    return value if isinstance(value, Tensor) else Tensor(value)


def gradients(
    output: Tensor, wrt: Sequence[Tensor], cotangent: np.ndarray | None = None
) -> list[np.ndarray]:
    """d(sum(cotangent * output)) / d(each of `wrt`); zeros where `output` does not depend on it.

    Without a cotangent the output must be a scalar.
    """
    if cotangent is None:
        assert output.shape == (), f"an output of shape {output.shape} needs a cotangent"
        cotangent = np.ones(())
    sums: dict[int, np.ndarray] = {output.serial: np.asarray(cotangent, dtype=np.float64)}
    for tensor in _tracked_ancestors(output):
        if tensor.pullback is None or tensor.serial not in sums:
            continue
        parts = tensor.pullback(sums[tensor.serial])
        for parent, part in zip(tensor.parents, parts, strict=True):
            if parent.tracked:
                known = sums.get(parent.serial)
                sums[parent.serial] = part if known is None else known + part
    return [sums.get(leaf.serial, np.zeros(leaf.shape)) for leaf in wrt]


def _tracked_ancestors(output: Tensor) -> list[Tensor]:
    """Everything tracked that `output` was made of, itself included, youngest first."""
    found, waiting = {output.serial: output}, [output]
    while waiting:
        for parent in waiting.pop().parents:
            if parent.tracked and parent.serial not in found:
                found[parent.serial] = parent
                waiting.append(parent)
    return [found[serial] for serial in sorted(found, reverse=True)]


def _unbroadcast(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums a gradient over the dims that broadcasting had repeated."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    repeated = tuple(dim for dim, size in enumerate(shape) if size == 1)
    return gradient.sum(axis=repeated, keepdims=True) if repeated else gradient


# Elementwise


def add(a, b) -> Tensor:
    a, b = as_tensor(a), as_tensor(b)
    return Tensor(
        a.value + b.value,
        (a, b),
        lambda g: (_unbroadcast(g, a.shape), _unbroadcast(g, b.shape)),
    )


def multiply(a, b) -> Tensor:
    a, b = as_tensor(a), as_tensor(b)
    return Tensor(
        a.value * b.value,
        (a, b),
        lambda g: (_unbroadcast(g * b.value, a.shape), _unbroadcast(g * a.value, b.shape)),
    )


def power(x, exponent: float) -> Tensor:
    """x ** exponent for a constant exponent."""
    x = as_tensor(x)
    return Tensor(x.value**exponent, (x,), lambda g: (g * exponent * x.value ** (exponent - 1.0),))


def exp(x) -> Tensor:
    x = as_tensor(x)
    result = np.exp(x.value)
    return Tensor(result, (x,), lambda g: (g * result,))


def log(x) -> Tensor:
    x = as_tensor(x)
    return Tensor(np.log(x.value), (x,), lambda g: (g / x.value,))


def sigmoid(x) -> Tensor:
    """1 / (1 + exp(-x)), written with tanh so that no exponential can overflow."""
    x = as_tensor(x)
    result = 0.5 * (1.0 + np.tanh(0.5 * x.value))
    return Tensor(result, (x,), lambda g: (g * result * (1.0 - result),))


def where(condition: np.ndarray, a, b) -> Tensor:
    """a where the condition holds, else b; infinities on the side not taken are harmless."""
    a, b = as_tensor(a), as_tensor(b)
    return Tensor(
        np.where(condition, a.value, b.value),
        (a, b),
        lambda g: (
            _unbroadcast(np.where(condition, g, 0.0), a.shape),
            _unbroadcast(np.where(condition, 0.0, g), b.shape),
        ),
    )


# Contractions and reductions


def matmul(a, b) -> Tensor:
    """np.matmul of two operands with at least two dims each; leading dims broadcast."""
    a, b = as_tensor(a), as_tensor(b)
    return Tensor(
        a.value @ b.value,
        (a, b),
        lambda g: (
            _unbroadcast(g @ b.value.swapaxes(-1, -2), a.shape),
            _unbroadcast(a.value.swapaxes(-1, -2) @ g, b.shape),
        ),
    )


def einsum(equation: str, a, b) -> Tensor:
    """np.einsum of two operands, e.g. "bqhd,bkhd->bhqk".

    Every letter must stand in two of the three terms and never twice in one: then the gradient of
    an operand is the einsum of the output's gradient with the other operand.
    """
    a, b = as_tensor(a), as_tensor(b)
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    for term, others in ((left, right + out), (right, left + out), (out, left + right)):
        assert len(set(term)) == len(term) and set(term) <= set(others), equation

    def pullback(g):
        return (
            np.einsum(f"{out},{right}->{left}", g, b.value, optimize=True),
            np.einsum(f"{left},{out}->{right}", a.value, g, optimize=True),
        )

    return Tensor(np.einsum(equation, a.value, b.value, optimize=True), (a, b), pullback)


def total(x, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """The sum over one axis, several, or all."""
    x = as_tensor(x)
    axes = tuple(range(len(x.shape))) if axis is None else axis

    def pullback(g):
        return (np.broadcast_to(g if keepdims else np.expand_dims(g, axes), x.shape),)

    return Tensor(x.value.sum(axis=axes, keepdims=keepdims), (x,), pullback)


def mean(x, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    x = as_tensor(x)
    result = total(x, axis, keepdims)
    return result * (result.value.size / x.value.size)


def softmax(x, axis: int = -1) -> Tensor:
    """exp(x) / sum exp(x); entries of minus infinity get exactly 0."""
    x = as_tensor(x)
    weights = np.exp(x.value - x.value.max(axis=axis, keepdims=True))
    result = weights / weights.sum(axis=axis, keepdims=True)
    return Tensor(
        result, (x,), lambda g: (result * (g - (g * result).sum(axis=axis, keepdims=True)),)
    )


def log_softmax(x, axis: int = -1) -> Tensor:
    x = as_tensor(x)
    shifted = x.value - x.value.max(axis=axis, keepdims=True)
    result = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    return Tensor(result, (x,), lambda g: (g - np.exp(result) * g.sum(axis=axis, keepdims=True),))


# Layout and indexing


def reshape(x, shape: tuple[int, ...]) -> Tensor:
    x = as_tensor(x)
    return Tensor(x.value.reshape(shape), (x,), lambda g: (g.reshape(x.shape),))


def transpose(x, order: tuple[int, ...] | None = None) -> Tensor:
    """Dims in the given order; without one, reversed."""
    x = as_tensor(x)
    inverse = None if order is None else tuple(np.argsort(order))
    return Tensor(x.value.transpose(order), (x,), lambda g: (g.transpose(inverse),))


def concatenate(tensors: Sequence, axis: int = 0) -> Tensor:
    tensors = tuple(as_tensor(tensor) for tensor in tensors)
    ends = np.cumsum([tensor.shape[axis] for tensor in tensors])[:-1]
    return Tensor(
        np.concatenate([tensor.value for tensor in tensors], axis=axis),
        tensors,
        lambda g: tuple(np.split(g, ends, axis=axis)),
    )


def take(x, index) -> Tensor:
    """x[index] for slices and integer arrays; a place read twice gets both gradients."""
    x = as_tensor(x)
    parts = index if isinstance(index, tuple) else (index,)
    may_repeat = any(isinstance(part, np.ndarray) for part in parts)

    def pullback(g):
        gradient = np.zeros(x.shape)
        if may_repeat:
            np.add.at(gradient, index, g)
        else:
            gradient[index] = g
        return (gradient,)

    return Tensor(x.value[index], (x,), pullback)


def scatter_add(x, rows: np.ndarray, length: int) -> Tensor:
    """y of `length` rows with y[rows[i]] += x[i]: the transpose of taking rows."""
    x = as_tensor(x)
    result = np.zeros((length, *x.shape[1:]))
    np.add.at(result, rows, x.value)
    return Tensor(result, (x,), lambda g: (g[rows],))
