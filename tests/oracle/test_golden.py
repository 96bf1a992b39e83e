"""The oracle against Hugging Face's model: float64 golden files of tests/parity/golden.

They were computed by transformers in true float64 from float32 weights, so logits and losses must
agree to float64 noise. Gradients are stored as float32.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from .model import forward, greedy
from .training import adamw_step, loss_and_gradients, start_adamw

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
CASES = [
    "direct_q",
    "odd_sizes",
    "three_dense",
    "two_shared",
    "unnormalised",
    "yarn_hub",
    "yarn_mscale",
]
FLOAT32_STORED = 2e-7  # relative to a tensor's largest element; half a unit in the last place: 6e-8


def hub_config(directory: Path) -> dict:
    """config.json with transformers 5's `rope_parameters` put under the hub's own names."""
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = rope if rope["rope_type"] == "yarn" else None
    return config


def load(name: str) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Config, weights and golden values of one case."""
    directory = GOLDEN / name
    weights = load_file(directory / "model.safetensors")
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    return hub_config(directory), weights, load_file(directory / "golden.safetensors")


def assert_same_gradients(found: dict, golden: dict, prefix: str) -> None:
    """All gradients under `prefix` are there and agree; biases have none on either side."""
    expected = {
        name.removeprefix(prefix): g for name, g in golden.items() if name.startswith(prefix)
    }
    assert expected and expected.keys() <= found.keys()
    for name, value in expected.items():
        allowed = FLOAT32_STORED * np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=allowed, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_gradients_and_choices(name):
    config, weights, golden = load(name)
    tokens = golden["tokens"]
    output = forward(config, weights, tokens[:, :-1])
    np.testing.assert_allclose(output.logits, golden["logits_float64"], rtol=1e-10, atol=1e-11)
    for layer, routing in output.routing.items():
        chosen = np.sort(routing.choices, axis=-1)
        np.testing.assert_array_equal(chosen, golden[f"top_k_index.{layer}"])
    losses, gradients = loss_and_gradients(config, weights, tokens, 0.0, 0.0)
    assert losses.main == pytest.approx(float(golden["loss_float64"]), rel=1e-12)
    assert_same_gradients(gradients, golden, "grad.")


def test_hub_config_means_the_same():
    config, weights, golden = load("yarn_hub")
    hub = json.loads((GOLDEN / "yarn_hub" / "config_hub.json").read_text())
    one, other = (forward(c, weights, golden["tokens"]).logits for c in (config, hub))
    np.testing.assert_array_equal(one, other)


def test_mtp_module():
    """Hugging Face divides by the T - 1 targets, the report (eq. 24) by T."""
    config, weights, golden = load("mtp")
    config |= {"num_nextn_predict_layers": 1}
    tokens = golden["tokens"]
    output = forward(config, weights, tokens)
    expected = golden["mtp_logits_float64"]
    np.testing.assert_allclose(output.mtp_logits[0], expected, rtol=1e-10, atol=1e-11)

    length = tokens.shape[1] - 1
    losses, both = loss_and_gradients(config, weights, tokens, 1.0, 0.0)
    _, main = loss_and_gradients(config, weights, tokens, 0.0, 0.0)
    factor = length / (length - 1)
    assert losses.mtp * factor == pytest.approx(float(golden["mtp_loss_float64"]), rel=1e-12)
    mtp = {name: factor * (both[name] - main[name]) for name in both}
    assert_same_gradients(mtp, golden, "mtp_grad.")


def test_fifty_steps_of_adamw():
    config, weights, golden = load("adamw")
    state = None
    for step, tokens in enumerate(golden["tokens"]):
        losses, gradients = loss_and_gradients(config, weights, tokens, 0.0, 0.0)
        state = state or start_adamw(gradients)
        weights, state, norm = adamw_step(weights, gradients, state, learning_rate=1e-3)
        assert losses.main == pytest.approx(golden["losses_float64"][step], rel=1e-9)
        assert norm == pytest.approx(golden["gradient_norms_float64"][step], rel=1e-8)
    for name, value in golden.items():
        if name.startswith("final."):
            found = weights[name.removeprefix("final.")]
            np.testing.assert_allclose(found, value, rtol=2e-7, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("number", [0, 1])
def test_greedy_continuation(number):
    golden = load_file(GOLDEN / "generate" / "golden.safetensors")
    config, weights, _ = load("yarn_hub")
    expected = golden[f"generated.{number}"].tolist()
    found = greedy(config, weights, golden[f"prompt.{number}"].tolist(), len(expected))
    assert found == expected
