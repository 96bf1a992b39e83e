"""Logits of Hugging Face's own model, from committed golden files (tests/parity/README.md)."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dsv3_jax.export.huggingface import load_hf

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
CASES = sorted(
    file.parent.name
    for file in GOLDEN.glob("*/golden.safetensors")
    if "logits" in load_file(file) and (file.parent / "config.json").exists()
)
TOLERANCE = 2e-4
"""Of the largest logit; float32 rounding alone gives about 1e-6."""
# Half the time to compile; the numbers are the same to rounding.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compute(model, function, tokens):
    graph, state = nnx.split(model)

    def run(state, tokens):
        return function(nnx.merge(graph, state), tokens)

    return jax.device_get(jax.jit(run, compiler_options=UNOPTIMISED)(state, tokens))


def assert_same_logits(found, expected):
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_every_kind_of_model_is_there():
    expected = {"direct_q", "mtp", "odd_sizes", "three_dense", "two_shared", "unnormalised"}
    assert set(CASES) >= expected | {"yarn_hub", "yarn_mscale"}


@pytest.mark.parametrize("case", [case for case in CASES if case != "mtp"])
def test_logits(case):
    golden = load_file(GOLDEN / case / "golden.safetensors")
    model = load_hf(GOLDEN / case)
    assert model.config.num_nextn_predict_layers == 0
    logits = compute(model, lambda model, tokens: model(tokens), golden["tokens"][:, :-1])
    assert_same_logits(logits, golden["logits"])


def test_logits_of_the_mtp_module_too():
    golden = load_file(GOLDEN / "mtp" / "golden.safetensors")

    def both(model, rows):
        states = model.hidden_states(rows)
        return model.logits(states.main), model.logits(states.mtp[0])

    model = load_hf(GOLDEN / "mtp")
    assert model.config.num_nextn_predict_layers == 1
    main, mtp = compute(model, both, golden["tokens"])
    assert_same_logits(main, golden["logits"])
    assert_same_logits(mtp[:, :-1], golden["mtp_logits"][:, :-1])  # the last has no target
