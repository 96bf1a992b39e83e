"""Models on meshes of 8 simulated devices against the same on one; run by test_mesh.py.

python -m tests.serve.mesh_program logits engine ...     prints {name: what was found}
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import dsv3_jax
from dsv3_jax.config import ModelConfig, ParallelConfig, ServeConfig
from dsv3_jax.environment import simulate_devices
from dsv3_jax.export.load import import_hf
from dsv3_jax.model.expert_slots import move_slots
from dsv3_jax.model.spread import spread
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.inference import inference_mesh, on_mesh
from dsv3_jax.serve import placed
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.request import SamplingParams
from tests.programs import QUICK
from tests.serve.disaggregated.tiny import WHOLE
from tests.serve.test_engine import expected, random_requests, run

FP8 = "float8_e4m3fn"
WIDE = dataclasses.replace(
    WHOLE, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, kv_lora_rank=128
)
"""Wide enough for blocks of FP8."""


def mesh_of(**sizes: int) -> Mesh:
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count])


def fresh(config: ModelConfig = WHOLE) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(0))


def distance(found: jax.Array, expected: jax.Array) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def distances(on_meshes: dict[str, Transformer]) -> dict[str, float]:
    """Of the logits of a batch that the devices do not divide, from one device's."""
    tokens = jax.random.randint(jax.random.key(0), (3, 20), 0, 64)
    expected = fresh()(tokens)
    return {name: distance(model(tokens), expected) for name, model in on_meshes.items()}


def logits() -> dict[str, float]:
    """Of models spread in two hops, and in one whose buffers overflow."""
    flat = ParallelConfig(dispatcher="flat", capacity_factor=0.25)
    return distances(
        {
            "two hops": spread(fresh(), inference_mesh(mesh_of(node=2, gpu=2))),
            "flat, many rounds": spread(fresh(), inference_mesh(mesh_of(node=2, gpu=4)), flat),
        }
    )


def more_logits() -> dict[str, float]:
    """Of more meshes, and of models that are loaded."""
    meshes = {
        "8 experts' devices": mesh_of(gpu=8),
        "experts on half of them": mesh_of(gpu=4, data=2),
    }
    models = {name: spread(fresh(), inference_mesh(mesh)) for name, mesh in meshes.items()}
    with tempfile.TemporaryDirectory() as directory:
        dsv3_jax.save_hf(models["8 experts' devices"], Path(directory, "hf"), "float32")
        import_hf(Path(directory, "hf"), Path(directory, "run"))
        for path in ("hf", "run"):
            loaded = dsv3_jax.load(Path(directory, path), mesh=mesh_of(node=2, gpu=2))
            experts = loaded.moe_layers.mlp.experts.down_proj[...]
            assert experts.sharding.spec == PartitionSpec(None, ("node", "gpu"))
            assert experts.addressable_shards[0].data.shape[1] == 2
            models[f"loaded from {path}"] = loaded
        return distances(models)


def fp8() -> dict[str, float]:
    """A model that holds its weights in FP8."""
    tokens = jax.random.randint(jax.random.key(0), (4, 12), 0, 64)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "hf")
        dsv3_jax.save_hf(fresh(WIDE), path, FP8)
        one = dsv3_jax.load(path, FP8)
        two = dsv3_jax.load(path, FP8, mesh=mesh_of(node=2, gpu=2))
        return {"fp8": distance(two(tokens), one(tokens))}


def generating() -> dict[str, bool]:
    """Answers of fewer prompts than devices, and of more."""
    model, prompts = fresh(), [[5, 6, 7], [8] * 20, [9, 10], [11] * 7, [3, 4]]
    found = {}
    for name, mesh in {"8": mesh_of(node=2, gpu=4), "2": mesh_of(data=2)}.items():
        on_it = spread(model, inference_mesh(mesh))
        for sampling in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
            answers = [dsv3_jax.generate(m, prompts, 20, **sampling) for m in (model, on_it)]
            found[f"{name} devices, {sampling}"] = answers[0] == answers[1]
    return found


