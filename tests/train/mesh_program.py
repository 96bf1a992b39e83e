"""Losses and gradients of one step on meshes of simulated devices, against one device.

    python -m tests.train.mesh_program NAME...        prints {name: {quantity: relative error}}

With beta1 = 0 and no clipping the first moments after a step are the whole batch's gradients.
"""

import os
import sys

os.environ["XLA_FLAGS"] = (  # and quick to compile
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
)

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import OptimizerConfig, ParallelConfig, RunConfig
from dsv3_jax.config.training import DataConfig, LossConfig, PrecisionConfig, TrainConfig
from dsv3_jax.quant.recipe import Recipe, make_recipe
from dsv3_jax.train import layout as layout_module
from dsv3_jax.train import state as state_module
from dsv3_jax.train.layout import Layout
from dsv3_jax.train.state import TrainState
from dsv3_jax.train.step import make_train_step
from tests import oracle
from tests.oracle.cases import V2_CHANGES, tiny_config
from tests.train.models import hub_tensors, model_config, relative_error, settings, state_of


def fp32_activations(*arguments: str) -> Recipe:
    """A recipe without BF16: its rounding would tip values into the next of FP8, and hide all else
    behind that."""
    return dataclasses.replace(make_recipe(*arguments), dtype=jnp.float32)


SEQ, BATCH = 24, 16
BASE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts_per_tok": 3}
PRECISION = ("recipe", "dispatch", "combine")
NOT_PARALLEL = ("one_expert", "accumulation", "documents", "model", "used_parts", *PRECISION)
"""What the run on one device does too; how much is computed again is not part of it."""
CASES: dict[str, dict[str, Any]] = {
    "gpu 2": {"gpu": 2},
    "node 8": {"node": 8},
    "node 2, gpu 4": {"node": 2, "gpu": 4},
    "data 2, node 2, gpu 2": {"data": 2, "node": 2, "gpu": 2},
    "flat": {"data": 2, "node": 2, "gpu": 2, "dispatcher": "flat"},
    "zero 3": {"data": 2, "node": 2, "gpu": 2, "zero": 3},
    "zero 3, two nodes": {"node": 2, "gpu": 4, "zero": 3},
    "many rounds, flat": {"gpu": 8, "capacity_factor": 0.1},
    "two parts, documents": {"node": 2, "gpu": 2, "accumulation": 2, "documents": True},
    "all to one expert, many rounds": {
        "node": 2,
        "gpu": 4,
        "one_expert": True,
        "capacity_factor": 0.1,
    },
}


ONE_EXPERT: dict[str, Any] = {"num_experts_per_tok": 1, "norm_topk_prob": False}
"""Normalised, the weight of a single expert is 1 and the router learns nothing from it."""


def pipeline(schedule: str, pipe: int, micro_batches: int = 8, **changes: Any) -> dict[str, Any]:
    """The changes of a pipeline case, four layers where `model` does not say otherwise."""
    return {
        "schedule": schedule,
        "pipe": pipe,
        "micro_batches": micro_batches,
        **changes,
        "model": FOUR_LAYERS | changes.get("model", {}),
    }


FOUR_LAYERS = {"num_hidden_layers": 4, "first_k_dense_replace": 1}
DEEP = {"num_hidden_layers": 8, "first_k_dense_replace": 3}
NO_MTP = {"num_nextn_predict_layers": 0}
TWO_MTP = {"num_nextn_predict_layers": 2, "vocab_size": 24}
V2_ROUTER = {  # no selection bias
    **{key: V2_CHANGES[key] for key in ("q_lora_rank", "scoring_func", "topk_method")},
    **{key: V2_CHANGES[key] for key in ("n_shared_experts", "norm_topk_prob")},
}
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128}  # whole tiles
FP8: dict[str, Any] = {"recipe": "fp8", "one_expert": True}
PARTS: dict[str, Any] = {"accumulation": 8}  # on one device; a pipeline has its micro-batches
CASES |= {
    "1f1b, pipe 4, gpu 2": pipeline("1f1b", 4, gpu=2, model=DEEP),
    "zb1p, pipe 4, node 2": pipeline("zb1p", 4, node=2, model=DEEP),
    "dualpipe, pipe 2, node 2, gpu 2": pipeline("dualpipe", 2, 4, node=2, gpu=2, model=DEEP),
    "dualpipev, pipe 4, node 2": pipeline("dualpipev", 4, node=2, model=DEEP),
    # Of one model and batch: one run on one device serves all.
    "dualpipe, documents": pipeline("dualpipe", 2, 4, node=2, gpu=2, documents=True),
    "dualpipev, documents, remat selective": pipeline(
        "dualpipev", 2, 4, gpu=2, documents=True, remat="selective"
    ),
    "zb1p, documents, remat full": pipeline("zb1p", 4, documents=True, remat="full"),
    "dualpipe, no late weight gradients": pipeline(
        "dualpipe", 2, 4, gpu=2, documents=True, late_weight_gradients=False
    ),
    # The model
    "dualpipe, two MTP modules, vocabulary 24": pipeline("dualpipe", 2, 4, gpu=2, model=TWO_MTP),
    "dualpipev, no dense layers, no MTP": pipeline(
        "dualpipev", 2, 4, gpu=2, model=NO_MTP | {"first_k_dense_replace": 0}
    ),
    "zb1p, no experts": pipeline(
        "zb1p", 4, data=2, model=NO_MTP | {"first_k_dense_replace": 4, "n_routed_experts": 0}
    ),
    "dualpipe, V2's router": pipeline("dualpipe", 2, 4, gpu=2, model=V2_ROUTER),
    # The batch and what is sent
    "dualpipe, all to one expert, many rounds": pipeline(
        "dualpipe", 2, 4, node=2, gpu=2, one_expert=True, capacity_factor=0.1
    ),
    "zb1p, many rounds, remat full": pipeline(
        "zb1p", 2, 4, gpu=4, capacity_factor=0.1, remat="full"
    ),
    "dualpipev, 1 of 8 parts, documents": pipeline(
        "dualpipev", 2, gpu=2, used_parts=1, documents=True, **PARTS
    ),
    # Rounding tips no choice of experts here.
    "dualpipe, bf16": pipeline("dualpipe", 2, gpu=2, one_expert=True, recipe="bf16", **PARTS),
    "fp8 wire, two hops": {"node": 2, "gpu": 2, "dispatch": "fp8", "capacity_factor": 0.5},
    "fp8 wire, dualpipe": pipeline("dualpipe", 2, 4, gpu=2, dispatch="fp8"),
    "logfmt10, two hops": {
        "node": 2,
        "gpu": 2,
        "combine": "logfmt10",
        "one_expert": True,
        "model": WIDE,
    },
    # Micro-batches and so tiles are the same as on one device.
    "fp8, dualpipe": pipeline("dualpipe", 2, model=WIDE, **FP8, **PARTS),
    "fp8, zb1p, remat full": pipeline("zb1p", 4, remat="full", model=WIDE, **FP8, **PARTS),
    "fp8, dualpipe, two hops": pipeline(
        "dualpipe", 2, 4, node=2, gpu=2, model=WIDE, **FP8, accumulation=4
    ),
    "fp8, data 2, node 2, gpu 2": {
        "data": 2,
        "node": 2,
        "gpu": 2,
        "capacity_factor": 0.3,
        "model": WIDE,
        **FP8,
    },
}


