"""Published figures to the digit, built models to the parameter, traced programs to the FLOP."""

import dataclasses
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.model.accounting import (
    attention_core_flops,
    attention_parameters,
    cache_bytes_per_token,
    count_flops,
    count_parameters,
    dense_mlp_parameters,
    expert_parameters,
    moe_parameters,
    router_parameters,
)
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.dispatch_plan import choose_capacity, overflow_block
from dsv3_jax.train import loss
from dsv3_jax.train.layout import make_layout
from dsv3_jax.train.state import build_model, init_state, split_model
from dsv3_jax.train.step import StepSettings, make_train_step
from tests.model.weights import arrays_of, model_config
from tests.oracle import weight_shapes
from tests.oracle.cases import TWO_DEPTHS, V2_CHANGES, V3_671B, tiny_config
from tests.programs import dot_flops, quick_jit

V3 = model_config(V3_671B)
V2_FOLDER = dict(
    vocab_size=102400,
    first_k_dense_replace=1,
    n_shared_experts=2,
    num_experts_per_tok=6,
    norm_topk_prob=False,
    scoring_func="softmax",
    num_nextn_predict_layers=0,
)
V2_236B = ModelConfig(
    **V2_FOLDER,
    hidden_size=5120,
    num_hidden_layers=60,
    num_attention_heads=128,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_group=8,
    topk_group=3,
    routed_scaling_factor=16.0,
    topk_method="group_limited_greedy",
)
V2_16B = ModelConfig(
    **V2_FOLDER,
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    topk_method="greedy",
    q_lora_rank=None,
)
TINY = {
    "v3": tiny_config(),
    "two MTP depths": tiny_config(**TWO_DEPTHS),
    "v2": tiny_config(**V2_CHANGES),
    "no shared expert": tiny_config(n_shared_experts=0, num_hidden_layers=3),
    "all dense": tiny_config(
        num_nextn_predict_layers=0, first_k_dense_replace=2, n_routed_experts=0
    ),
}


@pytest.mark.parametrize(
    ("name", "model"), [("v2_lite_16b", V2_16B), ("v3_671b", V3), ("v3_671b_h100_1024", V3)]
)
def test_configs_are_of_the_models_counted_here(name, model):
    path = Path(__file__).parents[2] / "configs" / f"{name}.py"
    found = runpy.run_path(str(path))["config"]().model
    assert count_parameters(found) == count_parameters(model)
    assert count_flops(found, 4096) == count_flops(model, 4096)


def test_blocks_of_the_671b_model():
    """Facts §1.2."""
    assert attention_parameters(V3) == 187_107_328
    assert dense_mlp_parameters(V3) == 396_361_728
    assert expert_parameters(V3) == 44_040_192
    assert router_parameters(V3) == 1_835_264
    assert moe_parameters(V3, 256) == 11_320_164_608
    assert moe_parameters(V3, 8) == 398_196_992


def test_parameters_of_the_671b_model():
    """Facts §1.2; the stored figures count the copies of embedding and head that MTP brings."""
    count = count_parameters(V3)
    embedding = 926_679_040
    assert count.total == 671_026_419_200
    assert count.active == 37_552_297_472
    assert count.active_without_embedding == 36_625_618_432
    assert count.active_without_embedding - embedding == 35_698_939_392
    assert count.mtp == 11_610_068_224
    assert count.mtp + 2 * embedding == 13_463_426_304
    assert count.total + count.mtp + 2 * embedding == 684_489_845_504
    # README_WEIGHTS' "11.5B" and "2.4B" leave eh_proj out; the second has the copies.
    eh_proj = 2 * 7168**2
    assert round((count.mtp - eh_proj) / 1e9, 3) == 11.507
    assert round((count.mtp_active - eh_proj + 2 * embedding) / 1e9, 3) == 2.439


@pytest.mark.parametrize(
    ("config", "total", "active_without_embedding", "active"),
    [(V2_236B, 235_741_434_880, 20.852, 21.376), (V2_16B, 15_706_484_224, 2.451, 2.661)],
    ids=["236B", "16B"],
)
def test_parameters_of_the_v2_models(config, total, active_without_embedding, active):
    """Facts §1.3, active parameters in billions. Without MTP and without a selection bias."""
    count = count_parameters(config)
    assert count.total == total
    assert round(count.active_without_embedding / 1e9, 3) == active_without_embedding
    assert round(count.active / 1e9, 3) == active
    assert count.mtp == count.mtp_active == 0


