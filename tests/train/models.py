"""A Transformer from tensors under their hub names, and its tensors under those names again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from dsv3_jax.config import ModelConfig, RunConfig, YarnConfig, from_dict
from dsv3_jax.export.names import tensor_entries
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.train.layout import Layout, make_layout
from dsv3_jax.train.state import TrainState, build_model
from dsv3_jax.train.step import StepSettings

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"


def model_config(fields: dict[str, Any], **changes: Any) -> ModelConfig:
    """The config that a dict of Hugging Face's names means; names that we have not are left out."""
    rope = fields.get("rope_parameters", fields)
    yarn = fields.get("rope_scaling", rope)  # None is a value: no YaRN
    is_yarn = yarn is not None and "factor" in yarn
    chosen = {
        "max_position_embeddings": 64,
        **_known(ModelConfig, fields),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": _known(YarnConfig, yarn) if is_yarn else None,
        "eos_token_id": None,
    }
    return from_dict(ModelConfig, chosen | changes)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def model_of(config: RunConfig, tensors: dict[str, np.ndarray]) -> Transformer:
    """The run's model with these weights, cast to float32."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))))
    arrays = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in _leaves(state)}
    for entry in tensor_entries(config.model):
        if not entry.is_copy:
            arrays[entry.path][entry.index] = tensors[entry.hub_name]
    for path, array in arrays.items():
        assert np.isfinite(array).all(), f"{path} is not wholly named"
    filled = jax.tree.map_with_path(lambda path, _: jnp.asarray(arrays[_names(path)]), state)
    return nnx.merge(graph, filled)


def hub_tensors(config: ModelConfig, *states: nnx.State) -> dict[str, np.ndarray]:
    """Every tensor that `states` hold (parameters, gradients, biases) by its hub name, float64."""
    arrays = {path: leaf for state in states for path, leaf in _leaves(state)}
    return {
        entry.hub_name: np.asarray(arrays[entry.path], np.float64)[entry.index]
        for entry in tensor_entries(config)
        if entry.path in arrays and not entry.is_copy
    }


def _leaves(state: nnx.State) -> list[tuple[tuple[str, ...], jax.Array]]:
    return [(_names(path), leaf) for path, leaf in jax.tree.leaves_with_path(state)]


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))


def state_of(config: RunConfig, tensors: dict[str, np.ndarray]) -> tuple[Layout, TrainState]:
    """Layout on the config's mesh, over the first devices, and state before the first step."""
    layout = make_layout(config, jax.devices()[: config.parallel.num_devices])
    return layout, layout.initial_state(model_of(config, tensors))


def settings(
    *,
    micro_batches: int = 1,
    learning_rate: float = 0.0,
    mtp_weight: float = 0.0,
    bias_update_rate: float = 0.0,
) -> StepSettings:
    """A step's settings as the loop makes them."""
    return StepSettings(
        jnp.int32(micro_batches), *map(jnp.float32, (learning_rate, mtp_weight, bias_update_rate))
    )


def load_golden(
    name: str, **changes: Any
) -> tuple[ModelConfig, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Config, weights and expected values of a case of tests/parity."""
    directory = GOLDEN / name
    fields = json.loads((directory / "config.json").read_text())
    return (
        model_config(fields, **changes),
        load_file(directory / "model.safetensors"),
        load_file(directory / "golden.safetensors"),
    )


def oracle_fields(name: str) -> dict[str, Any]:
    """The config of a case of tests/parity as the oracle reads it."""
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    yarn = rope if rope["rope_type"] == "yarn" else None
    return fields | {"rope_theta": rope["rope_theta"], "rope_scaling": yarn}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of `expected`; of a zero tensor, the found norm."""
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / (norm or 1.0)
