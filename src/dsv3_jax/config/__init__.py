"""Frozen configuration dataclasses; each layer receives only its own section."""

from dsv3_jax.config.model import ModelConfig, YarnConfig
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.run import RunConfig, apply_overrides, from_dict, read_config, to_dict
from dsv3_jax.config.serving import ServeConfig, ServerConfig
from dsv3_jax.config.training import (
    DataConfig,
    DataSource,
    LossConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainConfig,
)

__all__ = [
    "DataConfig",
    "DataSource",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "ServeConfig",
    "ServerConfig",
    "TrainConfig",
    "YarnConfig",
    "apply_overrides",
    "from_dict",
    "read_config",
    "to_dict",
]