@pytest.mark.parametrize("name", ["671B", *TINY])
def test_parameters_equal_the_oracles_list_of_tensors(name):
    config = V3_671B if name == "671B" else TINY[name]
    main, mtp = 0, 0
    for tensor, shape in weight_shapes(config).items():
        layer = int(tensor.split(".")[2]) if tensor.startswith("model.layers.") else -1
        if layer < config["num_hidden_layers"]:
            main += math.prod(shape)
        else:
            mtp += math.prod(shape)
    count = count_parameters(model_config(config))
    assert (count.total, count.mtp) == (main, mtp)


@pytest.mark.parametrize("name", ["671B", *TINY])
def test_parameters_equal_the_built_models_arrays(name):
    config = V3 if name == "671B" else model_config(TINY[name])
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    sizes = {path: leaf.size for path, leaf in arrays_of(nnx.state(model))}
    mtp = sum(size for path, size in sizes.items() if path[0] == "mtp")
    count = count_parameters(config)
    assert (count.total, count.mtp) == (sum(sizes.values()) - mtp, mtp)


def test_training_costs_per_token():
    """Facts §7.2, sequences of 4,096: Table 2 prints 250 for V3 and 155 for V2 (GFLOP a token)."""
    v3, v2 = count_flops(V3, 4096), count_flops(V2_236B, 4096)
    assert round(v3.training_without_mtp / 1e9, 2) == 250.46
    assert round(6 * count_parameters(V3).active_without_embedding / 1e9, 2) == 219.75
    assert round(3 * 61 * attention_core_flops(V3, 4096, causal=True) / 1e9, 2) == 30.70
    assert round(v2.training_without_mtp / 1e9, 2) == 155.31
    assert v2.mtp_forward == 0 and v2.training == v2.training_without_mtp
    full = count_flops(V3, 4096, causal=False)
    assert round((full.training_without_mtp - v3.training_without_mtp) / 1e9, 2) == 30.70


def test_cost_of_the_mtp_module():
    """Its active parameters and one more pass through the head, and its own attention."""
    cost, count = count_flops(V3, 4096), count_parameters(V3)
    head, attention = 129280 * 7168, 128 * (192 + 128) * 4096
    assert cost.mtp_forward == 2 * (count.mtp_active + head) + attention
    assert cost.training == 3 * (cost.forward + cost.mtp_forward)


def test_cache_bytes():
    """Facts §7.1: 70.272 KB a token in BF16, against 327.680 and 516.096 of GQA models."""
    assert cache_bytes_per_token(V3) == 70_272
    assert cache_bytes_per_token(V3, bytes_per_value=1) == 35_136
    assert cache_bytes_per_token(V2_16B) == 576 * 27 * 2


def test_cache_is_as_large_as_counted():
    config = model_config(TINY["v3"])
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((3, 10), jnp.int32)
    _, latents, _ = jax.eval_shape(Transformer.main_hidden, model, tokens)
    assert latents.size * latents.dtype.itemsize == 3 * 10 * cache_bytes_per_token(config, 4)


def test_forward_flops_of_a_dense_model_are_exact():
    """Norms multiply no matrix; accounting counts their parameters as if they did."""
    config = model_config(TINY["all dense"])
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((3, 32), jnp.int32)
    found = dot_flops(jax.make_jaxpr(Transformer.__call__)(model, tokens), while_trips=0)
    norms = 12 + 2 * (2 * 12 + 7 + 5)
    expected = count_flops(config, 32, causal=False).forward - 2 * norms
    assert found == 3 * 32 * expected


def bench_tiny() -> RunConfig:
    return runpy.run_path(str(Path(__file__).parents[2] / "configs" / "bench_tiny.py"))["config"]()


def step_arguments(config: RunConfig):
    """A jitted training step and the shapes of its arguments."""
    layout = make_layout(config)
    batch, seq = config.train.batch_size, config.data.seq_len
    rows = jax.ShapeDtypeStruct((1, batch, seq + 1), jnp.int32)
    settings = StepSettings(jnp.int32(1), *map(jnp.float32, (1e-4, 0.3, 0.001)))
    return make_train_step(layout), (layout.abstract_state(), rows, None, settings)


