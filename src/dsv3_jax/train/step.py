"""One optimizer step as one jitted function."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.parallel.sharding import add_over
from dsv3_jax.train.balance import update_selection_bias
from dsv3_jax.train.layout import ROWS, Layout
from dsv3_jax.train.loss import Losses, loss_mask, training_loss
from dsv3_jax.train.optimizer import GradientNorm, adamw_update, clip_factor, gradient_norm
from dsv3_jax.train.pipeline_step import make_pipeline
from dsv3_jax.train.state import TrainState, is_stacked


class StepSettings(NamedTuple):
    """What the schedules say for this step."""

    micro_batches: Int[Array, ""]
    learning_rate: Float[Array, ""]
    mtp_weight: Float[Array, ""]
    bias_update_rate: Float[Array, ""]


class StepReport(NamedTuple):
    """What a step tells: its losses before the update, its gradients' norms, the experts' load."""

    losses: Losses
    gradient_norm: GradientNorm
    load: Float[Array, "routed_layers experts"]
    finite: Bool[Array, ""]
    """False if the loss or a gradient was not; the state is then unchanged."""


TrainStep = Callable[..., tuple[TrainState, StepReport]]


def make_train_step(layout: Layout) -> TrainStep:
    """`step(state, rows, documents, settings)`, jitted over the layout's mesh, its state donated.

    `rows` is int32 [parts, part, seq + 1], the parts those of an accumulation or a pipeline's
    micro-batches; the first `settings.micro_batches` of them are used. `documents` is the same
    shape or None. Losses and gradients are the whole batch's means. Gradients of all parts are
    added up on each device and reduced over devices once.
    """
    config, placements = layout.config, layout.placements
    in_pipeline = config.parallel.pipe > 1
    add_up = make_pipeline(layout).gradients if in_pipeline else _accumulation(layout)

    def batch_gradients(state, rows, documents, settings):
        used = jnp.arange(rows.shape[0]) < settings.micro_batches
        sequences = (jnp.sum(used) * rows.shape[1]).astype(jnp.float32)
        counts = (_count_predictions(rows, documents, used), sequences)
        predictions, sequences = add_over(layout.token_axes, counts)
        losses, load, gradients = add_up(state, rows, documents, settings, predictions, sequences)
        return *add_over(layout.token_axes, (losses, load)), gradients

    def step(state, rows, documents, settings):
        losses, load, gradients = batch_gradients(state, rows, documents, settings)
        with jax.named_scope("optimizer"):
            norm = gradient_norm(gradients, is_stacked(gradients), placements)
            factor = clip_factor(norm.total, config.optimizer.clip_norm)
            clipped = jax.tree.map(lambda g: g * factor, gradients)
            params, moments = adamw_update(
                config.optimizer,
                state.params,
                state.moments,
                clipped,
                step=state.step + 1,
                learning_rate=settings.learning_rate,
            )
            new = TrainState(
                state.step + 1,
                params,
                _update_biases(state.selection_bias, load, settings.bias_update_rate),
                moments,
            )
        finite = jnp.isfinite(losses.loss) & jnp.isfinite(norm.total)
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return kept, StepReport(losses, norm, load, finite)

    specs, nowhere = layout.state_specs(), PartitionSpec()
    return layout.on_mesh(step, (specs, ROWS, ROWS, nowhere), (specs, nowhere), donate=(0,))


def _accumulation(layout: Layout) -> Callable:
    """The losses, loads and gradients of a batch's parts one after the other."""
    config = layout.config

    def losses_of(params, bias, rows, documents, predictions, sequences, mtp_weight):
        return training_loss(
            layout.model(params, bias),
            rows,
            documents,
            predictions=predictions,
            sequences=sequences,
            mtp_weight=mtp_weight,
            balance_weight=config.loss.balance_weight,
        )

    differentiate = jax.value_and_grad(losses_of, has_aux=True)

    def add_up(state, rows, documents, settings, predictions, sequences):
        weights = layout.weights(state.params)

        def part_gradients(index):
            (_, (losses, load)), gradients = differentiate(
                weights,
                state.selection_bias,
                rows[index],
                None if documents is None else documents[index],
                predictions,
                sequences,
                settings.mtp_weight,
            )
            return losses, load, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)

        if rows.shape[0] == 1:
            totals = part_gradients(0)
        else:
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(part_gradients, 0)
            )

            def add_part(index, total):
                return jax.tree.map(jnp.add, total, part_gradients(index))

            totals = jax.lax.fori_loop(0, settings.micro_batches, add_part, zeros)
        losses, load, gradients = totals
        with jax.named_scope("reduce_gradients"):
            gradients = layout.reduce(gradients)
        return losses, load, gradients

    return add_up


def _count_predictions(
    rows: Int[Array, "parts batch seq_and_one"],
    documents: Int[Array, "parts batch seq_and_one"] | None,
    used: Bool[Array, " parts"],
) -> Float[Array, ""]:
    """Next-token targets of the used parts of the batch."""
    if documents is None:
        return (jnp.sum(used) * (rows.shape[1] * (rows.shape[2] - 1))).astype(jnp.float32)
    return jnp.sum(jnp.where(used[:, None, None], jax.vmap(loss_mask)(documents), 0))


def _update_biases(
    biases: nnx.State, load: Float[Array, "routed_layers experts"], rate: Float[Array, ""]
) -> nnx.State:
    """Every router's bias moved by its own load: MoE layers first, then the MTP modules."""

    def update(path, bias):
        is_mtp = path[0].key == "mtp"
        of_stack = load[load.shape[0] - bias.shape[0] :] if is_mtp else load[: bias.shape[0]]
        return update_selection_bias(bias, of_stack, rate)

    return jax.tree.map_with_path(update, biases)
