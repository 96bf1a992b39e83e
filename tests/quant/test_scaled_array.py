"""Matrices in 8 bits as values of trees: what they stand for, bytes, handles, whole tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.quant.scaled_array import (
    ScaledArray,
    is_scaled,
    joined,
    quantise,
    scaled_spec,
    trained,
    untrained,
    with_handles,
)
from tests.kernels.test_quantize import (
    BLOCK,
    E4M3,
    E5M2,
    ROW,
    assert_quantised,
    assert_same,
    dequantised_by_hand,
    normal,
    quantised_by_hand,
)

COLUMN = (128, 1)


def scaled(shape: tuple[int, ...], tile: tuple[int, int] = BLOCK, seed: int = 0) -> ScaledArray:
    """Made without `quantise`."""
    values, scale = quantised_by_hand(normal(shape, seed), tile, E4M3, power_of_two=False)
    return ScaledArray(
        jnp.asarray(values.astype(ml_dtypes.float8_e4m3fn)), jnp.asarray(scale), tile
    )


def stands_for(matrix: ScaledArray) -> np.ndarray:
    values, scale = np.asarray(matrix.values), np.asarray(matrix.scale)
    return dequantised_by_hand(values, scale, matrix.tile).astype(np.float64)


def assert_equal(found: ScaledArray, expected: ScaledArray) -> None:
    """Bit by bit; handles are the same object or none."""
    assert found.tile == expected.tile and found.handle is expected.handle
    for part in ("values", "scale"):
        mine, other = getattr(found, part), getattr(expected, part)
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", [BLOCK, ROW, None])
@pytest.mark.parametrize("shape", [(200, 130), (2, 128, 256)])
def test_quantises_in_tiles_or_with_one_scale_for_a_matrix(shape, tile, power_of_two):
    x = normal(shape)
    make = jax.jit(functools.partial(quantise, tile=tile, power_of_two=power_of_two))
    found = make(jnp.asarray(x))
    assert found.handle is None and (found.shape, found.ndim) == (shape, len(shape))
    by_hand = tile or shape[-2:]
    assert_quantised((found.values, found.scale), x, by_hand, power_of_two)
    if tile is None:
        assert found.scale.shape == (*shape[:-2], 1, 1)


def test_quantises_in_another_dtype():
    x = normal((3, 200))
    make = functools.partial(quantise, tile=ROW, dtype=jnp.float8_e5m2)
    found = jax.jit(make)(jnp.asarray(x))
    assert found.values.dtype == jnp.float8_e5m2
    assert_quantised((found.values, found.scale), x, ROW, False, E5M2)


@functools.partial(jax.jit, static_argnums=1)
def dequantised(matrix: ScaledArray, dtype="float32") -> jax.Array:
    return matrix.dequantise(dtype)


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [
        (BLOCK, "bfloat16"),
        (BLOCK, "float32"),
        (ROW, "float32"),
        (COLUMN, "float32"),
        ((200, 256), "float32"),
    ],
)
def test_dequantised(tile, dtype):
    matrix = scaled((2, 200, 130), tile)
    found = dequantised(matrix, dtype)
    assert found.dtype == dtype
    assert_same(found, stands_for(matrix).astype(dtype).astype(np.float64))
    swapped = dataclasses.replace(matrix, scale=jnp.asarray(np.asarray(matrix.scale)[::-1]))
    with pytest.raises(AssertionError):
        assert_same(dequantised(swapped, dtype), np.asarray(found).astype(np.float64))


@pytest.mark.parametrize("tile", [BLOCK, ROW, COLUMN, (200, 256)])
def test_transposed_stands_for_the_transpose(tile):
    matrix = scaled((2, 200, 130), tile)
    found = jax.jit(ScaledArray.transposed)(matrix)
    assert found.shape == (2, 130, 200) and found.tile == tile[::-1]
    assert_same(dequantised(found), np.swapaxes(stands_for(matrix), -1, -2))
    assert_equal(found.transposed(), matrix)


WHOLE = (200, 256)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((2, 200, 130), BLOCK),
        ((2, 200, 130), ROW),
        ((2, 200, 130), WHOLE),
        ((7, 300), (7, 384)),
        ((130, 200), WHOLE[::-1]),
        ((256, 576), (256, 576)),
    ],
)
def test_of_rows_stands_for_the_same(shape, tile):
    """The last two are what is the transpose of a matrix with one scale."""
    matrix = scaled(shape, tile)
    found = jax.jit(ScaledArray.of_rows)(matrix)
    assert found.tile == ROW and found.scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    assert_same(dequantised(found), stands_for(matrix))


def test_an_index_takes_matrices_of_a_stack():
    matrix = scaled((3, 2, 140, 130))
    for index in (1, slice(1, 3), (2, 0), ...):
        found = matrix[index]
        assert_equal(found, ScaledArray(matrix.values[index], matrix.scale[index], matrix.tile))
        np.testing.assert_array_equal(dequantised(found), stands_for(matrix)[index])
    (with_handle,) = with_handles((matrix,))
    assert with_handle[1].handle.shape == (2, 140, 130)


@pytest.mark.parametrize(("shape", "tile"), [((3, 200, 130), BLOCK), ((3, 200, 130), ROW)])
def test_bytes_are_those_of_values_and_scales(shape, tile):
    matrix = scaled(shape, tile)
    tiles = 3 * 2 * 2 if tile == BLOCK else 3 * 200 * 2
    assert matrix.nbytes == 3 * 200 * 130 + 4 * tiles
    assert with_handles(matrix).nbytes == matrix.nbytes


def test_a_tree_of_values_scale_and_handle():
    matrix = scaled((130, 20))
    leaves, structure = jax.tree.flatten(matrix)
    assert [leaf.shape for leaf in leaves] == [(130, 20), (2, 1)]
    assert_equal(jax.tree.unflatten(structure, leaves), matrix)
    assert structure != jax.tree.structure(dataclasses.replace(matrix, tile=ROW))
    assert len(jax.tree.leaves(with_handles(matrix))) == 3


def test_a_tree_whatever_stands_for_its_parts():
    """Shapes, shardings and the placeholders of JAX among them."""
    matrix = with_handles(scaled((130, 20)))
    shapes = jax.tree.map(lambda part: part.shape, matrix)
    assert isinstance(shapes, ScaledArray) and shapes.scale == (2, 1)
    assert isinstance(jax.eval_shape(lambda x: x, matrix).values, jax.ShapeDtypeStruct)
    assert jax.tree.map(lambda part: None, matrix).values is None


def test_through_jit_scan_and_vmap():
    matrix = scaled((3, 130, 20))
    assert_equal(jax.jit(lambda matrix: matrix)(matrix), matrix)
    expected = stands_for(matrix)
    by_vmap = jax.vmap(ScaledArray.dequantise)(matrix)
    _, by_scan = jax.lax.scan(lambda carry, part: (carry, part.dequantise()), None, matrix)
    for found in (by_vmap, by_scan):
        assert_same(found, expected)


def mixed_tree(handles: str) -> dict:
    """Arrays, matrices in 8 bits, nothing, and all of it nested."""
    tree = {
        "norm": jnp.ones(3),
        "proj": scaled((130, 20)),
        "none": None,
        "layers": [{"gate": scaled((2, 20, 130), seed=1), "bias": jnp.zeros(2)}, (jnp.arange(3),)],
    }
    if handles == "all":
        return with_handles(tree)
    if handles == "some":
        tree["proj"] = with_handles(tree["proj"])
    return tree


def assert_equal_trees(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = (jax.tree.leaves(tree, is_leaf=is_scaled) for tree in (found, expected))
    for mine, other in zip(*pairs, strict=True):
        if is_scaled(other):
            assert_equal(mine, other)
        else:
            assert mine is other


@pytest.mark.parametrize("handles", ["none", "some", "all"])
def test_what_is_trained_and_the_rest_join_to_the_tree(handles):
    tree = mixed_tree(handles)
    of_trained, rest = trained(tree), untrained(tree)
    assert_equal_trees(joined(rest, of_trained), tree)
    gate, proj = tree["layers"][0]["gate"], tree["proj"]
    assert of_trained["norm"] is tree["norm"] and rest["norm"] is None
    assert of_trained["proj"] is proj.handle and rest["proj"].handle is None
    assert of_trained["layers"][0]["gate"] is gate.handle
    assert rest["layers"][0]["gate"].values is gate.values
    arrays = 3
    with_handle = {"none": 0, "some": 1, "all": 2}[handles]
    assert len(jax.tree.leaves(of_trained)) == arrays + with_handle
    assert len(jax.tree.leaves(rest)) == 2 * 2


def test_other_handles_can_be_joined():
    tree = mixed_tree("all")
    doubled = jax.tree.map(lambda x: x + 2, trained(tree))
    found = joined(untrained(tree), doubled)
    assert found["proj"].handle is doubled["proj"] and found["norm"] is doubled["norm"]
    assert found["proj"].values is tree["proj"].values


def test_a_single_matrix_or_array_is_a_tree():
    (matrix,), array = with_handles((scaled((2, 3)),)), jnp.ones(2)
    assert trained(matrix) is matrix.handle and trained(array) is array
    assert untrained(array) is None and joined(None, array) is array
    assert_equal(joined(untrained(matrix), trained(matrix)), matrix)


def test_handles_are_zeros_in_fp32():
    tree = with_handles(mixed_tree("none"))
    for matrix in (tree["proj"], tree["layers"][0]["gate"]):
        assert matrix.handle.shape == matrix.shape and matrix.handle.dtype == jnp.float32
        assert not np.any(matrix.handle)
    assert not is_scaled(tree["norm"]) and is_scaled(tree["proj"])


def test_gradients_are_taken_of_what_is_trained():
    tree = mixed_tree("all")
    of_trained, rest = trained({"proj": tree["proj"], "norm": tree["norm"]}), untrained(tree)
    rest = {"proj": rest["proj"], "norm": None}

    def loss(of_trained):
        whole = joined(rest, of_trained)
        return jnp.sum(whole["proj"].dequantise() * 2 + whole["proj"].handle * 3) + jnp.sum(
            whole["norm"]
        )

    found = jax.grad(loss)(of_trained)
    np.testing.assert_array_equal(found["proj"], np.full((130, 20), 3))
    np.testing.assert_array_equal(found["norm"], np.ones(3))


SIZES = {"fsdp": 4, "expert": 2, "pipe": 1}


@pytest.mark.parametrize(
    ("shape", "tile", "spec"),
    [
        ((512, 100), BLOCK, ("fsdp", None)),
        ((100, 512), BLOCK, (None, "fsdp")),
        ((1024, 100), BLOCK, (("fsdp", "expert"), None)),
        ((512, 256), BLOCK, ("fsdp", "expert")),
        ((8, 100, 100), BLOCK, ("fsdp", None, None)),
        ((3, 100, 100), BLOCK, ("pipe", None, None)),
        ((100, 70), BLOCK, ("pipe", "pipe")),
        ((100, 70), BLOCK, (None,)),
        ((100, 70), BLOCK, ()),
        ((4, 512), ROW, ("fsdp", "expert")),
        ((512, 4), COLUMN, ("fsdp", "expert")),
    ],
)
def test_a_spec_that_cuts_no_tile_is_that_of_values_and_scale(shape, tile, spec):
    spec = PartitionSpec(*spec)
    assert scaled_spec("w", shape, tile, spec, SIZES) == spec


@pytest.mark.parametrize(
    ("shape", "tile", "spec", "message"),
    [
        ((256, 100), BLOCK, ("fsdp", None), "split 4 ways in dim 0 has parts of 64, expected a"),
        ((576, 7168), BLOCK, ("fsdp", None), r"w \[576, 7168\] split 4 ways in dim 0 has parts of"),
        ((128, 576), BLOCK, (None, "expert"), "split 2 ways in dim 1 has parts of 288, expected"),
        ((512, 100), BLOCK, (("fsdp", "expert"),), "split 8 ways in dim 0 has parts of 64"),
        ((3, 512, 128), BLOCK, (None, "fsdp", "expert"), "split 2 ways in dim 2 has parts of 64"),
        ((4, 256), ROW, ("fsdp", "fsdp"), "parts of 64, expected a multiple of 128: a tile of 1x1"),
        ((258, 4), COLUMN, ("expert", None), "in dim 0 has parts of 129, expected a multiple of"),
        ((250, 512), (250, 512), (None, "expert"), "parts of 256, expected a multiple of 512"),
    ],
)
def test_a_spec_that_cuts_a_tile_is_named(shape, tile, spec, message):
    with pytest.raises(ValueError, match=message):
        scaled_spec("w", shape, tile, PartitionSpec(*spec), SIZES)
