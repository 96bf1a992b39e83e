"""Placements on meshes of 8 simulated devices: from whole to stored to whole, and back.

python -m tests.parallel.sharding_program      prints one object for each mesh and parameter
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ParallelConfig
from dsv3_jax.parallel.mesh import AXES, make_mesh
from dsv3_jax.parallel.sharding import EXPERT_DIM, place

MESHES = (
    {"pipe": 8},
    {"pipe": 2, "data": 4},
    {"pipe": 4, "gpu": 2},
    {"pipe": 2, "node": 2, "gpu": 2},
)
SHAPES = {  # the comments are for the last mesh
    "moe_layers/self_attn/o_proj/weight": (3, 8, 4),  # two dims
    "moe_layers/self_attn/kv_b_proj/weight": (3, 9, 64),  # one dim for both
    "moe_layers/input_layernorm/weight": (3, 12),  # not over pipe
    "moe_layers/mlp/gate/weight": (3, 6, 5),  # over pipe alone
    "moe_layers/self_attn/kv_a_layernorm/weight": (3, 7),  # whole
    "moe_layers/mlp/experts/down_proj": (3, 8, 16, 6),
    "embed_tokens/weight": (24, 16),
    "lm_head/weight": (23, 16),  # the vocabulary is whole
    "norm/weight": (16,),
}


def findings(sizes: dict[str, Any]) -> list[dict]:
    """For each parameter its spec, and whether on every device `gather` gives the whole, one layer
    of it too, and its transpose adds up over the devices that gathered a shard."""
    mesh = make_mesh(ParallelConfig(**sizes, schedule="1f1b"))
    placements = {
        name: place(tuple(map(jax.tree_util.DictKey, name.split("/"))), shape, mesh)
        for name, shape in SHAPES.items()
    }
    whole = {
        name: np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        for name, shape in SHAPES.items()
    }
    specs = {name: placement.spec() for name, placement in placements.items()}
    stored = {
        name: jax.device_put(array, NamedSharding(mesh, specs[name]))
        for name, array in whole.items()
    }

    def gathered(shards):
        """Every device's, side by side along a new first dim."""
        wholes, layers, gradients = {}, {}, {}
        for name, shard in shards.items():
            placement = placements[name]
            result, transpose = jax.vjp(placement.gather, shard)
            wholes[name] = result[None]
            gradients[name] = transpose(jnp.ones_like(result))[0]
            if name.startswith("moe_layers"):
                layers[name] = placement.gather(shard[1], first_dim=1)[None]
        return wholes, layers, gradients

    on_mesh = jax.shard_map(
        gathered, mesh=mesh, in_specs=(specs,), out_specs=(P(AXES), P(AXES), specs), check_vma=False
    )
    wholes, layers, gradients = jax.device_get(jax.jit(on_mesh)(stored))
    result = []
    for name, placement in placements.items():
        own = [of_device(whole[name], mesh, placement.expert_axes, i) for i in range(mesh.size)]
        gatherers = [a for a in placement.shard_axes if a not in placement.expert_axes]
        count = math.prod(mesh.shape[axis] for axis in gatherers)
        result.append(
            {
                "mesh": sizes,
                "name": name,
                "spec": [list(p) if isinstance(p, tuple) else p for p in specs[name]],
                "whole": all(map(np.array_equal, wholes[name], own)),
                "layer": name not in layers
                or all(map(np.array_equal, layers[name], [part[1] for part in own])),
                "transpose": bool((gradients[name] == count).all()),
            }
        )
    return result


def of_device(array: np.ndarray, mesh: Mesh, expert_axes: tuple[str, ...], index: int):
    """`array`, or the experts of it that are on the device number `index` of the mesh."""
    if not expert_axes:
        return array
    at: dict[str, Any] = dict(zip(AXES, np.unravel_index(index, mesh.devices.shape), strict=True))
    sizes = [mesh.shape[axis] for axis in expert_axes]
    part = np.ravel_multi_index([at[axis] for axis in expert_axes], sizes)
    return np.split(array, math.prod(sizes), axis=EXPERT_DIM)[part]


if __name__ == "__main__":
    print(json.dumps([finding for mesh in MESHES for finding in findings(mesh)]))
