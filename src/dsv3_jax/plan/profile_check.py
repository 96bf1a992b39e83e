"""The published training profile, predicted: how well the planner's parts add up. Imports no JAX.

GEMMs, attention and elementwise kernels were fitted to it one by one (calibration.py); that their
weaving takes as long as the profile was not.
"""

from dsv3_jax.config import ModelConfig, PrecisionConfig
from dsv3_jax.parallel.pipeline.stages import Unit, UnitKind
from dsv3_jax.plan.calibration import profile
from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.layer_times import ChunkTimes, Job, chunk_times
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.machine import Fanout

BALANCED = Fanout(nodes=4.0, gpus=8.0, remote_nodes=3.5, remote_gpus=7.0)
"""Of the profile, whose routing is "absolutely balanced": two experts of a token on each of 4
nodes."""
PARTS = {  # the profile's names of a layer's parts
    "attention": "attn(F)",
    "mlp": "mlp(F)",
    "mlp_dx": "mlp(B)",
    "mlp_dw": "mlp(W)",
    "attention_dx": "attn(B)",
    "attention_dw": "attn(W)",
}


def profile_times() -> ChunkTimes:
    """Of the profile's layers: 64 H800, one sequence of 4,096 each, FP8."""
    found = profile()
    job = Job(
        model=ModelConfig(),
        seq=found["tokens"],
        tokens=float(found["tokens"]),
        expert_gpus=found["expert_gpus"],
    )
    return chunk_times(find_cluster("h800_2048"), PrecisionConfig(recipe="fp8"), job, BALANCED)


def predict_profile() -> Number:
    """Seconds of its overlapped pair of chunks."""
    layers = [Unit(UnitKind.MOE, index) for index in range(profile()["layers"])]
    return profile_times().overlapped(layers, layers).seconds


def part_errors() -> dict[str, Number]:
    """Of each part of a layer on the multiprocessors: predicted over measured, less 1."""
    times = profile_times().beside[UnitKind.MOE].compute()
    measured = profile()["parts"]
    return {name: times[name] / measured[part]["wall"] - 1 for name, part in PARTS.items()}
