"""Tensors kept as a codec encodes them: backward sees what they decode to, forward does not."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.parallel.tape import AUTODIFF, Inputs, Player, Recorder
from dsv3_jax.quant.formats import E4M3_POWER_OF_TWO, E4M3_ROWS, PLAIN
from tests.kernels.test_quantize import (
    E4M3,
    ROW,
    assert_same,
    dequantised_by_hand,
    quantised_by_hand,
)
from tests.tolerances import FLOAT32_OP, assert_close

NAMES = ("gate", "up")
ROWS, COLUMNS = 6, 200


def rounded(x: jax.Array) -> jax.Array:
    """What E4M3_ROWS keeps of `x`."""
    kept = quantised_by_hand(np.asarray(x), ROW, E4M3, power_of_two=False)
    return jnp.asarray(dequantised_by_hand(*kept, ROW), x.dtype)


def swiglu(gate, up, weight):
    return (jax.nn.silu(gate) * up) @ weight


def arguments(dtype=jnp.float32) -> list[jax.Array]:
    """Gate, up and weight; and the gradient of the result."""
    rng = np.random.default_rng(0)
    shapes = [(ROWS, COLUMNS), (ROWS, COLUMNS), (COLUMNS, 7), (ROWS, 7)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def value_and_gradients(function, *arguments):
    *inputs, gradient = arguments
    value, pull_back = jax.vjp(function, *inputs)
    return value, pull_back(gradient)


def as_kept(gate, up, weight, gradient):
    """The gradients at what is kept."""
    return jax.vjp(swiglu, rounded(gate), rounded(up), weight)[1](gradient)


def assert_gradients(found, expected) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == other.dtype
        assert_close(mine, other, FLOAT32_OP)


def is_close(found, expected) -> bool:
    try:
        assert_gradients(found, expected)
    except AssertionError:
        return False
    return True


# Tape.from_kept


def from_autodiff(gate, up, weight):
    return AUTODIFF.from_kept(NAMES, E4M3_ROWS, swiglu, gate, up, weight)


def in_checkpoint(*names: str):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(from_autodiff, policy=policy)


WAYS = {
    "plain": from_autodiff,
    "compiled": jax.jit(from_autodiff),
    "names saved": in_checkpoint(*NAMES),
    "nothing saved": in_checkpoint(),
    "recomputed by the tape": AUTODIFF.recomputed(from_autodiff, NAMES),
}


@pytest.mark.parametrize("way", WAYS)
def test_forward_is_exact_and_backward_sees_what_was_kept(way):
    gate, up, weight, gradient = arguments()
    value, found = value_and_gradients(WAYS[way], gate, up, weight, gradient)
    exact, at_exact = value_and_gradients(swiglu, gate, up, weight, gradient)
    assert_close(value, exact, FLOAT32_OP)
    if way != "compiled":
        assert_same(value, np.asarray(exact, np.float64))
    assert_gradients(found, as_kept(gate, up, weight, gradient))
    assert not is_close(found, at_exact)


def test_in_bfloat16_too():
    gate, up, weight, gradient = arguments(jnp.bfloat16)
    value, found = value_and_gradients(from_autodiff, gate, up, weight, gradient)
    assert_same(value, np.asarray(swiglu(gate, up, weight)).astype(np.float64))
    for mine, other in zip(found, as_kept(gate, up, weight, gradient), strict=True):
        assert mine.dtype == jnp.bfloat16
        assert_same(mine, np.asarray(other).astype(np.float64))


def test_a_plain_codec_leaves_it_to_autodiff():
    *inputs, gradient = arguments()

    def plain(gate, up, weight):
        return AUTODIFF.from_kept(NAMES, PLAIN, swiglu, gate, up, weight)

    value, found = value_and_gradients(plain, *inputs, gradient)
    exact, expected = value_and_gradients(swiglu, *inputs, gradient)
    assert_same(value, np.asarray(exact, np.float64))
    assert_gradients(found, expected)


@pytest.mark.parametrize(
    ("names", "tensors_in_8_bits"), [(NAMES, 2), (("gate",), 1), (("other",), 0)]
)
def test_a_policy_saves_the_encoded_parts(names, tensors_in_8_bits):
    """Of tensors made inside; what else waits are the inputs."""

    def layer(x, weight):
        return from_autodiff(jnp.sin(x), jnp.cos(x), weight)

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    gate, _, weight, _ = arguments()
    _, pull_back = jax.vjp(jax.checkpoint(layer, policy=policy), gate, weight)
    waiting = [(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(pull_back)]
    inputs = [("float32", gate.shape), ("float32", weight.shape)]
    parts = [("float8_e4m3fn", gate.shape), ("float32", (ROWS, 2))]
    assert sorted(waiting) == sorted(inputs + parts * tensors_in_8_bits)


# Recorder and Player


def layer(tape, x):
    """Two tensors worth keeping, one from the other."""
    first = tape.keep("first", jnp.sin(x), E4M3_ROWS)
    second = tape.keep("second", first * 2, E4M3_POWER_OF_TWO)
    return first * second + tape.keep("third", first + 1) + tape.keep("other", second, E4M3_ROWS)


def test_the_recorder_keeps_encoded_parts_under_name_and_suffix():
    x = arguments()[0]
    recorder = Recorder(frozenset({"first", "second", "third"}))
    value = layer(recorder, x)
    sine = np.sin(np.asarray(x))
    assert_close(value, sine * sine * 2 + sine + 1 + sine * 2, FLOAT32_OP)
    saved = recorder.saved
    assert saved.keys() == {"first", "first:scale", "second", "second:exponent", "third"}
    first = np.asarray(jnp.sin(x))
    for name, suffix, kept, power_of_two in [
        ("first", ":scale", first, False),
        ("second", ":exponent", first * 2, True),
    ]:
        values, scale = quantised_by_hand(kept, ROW, E4M3, power_of_two)
        assert saved[name].dtype == ml_dtypes.float8_e4m3fn
        assert_same(saved[name], values)
        if power_of_two:
            assert saved[name + suffix].dtype == jnp.uint8
            scale = 127 + np.log2(scale.astype(np.float64))
        assert_same(saved[name + suffix], scale.astype(np.float64))
    assert_same(saved["third"], (first + 1).astype(np.float64))


def test_the_recorder_refuses_a_name_twice():
    recorder = Recorder(frozenset({"first"}))
    recorder.keep("first", jnp.ones((1, 2)), E4M3_ROWS)
    with pytest.raises(AssertionError, match="first is kept twice in one layer"):
        recorder.keep("first", jnp.ones((1, 2)), E4M3_ROWS)


def saved_parts(name: str, x: jax.Array) -> dict[str, jax.Array]:
    """What a Recorder has of `x` in E4M3, by hand."""
    values, scale = quantised_by_hand(np.asarray(x), ROW, E4M3, power_of_two=False)
    return {name: jnp.asarray(values, jnp.float8_e4m3fn), f"{name}:scale": jnp.asarray(scale)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_player_gives_what_was_kept_and_the_gradient_to_what_is_computed(dtype):
    gate, up, _, _ = arguments(dtype)
    player = Player(saved_parts("gate", up))  # of another tensor, so that it shows
    value, pull_back = jax.vjp(lambda x: player.keep("gate", x * 3, E4M3_ROWS), gate)
    assert value.dtype == dtype
    assert_same(value, np.asarray(rounded(up)).astype(np.float64))
    assert_same(pull_back(up)[0], np.asarray(up * 3).astype(np.float64))


@pytest.mark.parametrize("missing", ["gate", "gate:scale"])
def test_the_player_computes_what_was_not_kept(missing):
    gate, up, _, _ = arguments()
    saved = saved_parts("gate", up)
    del saved[missing]
    assert Player(saved).keep("gate", gate, E4M3_ROWS) is gate


def test_what_the_recorder_keeps_the_player_plays():
    x, up, _, _ = arguments()
    recorder = Recorder(frozenset({"first", "second", "third", "other"}))
    layer(recorder, x)
    value, pull_back = jax.vjp(lambda x: layer(Player(recorder.saved), x), x)
    first = rounded(jnp.sin(x))
    twice = quantised_by_hand(2 * np.sin(np.asarray(x)), ROW, E4M3, power_of_two=True)
    twice = jnp.asarray(dequantised_by_hand(*twice, ROW))
    other = rounded(2 * jnp.sin(x))
    assert_close(value, first * twice + jnp.sin(x) + 1 + other, FLOAT32_OP)
    # d value / d sine, each tensor at what was kept of it.
    slope = twice + 2 * first + 1 + 2
    assert_close(pull_back(up)[0], up * slope * jnp.cos(x), FLOAT32_OP)


def test_from_kept_of_what_was_kept():
    """Value and gradients are those at the saved tensors."""
    gate, up, weight, gradient = arguments()
    recorder = Recorder(frozenset(NAMES))
    value = recorder.from_kept(NAMES, E4M3_ROWS, swiglu, gate, up, weight)
    assert_same(value, np.asarray(swiglu(gate, up, weight), np.float64))
    saved = saved_parts("gate", gate) | saved_parts("up", up)
    assert recorder.saved.keys() == saved.keys()
    for name, part in saved.items():
        assert_same(recorder.saved[name], np.asarray(part).astype(np.float64))

    def played(gate, up, weight):
        return Player(saved).from_kept(NAMES, E4M3_ROWS, swiglu, gate, up, weight)

    value, found = value_and_gradients(played, gate, up, weight, gradient)
    assert_close(value, swiglu(rounded(gate), rounded(up), weight), FLOAT32_OP)
    assert_gradients(found, as_kept(gate, up, weight, gradient))


def from_nothing_kept(gate, up, weight):
    return Player({}).from_kept(NAMES, E4M3_ROWS, swiglu, gate, up, weight)


def test_from_kept_of_nothing_has_the_gradient_of_what_would_have_been_kept():
    gate, up, weight, gradient = arguments()
    value, found = value_and_gradients(from_nothing_kept, gate, up, weight, gradient)
    assert_close(value, swiglu(gate, up, weight), FLOAT32_OP)
    assert_gradients(found, as_kept(gate, up, weight, gradient))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_from_kept_of_nothing_has_the_exact_value(dtype):
    """Sums near zero, of which some change by more than their size."""
    rng = np.random.default_rng(0)
    gate, up, weight = (
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in [(64, 128)] * 2 + [(128, 64)]
    )
    found = from_nothing_kept(gate, up, weight)
    assert_same(found, np.asarray(swiglu(gate, up, weight)).astype(np.float64))


def test_from_kept_of_nothing_where_it_overflows():
    x = jnp.full((2, 4), 100.0)
    found = Player({}).from_kept(("x",), E4M3_ROWS, jnp.exp, x)
    np.testing.assert_array_equal(found, np.inf)


def test_a_product_of_several_arrays():
    """Of the product's weight alone in Inputs, whose x are constants, whatever they are made of."""
    gate, up, weight, gradient = arguments()

    def layer(tape, weight):
        x = gate * jnp.sum(weight), up
        return tape.linear("product", lambda x, weight: swiglu(*x, weight), x, weight)

    recorder = Recorder(frozenset())
    value = layer(recorder, weight)
    assert recorder.outputs["product"] is value
    assert_same(layer(AUTODIFF, weight), value)

    def outputs(weight):
        tape = Inputs({}, frozenset({"product"}))
        layer(tape, weight)
        return tape.outputs["product"]

    found, pull_back = jax.vjp(outputs, weight)
    assert_same(found, value)
    scaled = gate * jnp.sum(weight)
    expected = jax.vjp(lambda weight: swiglu(scaled, up, weight), weight)[1](gradient)[0]
    assert_close(pull_back(gradient)[0], expected, FLOAT32_OP)


def test_what_backward_has_of_a_value():
    """Rounded once: by the codec where it is asked, or when it was kept."""
    x = jax.random.normal(jax.random.key(0), (ROWS, COLUMNS))
    assert_same(AUTODIFF.for_backward("x", x, E4M3_ROWS), rounded(x))
    assert AUTODIFF.for_backward("x", x, PLAIN) is x
    recorder = Recorder(frozenset({"x"}))
    recorder.keep("x", x, E4M3_ROWS)
    player = Player(recorder.saved)
    kept = player.keep("x", x, E4M3_ROWS)
    assert player.for_backward("x", kept, E4M3_ROWS) is kept
    assert_same(Player({}).for_backward("x", x, E4M3_ROWS), rounded(x))
