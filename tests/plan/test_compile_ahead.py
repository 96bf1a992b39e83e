"""Compiling for GPUs that are not there: bytes and FLOPs against closed forms."""

import json
import os
import subprocess
import sys

import pytest

from dsv3_jax.plan import compile_ahead
from dsv3_jax.plan.hardware import find_gpu

HOSTS, TOKENS, HIDDEN, WIDTH, LAYERS = 2, 4096, 1024, 2048, 3
DEVICES = HOSTS * 8
PRODUCT = 2 * TOKENS * HIDDEN * WIDTH
ROWS = 2 * TOKENS * HIDDEN
"""Bytes of a device's tokens in BF16."""
WEIGHT = 2 * HIDDEN * WIDTH

# Layers of a mixture of experts on a mesh of (data 1, node 2, gpu 8): dispatch over all GPUs,
# weights gathered over the node's GPUs, an expert, combine in two hops; at last a sum over all.
PROGRAM = f"""
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from dsv3_jax.plan.compile_ahead import compile_ahead, topology_devices
from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.hlo import parse_module
from dsv3_jax.plan.program import count_totals, list_unknowns, read_program
from dsv3_jax.plan.roofline import predict

assert jax.devices()[0].platform == "cpu"
gpu = find_gpu(sys.argv[1])
devices = topology_devices(gpu, {HOSTS})
assert [device.id for device in devices] == list(range({DEVICES}))
shape = np.array(devices).reshape(1, 2, 8)
mesh = Mesh(shape, ("data", "node", "gpu"), axis_types=(AxisType.Auto,) * 3)

def layer(x, w):
    x = lax.all_to_all(x, ("node", "gpu"), 0, 0, tiled=True)
    y = jax.nn.silu(x @ lax.all_gather(w, "gpu", axis=0, tiled=True))
    y = y @ lax.all_gather(w, "gpu", axis=0, tiled=True).T
    y = lax.cond(lax.axis_index("node") == 0, lambda y: y, lambda y: -y, y)
    y = lax.all_to_all(y, "gpu", 0, 0, tiled=True)
    return lax.all_to_all(y, "node", 0, 0, tiled=True), None

def step(x, w):
    x, _ = lax.scan(layer, x, w)
    return x, lax.psum(jnp.sum(x.astype(jnp.float32), 0), ("node", "gpu"))

rows, weights = P(("data", "node", "gpu")), P(None, "gpu")
specs = dict(in_specs=(rows, weights), out_specs=(rows, P()), check_vma=False)
step = jax.shard_map(step, mesh=mesh, **specs)
def spec(shape, p):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, p))
x = spec(({DEVICES * TOKENS}, {HIDDEN}), rows)
w = spec(({LAYERS}, {HIDDEN}, {WIDTH}), weights)
compiled = compile_ahead(jax.jit(step, donate_argnums=0).lower(x, w))
program = read_program(parse_module(compiled.hlo_text), gpu.gpus_per_node)
totals = count_totals(program)
prediction = predict(program, gpu)
print(json.dumps(dict(
    seconds=compiled.compile_seconds, host=compiled.host_peak_bytes,
    arguments=compiled.arguments, argument=compiled.argument_bytes, alias=compiled.alias_bytes,
    peak=compiled.peak_bytes, temp=compiled.temp_bytes,
    flops=totals.cost.flops, counts=totals.counts, unknown=list_unknowns(program),
    nvlink={{kind: t.nvlink_bytes for kind, t in totals.bytes_by_kind.items()}},
    network={{kind: t.network_bytes for kind, t in totals.bytes_by_kind.items()}},
    predicted=prediction.step.seconds, hidden=prediction.step.hidden_fraction,
)))
"""


def compile_program(gpu: str) -> dict:
    """In a process of its own: this one has JAX's CPU devices, and no other plugin, to keep."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, gpu],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # nothing of cuInit, cuDNN or autotuning
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["h800", "b200"])
def test_a_step_for_16_gpus(gpu):
    report = compile_program(gpu)
    assert report["flops"] == LAYERS * 2 * PRODUCT
    assert report["unknown"] == [[], []]
    assert report["arguments"] == {"[0]": ROWS, "[1]": LAYERS * WEIGHT // 8}
    assert report["argument"] == ROWS + LAYERS * WEIGHT // 8
    assert report["alias"] == ROWS
    assert report["peak"] >= report["argument"] + report["temp"]
    assert report["counts"]["all-to-all"] == 3 * LAYERS
    # To each of 16 GPUs a sixteenth: 8 in the other node, 7 beside it. Then the two hops.
    assert report["nvlink"]["all-to-all"] == LAYERS * ROWS * (7 / 16 + 7 / 8)
    assert report["network"]["all-to-all"] == LAYERS * ROWS * (8 / 16 + 1 / 2)
    assert report["nvlink"]["all-gather"] == LAYERS * WEIGHT * 7 / 8  # XLA gathers once, not twice
    assert report["network"]["all-gather"] == 0
    # A ring of 16 in which one step in 8 leaves the node.
    ring = 2 * 4 * HIDDEN * 15 / 16
    assert report["nvlink"]["all-reduce"] == pytest.approx(ring * 7 / 8)
    assert report["network"]["all-reduce"] == pytest.approx(ring / 8)
    assert report["predicted"] > LAYERS * 2 * PRODUCT / find_gpu(gpu).bf16_flops_per_second
    assert 0 <= report["hidden"] <= 1
    assert report["seconds"] > 0
    assert report["host"] > 1e8


INTEGER_MAXIMUM = """
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from dsv3_jax.plan.compile_ahead import compile_ahead, topology_devices
from dsv3_jax.plan.hardware import find_gpu

devices = np.array(topology_devices(find_gpu("h800"), 8))
mesh = Mesh(devices, ("gpu",), axis_types=(AxisType.Auto,))
step = jax.shard_map(
    lambda x: lax.pmax(x[0], "gpu"), mesh=mesh, in_specs=P("gpu"), out_specs=P(), check_vma=False
)
x = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=NamedSharding(mesh, P("gpu")))
print("all-reduce" in compile_ahead(jax.jit(step).lower(x)).hlo_text)
"""


@pytest.mark.slow
def test_an_integer_maximum_over_8_nodes_does_not_end_the_process():
    """As the flag is on which all peers agree; see compile_ahead.DEFAULT_OPTIONS."""
    result = subprocess.run(
        [sys.executable, "-c", INTEGER_MAXIMUM],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_ahead, "PACKAGES", tmp_path / "none")
    monkeypatch.setattr(compile_ahead, "PLUGIN", "jax_plugins.not_there")
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    with pytest.raises(ValueError, match=r"run scripts/setup\.sh compile$"):
        compile_ahead.topology_devices(find_gpu("h800"), 2)


def test_hosts_must_be_there():
    with pytest.raises(ValueError, match="hosts is 0, expected at least 1"):
        compile_ahead.topology_devices(find_gpu("h800"), 0)
