"""Products by rule: results and gradients against float64 products of operands rounded by hand."""

import functools
from dataclasses import dataclass, replace
from math import ceil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.quant import matmul
from dsv3_jax.quant.matmul import QuantisedProduct, SwigluProduct, stacked_product
from dsv3_jax.quant.recipe import PUBLISHED, RULES, Operand
from dsv3_jax.quant.scaled_array import joined, quantise, trained, untrained, with_handles
from dsv3_kernels.grouped_gemm.op import masked_rows
from dsv3_kernels.swiglu_quantize.reference import activation
from tests.kernels.test_quantize import (
    BLOCK,
    E4M3,
    E5M2,
    ROW,
    dequantised_by_hand,
    quantised_by_hand,
)
from tests.quant.test_formats import E5M6

TOKENS, IN, OUT = 150, 130, 256
"""Tiles that are not whole along every sum but that over OUT."""
EXPERTS = 2
FP32_ROUNDING = 1e-5
"""Relative, in the Frobenius norm: 2e-7 was measured."""


@dataclass(frozen=True)
class Rounding:
    """What becomes of a tensor in tiles of its last two dims; one scale for all without a tile."""

    tile: tuple[int, int] | None = ROW
    power_of_two: bool = False
    magnitudes: str = "E4M3"

    def __call__(self, x: np.ndarray) -> np.ndarray:
        magnitudes = {"E4M3": E4M3, "E5M2": E5M2, "E5M6": E5M6}[self.magnitudes]
        tile = self.tile or x.shape[-2:]
        values, scale = quantised_by_hand(x, tile, magnitudes, self.power_of_two)
        return dequantised_by_hand(values, scale, tile)


ROWS, BLOCKS, WHOLE = Rounding(), Rounding(BLOCK), Rounding(None)
EXACT = Rounding(power_of_two=True)
IN_E5M6 = Rounding(power_of_two=True, magnitudes="E5M6")
IN_E5M2 = Rounding(magnitudes="E5M2")


def none(x: np.ndarray) -> np.ndarray:
    return x


@dataclass(frozen=True)
class ByHand:
    """The report's recipe for one product; what is transposed for Wgrad is rounded after that."""

    x: Rounding = ROWS
    weight: Rounding = BLOCKS
    dy: Rounding = ROWS
    kept: object = ROWS
    x_columns: object = ROWS
    dy_columns: object = ROWS


