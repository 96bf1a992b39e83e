"""A decode step of the 671B model's layers, compiled for one H800 that is not there.

    python -m tests.plan.decode_step      prints {"calls": {kernel: times}, "arrays": ...}

Two layers, one of them with 32 of the 256 experts; 64 requests, of up to 4,096 tokens, in FP8.
With DSV3_KERNELS=plain in the environment it is what XLA makes of the references.
"""

import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.export.fp8_weights import FP8_WEIGHTS, model_structure
from dsv3_jax.plan.compile_ahead import compile_ahead, topology_devices
from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.hlo import parse_module
from dsv3_jax.plan.program import count_totals, read_program

REQUESTS, TOKENS, EXPERTS, LAYERS = 64, 4096, 32, 2
KERNELS = ("mla_decode", "grouped_gemm", "fp8_gemm", "swiglu", "quantize", "take_rows", "sum_rows")


def report() -> dict:
    """Mosaic's calls by kernel, FLOPs, bytes, and the shapes of all arrays."""
    config = ModelConfig(
        num_hidden_layers=LAYERS,
        first_k_dense_replace=1,
        n_routed_experts=EXPERTS,
        num_nextn_predict_layers=0,
    )
    graph, state = nnx.split(model_structure(config, FP8_WEIGHTS))

    def step(state, tokens, positions, cache):
        model = nnx.merge(graph, state)
        hidden, cache = model.decode(tokens, positions, cache)
        return model.logits(hidden), cache

    gpu = find_gpu("h800")
    mesh = Mesh(np.array(topology_devices(gpu, 1)[:1]), ("gpu",), axis_types=(AxisType.Auto,))
    whole = PartitionSpec()
    on_mesh = jax.shard_map(step, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, whole))

    ids = jax.ShapeDtypeStruct((REQUESTS, 1), jnp.int32)
    cache = jax.ShapeDtypeStruct((LAYERS, REQUESTS, TOKENS, 576), jnp.bfloat16)
    arguments = jax.tree.map(placed, (state, ids, ids, cache))
    compiled = compile_ahead(jax.jit(on_mesh, donate_argnums=3).lower(*arguments))
    calls = re.findall(
        r'custom_call_target="mosaic_gpu[^"]*".*?op_name="([^"]*)"', compiled.hlo_text
    )
    totals = count_totals(read_program(parse_module(compiled.hlo_text), gpu.gpus_per_node))
    return {
        "calls": Counter(next(k for k in KERNELS if k in call) for call in calls),
        "arrays": sorted(set(re.findall(r"\b(?:f32|bf16|f8e4m3fn)\[[\d,]+\]", compiled.hlo_text))),
        "flops": totals.cost.flops,
        "hbm_bytes": totals.cost.hbm_bytes,
        "peak_bytes": compiled.peak_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(report()))
