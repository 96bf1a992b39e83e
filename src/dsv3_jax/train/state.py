"""Everything a training step changes, as one pytree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dsv3_jax.config import OptimizerConfig, RunConfig
from dsv3_jax.model.experts import make_dispatcher
from dsv3_jax.model.router import SelectionBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.sharding import STACKS
from dsv3_jax.parallel.wire import wire_of
from dsv3_jax.quant.recipe import make_recipe
from dsv3_jax.train.optimizer import Moments, init_moments


class TrainState(NamedTuple):
    """FP32 master weights, selection biases, AdamW moments, steps done."""

    step: Int[Array, ""]
    params: nnx.State
    selection_bias: nnx.State
    moments: Moments


def build_model(config: RunConfig, rngs: nnx.Rngs) -> Transformer:
    """The run's model in FP32, initialised from `rngs`."""
    recipe = make_recipe(config.precision.recipe, config.precision.rules)
    wire = wire_of(config.precision)
    in_pipeline = config.parallel.pipe > 1  # which chooses itself what backward computes again
    return Transformer(
        config.model,
        rngs=rngs,
        remat="none" if in_pipeline else config.train.remat,
        keep=tuple(sorted(config.train.kept)),
        scan_layers=config.train.scan_layers,
        dispatcher=make_dispatcher(config.model, config.parallel, recipe, wire),
        recipe=recipe,
    )


def split_model(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(structure, parameters, selection biases); what else a model carries is left behind."""
    graph = nnx.graphdef(model)
    return graph, nnx.state(model, nnx.Param), nnx.state(model, SelectionBias)


def init_state(config: OptimizerConfig, params: nnx.State, selection_bias: nnx.State) -> TrainState:
    """The state before the first step."""
    moments = init_moments(config, params)
    return TrainState(jnp.zeros((), jnp.int32), params, selection_bias, moments)


def is_stacked(params: nnx.State) -> nnx.State:
    """True for every tensor that holds several layers."""
    return jax.tree.map_with_path(lambda path, _: path[0].key in STACKS, params)