ORDINARY = ByHand()
PUBLISHED_BY_HAND = dict.fromkeys(
    ["q_a_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "gate_proj", "up_proj"], ORDINARY
) | {
    "o_proj": ByHand(x=EXACT, kept=IN_E5M6, x_columns=EXACT),
    "mlp_down_proj": ByHand(kept=none),
    "gate_up_proj": ByHand(x=EXACT, kept=EXACT, x_columns=EXACT),
    "down_proj": ByHand(kept=none, dy=EXACT, dy_columns=EXACT),
}
CHANGES = {
    "published": {},
    "per_tensor_scales": dict.fromkeys(["x", "weight", "dy", "x_columns", "dy_columns"], WHOLE),
    "block_gradients": dict.fromkeys(["dy", "x_columns", "dy_columns"], BLOCKS),
    "e5m2_gradients": dict.fromkeys(["dy", "dy_columns"], IN_E5M2),
}
KINDS = ["q_proj", "o_proj", "gate_up_proj", "down_proj", "mlp_down_proj"]
"""One product of each rule."""


def rule_by_hand(rules: str, name: str) -> ByHand:
    return replace(PUBLISHED_BY_HAND[name], **CHANGES[rules])


def swap(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b^T"""
    return a.astype(np.float64) @ swap(b).astype(np.float64)


def by_hand(hand: ByHand, x: np.ndarray, weight: np.ndarray, dy: np.ndarray) -> dict:
    """y = x W^T, dx = dy W, dW = dy^T x."""
    rounded_weight = hand.weight(weight)
    return dict(
        y=product(hand.x(x), rounded_weight),
        dx=product(hand.dy(dy), swap(rounded_weight)),
        dw=product(hand.dy_columns(swap(dy)), hand.x_columns(swap(hand.kept(x)))),
    )


@functools.cache
def tensor(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Rows and columns of different size, so that each way to take tiles rounds otherwise."""
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(-2, 2, (*shape[:-1], 1)) + rng.uniform(-2, 2, shape[-1:])
    return (rng.standard_normal(shape) * np.exp2(sizes)).astype(np.float32)


def operands(*batch: int) -> tuple[np.ndarray, ...]:
    shapes = [(TOKENS, IN), (OUT, IN), (TOKENS, OUT)]
    return tuple(tensor((*batch, *shape), seed) for seed, shape in enumerate(shapes))


QUICKLY = {"xla_backend_optimization_level": 0}
"""Half the time to compile, which is most of these tests' time."""


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def run(rule, x, weight, dy) -> dict:
    y, pull_back = jax.vjp(QuantisedProduct(rule), x, weight)
    dx, dw = pull_back(dy)
    return dict(y=y, dx=dx, dw=dw)


def error(found: jax.Array, expected: np.ndarray) -> float:
    found = np.asarray(found).astype(np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_close(found: dict, expected: dict) -> None:
    for name in expected:
        assert error(found[name], expected[name]) <= FP32_ROUNDING, name


def test_every_product_is_here():
    assert PUBLISHED_BY_HAND.keys() == PUBLISHED.keys()
    assert CHANGES.keys() == RULES.keys()
    assert all(rules.keys() == PUBLISHED.keys() for rules in RULES.values())
    assert RULES["published"] is PUBLISHED


@functools.cache
def computed(rules: str, name: str) -> dict:
    """Once for all products with the same rule."""
    rule = RULES[rules][name]
    first = next(other for other in RULES[rules] if RULES[rules][other] == rule)
    if first != name:
        return computed(rules, first)
    return jax.tree.map(np.asarray, run(rule, *map(jnp.asarray, operands())))


@functools.cache
def expected_of(hand: ByHand) -> dict:
    return by_hand(hand, *operands())


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", PUBLISHED_BY_HAND)
def test_result_and_gradients(rules, name):
    assert_close(computed(rules, name), expected_of(rule_by_hand(rules, name)))


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ("published", "gate_up_proj"),
        ("published", "down_proj"),
        ("per_tensor_scales", "down_proj"),
        ("block_gradients", "gate_up_proj"),
    ],
)
def test_of_stacked_matrices(rules, name):
    arrays = operands(EXPERTS)
    found = run(RULES[rules][name], *map(jnp.asarray, arrays))
    assert_close(found, by_hand(rule_by_hand(rules, name), *arrays))


WRONG = {
    "x in rows for Wgrad": dict(x_columns=none),
    "x not in 8 bits until Wgrad": dict(kept=none),
    "x of Wgrad as Fprop's": dict(kept=none, x_columns=none),
    "dy in rows for Wgrad": dict(dy_columns=lambda dy: swap(ROWS(swap(dy)))),
    "dy rounded twice for Wgrad": dict(dy_columns=lambda dy: ROWS(swap(ROWS(swap(dy))))),
    "dy not rounded": dict(dy=none),
    "W in rows": dict(weight=ROWS),
    "x with other scales": dict(x=BLOCKS),
    "dy with other scales": dict(dy=EXACT),
    "E5M2": dict(dy_columns=IN_E5M2),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_the_recipe_would_be_detected(mistake):
    with pytest.raises(AssertionError):
        assert_close(computed("published", "q_proj"), expected_of_wrong(WRONG[mistake]))


def expected_of_wrong(changes: dict, name: str = "q_proj") -> dict:
    return by_hand(replace(PUBLISHED_BY_HAND[name], **changes), *operands())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("o_proj", dict(kept=EXACT)),
        ("o_proj", dict(kept=none)),
        ("o_proj", dict(x=IN_E5M6)),
        ("o_proj", dict(x=ROWS)),
        ("o_proj", dict(x_columns=ROWS)),
        ("gate_up_proj", dict(kept=ROWS)),
        ("gate_up_proj", dict(x_columns=ROWS)),
        ("down_proj", dict(kept=ROWS)),
        ("down_proj", dict(dy=ROWS)),
        ("down_proj", dict(dy_columns=ROWS)),
        ("mlp_down_proj", dict(kept=ROWS)),
        ("mlp_down_proj", dict(dy=EXACT)),
    ],
)
def test_the_exceptions_are_told_from_the_ordinary(name, changes):
    with pytest.raises(AssertionError):
        assert_close(computed("published", name), expected_of_wrong(changes, name))


