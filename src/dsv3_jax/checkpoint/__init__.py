"""Checkpoints of a run: asynchronous, atomic, verified. Orbax is used here and nowhere else."""

from dsv3_jax.checkpoint.manager import (
    CheckpointManager,
    Restored,
    find_step,
    read_metadata,
    restore_subtree,
    stored_tensors,
)
from dsv3_jax.checkpoint.manifest import find_damage

__all__ = [
    "CheckpointManager",
    "Restored",
    "find_damage",
    "find_step",
    "read_metadata",
    "restore_subtree",
    "stored_tensors",
]