def run_config(changes: dict[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """The run of a case, and the model's fields as the oracle reads them."""
    changes = dict(changes)
    one_expert = changes.pop("one_expert", False)
    accumulation, documents = changes.pop("accumulation", 1), changes.pop("documents", False)
    remat, model = changes.pop("remat", "none"), changes.pop("model", {})
    if changes.get("recipe") == "fp8":
        for module in (layout_module, state_module):
            module.make_recipe = fp32_activations  # for all of this process
    precision = {name: changes.pop(name) for name in PRECISION if name in changes}
    changes.pop("used_parts", None)
    if "pipe" in changes:
        accumulation = 1
    fields = tiny_config(**BASE | model | (ONE_EXPERT if one_expert else {}))
    config = RunConfig(
        model=model_config(fields, max_position_embeddings=4096),
        data=DataConfig(seq_len=SEQ, cross_document_mask=documents),
        train=TrainConfig(batch_size=BATCH, accumulation=accumulation, remat=remat),
        optimizer=OptimizerConfig(beta1=0.0, clip_norm=1e9, schedule="constant"),
        loss=LossConfig(balance_weight=0.01),
        parallel=ParallelConfig(**changes),
        precision=PrecisionConfig(**precision),
    )
    return config, fields


def first_state(config: RunConfig, fields: dict[str, Any], one_expert: bool):
    # Rounding grows with depth: of weights like these 8 layers pass on twice what 2 layers do.
    std = 0.3 if config.model.num_hidden_layers == 2 else 0.15
    layout, state = state_of(config, oracle.random_weights(fields, seed=0, std=std))
    if one_expert:  # expert 5 of every layer outbids all others
        bias = jax.tree.map(lambda b: b.at[:, 5].set(100.0), state.selection_bias)
        state = state._replace(selection_bias=bias)
    return layout, state


def one_step(
    layout: Layout, state: TrainState, used_parts: int | None = None
) -> dict[str, np.ndarray]:
    """The losses, the load, the gradient norm and every gradient, by the hub's names."""
    config = layout.config
    shape = (config.parts, BATCH // config.parts, SEQ + 1)
    random = np.random.default_rng(1)
    tokens = random.integers(0, config.model.vocab_size, (BATCH, SEQ + 1), np.int32)
    rows = layout.put_rows(tokens.reshape(shape))
    documents = None
    if config.data.cross_document_mask:
        cuts = np.cumsum(random.random((BATCH, SEQ + 1)) < 0.2, axis=1).astype(np.int32)
        documents = layout.put_rows(cuts.reshape(shape))
    step = make_train_step(layout)
    parts = settings(micro_batches=used_parts or config.parts, mtp_weight=0.3)
    after, report = step(state, rows, documents, parts)
    gradients = hub_tensors(config.model, after.moments.first)
    return {
        **{name: np.asarray(value) for name, value in report.losses._asdict().items()},
        "load": np.asarray(report.load),
        "gradient norm": np.asarray(report.gradient_norm.total),
        **gradients,
    }


@functools.cache
def on_one_device(alone: str) -> dict[str, np.ndarray]:
    changes = json.loads(alone)
    config, fields = run_config(changes)
    state = first_state(config, fields, changes.get("one_expert", False))
    return one_step(*state, changes.get("used_parts"))


def errors(name: str) -> dict[str, float]:
    """Relative errors of a case's mesh against one device."""
    changes = CASES[name]
    config, fields = run_config(changes)
    one_expert = bool(changes.get("one_expert"))
    found = one_step(*first_state(config, fields, one_expert), changes.get("used_parts"))
    alone = {key: changes[key] for key in NOT_PARALLEL if key in changes}
    expected = on_one_device(json.dumps(alone))
    if one_expert:
        assert (expected["load"][:, 5] == expected["load"].sum(axis=1)).all()
    assert found.keys() == expected.keys()
    return {key: relative_error(found[key], expected[key]) for key in expected}


if __name__ == "__main__":
    print(json.dumps({name: errors(name) for name in sys.argv[1:]}))
