"""A Transformer from the oracle's config and weights, and its arrays under hub names again.

The oracle and Hugging Face's golden files speak in the hub's tensor names; `export/names.py` is the
one table that says where each of them lies in the model.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.export.names import tensor_entries
from dsv3_jax.model.transformer import Transformer

LENGTH = "original_max_position_embeddings"
GOLDEN = Path(__file__).parents[1] / "parity" / "golden"


def model_config(config: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """The ModelConfig of an oracle's config; names that it has not are left out."""
    yarn = config.get("rope_scaling")
    if yarn is not None:
        numbers = {name: float(value) for name, value in _known(YarnConfig, yarn).items()}
        yarn = YarnConfig(**(numbers | {LENGTH: yarn[LENGTH]}))
    fields = _known(ModelConfig, config) | {"rope_scaling": yarn}
    return ModelConfig(**({"eos_token_id": None} | fields | changes))


def _known(section: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(section)}
    return {name: value for name, value in values.items() if name in names}


def build_transformer(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    *,
    dtype: jnp.dtype = jnp.float32,
    **options: Any,
) -> Transformer:
    """The model that holds `weights` (by hub name), cast to `dtype`; each value is placed once."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, **options))
    graph, state = nnx.split(model)
    filled = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in arrays_of(state)}
    for entry in tensor_entries(config):
        if not entry.is_copy:
            assert np.isnan(filled[entry.path][entry.index]).all(), entry.hub_name
            filled[entry.path][entry.index] = weights[entry.hub_name]
    assert not any(np.isnan(array).any() for array in filled.values())
    leaves = [jnp.asarray(filled[path], leaf.dtype) for path, leaf in arrays_of(state)]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))


def hub_arrays(config: ModelConfig, state: nnx.State) -> dict[str, np.ndarray]:
    """The arrays of `state` (parameters or their gradients) by hub name, as float64."""
    arrays = dict(arrays_of(state))
    return {
        entry.hub_name: np.asarray(arrays[entry.path][entry.index], np.float64)
        for entry in tensor_entries(config)
        if entry.path in arrays and not entry.is_copy
    }


def arrays_of(state: nnx.State) -> list[tuple[tuple[str, ...], Any]]:
    """Every leaf with the attributes that lead to it."""
    return [
        (tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), leaf)
        for path, leaf in jax.tree.leaves_with_path(state)
    ]


def load_golden(name: str) -> tuple[dict, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Config under the hub's names, weights and expected values of a case of tests/parity."""
    directory = GOLDEN / name
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": rope if rope["rope_type"] == "yarn" else None,
        "eos_token_id": None,
    }
    weights = load_file(directory / "model.safetensors")
    return config, weights, load_file(directory / "golden.safetensors")
