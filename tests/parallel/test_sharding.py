"""Where parameters lie: the rule by hand, for tensors of the 671B model on its cluster."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import RunConfig
from dsv3_jax.model.accounting import count_parameters
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.sharding import Placement, place
from dsv3_jax.train.state import build_model, split_model

ROOT = Path(__file__).parents[2]


def path(*names):
    return tuple(jax.tree_util.DictKey(name) for name in names)


def placed(names, shape, pipe=1, data=1, node=1, gpu=1) -> Placement:
    mesh = AbstractMesh((pipe, data, node, gpu), AXES)
    return place(path(*names), shape, mesh)


GATE_UP = ("moe_layers", "mlp", "experts", "gate_up_proj")
QUERY = ("moe_layers", "self_attn", "q_b_proj", "weight")


@pytest.mark.parametrize(
    ("names", "shape", "mesh", "spec"),
    [
        (GATE_UP, (58, 256, 2, 2048, 7168), {"data": 2, "node": 8, "gpu": 8},
         P(None, ("node", "gpu"), None, None, ("data",))),
        (GATE_UP, (58, 256, 2, 2048, 7168), {"node": 8, "gpu": 8}, P(None, ("node", "gpu"))),
        (GATE_UP, (58, 256, 2, 2048, 7168), {"data": 8}, P(None, None, None, None, ("data",))),
        (QUERY, (58, 24576, 1536), {"data": 2, "node": 8, "gpu": 8},
         P(None, ("data", "node", "gpu"))),
        (("embed_tokens", "weight"), (129280, 7168), {"gpu": 8}, P(("gpu",))),
        (("norm", "weight"), (7168,), {"node": 8, "gpu": 8}, P(("node", "gpu"))),
        (("moe_layers", "input_layernorm", "weight"), (58, 30), {"gpu": 4}, P()),
        (("moe_layers", "input_layernorm", "weight"), (8, 30), {"gpu": 4}, P()),
        (QUERY, (58, 24576, 1536), {}, P()),
    ],
)  # fmt: skip
def test_specs(names, shape, mesh, spec):
    assert placed(names, shape, **mesh).spec() == spec


def test_what_is_not_split_is_summed_over_the_same_axes():
    whole = placed(("norm", "weight"), (30,), node=2, gpu=2)
    assert (whole.dim, whole.axes, whole.shard_axes) == (None, ("node", "gpu"), ())
    experts = placed(GATE_UP, (3, 8, 2, 6, 4), data=2, node=2, gpu=2)
    assert (experts.axes, experts.expert_axes) == (("data",), ("node", "gpu"))
    assert experts.shard_axes == ("node", "gpu", "data")


CLUSTER = {"pipe": 16, "data": 2, "node": 8, "gpu": 8}
TOKENS = ("data", "node", "gpu")
NORM = ("moe_layers", "input_layernorm", "weight")


@pytest.mark.parametrize(
    ("names", "shape", "mesh", "spec"),
    [
        # pipe takes the dim that is the largest when the tokens have theirs
        (QUERY, (58, 24576, 1536), CLUSTER, P(None, TOKENS, ("pipe",))),
        (QUERY, (58, 24576, 1536), {"pipe": 16}, P(None, ("pipe",))),
        (QUERY, (58, 24576, 1536), {"pipe": 4, "gpu": 2}, P(None, ("gpu", "pipe"))),
        (GATE_UP, (58, 256, 2, 2048, 7168), CLUSTER,
         P(None, ("node", "gpu"), None, None, ("data", "pipe"))),
        (GATE_UP, (58, 256, 2, 2048, 7168), {"pipe": 16, "node": 8, "gpu": 8},
         P(None, ("node", "gpu"), None, None, ("pipe",))),
        # what does not divide is whole: over pipe, over tokens, over both; never the layer
        (NORM, (58, 7168), CLUSTER, P(None, TOKENS)),
        (NORM, (58, 30), {"pipe": 2, "gpu": 4}, P(None, ("pipe",))),
        (NORM, (58, 30), {"pipe": 4, "gpu": 4}, P()),
        (NORM, (64, 30), {"pipe": 4, "gpu": 4}, P()),
        (NORM, (58, 12), {"pipe": 4, "gpu": 4}, P(None, ("gpu",))),
        (("norm", "weight"), (7168,), {"pipe": 8, "gpu": 8}, P(("gpu", "pipe"))),
        # the vocabulary is split over pipe or not at all
        (("embed_tokens", "weight"), (129280, 7168), CLUSTER, P(("pipe",), TOKENS)),
        (("lm_head", "weight"), (129280, 7168), {"pipe": 4}, P(("pipe",))),
        (("lm_head", "weight"), (129281, 7168), CLUSTER, P(None, TOKENS)),
        (("lm_head", "weight"), (129281, 7168), {"pipe": 4}, P()),
        (("lm_head", "weight"), (64, 30), {"pipe": 4, "gpu": 4}, P(("pipe",))),
    ],
)  # fmt: skip
def test_specs_in_a_pipeline(names, shape, mesh, spec):
    assert placed(names, shape, **mesh).spec() == spec


def test_axes_of_a_pipeline_s_shards():
    """Devices that differ in these alone hold different shards."""
    assert placed(GATE_UP, (58, 256, 2, 2048, 7168), **CLUSTER).shard_axes == (
        *("node", "gpu", "data", "pipe"),
    )
    assert placed(NORM, (58, 7168), **CLUSTER).shard_axes == TOKENS
    assert placed(NORM, (58, 30), pipe=2, gpu=4).shard_axes == ("pipe",)
    assert placed(NORM, (58, 30), pipe=4, gpu=4).shard_axes == ()


def test_placements_are_carried_out_by_eight_devices():
    """In a process of its own, which sees them."""
    command = [sys.executable, "-m", "tests.parallel.sharding_program"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for finding in found:
        for claim in ("whole", "layer", "transpose"):
            assert finding[claim] is True, finding
    specs = {f["name"]: f["spec"] for f in found if f["mesh"] == {"pipe": 2, "node": 2, "gpu": 2}}
    both, tokens = ["node", "gpu", "pipe"], ["node", "gpu"]
    assert specs == {
        "moe_layers/self_attn/o_proj/weight": [None, tokens, "pipe"],
        "moe_layers/self_attn/kv_b_proj/weight": [None, None, both],
        "moe_layers/input_layernorm/weight": [None, tokens],
        "moe_layers/mlp/gate/weight": [None, "pipe"],
        "moe_layers/self_attn/kv_a_layernorm/weight": [],
        "moe_layers/mlp/experts/down_proj": [None, tokens, "pipe"],
        "embed_tokens/weight": ["pipe", tokens],
        "lm_head/weight": [None, tokens],
        "norm/weight": [both],
    }


def test_deepseek_v3_on_its_2048_gpus():
    """A device has 1/2048 of every tensor, but 1/128 of norms, too short for 16 times that.

    682.6e9 parameters, 1.14 million of them in norms: 1.333 GB of FP32 master weights on each.
    """
    config, mesh = RunConfig(), AbstractMesh(tuple(CLUSTER.values()), AXES)
    model = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))
    parameters = elements = 0
    for path, leaf in jax.tree.leaves_with_path(split_model(model)[1]):
        placement = place(path, leaf.shape, mesh)
        # Every dim divides: no device holds more than another.
        shard = NamedSharding(mesh, placement.spec()).shard_shape(leaf.shape)
        elements += math.prod(shard)
        parameters += leaf.size
        assert math.prod(shard) * math.prod(mesh.shape[a] for a in placement.shard_axes) == (
            leaf.size
        )
    count = count_parameters(config.model)
    assert parameters == count.total + count.mtp - 59 * 256  # selection biases
    of_layers = 62 * (2 * 7168 + 1536 + 512)  # input and post-attention, q_a and kv_a
    norms = (
        of_layers + 7168 + 3 * 7168
    )  # the final one; enorm, hnorm and head norm of the MTP module
    assert elements == (parameters - norms) // 2048 + norms // 128 == 333_326_240
