"""What a layer's forward hands to its backward: JAX's own choice, or named tensors.

A layer names the tensors worth keeping (`tape.keep`) and its matrix products (`tape.linear`).
Called with `AUTODIFF`, the default, it is an ordinary function that JAX differentiates. A pipeline,
whose forward and backward lie many ticks apart, calls it with other tapes:

    forward          Recorder(kept)             saved = the tensors named in `kept`
    full backward    Player(saved)              jax.vjp of the layer run again; what was saved
                                                stands in, so XLA drops all that only led to it
    input backward   Player(saved, probes)      a zero added to each product: its gradient is the
                                                product's dy; weights of products get no gradient
    weight backward  Inputs(saved)              each product's input x; its gradient is dy^T x

So what is recomputed is a choice per tensor, and a late weight gradient repeats no product.
Source of the split: Zero Bubble Pipeline Parallelism, arXiv 2401.10241.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

Product = Callable[[Array, Array], Array]
"""(x, weight) -> y, linear in both."""


class Tape:
    """The default: JAX differentiates; names are seen by `jax.checkpoint` policies alone."""

    def keep(self, name: str, value: Array) -> Array:
        """`value`; `name` is unique within a layer."""
        return checkpoint_name(value, name)

    def linear(self, name: str, product: Product, x: Array, weight: Array) -> Array:
        """product(x, weight); `name` is unique within a layer."""
        del name
        return product(x, weight)

    def piece(self, function: Callable) -> Callable:
        """`function`, one of several of which backward should hold one at a time."""
        return function

    def recomputed(self, function: Callable, but: tuple[str, ...]) -> Callable:
        """`function`, of which backward computes everything again but the tensors named."""
        policy = jax.checkpoint_policies.save_only_these_names(*but)
        return jax.checkpoint(function, policy=policy)


AUTODIFF = Tape()


class Recorder(Tape):
    """Puts the tensors named in `kept` into `saved`, and the shapes of products into `outputs`."""

    def __init__(self, kept: frozenset[str]):
        self.kept = kept
        self.saved: dict[str, Array] = {}
        self.outputs: dict[str, Array] = {}

    def keep(self, name: str, value: Array) -> Array:
        if name in self.kept:
            assert name not in self.saved, f"{name} is kept twice in one layer"
            self.saved[name] = value
        return value

    def linear(self, name: str, product: Product, x: Array, weight: Array) -> Array:
        assert name not in self.outputs, f"{name} is computed twice in one layer"
        self.outputs[name] = product(x, weight)
        return self.outputs[name]

    def recomputed(self, function: Callable, but: tuple[str, ...]) -> Callable:
        del but
        return function


class Player(Tape):
    """Gives back what was `saved`. A product named in `probes` has its probe added, and takes its
    weight for a constant."""

    def __init__(self, saved: Mapping[str, Array], probes: Mapping[str, Array] | None = None):
        self.saved = saved
        self.probes = probes or {}

    def keep(self, name: str, value: Array) -> Array:
        return _instead(self.saved[name], value) if name in self.saved else value

    def linear(self, name: str, product: Product, x: Array, weight: Array) -> Array:
        if name in self.probes:
            return product(x, jax.lax.stop_gradient(weight)) + self.probes[name]
        return product(x, weight)

    def piece(self, function: Callable) -> Callable:
        return jax.checkpoint(function)

    def recomputed(self, function: Callable, but: tuple[str, ...]) -> Callable:
        del but
        return function


class Inputs(Player):
    """Gives back what was `saved` and collects into `outputs`, for the products of `names`, the
    product as a function of its weight alone."""

    def __init__(self, saved: Mapping[str, Array], names: frozenset[str]):
        super().__init__(saved)
        self.names = names
        self.outputs: dict[str, Array] = {}

    def linear(self, name: str, product: Product, x: Array, weight: Array) -> Array:
        if name in self.names:
            self.outputs[name] = product(jax.lax.stop_gradient(x), weight)
        return product(x, jax.lax.stop_gradient(weight))


@jax.custom_vjp
def _instead(saved: Array, value: Array) -> Array:
    """`saved`, with the gradient going to `value`."""
    del value
    return saved


def _instead_forward(saved: Any, value: Any):
    del value
    return saved, None


def _instead_backward(_: None, gradient: Array):
    return None, gradient


_instead.defvjp(_instead_forward, _instead_backward)
