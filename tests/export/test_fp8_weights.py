"""FP8 checkpoints inferred from as they are: the same bytes in the model, the oracle's logits."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import dsv3_jax
from dsv3_jax.checkpoint import CheckpointManager
from dsv3_jax.config import DataConfig, RunConfig
from dsv3_jax.export.huggingface import load_hf, save_hf
from dsv3_jax.export.load import load
from dsv3_jax.quant.recipe import QUANTISED
from dsv3_jax.quant.scaled_array import ScaledArray, is_scaled, quantise
from dsv3_jax.train.run_directory import write_config
from dsv3_jax.train.state import init_state, split_model
from tests.export.hub_files import (
    RAGGED,
    assert_same_tensors,
    dequantise_by_hand,
    hub_tensors,
    quantise_by_hand,
    read_checkpoint,
    write_checkpoint,
)
from tests.oracle import model as oracle

FP8 = "float8_e4m3fn"
SMALL = RAGGED | dict(moe_intermediate_size=128)
"""Whole blocks where experts' gate and up share them, ragged ones elsewhere."""
UP_PROJ = "model.layers.1.mlp.experts.1.up_proj.weight"
LOGITS = 0.2
"""Relative, in the Frobenius norm. E4M3 rounds an activation by 0.025 in the root mean square, and
a dozen products follow one another (measured: 0.098)."""


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return hub_tensors(SMALL, "F8_E4M3")


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tensors):
    return write_checkpoint(tmp_path_factory.mktemp("fp8"), SMALL, tensors)


def dequantised(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor in FP32, by hand."""
    return {
        name: dequantise_by_hand(values, tensors[f"{name}_scale_inv"])
        if f"{name}_scale_inv" in tensors
        else values.astype(np.float32)
        for name, values in tensors.items()
        if not name.endswith("_scale_inv")
    }


def scaled_arrays(model) -> dict[str, ScaledArray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model), is_leaf=is_scaled)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if is_scaled(leaf)}


def test_values_and_scales_are_the_files(directory, tensors):
    model = load(directory, FP8)
    experts = model.moe_layers.mlp.experts
    up = experts.gate_up_proj[...][0, 1, 1]
    assert up.values.dtype == ml_dtypes.float8_e4m3fn
    assert np.asarray(up.values).tobytes() == tensors[UP_PROJ].tobytes()
    assert np.asarray(up.scale).tobytes() == tensors[f"{UP_PROJ}_scale_inv"].tobytes()
    # Those of the products in FP8, and only those.
    named = scaled_arrays(model)
    assert {next(name for name in QUANTISED if f"'{name}'" in path) for path in named} == (
        QUANTISED - {"q_proj"}
    )
    others = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=is_scaled)
    assert {leaf.dtype for leaf in others if not is_scaled(leaf)} == {jnp.dtype(jnp.bfloat16)}


def test_saved_again_it_is_the_same_file(tmp_path, directory, tensors):
    model = load(directory, FP8)
    save_hf(model, tmp_path / "fp8", FP8)
    assert_same_tensors(read_checkpoint(tmp_path / "fp8"), tensors)
    save_hf(model, tmp_path / "bf16", "bfloat16")
    saved = read_checkpoint(tmp_path / "bf16")
    expected = dequantised(tensors)[UP_PROJ].astype(ml_dtypes.bfloat16)
    assert saved[UP_PROJ].tobytes() == expected.tobytes()


def test_what_a_file_has_in_bf16_is_quantised(tmp_path, tensors):
    """Here one expert of a stack whose other matrices are in FP8."""
    mixed = dict(tensors)
    scale = mixed.pop(f"{UP_PROJ}_scale_inv")
    mixed[UP_PROJ] = dequantise_by_hand(mixed[UP_PROJ], scale).astype(ml_dtypes.bfloat16)
    expected = quantise_by_hand(UP_PROJ, mixed[UP_PROJ].astype(np.float32))
    model = load_hf(write_checkpoint(tmp_path / "in", SMALL, mixed), FP8)
    save_hf(model, tmp_path / "out", FP8)
    assert_same_tensors(read_checkpoint(tmp_path / "out"), mixed | expected)


def test_logits_are_the_oracles(directory, tensors):
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 12)).astype(np.int32)
    expected = oracle.forward(SMALL, dequantised(tensors), tokens, mtp=False)
    found = np.asarray(load(directory, FP8)(jnp.asarray(tokens)), np.float64)
    error = np.linalg.norm(found - expected.logits) / np.linalg.norm(expected.logits)
    assert error < LOGITS
    # Another expert's weights would be seen.
    wrong = dequantised(tensors)
    wrong[UP_PROJ] = -wrong[UP_PROJ]
    changed = oracle.forward(SMALL, wrong, tokens, mtp=False).logits
    assert np.linalg.norm(found - changed) / np.linalg.norm(changed) > 2 * LOGITS


@pytest.mark.slow
def test_decoding_computes_what_prefill_does(directory):
    """The absorbed form reads kv_b_proj's matrix itself."""
    model = load(directory, FP8)
    prompt = [3, 1, 4, 1, 5]
    made = dsv3_jax.generate(model, [prompt], max_new_tokens=4)[0]
    logits = np.asarray(model(jnp.asarray([prompt + made])))[0]
    for place, token in enumerate(made, start=len(prompt) - 1):
        best = np.max(logits[place])
        assert best - logits[place, token] <= LOGITS * np.max(np.abs(logits[place]))


@pytest.mark.slow
def test_a_run_is_quantised_as_it_would_be_saved(tmp_path, directory):
    model = load_hf(directory)
    config = RunConfig(model=model.config, data=DataConfig(seq_len=32))
    write_config(tmp_path / "run", config)
    _, params, selection_bias = split_model(model)
    with CheckpointManager(tmp_path / "run" / "checkpoints", keep=1) as manager:
        state = init_state(config.optimizer, params, selection_bias)
        manager.save(1, state, {"step": 1})
    save_hf(load(tmp_path / "run"), tmp_path / "saved", FP8)
    found, expected = (
        scaled_arrays(load(tmp_path / "run", FP8)),
        scaled_arrays(load(tmp_path / "saved", FP8)),
    )
    assert found.keys() == expected.keys() != set()
    for name, scaled in found.items():
        assert np.asarray(scaled.values).tobytes() == np.asarray(expected[name].values).tobytes()
        np.testing.assert_array_equal(scaled.scale, expected[name].scale)


def test_training_quantises_the_master_weights_to_the_files_values(directory, tensors):
    """No detour: FP32 weights of an FP8 file become its values again, scales to 2 ulp."""
    master = load_hf(directory).moe_layers.mlp.experts.gate_up_proj[0, 1, 1]
    again = quantise(master)
    assert np.asarray(again.values).tobytes() == tensors[UP_PROJ].tobytes()
    np.testing.assert_array_max_ulp(np.asarray(again.scale), tensors[f"{UP_PROJ}_scale_inv"], 2)
    by_bf16 = quantise(master.astype(jnp.bfloat16).astype(jnp.float32))
    assert not np.array_equal(by_bf16.scale, again.scale)


def test_experts_whose_blocks_would_be_cut_are_refused(tmp_path):
    path = write_checkpoint(tmp_path / "cut", RAGGED, hub_tensors(RAGGED, "F8_E4M3"))
    with pytest.raises(
        ValueError, match="moe_intermediate_size is 130, expected a multiple of 128"
    ):
        load(path, FP8)
