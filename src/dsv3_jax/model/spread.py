"""Spreading a model over a mesh for inference (parallel/inference.py says where what lies)."""

from collections.abc import Iterator
from dataclasses import replace

from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import ParallelConfig
from dsv3_jax.model.experts import LocalDispatcher, spread_dispatcher
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.dispatch import Dispatcher, Exchange
from dsv3_jax.parallel.inference import check_division, place_weights
from dsv3_jax.parallel.mesh import TOKEN_AXES
from dsv3_jax.parallel.wire import Wire


def set_mesh(
    model: Transformer,
    mesh: Mesh,
    how: ParallelConfig | None = None,
    *,
    slots: int | None = None,
    wire: Wire | None = None,
) -> None:
    """Makes the model one of `mesh`, an `inference_mesh`, whose devices hold `slots` experts
    (None: each once). `how` has the dispatcher and its buffers (None: the default ones), `wire`
    what rows travel in (None: as before). Arrays stay where they are."""
    data, node, gpu = (int(mesh.shape[axis]) for axis in TOKEN_AXES)
    how = ParallelConfig() if how is None else how
    parallel = ParallelConfig(
        data=data,
        node=node,
        gpu=gpu,
        dispatcher=how.dispatcher,
        capacity_factor=how.capacity_factor,
    )
    slots = model.config.n_routed_experts if slots is None else slots
    for moe in routed_modules(model):
        local = _local(moe.experts.dispatcher)
        local = local if wire is None else replace(local, wire=wire)
        moe.experts.dispatcher = spread_dispatcher(local, model.config, parallel, slots)
    model.mesh = mesh


def spread(model: Transformer, mesh: Mesh, how: ParallelConfig | None = None) -> Transformer:
    """The model with its weights on `mesh` too. ValueError where its experts do not divide."""
    check_division(model.config.n_routed_experts, mesh, "n_routed_experts")
    graph, state = nnx.split(model)
    placed = nnx.merge(graph, place_weights(state, mesh))
    set_mesh(placed, mesh, how)
    return placed


def routed_modules(model: Transformer) -> Iterator[MoE]:
    """The stacked MoE layers of the model, and those of its MTP modules."""
    if model.config.num_moe_layers:
        yield getattr(model.moe_layers, "mlp")  # noqa: B009  (stacked: of no known class)
    if model.config.num_nextn_predict_layers:
        yield getattr(model.mtp, "block").mlp  # noqa: B009


def _local(dispatcher: Dispatcher) -> LocalDispatcher:
    """What a device does with the rows that have come to it."""
    inner = dispatcher.hops[-1].inner if isinstance(dispatcher, Exchange) else dispatcher
    assert isinstance(inner, LocalDispatcher)
    return inner