def mean_overflow_blocks(load: np.ndarray, model: ModelConfig, tokens: int) -> float:
    """Overflow blocks of a layer, the mean over layers, for the tokens each expert has got."""
    capacity = choose_capacity(tokens, model.num_experts_per_tok, model.n_routed_experts, tokens)
    blocks = -(-np.maximum(load - capacity, 0) // overflow_block(tokens))
    return float(blocks.sum(axis=1).mean())


def first_model(config: RunConfig) -> Transformer:
    """A model as training starts it, drawn by NumPy (compiling the draws takes seconds)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim == 2 and path[0] != "embed_tokens" and path[0] != "lm_head":  # norms, biases
            return jnp.full(leaf.shape, float(path[-1] == "weight"))
        drawn = random.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(config.model.initializer_range * drawn)

    leaves = [draw(path, leaf) for path, leaf in arrays_of(state)]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


def random_rows(config: RunConfig) -> jax.Array:
    shape = (config.train.batch_size, config.data.seq_len + 1)
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
    return jnp.asarray(rows, jnp.int32)


@pytest.fixture(scope="module")
def bench_load() -> np.ndarray:
    """Tokens of every expert and layer: bench_tiny as it starts, on random tokens."""
    config = bench_tiny()
    loads = quick_jit(lambda model, rows: model.hidden_states(rows).load)
    return np.asarray(loads(first_model(config), random_rows(config)))


def test_a_training_step_multiplies_at_most_a_quarter_more_than_accounting_says(bench_load):
    """bench_tiny: 1.044 times with an even load, 1.05 with the load it starts with.

    (Every token of every layer on the same 4 experts, which no training keeps up, gives 1.28.)
    """
    config = bench_tiny()
    step, arguments = step_arguments(config)
    traced = step.trace(*arguments).jaxpr
    accounted = 8 * 256 * count_flops(config.model, 256).training
    assert bench_load.sum() == 3 * 8 * 256 * 4
    trips = mean_overflow_blocks(bench_load, config.model, 8 * 256)
    even, found = (dot_flops(traced, while_trips=n) / accounted for n in (0, trips))
    assert 1.0 <= even <= 1.1
    assert even <= found <= 1.25
    collapsed = np.array([[2048] * 4 + [0] * 12])
    trips = mean_overflow_blocks(collapsed, config.model, 8 * 256)
    assert dot_flops(traced, while_trips=trips) / accounted <= 1.35


def test_xla_counts_the_same(monkeypatch):
    """Its own figure, element-wise work included, is above the products' by a few percent.

    XLA counts the body of a loop once. So the layers are unrolled (as bench_tiny has them), the
    cross-entropy goes in one chunk, and of the overflow blocks one counts here as there.
    """
    config = bench_tiny()
    assert not config.train.scan_layers
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 8 * 256)
    step, arguments = step_arguments(config)
    traced = step.trace(*arguments)
    products = dot_flops(traced.jaxpr, while_trips=1)
    found = traced.lower().cost_analysis()["flops"]
    accounted = 8 * 256 * count_flops(config.model, 256).training
    assert products <= found <= 1.05 * products
    assert found <= 1.25 * accounted
    scanned = dataclasses.replace(config.train, scan_layers=True)
    step, arguments = step_arguments(dataclasses.replace(config, train=scanned))
    assert dot_flops(step.trace(*arguments).jaxpr, while_trips=1) == products


@pytest.mark.slow
def test_the_compiled_step_costs_no_more_on_the_loads_that_it_meets(monkeypatch, bench_load):
    """XLA's figure after its optimisations (1.063), and ours for the loads of ten steps (1.053)."""
    config = bench_tiny()
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 8 * 256)
    step, (_, _, documents, settings) = step_arguments(config)
    _, params, bias = split_model(first_model(config))
    state = init_state(config.optimizer, params, bias)
    rows = random_rows(config)[None]
    traced = step.trace(state, rows, documents, settings)
    compiled = traced.lower().compile()
    accounted = 8 * 256 * count_flops(config.model, 256).training
    products = dot_flops(traced.jaxpr, while_trips=1) / accounted
    assert 0.95 * products <= compiled.cost_analysis()["flops"] / accounted <= 1.25
    loads = []
    for _ in range(10):
        state, report = compiled(state, rows, documents, settings)
        loads.append(np.asarray(report.load))
    np.testing.assert_array_equal(loads[0], bench_load)
    for load in loads:
        trips = mean_overflow_blocks(load, config.model, 8 * 256)
        assert dot_flops(traced.jaxpr, while_trips=trips) / accounted <= 1.25