def slots() -> dict[str, bool]:
    """Experts that move to any slots of any device."""
    mesh = inference_mesh(mesh_of(node=2, gpu=2))
    axes, rng = ("node", "gpu"), np.random.default_rng(0)
    experts = jnp.asarray(rng.normal(size=(12, 3, 2)), jnp.float32)
    spec = PartitionSpec(axes)

    def move(local, source):
        return move_slots(local, source, axes, 4)

    moved = jax.jit(on_mesh(move, mesh, (spec, PartitionSpec()), spec))
    found = {}
    for seed in range(3):
        source = np.random.default_rng(seed).integers(0, 12, 12).astype(np.int32)
        found[str(seed)] = bool(np.array_equal(moved(experts, source), experts[source]))
    return found


SERVE = ServeConfig(slots=2, page_size=8, prefill_chunk=16, decode_steps=2, max_seq_len=96)
GREEDY, DRAWN = SamplingParams(), SamplingParams(temperature=0.8, top_k=20, seed=5)
EDITED = SamplingParams(logprobs=2)
"""Greedy by a program that edits logits."""


def serving(mesh: Mesh, how: ParallelConfig, **changes: Any) -> dict[str, Any]:
    """Requests at random times, with too few pages, guesses, and experts that move meanwhile."""
    model, serve = fresh(), dataclasses.replace(SERVE, pages=13, host_pages=4, **changes)
    engine = Engine(model, serve, mesh=mesh, how=how, compiler_options=QUICK)
    engine.warm_up()
    compiled, found = engine.runner.compilations, {"right": True}
    for seed in range(3):
        requests = random_requests(16, seed, [GREEDY, EDITED, DRAWN])
        arrivals = np.random.default_rng(seed).integers(0, 20, 16).tolist()
        if engine.balance is not None:
            engine.balance.begin()  # by the load of the requests before
        answers, alone = (
            run(engine, requests, arrivals, cancel=("3", "8")),
            expected(model, *requests),
        )
        found["right"] &= answers == {name: alone[name] for name in answers}
    now = engine.statistics()
    return found | {
        "compiled meanwhile": engine.runner.compilations - compiled,
        "left": now.running + now.waiting + now.pages_used,
        "slots": now.slots,
        "preemptions": now.preemptions,
        "prefixes found": now.cached_prompt_tokens,
        "right guesses": now.accepted_tokens,
        "placements": now.expert_placements,
        "devices that served": sum(pool.kept > 0 for pool in engine.scheduler.pools),
        "replicas": None
        if engine.runner.placement is None
        else engine.runner.placement.replicas.tolist(),
    }


def stacked() -> dict[str, Any]:
    """As models of many layers are served: the layers in stacks, which programs scan."""
    placed.UNSTACKED_LAYERS = 0
    try:
        changes = {"redundant_experts": 4, "rebalance_seconds": 1e9, "speculative": False}
        return serving(mesh_of(node=2, gpu=2), ParallelConfig(), **changes)
    finally:
        placed.UNSTACKED_LAYERS = 16


PROGRAMS: dict[str, Callable[[], dict[str, Any]]] = {
    "logits": logits,
    "more logits": more_logits,
    "fp8": fp8,
    "generate": generating,
    "slots": slots,
    "engine, two hops": lambda: serving(
        mesh_of(node=2, gpu=2), ParallelConfig(), redundant_experts=4, rebalance_seconds=1e9
    ),
    "engine, stacked": stacked,
    "engine, experts in place": lambda: serving(
        mesh_of(data=2, gpu=2), ParallelConfig(dispatcher="flat")
    ),
}

if __name__ == "__main__":
    simulate_devices(8)
    print(json.dumps({name: PROGRAMS[name]() for name in sys.argv[1:]}))
