"""A step in FP8: how near to float64, what its scales look like."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from dsv3_jax.quant.recipe import make_recipe
from dsv3_jax.train.scale_statistics import ScaleStatistics
from dsv3_jax.train.step import make_train_step
from tests import oracle
from tests.oracle.cases import random_tokens, tiny_config
from tests.train.models import hub_tensors, model_config, relative_error, settings, state_of

FIELDS = tiny_config(
    hidden_size=128,
    moe_intermediate_size=128,
    intermediate_size=256,
    vocab_size=64,
    num_experts_per_tok=8,  # all of them: rounding tips no choice
    topk_group=4,
)
ROWS = random_tokens(FIELDS, rows=8, length=12, seed=1)
TENSORS = oracle.random_weights(FIELDS, seed=6, std=0.1)


def config_of(recipe: str) -> RunConfig:
    return RunConfig(
        model=model_config(FIELDS),
        data=DataConfig(source="tokens", paths=("rows.npy",), seq_len=11),
        train=TrainConfig(batch_size=8),
        optimizer=OptimizerConfig(beta1=0.0, clip_norm=1e9),
        loss=LossConfig(balance_weight=0.01),
        precision=PrecisionConfig(recipe=recipe),
    )


@pytest.mark.slow
def test_fp8_loss_and_gradients_are_close_to_float64s():
    config = config_of("fp8")
    layout, state = state_of(config, TENSORS)
    step = make_train_step(layout)
    after, report = step(state, ROWS[None].astype(np.int32), None, settings(mtp_weight=0.3))
    expected, gradients = oracle.loss_and_gradients(FIELDS, TENSORS, ROWS, 0.3, 0.01)
    error = abs(float(report.losses.loss) / expected.loss - 1)
    assert 1e-6 < error < 5e-3
    found = hub_tensors(config.model, after.moments.first)
    whole = np.concatenate([found[name].ravel() for name in gradients])
    truth = np.concatenate([gradient.ravel() for gradient in gradients.values()])
    # 0.18; BF16, whose rounding is 16 times finer, has 0.016.
    assert 0.05 < relative_error(whole, truth) < 0.3


@pytest.fixture(scope="module")
def statistics():
    """Of a model whose every q_a_proj has one value that makes all others small."""
    config = config_of("fp8")
    tensors = dict(TENSORS)
    names = [name for name in tensors if name.endswith("q_a_proj.weight")]
    for name in names:
        tensors[name] = tensors[name].copy()
        tensors[name][0, 0] = 448 * 2.0**10  # the scale is 1024, the smallest value 2
    layout, state = state_of(config, tensors)
    measure = ScaleStatistics(layout, make_recipe("fp8"))
    found = measure(state, jnp.asarray(ROWS, jnp.int32), None, 0.3)
    return found, [tensors[name] for name in names]


@pytest.mark.slow
def test_a_weights_scales_and_underflow_are_those_counted_by_hand(statistics):
    found, weights = statistics
    assert found["fp8/q_a_proj/weight/log2_scale_mean"] == pytest.approx(10, abs=1e-6)
    assert found["fp8/q_a_proj/weight/log2_scale_std"] == pytest.approx(0, abs=2e-3)
    size = weights[0].size
    lost = sum(np.count_nonzero(np.abs(weight) <= 1.0) for weight in weights)
    assert lost == len(weights) * (size - 1)  # half of the smallest value, 2, goes to zero
    assert found["fp8/q_a_proj/weight/underflow"] == pytest.approx(lost / (size * len(weights)))
    assert found["fp8/q_a_proj/weight/saturation"] == pytest.approx(1 / size)


@pytest.mark.slow
def test_every_product_of_the_model_is_there(statistics):
    found, _ = statistics
    products = {name.split("/")[1] for name in found}
    assert products == {
        *("q_a_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "mlp_down_proj", "gate_up_proj", "down_proj"),
    }
    assert len(found) == len(products) * 3 * 4
    assert all(np.isfinite(value) for value in found.values())
    for product in products:  # each tile's largest value is at the limit, or next to it
        assert found[f"fp8/{product}/gradient/saturation"] > 0
