"""Cache bytes, parameters and FLOPs against published figures, brute force and accounting.py."""

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import accounting
from dsv3_jax.plan.model_arithmetic import (
    cache_bytes,
    cache_bytes_per_layer,
    cache_bytes_per_token,
    count,
    training_flops_per_token,
)
from dsv3_jax.plan.model_shape import find_model, read_shape, shape_of
from tests.plan.test_model_shape import SMALL


@pytest.mark.parametrize(
    ("model", "published"),
    [("deepseek-v3", 70_272), ("qwen2.5-72b", 327_680), ("llama-3.1-405b", 516_096)],
)
def test_cache_bytes_are_table_1(model, published):
    assert cache_bytes_per_token(find_model(model)) == published


def test_quantised_caches():
    v3, qwen = find_model("deepseek-v3"), find_model("qwen2.5-72b")
    assert cache_bytes_per_layer(v3, "fp8") == 656  # FlashMLA's README
    assert cache_bytes_per_layer(qwen, "fp8") == 2 * 8 * 128
    # 4 bits a value and an FP16 scale and zero point for 64: 0.5625 bytes.
    assert cache_bytes_per_layer(qwen, "int4") == 2 * 8 * 128 * 0.5625
    with pytest.raises(ValueError, match="cache is 'fp4', expected one of bf16, fp8"):
        cache_bytes_per_layer(v3, "fp4")


def test_windows_cap_the_cache():
    shape = read_shape(SMALL | {"sliding_window": 10, "sliding_window_pattern": 3}, "c")
    layer = 2 * 64 * 2  # keys and values of 4 heads of 16, two bytes
    assert cache_bytes(shape, 8) == 6 * 8 * layer
    assert cache_bytes(shape, 50) == (4 * 10 + 2 * 50) * layer


@pytest.mark.parametrize(
    ("model", "total"),
    [
        ("deepseek-v3", 671_026_419_200),  # the checkpoint's tensors
        ("deepseek-v2", 235_741_434_880),
        ("llama-3.1-405b", 405_853_388_800),  # as on its model card
        ("qwen2.5-72b", 72_706_203_648),
    ],
)
def test_parameters_are_the_checkpoints(model, total):
    assert count(find_model(model)).total == total


def test_mixtral():
    mixtral = {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    }
    found = count(read_shape(mixtral, "c"))
    assert found.total == 46_702_792_704  # the hub's count of its tensors
    assert found.active == 12_879_925_248  # and its card's 12.9B active


def test_against_accounting():
    config = ModelConfig(num_hidden_layers=7, hidden_size=512, num_nextn_predict_layers=0)
    ours, theirs = count(shape_of(config)), accounting.count_parameters(config)
    assert (ours.total, ours.active) == (theirs.total, theirs.active)
    assert ours.active_without_embedding == theirs.active_without_embedding
    for causal in (True, False):
        flops = training_flops_per_token(shape_of(config), 4096, causal=causal)
        expected = accounting.count_flops(config, 4096, causal=causal).training
        assert flops == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("model", "published"), [("deepseek-v2", 155), ("deepseek-v3", 250), ("llama-3.1-405b", 2448)]
)
def test_flops_are_table_2(model, published):
    gflops = training_flops_per_token(find_model(model), 4096) / 1e9
    # The dense model's printed figure counts attention once more by half: 1 % apart.
    assert gflops == pytest.approx(published, rel=0.0021 if "deepseek" in model else 0.011)


def test_windowed_attention_by_brute_force():
    fields = {"sliding_window": 5, "num_hidden_layers": 1}
    seq = 12
    keys = [min(5, token) for token in range(seq)]  # of the triangle, without its diagonal's half
    mean = sum(keys) / seq + 0.5 * 5 / seq  # the diagonal counts a half, as in seq/2
    windowed, whole = (
        training_flops_per_token(read_shape(SMALL | f, "c"), seq)
        for f in (fields, {"num_hidden_layers": 1})
    )
    assert whole - windowed == pytest.approx(6 * 4 * 32 * (seq / 2 - mean))


def test_unknown_families_are_refused():
    with pytest.raises(ValueError, match="model_type is 'gpt2', expected one of llama"):
        count(read_shape(SMALL | {"model_type": "gpt2"}, "c"))
