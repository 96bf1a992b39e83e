"""Traced programs: what their matrix products cost, how large they are, and compiling them fast."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
from jax.extend import core

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit: Callable[..., Any] = partial(jax.jit, compiler_options=QUICK)
"""`jax.jit` for programs that run once or twice: half the time to compile, slower code."""


def dot_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr, while_trips: float) -> float:
    """Operations of every `dot_general`, a multiply-add counting two.

    A scan's body counts as often as it runs. How often the body of a while loop runs is known only
    to its data: it counts `while_trips` times. Of a conditional the dearest branch counts.

    >>> dot_flops(jax.make_jaxpr(jnp.matmul)(ones(2, 3), ones(3, 5)), while_trips=0)
    60.0
    """
    return sum(_equation_flops(equation, while_trips) for equation in _inner(jaxpr).eqns)


def count_equations(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> int:
    """Equations of the program and of everything in it."""
    return sum(
        1 + sum(count_equations(part) for part in _parts(equation))
        for equation in _inner(jaxpr).eqns
    )


def _equation_flops(equation: core.JaxprEqn, while_trips: float) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        return _product_flops(equation)
    parts = [dot_flops(part, while_trips) for part in _parts(equation)]
    if name == "cond":
        return max(parts)
    if name == "scan":
        return equation.params["length"] * sum(parts)
    return while_trips * sum(parts) if name == "while" else sum(parts)


def _product_flops(equation: core.JaxprEqn) -> float:
    """Two for every element of the result and every step of the contraction."""
    contracted, _ = equation.params["dimension_numbers"][0]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _inner(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _parts(equation: core.JaxprEqn) -> Iterator[core.Jaxpr | core.ClosedJaxpr]:
    """The programs among an equation's parameters: bodies, branches, called functions."""
    for value in equation.params.values():
        yield from (part for part in _flat(value) if isinstance(part, _PROGRAMS))


def _flat(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, tuple | list) else (value,)


_PROGRAMS = (core.Jaxpr, core.ClosedJaxpr)