def test_two_scales_swapped_would_be_detected():
    x, weight, dy = operands()
    values, scale = quantised_by_hand(weight, BLOCK, E4M3, power_of_two=False)
    swapped = dequantised_by_hand(values, scale[::-1], BLOCK)
    hand = replace(ORDINARY, weight=lambda _: swapped)
    for name, expected in by_hand(hand, x, weight, dy).items():
        is_close = error(computed("published", "q_proj")[name], expected) <= FP32_ROUNDING
        assert is_close == (name == "dw")


def test_a_flip_of_powers_of_two_adds_no_rounding():
    """What dispatch has brought in rows is Wgrad's operand as it is."""
    assert_close(
        computed("published", "gate_up_proj"),
        expected_of_wrong(dict(x_columns=none), "gate_up_proj"),
    )


def test_activations_of_any_rank():
    x, weight, dy = map(jnp.asarray, operands())
    shaped = run(PUBLISHED["q_proj"], x.reshape(3, 50, IN), weight, dy.reshape(3, 50, OUT))
    assert shaped["y"].shape == (3, 50, OUT) and shaped["dx"].shape == (3, 50, IN)
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in shaped.items()}
    assert_close(flat, expected_of(ORDINARY))


def test_results_are_in_the_dtype_of_x_and_gradients_in_their_own():
    x, weight, dy = (jnp.asarray(array, jnp.bfloat16) for array in operands())
    expected = by_hand(ORDINARY, *(np.asarray(a, np.float32) for a in (x, weight, dy)))
    for dtype in (jnp.bfloat16, jnp.float32):
        found = run(PUBLISHED["q_proj"], x, weight.astype(dtype), dy)
        assert [found[name].dtype for name in ("y", "dx", "dw")] == [x.dtype, x.dtype, dtype]
        assert error(found["y"], expected["y"]) < 3e-3 > error(found["dx"], expected["dx"])
        assert error(found["dw"], expected["dw"]) < (3e-3 if dtype == x.dtype else FP32_ROUNDING)


@pytest.mark.parametrize(("name", "batch"), [("q_proj", ()), ("down_proj", (EXPERTS,))])
def test_a_weight_in_8_bits_gives_the_same_and_a_gradient_by_its_handle(name, batch):
    arrays = operands(*batch)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def with_handle(x, weight, dy):
        in_8_bits = with_handles(quantise(weight))
        rest = untrained(in_8_bits)

        def product(x, handle):
            return QuantisedProduct(PUBLISHED[name])(x, joined(rest, handle))

        y, pull_back = jax.vjp(product, x, trained(in_8_bits))
        dx, dw = pull_back(dy)
        return dict(y=y, dx=dx, dw=dw)

    found = with_handle(*map(jnp.asarray, arrays))
    assert found["dw"].dtype == jnp.float32
    assert_close(found, by_hand(PUBLISHED_BY_HAND[name], *arrays))


def test_a_weight_in_8_bits_without_a_handle_is_a_constant():
    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def without_handle(x, weight, dy):
        in_8_bits = quantise(weight)
        y, pull_back = jax.vjp(QuantisedProduct(PUBLISHED["q_proj"]), x, in_8_bits)
        dx, of_weight = pull_back(dy)
        assert of_weight.handle is None
        return dict(y=y, dx=dx), jax.tree.leaves(of_weight)

    found, of_weight = without_handle(*map(jnp.asarray, operands()))
    expected = expected_of(ORDINARY)
    assert_close(found, {name: expected[name] for name in found})
    assert not any(np.any(np.asarray(leaf, np.float32)) for leaf in of_weight)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_zeros_give_zeros(name, which):
    arrays = [jnp.asarray(array) for array in operands()]
    arrays[which] = jnp.zeros_like(arrays[which])
    found = run(PUBLISHED[name], *arrays)
    zero = [("y", "dw"), ("y", "dx"), ("dx", "dw")][which]
    for result, array in found.items():
        assert np.all(np.isfinite(array)) and np.any(array) == (result not in zero), result


