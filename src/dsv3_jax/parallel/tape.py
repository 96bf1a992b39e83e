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

So what is recomputed is a choice per tensor, and a late weight gradient repeats no product. A
tensor is kept as its `Codec` encodes it, FP8 for one; backward then sees what that decodes to.
Source of the split: Zero Bubble Pipeline Parallelism, arXiv 2401.10241.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dsv3_jax.quant.formats import PLAIN, Codec

Product = Callable[[Any, Any], Array]
"""(x, weight) -> y, linear in the weight but for rounding. The weight may be a `ScaledArray`, x a
tree of arrays: what an activation is made of that is part of the product."""


class Tape:
    """The default: JAX differentiates; names are seen by `jax.checkpoint` policies alone."""

    def keep(self, name: str, value: Array, codec: Codec = PLAIN) -> Array:
        """`value`; `name` is unique within a layer."""
        del codec
        return checkpoint_name(value, name)

    def linear(self, name: str, product: Product, x: Any, weight: Any) -> Array:
        """product(x, weight); `name` is unique within a layer."""
        del name
        return product(x, weight)

    def for_backward(self, name: str, value: Array, codec: Codec) -> Array:
        """What backward has of a `value` that was to be kept by this name."""
        del name
        return value if codec is PLAIN else codec.decode(codec.encode(value), value.dtype)

    def recomputed(self, function: Callable, but: tuple[str, ...]) -> Callable:
        """`function`, of which backward computes everything again but the tensors named."""
        policy = jax.checkpoint_policies.save_only_these_names(*but)
        return jax.checkpoint(function, policy=policy)

    def from_kept(
        self, names: tuple[str, ...], codec: Codec, function: Callable, *arguments: Any
    ) -> Array:
        """function(*arguments), whose backward computes it again from the first arguments as they
        are kept, by these names, and from the other arguments."""
        count = len(names)
        if codec is PLAIN:
            kept = [self.keep(name, value) for name, value in zip(names, arguments, strict=False)]
            return function(*kept, *arguments[count:])
        dtypes = [value.dtype for value in arguments[:count]]

        @jax.custom_vjp
        def replayed(*arguments):
            return function(*arguments)

        def forward(*arguments):
            kept = [
                tuple(checkpoint_name(part, name) for part in codec.encode(value))
                for name, value in zip(names, arguments, strict=False)
            ]
            return function(*arguments), (kept, arguments[count:])

        def backward(residuals, gradient):
            kept, others = residuals
            values = [codec.decode(k, dtype) for k, dtype in zip(kept, dtypes, strict=True)]
            return jax.vjp(function, *values, *others)[1](gradient)

        replayed.defvjp(forward, backward)
        return replayed(*arguments)


AUTODIFF = Tape()


class _Named(Tape):
    """Keeps by name alone."""

    def recomputed(self, function: Callable, but: tuple[str, ...]) -> Callable:
        del but
        return function

    def from_kept(
        self, names: tuple[str, ...], codec: Codec, function: Callable, *arguments: Any
    ) -> Array:
        kept = [
            self.keep(name, value, codec) for name, value in zip(names, arguments, strict=False)
        ]
        return function(*kept, *arguments[len(names) :])


class Recorder(_Named):
    """Puts the tensors named in `kept` into `saved`, and the shapes of products into `outputs`."""

    def __init__(self, kept: frozenset[str]):
        self.kept = kept
        self.saved: dict[str, Array] = {}
        self.outputs: dict[str, Array] = {}

    def keep(self, name: str, value: Array, codec: Codec = PLAIN) -> Array:
        if name in self.kept:
            assert name not in self.saved, f"{name} is kept twice in one layer"
            parts = zip(codec.parts, codec.encode(value), strict=True)
            self.saved |= {name + suffix: part for suffix, part in parts}
        return value

    def linear(self, name: str, product: Product, x: Any, weight: Any) -> Array:
        assert name not in self.outputs, f"{name} is computed twice in one layer"
        self.outputs[name] = product(x, weight)
        return self.outputs[name]


class Player(_Named):
    """Gives back what was `saved`. A product named in `probes` has its probe added, and takes its
    weight for a constant."""

    def __init__(self, saved: Mapping[str, Array], probes: Mapping[str, Array] | None = None):
        self.saved = saved
        self.probes = probes or {}

    def keep(self, name: str, value: Array, codec: Codec = PLAIN) -> Array:
        parts = [name + suffix for suffix in codec.parts]
        if not all(part in self.saved for part in parts):
            return value
        decoded = codec.decode(tuple(self.saved[part] for part in parts), value.dtype)
        return _instead(decoded, value)

    def linear(self, name: str, product: Product, x: Any, weight: Any) -> Array:
        if name in self.probes:
            return product(x, jax.lax.stop_gradient(weight)) + self.probes[name]
        return product(x, weight)

    def for_backward(self, name: str, value: Array, codec: Codec) -> Array:
        is_kept = all(name + suffix in self.saved for suffix in codec.parts)
        return value if is_kept else super().for_backward(name, value, codec)

    def from_kept(
        self, names: tuple[str, ...], codec: Codec, function: Callable, *arguments: Any
    ) -> Array:
        if codec is PLAIN or any(name in self.saved for name in names):
            return super().from_kept(names, codec, function, *arguments)
        # Nothing was kept: the value comes from what was computed again, the gradient from what
        # would have been kept of it.
        exact, count = function(*arguments), len(names)
        rounded = [
            _instead(codec.decode(codec.encode(jax.lax.stop_gradient(value)), value.dtype), value)
            for value in arguments[:count]
        ]
        return _instead(exact, function(*rounded, *arguments[count:]))


class Inputs(Player):
    """Gives back what was `saved` and collects into `outputs`, for the products of `names`, the
    product as a function of its weight alone."""

    def __init__(self, saved: Mapping[str, Array], names: frozenset[str]):
        super().__init__(saved)
        self.names = names
        self.outputs: dict[str, Array] = {}

    def linear(self, name: str, product: Product, x: Any, weight: Any) -> Array:
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
