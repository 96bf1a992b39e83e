"""Matrices quantised in parts on 8 simulated devices, and whole.

python -m tests.parallel.quantised_program      prints the names of those that differ
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ParallelConfig
from dsv3_jax.parallel.mesh import EXPERT_AXES, PIPE_AXIS, make_mesh
from dsv3_jax.parallel.quantised_shards import quantise_shard
from dsv3_jax.parallel.sharding import place
from dsv3_kernels.quantize.op import quantize

MESHES = (
    {"data": 2, "gpu": 4},
    {"pipe": 4, "gpu": 2, "schedule": "1f1b"},
    {"pipe": 2, "node": 2, "gpu": 2, "schedule": "1f1b"},
)
SHAPES = {
    "moe_layers/self_attn/q_b_proj/weight": (2, 256, 384),
    "moe_layers/self_attn/o_proj/weight": (2, 320, 448),  # parts of 56 columns
    "moe_layers/self_attn/kv_a_proj_with_mqa/weight": (2, 72, 129),  # ragged
    "moe_layers/mlp/experts/gate_up_proj": (2, 8, 2, 128, 256),
    "moe_layers/mlp/experts/down_proj": (2, 8, 131, 64),  # whole on every device but for experts
}


def differing(sizes: dict) -> list[str]:
    mesh = make_mesh(ParallelConfig(**sizes))
    found = []
    for name, shape in SHAPES.items():
        placement = place(tuple(map(jax.tree_util.DictKey, name.split("/"))), shape, mesh)
        spread = np.exp(np.random.default_rng(1).normal(size=shape) * 3)
        weights = np.random.default_rng(0).normal(size=shape) * spread
        weights = weights.astype(np.float32)
        weights[0, ..., :60, :] = 0
        spec = placement.spec()
        experts = tuple(axis for axis in EXPERT_AXES if axis in placement.expert_axes)
        scale_spec = P(None, experts) if experts else P()

        def on_device(shard, placement=placement):
            made = quantise_shard(shard, placement)
            return jax.lax.bitcast_convert_type(made.values, jnp.uint8), made.scale

        on_mesh = jax.shard_map(
            on_device, mesh=mesh, in_specs=spec, out_specs=(spec, scale_spec), check_vma=False
        )
        stored = jax.device_put(weights, NamedSharding(mesh, spec))
        values, scale = map(np.asarray, jax.jit(on_mesh)(stored))
        whole_values, whole_scale = map(np.asarray, quantize(jnp.asarray(weights), (128, 128)))
        same = np.array_equal(values, whole_values.view(np.uint8))
        if not same or not np.array_equal(scale, whole_scale):
            found.append(f"{name} on {sizes}")
        parts = sizes.get("pipe", 1)
        assert parts == 1 or placement.pipe_dim is not None or PIPE_AXIS not in str(spec)
    return found


if __name__ == "__main__":
    print(json.dumps([name for sizes in MESHES for name in differing(sizes)]))
