"""Where parameters lie: the rule by hand, for tensors of the 671B model on its cluster."""

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.parallel.sharding import Placement, place


def path(*names):
    return tuple(jax.tree_util.DictKey(name) for name in names)


def placed(names, shape, data=1, node=1, gpu=1) -> Placement:
    mesh = AbstractMesh((1, data, node, gpu), ("pipe", "data", "node", "gpu"))
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
