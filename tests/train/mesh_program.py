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

import functools
import json
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import OptimizerConfig, ParallelConfig, RunConfig
from dsv3_jax.config.training import DataConfig, LossConfig, TrainConfig
from dsv3_jax.train.layout import Layout
from dsv3_jax.train.state import TrainState
from dsv3_jax.train.step import make_train_step
from tests import oracle
from tests.oracle.cases import tiny_config
from tests.train.models import hub_tensors, model_config, relative_error, settings, state_of

SEQ, BATCH, VOCAB = 24, 16, 23
BASE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts_per_tok": 3}
NOT_PARALLEL = ("one_expert", "accumulation", "documents")
CASES: dict[str, dict[str, Any]] = {
    "gpu 2": {"gpu": 2},
    "node 2": {"node": 2},
    "data 2": {"data": 2},
    "gpu 8": {"gpu": 8},
    "node 8": {"node": 8},
    "data 8": {"data": 8},
    "node 2, gpu 4": {"node": 2, "gpu": 4},
    "node 4, gpu 2": {"node": 4, "gpu": 2},
    "data 2, node 2, gpu 2": {"data": 2, "node": 2, "gpu": 2},
    "data 4, node 2": {"data": 4, "node": 2},
    "data 2, gpu 4": {"data": 2, "gpu": 4},
    "flat": {"data": 2, "node": 2, "gpu": 2, "dispatcher": "flat"},
    "zero 3": {"data": 2, "node": 2, "gpu": 2, "zero": 3},
    "zero 3, two nodes": {"node": 2, "gpu": 4, "zero": 3},
    "many rounds": {"node": 2, "gpu": 4, "capacity_factor": 0.1},
    "many rounds, flat": {"gpu": 8, "capacity_factor": 0.1},
    "two parts, documents": {"node": 2, "gpu": 2, "accumulation": 2, "documents": True},
    "all to one expert": {"node": 2, "gpu": 4, "one_expert": True},
    "all to one expert, many rounds": {
        "node": 2,
        "gpu": 4,
        "one_expert": True,
        "capacity_factor": 0.1,
    },
}


def run_config(changes: dict[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """The run of a case, and the model's fields as the oracle reads them."""
    changes = dict(changes)
    one_expert = changes.pop("one_expert", False)
    accumulation, documents = changes.pop("accumulation", 1), changes.pop("documents", False)
    fields = tiny_config(**BASE | ({"num_experts_per_tok": 1} if one_expert else {}))
    config = RunConfig(
        model=model_config(fields, max_position_embeddings=4096),
        data=DataConfig(seq_len=SEQ, cross_document_mask=documents),
        train=TrainConfig(batch_size=BATCH, accumulation=accumulation),
        optimizer=OptimizerConfig(beta1=0.0, clip_norm=1e9, schedule="constant"),
        loss=LossConfig(balance_weight=0.01),
        parallel=ParallelConfig(**changes),
    )
    return config, fields


def first_state(config: RunConfig, fields: dict[str, Any], one_expert: bool):
    layout, state = state_of(config, oracle.random_weights(fields, seed=0, std=0.3))
    if one_expert:  # expert 5 of every layer outbids all others
        bias = jax.tree.map(lambda b: b.at[:, 5].set(100.0), state.selection_bias)
        state = state._replace(selection_bias=bias)
    return layout, state


def one_step(layout: Layout, state: TrainState) -> dict[str, np.ndarray]:
    """The losses, the load, the gradient norm and every gradient, by the hub's names."""
    config = layout.config
    shape = (config.train.accumulation, BATCH // config.train.accumulation, SEQ + 1)
    random = np.random.default_rng(1)
    rows = layout.put_rows(random.integers(0, VOCAB, (BATCH, SEQ + 1), np.int32).reshape(shape))
    documents = None
    if config.data.cross_document_mask:
        cuts = np.cumsum(random.random((BATCH, SEQ + 1)) < 0.2, axis=1).astype(np.int32)
        documents = layout.put_rows(cuts.reshape(shape))
    step = make_train_step(layout)
    parts = settings(micro_batches=config.train.accumulation, mtp_weight=0.3)
    after, report = step(state, rows, documents, parts)
    gradients = hub_tensors(config.model, after.moments.first)
    return {
        **{name: np.asarray(value) for name, value in report.losses._asdict().items()},
        "load": np.asarray(report.load),
        "gradient norm": np.asarray(report.gradient_norm.total),
        **gradients,
    }


@functools.cache
def on_one_device(changes: tuple[tuple[str, Any], ...]) -> dict[str, np.ndarray]:
    config, fields = run_config(dict(changes))
    return one_step(*first_state(config, fields, dict(changes).get("one_expert", False)))


def errors(name: str) -> dict[str, float]:
    """Relative errors of a case's mesh against one device."""
    changes = CASES[name]
    config, fields = run_config(changes)
    one_expert = bool(changes.get("one_expert"))
    found = one_step(*first_state(config, fields, one_expert))
    alone = {key: changes[key] for key in NOT_PARALLEL if key in changes}
    expected = on_one_device(tuple(alone.items()))
    if one_expert:
        assert (expected["load"][:, 5] == expected["load"].sum(axis=1)).all()
    assert found.keys() == expected.keys()
    return {key: relative_error(found[key], expected[key]) for key in expected}


if __name__ == "__main__":
    print(json.dumps({name: errors(name) for name in sys.argv[1:]}))