@pytest.mark.parametrize("name", KINDS)
def test_what_overflowed_gives_something_finite(name):
    """Weights and gradients below 1/8, zeros among them, so that no sum overflows by itself."""
    x, weight, dy = (np.clip(array, -1, 1) / 8 for array in operands())
    x[3, 7], dy[5, 9] = np.inf, -np.inf
    weight[:, 7:9], weight[9], dy[3, :2] = weight[:, 7:9] / 64, weight[9] / 64, 0
    x[5, :2] = 0
    weight[4] = 0
    for result, array in run(PUBLISHED[name], *map(jnp.asarray, (x, weight, dy))).items():
        assert np.all(np.isfinite(array)), result


@pytest.mark.parametrize("rules", ["published", "per_tensor_scales"])
def test_output_features_that_fill_no_tile(rules):
    x, weight, dy = tensor((5, 130), 0), tensor((200, 130), 1), tensor((5, 200), 2)
    found = run(RULES[rules]["q_proj"], *map(jnp.asarray, (x, weight, dy)))
    assert_close(found, by_hand(rule_by_hand(rules, "q_proj"), x, weight, dy))


KEPT_BYTES = {
    "q_proj": lambda rows, columns: rows * (columns + 4 * ceil(columns / 128)),
    "o_proj": lambda rows, columns: rows * (columns * 3 // 2 + ceil(columns / 128)),
    "gate_up_proj": lambda rows, columns: rows * (columns + ceil(columns / 128)),
    "down_proj": lambda rows, columns: rows * columns * 2,
    "mlp_down_proj": lambda rows, columns: rows * columns * 2,
}
"""In BF16 where a down projection's input is made again, and so not kept by the model."""


@pytest.mark.parametrize("name", KINDS)
def test_bytes_that_wait_for_backward(name):
    """All arrays of the pullback: of x, and of the weight its 8 bits and FP32 scales."""

    def waiting(x, weight):
        return jax.tree.leaves(jax.vjp(QuantisedProduct(PUBLISHED[name]), x, weight)[1])

    x, weight, _ = (jnp.asarray(array, jnp.bfloat16) for array in operands())
    of_weight = OUT * IN + 4 * ceil(OUT / 128) * ceil(IN / 128)
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.eval_shape(waiting, x, weight))
    assert found - of_weight == KEPT_BYTES[name](TOKENS, IN)


# SwiGLU, weights and product


def swiglu_operands(*batch: int) -> list[np.ndarray]:
    """h, weights, W, dy, and how many rows are filled: all but 21 of the second matrix's."""
    _, weight, dy = operands(*batch)
    h, weights = tensor((*batch, TOKENS, 2 * IN), 3), tensor((*batch, TOKENS), 4)
    arrays = [h, weights, weight, dy]
    if batch:
        h[1, -21:], weights[1, -21:], dy[1, -21:] = np.nan, np.nan, 0
        arrays.append(np.array([TOKENS, TOKENS - 21], np.int32))
    return arrays


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def run_swiglu(rule, h, weights, weight, dy, filled=None) -> dict:
    def product(h, weights, weight):
        return SwigluProduct(rule)((h, weights), weight, filled, expected=TOKENS)

    y, pull_back = jax.vjp(product, h, weights, weight)
    names = "dh", "dweights", "dw"
    return dict(y=y) | dict(zip(names, pull_back(dy), strict=True))


activated = jax.jit(activation, compiler_options=QUICKLY)


