"""A run's training step for devices that need not be there."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import RunConfig
from dsv3_jax.train.layout import ROWS, make_layout
from dsv3_jax.train.step import StepSettings, make_train_step


def lower_train_step(config: RunConfig, devices: Sequence[Any]) -> jax.stages.Lowered:
    """The jitted step of `config` over `devices`, such as a topology's, with abstract arguments.

    Nothing is allocated. Raises ValueError where the mesh needs another number of devices.
    """
    layout = make_layout(config, devices)
    part, seq = config.train.batch_size // config.parts, config.data.seq_len
    rows = jax.ShapeDtypeStruct(
        (config.parts, part, seq + 1),
        jnp.int32,
        sharding=NamedSharding(layout.mesh, ROWS),
    )
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    settings: Any = StepSettings
    scalars = settings(
        *(jax.ShapeDtypeStruct((), d, sharding=everywhere) for d in (jnp.int32, *[jnp.float32] * 3))
    )
    documents = rows if config.data.cross_document_mask else None
    return make_train_step(layout).lower(layout.abstract_state(), rows, documents, scalars)