def swiglu_by_hand(hand: ByHand, h, weights, weight, dy, filled=None) -> dict:
    """Of the activation that the kernels' reference has, so that the same values are rounded."""
    there = None if filled is None else jnp.asarray(filled)
    a = np.asarray(activated(jnp.asarray(h), jnp.asarray(weights), there))
    found = by_hand(hand, a, weight, dy)
    rows = np.arange(TOKENS) < (TOKENS if filled is None else filled[..., None])
    h, weights = (np.nan_to_num(x.astype(np.float64)) for x in (h, weights))
    gate, up = np.split(h, 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    d_a = found.pop("dx") * rows[..., None]
    d_product = d_a * weights[..., None]
    d_gate = d_product * up * sigmoid * (1 + gate * (1 - sigmoid))
    dh = np.concatenate([d_gate, d_product * gate * sigmoid], axis=-1)
    return found | dict(dh=dh, dweights=np.sum(d_a * gate * sigmoid * up, axis=-1))


DOWN = PUBLISHED_BY_HAND["down_proj"]


@pytest.mark.parametrize("batch", [(), (EXPERTS,)])
@pytest.mark.parametrize("rules", ["published", "e5m2_gradients"])
def test_swiglu_product(rules, batch):
    arrays = swiglu_operands(*batch)
    found = run_swiglu(RULES[rules]["down_proj"], *map(jnp.asarray, arrays))
    assert_close(found, swiglu_by_hand(rule_by_hand(rules, "down_proj"), *arrays))


def test_swiglu_product_has_the_rules_scales():
    exact, arrays = Operand(power_of_two=True), swiglu_operands()
    for field, changed in [("input", dict(x=EXACT)), ("input_columns", dict(x_columns=EXACT))]:
        rule = replace(PUBLISHED["down_proj"], **{field: exact})
        found = run_swiglu(rule, *map(jnp.asarray, arrays))
        assert_close(found, swiglu_by_hand(replace(DOWN, **changed), *arrays))
        with pytest.raises(AssertionError):
            assert_close(found, swiglu_by_hand(DOWN, *arrays))


@pytest.mark.parametrize("which", range(4))
def test_a_row_of_another_place_would_be_detected(which):
    arrays = swiglu_operands()
    found = run_swiglu(PUBLISHED["down_proj"], *map(jnp.asarray, arrays))
    arrays[which] = np.roll(arrays[which], 1, axis=0)
    with pytest.raises(AssertionError):
        assert_close(found, swiglu_by_hand(DOWN, *arrays))


def test_swiglu_product_of_a_weight_in_8_bits():
    arrays = swiglu_operands(EXPERTS)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def with_handle(h, weights, weight, dy, filled):
        in_8_bits = with_handles(quantise(weight))
        rest, product = untrained(in_8_bits), SwigluProduct(PUBLISHED["down_proj"])

        def of_handle(h, handle):
            return product((h, weights), joined(rest, handle), filled)

        y, pull_back = jax.vjp(of_handle, h, trained(in_8_bits))
        dh, dw = pull_back(dy)
        constant, pull_back = jax.vjp(lambda h: product((h, weights), rest, filled), h)
        return dict(y=y, dh=dh, dw=dw), dict(y=constant, dh=pull_back(dy)[0])

    found, of_constant = with_handle(*map(jnp.asarray, arrays))
    expected = swiglu_by_hand(DOWN, *arrays)
    del expected["dweights"]
    assert_close(found, expected)
    del expected["dw"]
    assert_close(of_constant, expected)


@pytest.mark.parametrize(
    ("changes", "can"),
    [
        ({}, True),
        (dict(input=Operand(power_of_two=True)), True),
        (dict(kept=PUBLISHED["q_proj"].kept), False),
        (dict(input=Operand(None)), False),
        (dict(input_columns=Operand((128, 128))), False),
        (dict(input=Operand(dtype=jnp.float8_e5m2)), False),
    ],
)
def test_which_rules_swiglu_can_follow(changes, can):
    assert SwigluProduct.can_follow(replace(PUBLISHED["down_proj"], **changes)) == can


def test_bytes_that_wait_for_backward_of_swiglu():
    """Its input, the weights, W in 8 bits, and how many rows are filled; nothing of its output."""
    h, weights, weight, _, filled = swiglu_operands(EXPERTS)
    given = [jnp.asarray(array, jnp.bfloat16) for array in (h, weights, weight)]

    def waiting(h, weights, weight, filled):
        product = SwigluProduct(PUBLISHED["down_proj"])

        def of(h, weights, weight):
            return product((h, weights), weight, filled)

        return jax.tree.leaves(jax.vjp(of, h, weights, weight)[1])

    leaves = jax.eval_shape(waiting, *given, jnp.asarray(filled))
    of_weight = OUT * IN + 4 * ceil(OUT / 128) * ceil(IN / 128)
    expected = EXPERTS * (2 * TOKENS * 2 * IN + 2 * TOKENS + of_weight + 4)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == expected


FILLED, SLOTS = [70, 0, 128], 128
BFLOAT16_ROUNDING = 4e-3
"""Relative, in the Frobenius norm: 1.7e-3 was measured."""


def stacked_operands() -> list[jax.Array]:
    """x and dy with zeros behind the filled rows, and W."""
    shapes = (3, SLOTS, 64), (3, SLOTS, 128), (3, 128, 64)
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy, weight = map(jax.random.normal, keys, shapes)
    is_filled = jnp.arange(SLOTS)[:, None] < jnp.asarray(FILLED)[:, None, None]
    x, dy = (jnp.where(is_filled, part, 0) for part in (x, dy))
    return [part.astype(jnp.bfloat16) for part in (x, dy, weight)]


def rows_of_reference(*operands, implementation, expected_rows, **options):
    """In place of the kernel, on CPU: what it leaves undefined is not a number."""
    assert implementation == "mosaic"
    y = masked_rows(*operands, implementation="reference", **options)
    is_filled = jnp.arange(y.shape[1])[:, None] < operands[2][:, None, None]
    return jnp.where(is_filled, y, jnp.nan)


def rows_of_kernel(*operands, **options):
    """The kernel itself, raced."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return masked_rows(*operands, **options)


@pytest.mark.parametrize(
    "rows_of",
    [
        rows_of_reference,
        pytest.param(rows_of_kernel, marks=[pytest.mark.interpret, pytest.mark.slow]),
    ],
)
def test_a_stacked_product_on_hopper(monkeypatch, rows_of):
    """The kernel's filled rows, zeros behind them; its gradients against float64 products."""
    monkeypatch.setattr(matmul, "is_hopper", lambda: True)
    monkeypatch.setattr(matmul, "masked_rows", rows_of)
    run = SimpleNamespace(run=lambda _op, _name, operands, kernel, **_: kernel()(*operands))
    monkeypatch.setattr(matmul, "choice", run)
    x, dy, weight = stacked_operands()
    product = functools.partial(stacked_product, filled=jnp.asarray(FILLED), expected=64)
    y, pull = jax.vjp(product, x, weight)
    found = [y, *pull(dy)]
    x, dy, weight = (np.asarray(part, np.float64) for part in (x, dy, weight))
    by_hand = x @ weight.swapaxes(1, 2), dy @ weight, dy.swapaxes(1, 2) @ x
    for one, expected in zip(found, by_hand, strict=True):
        assert one.dtype == jnp.bfloat16
        assert error(np.asarray(one, np.float64), expected) < BFLOAT16_ROUNDING
        np.testing.assert_array_equal(one[1], 0)


def test_a_stacked_product_anywhere_else_is_of_all_rows():
    """The program itself: no product of filled rows, and JAX's own gradient."""
    x, _, weight = stacked_operands()

    def traced(product):
        gradient = jax.grad(lambda x, weight: product(x, weight).sum(dtype=jnp.float32), (0, 1))
        return str(jax.make_jaxpr(gradient)(x, weight))

    product = functools.partial(stacked_product, filled=jnp.asarray(FILLED), expected=64)
    assert traced(product) == traced(lambda x, w: jnp.einsum("eci,eoi->eco", x, w))
