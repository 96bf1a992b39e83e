"""Hugging Face checkpoints to models and back, one tensor at a time."""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import require, require_one_of
from dsv3_jax.data.tokenizer import load_tokenizer, tokenizer_config
from dsv3_jax.export.block_fp8 import dequantise, quantise
from dsv3_jax.export.config_json import hub_config
from dsv3_jax.export.fp8_weights import FP8_WEIGHTS, model_structure
from dsv3_jax.export.hub_directory import (
    CONFIG,
    FP8,
    INDEX,
    MTP_FILE,
    SINGLE,
    HubCheckpoint,
    open_hub_checkpoint,
)
from dsv3_jax.export.names import TensorEntry, scale_shape, tensor_entries
from dsv3_jax.export.new_directory import new_directory, require_new
from dsv3_jax.export.safetensors_io import DTYPES, read_ahead, read_tensor, stored_bytes, write_file
from dsv3_jax.model.linear import BlockScale
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.inference import weight_spec
from dsv3_jax.quant.scaled_array import is_scaled

MODEL_DTYPES = ("float32", "bfloat16", "float16", FP8_WEIGHTS)
SAVED_WEIGHTS = {"bfloat16": "BF16", "float32": "F32", FP8_WEIGHTS: FP8}
MAX_SHARD_BYTES = 5 * 10**9
"""Near the size of the released shards, 4.3 GB."""
LAYERS_WITH_INLINE_MTP = 61
"""transformers ignores MTP modules at `model.layers.61`, DeepSeek-V3's, and reports any other as
unexpected. So MTP modules of other models go into a file of their own that it does not open."""
HOST_BYTES = 2**22
"""Arrays up to this size are put together and taken apart by NumPy, larger ones on the device (a
program has to be compiled for each shape)."""
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model", "tokenization_kimi.py"),
    *("chat_template.jinja", "chat_template.json"),
)

SCALED_PARTS = ("values", "scale")
"""Of a `ScaledArray`."""
TensorPath = tuple[str, ...]
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Hub name to the dtype and shape that a file has."""


def load_hf(
    path: str | Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> Transformer:
    """The model in a Hugging Face directory, its weights in `dtype`, one of `MODEL_DTYPES`, where
    an inference `mesh` has them.

    Block-FP8 weights are dequantised in FP32, then cast; their scales stay beside them, as
    `BlockScale`, so that `save_hf` can give the same bytes back. For float8_e4m3fn they stay as
    they are, and others of the same products are quantised (see `fp8_weights`). The selection bias
    is FP32 always. Host memory, the model's own apart, holds three tensors at most. MTP modules
    must share the main model's embedding and head: copies with other values are an error.

    Raises ValueError, before anything large is allocated, for whatever is wrong with the directory.
    """
    require_one_of("dtype", dtype, *MODEL_DTYPES)
    directory = Path(path)
    require(directory.is_dir(), "path", str(path), "a Hugging Face checkpoint directory")
    checkpoint = open_hub_checkpoint(directory)
    graph, structure, arrays = _allocate(checkpoint, dtype, mesh)
    values_ahead = read_ahead(tensor.values for tensor in checkpoint.tensors)
    for tensor, values in zip(checkpoint.tensors, values_ahead, strict=True):
        entry = tensor.entry
        scale = None if tensor.scale is None else read_tensor(tensor.scale)
        if dtype == FP8_WEIGHTS and entry.storage == "quantised":
            parts = quantise(values) if scale is None else (values, scale)
            for part, array in zip(SCALED_PARTS, parts, strict=True):
                _put(arrays, (*entry.path, part), entry.index, array)
            continue
        if scale is not None:
            _put(arrays, entry.scale_path, entry.index, scale)
            values = dequantise(values, scale, arrays[entry.path].dtype)
        _put(arrays, entry.path, entry.index, values)
    leaves = [_on_device(arrays.pop(path), _sharding(mesh, path)) for path in list(arrays)]
    model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
    model.files_from = str(directory.absolute())
    return model


def save_hf(
    model: Transformer,
    path: str | Path,
    weights: str = "bfloat16",
    *,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the checkpoint directory `path` as deepseek-ai's are: names, dtypes, shards, config.

    `weights` is bfloat16, float32 or float8_e4m3fn (128x128 blocks; embedding, head, norms, router
    and eh_proj stay BF16). FP8 scales that the model was loaded with are used again wherever they
    still give the weight exactly. Tokenizer files, and generation_config.json if there is one, are
    copied from `tokenizer_from`, a directory or a tokenizer.json; by default as they are in the
    directory that the model was loaded from, if there is one. MTP modules of a model that has
    not just 61 layers go into mtp.safetensors, which `load_hf` reads and transformers does not.

    The directory appears whole or not at all. Raises ValueError where it exists and is not empty,
    for a model that has no hub form and for non-finite FP8 weights; OSError where writing fails.
    """
    require_one_of("weights", weights, *SAVED_WEIGHTS)
    require(max_shard_bytes >= 1, "max_shard_bytes", max_shard_bytes, "at least 1")
    config = model.config
    hub_config(config, weights)
    source = _Source(_named_arrays(model), weights)
    entries = list(tensor_entries(config))
    source.check(entries)
    require_new(Path(path))
    extra_files = _extra_files(config, tokenizer_from, model.files_from)
    with new_directory(Path(path)) as directory:
        inline, separate = _separate_mtp(entries, config)
        _write_shards(directory, inline, source, max_shard_bytes)
        if separate:
            layout = {n: form for entry in separate for n, form in source.layout(entry).items()}
            write_file(directory / MTP_FILE, layout, source.tensors(separate))
        fields = hub_config(config, weights, power_of_two_scales=source.power_of_two_scales)
        _write_json(directory / CONFIG, fields)
        for name, content in extra_files.items():
            (directory / name).write_bytes(content)


@dataclass
class _Source:
    """A model's arrays as the tensors of a file."""

    arrays: dict[TensorPath, Any]
    weights: str
    power_of_two_scales: bool = True
    """Of all FP8 scales that went out so far."""

    def layout(self, entry: TensorEntry) -> Layout:
        """What the file holds for `entry`."""
        if entry.storage == "float32":
            return {entry.hub_name: ("F32", entry.shape)}
        dtype = SAVED_WEIGHTS[self.weights]
        if dtype != FP8:
            return {entry.hub_name: (dtype, entry.shape)}
        if entry.storage == "plain":
            return {entry.hub_name: ("BF16", entry.shape)}
        scale = ("F32", entry.scale_shape)
        return {entry.hub_name: (FP8, entry.shape), entry.scale_name: scale}

    def tensors(self, entries: list[TensorEntry]) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of everything in the entries' layouts."""
        for entry in entries:
            dtype = self.layout(entry)[entry.hub_name][0]
            if dtype != FP8:
                yield entry.hub_name, self._weight(entry, DTYPES[dtype])
                continue
            values, scale = map(np.asarray, self._quantised(entry))
            if not np.isfinite(scale).all():
                raise ValueError(f"{entry.hub_name} has values that are not finite, FP8 needs them")
            self.power_of_two_scales &= bool((np.frexp(scale)[0] == 0.5).all())
            yield entry.hub_name, values
            yield entry.scale_name, scale

    def _weight(self, entry: TensorEntry, dtype: np.dtype) -> np.ndarray:
        """The values in `dtype`."""
        array = self.arrays[entry.path]
        if not is_scaled(array):
            return _take(array, entry.index, dtype)
        return np.asarray(dequantise(*self._quantised(entry), dtype))

    def _quantised(self, entry: TensorEntry) -> tuple[np.ndarray | Array, np.ndarray | Array]:
        """Values and scales in FP8."""
        array, kept = self.arrays[entry.path], self.arrays.get(entry.scale_path)
        if is_scaled(array):
            parts = array.values, array.scale
            values, scale = (_take(part, entry.index, part.dtype) for part in parts)
            return values, scale
        kept = None if kept is None else _take(kept, entry.index, kept.dtype)
        return quantise(_take(array, entry.index, array.dtype), kept)

    def check(self, entries: list[TensorEntry]) -> None:
        """Raises ValueError unless the arrays are those that the table has for the model."""
        for entry in entries:
            name = ".".join(("model", *entry.path))
            if entry.path not in self.arrays:
                raise ValueError(f"{name} is missing, expected an array that has {entry.hub_name}")
            shape = self.arrays[entry.path].shape
            depth = len(entry.index)
            fits = len(shape) >= depth and shape[depth:] == entry.shape
            fits = fits and all(i < n for i, n in zip(entry.index, shape, strict=False))
            expected = f"{list(entry.shape)} at {list(entry.index)}, for {entry.hub_name}"
            require(fits, f"shape of {name}", shape, expected)
        known = {e.path for e in entries} | {e.scale_path for e in entries}
        unknown = sorted(".".join(path) for path in self.arrays.keys() - known)
        require(not unknown, "model", unknown, "only arrays that have a hub name")


def _allocate(checkpoint: HubCheckpoint, dtype: str, mesh: jax.sharding.Mesh | None):
    """The model's structure, that of its state, and the state's arrays by path, to be filled."""
    model = model_structure(checkpoint.config, dtype)
    scaled = [tensor.entry.path for tensor in checkpoint.tensors if tensor.scale is not None]
    for path in set(scaled if dtype != FP8_WEIGHTS else ()):
        module = functools.reduce(getattr, path[:-1], model)
        shape = scale_shape(getattr(module, path[-1]).shape)
        scale = BlockScale(jax.ShapeDtypeStruct(shape, jnp.float32))
        setattr(module, f"{path[-1]}_scale_inv", scale)
    graph, state = nnx.split(model)
    # Scales of tensors that were not FP8 stay NaN.
    leaves = _by_path(state)
    fill = {path: np.nan if path[-1].endswith("_scale_inv") else 0 for path in leaves}
    large = [path for path, leaf in leaves.items() if _nbytes(leaf) > HOST_BYTES]

    def allocate(paths, xnp):
        return [xnp.full(leaves[p].shape, fill[p], leaves[p].dtype) for p in paths]

    small = [path for path in leaves if path not in large]
    arrays = dict(zip(small, allocate(small, np), strict=True))
    shardings = None if mesh is None else [_sharding(mesh, path) for path in large]
    on_device = jax.jit(lambda: allocate(large, jnp), out_shardings=shardings)()
    arrays |= dict(zip(large, on_device, strict=True))
    return graph, jax.tree.structure(state), {path: arrays[path] for path in leaves}


def _sharding(mesh: jax.sharding.Mesh | None, path: TensorPath) -> NamedSharding | None:
    return None if mesh is None else NamedSharding(mesh, weight_spec(path))


def _on_device(array: np.ndarray | Array, sharding: NamedSharding | None) -> Array:
    """A copy of a NumPy array (one without would share its memory, on CPU)."""
    copy = jnp.array(array) if isinstance(array, np.ndarray) else array
    return copy if sharding is None else jax.device_put(copy, sharding)


def _nbytes(leaf: jax.ShapeDtypeStruct | Array) -> int:
    return leaf.size * leaf.dtype.itemsize


def _named_arrays(model: nnx.Module) -> dict[TensorPath, Any]:
    return _by_path(nnx.state(model), is_leaf=is_scaled)


def _by_path(state: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[TensorPath, Any]:
    """The leaves of an nnx.State in their order, by the attributes that lead to them: a module's
    and, of a matrix in FP8, one of `SCALED_PARTS`."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_leaf)
    names = [[jax.tree_util.keystr((key,), simple=True) for key in path] for path, _ in leaves]
    return {
        tuple(name for name in path if name != "value"): leaf
        for path, (_, leaf) in zip(names, leaves, strict=True)
    }


def _put(
    arrays: dict[TensorPath, Any],
    path: TensorPath,
    index: tuple[int, ...],
    tensor: np.ndarray | Array,
) -> None:
    """Writes `tensor` into the array of `path` at `index` of its first dims."""
    if isinstance(arrays[path], np.ndarray):
        arrays[path][index] = np.asarray(tensor)
    else:
        arrays[path] = _place(arrays[path], tensor, np.asarray(index, np.int32))
        arrays[path].block_until_ready()  # or else tensors pile up in front of the device


def _take(array: Array, index: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The tensor at `index` of the first dims of `array`, in `dtype`."""
    if _nbytes(array) <= HOST_BYTES:
        return np.asarray(array)[index].astype(dtype)
    return np.asarray(_slice(array, np.asarray(index, np.int32), dtype))


@functools.partial(jax.jit, donate_argnums=0)
def _place(
    stack: Float[Array, "..."],
    tensor: Float[Array | np.ndarray, "..."],
    index: Int[Array | np.ndarray, " stacked"],
) -> Float[Array, "..."]:
    """`stack` with `tensor` at `index`, written in place."""
    update = tensor.astype(stack.dtype).reshape((1,) * index.size + tensor.shape)
    return jax.lax.dynamic_update_slice(stack, update, _start(index, stack.ndim))


@functools.partial(jax.jit, static_argnames="dtype")
def _slice(
    stack: Float[Array, "..."], index: Int[Array | np.ndarray, " stacked"], dtype: np.dtype
) -> Float[Array, "..."]:
    shape = stack.shape[index.size :]
    sizes = (1,) * index.size + shape
    tensor = jax.lax.dynamic_slice(stack, _start(index, stack.ndim), sizes)
    return tensor.reshape(shape).astype(dtype)


def _start(index: Int[Array | np.ndarray, " stacked"], ndim: int) -> list[Array]:
    """Where a slice begins in all dims; it begins at 0 in those that are not stacked."""
    return [*jnp.asarray(index), *[jnp.int32(0)] * (ndim - index.size)]


def _write_shards(
    directory: Path, entries: list[TensorEntry], source: _Source, max_shard_bytes: int
) -> None:
    shards = _split(entries, source, max_shard_bytes)
    weight_map, total_bytes = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        layout = {n: form for entry in shard for n, form in source.layout(entry).items()}
        write_file(directory / name, layout, source.tensors(shard))
        weight_map |= dict.fromkeys(layout, name)
        total_bytes += sum(stored_bytes(*form) for form in layout.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)


def _separate_mtp(
    entries: list[TensorEntry], config: ModelConfig
) -> tuple[list[TensorEntry], list[TensorEntry]]:
    """Entries for the model's file or shards, and those for the MTP modules' own file."""
    layers = config.num_hidden_layers
    if layers == LAYERS_WITH_INLINE_MTP:
        return entries, []
    prefixes = tuple(
        f"model.layers.{layers + depth}." for depth in range(config.num_nextn_predict_layers)
    )
    separate = [entry for entry in entries if entry.hub_name.startswith(prefixes)]
    return [entry for entry in entries if not entry.hub_name.startswith(prefixes)], separate


def _split(
    entries: list[TensorEntry], source: _Source, max_shard_bytes: int
) -> list[list[TensorEntry]]:
    """Consecutive entries that fit into a shard together; one that is larger has its own."""
    shards: list[list[TensorEntry]] = []
    filled = 0
    for entry in entries:
        size_bytes = sum(stored_bytes(*form) for form in source.layout(entry).values())
        if not shards or filled + size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size_bytes
    return shards


def _extra_files(
    config: ModelConfig, tokenizer_from: str | Path | None, loaded_from: str | None
) -> dict[str, bytes]:
    """generation_config.json and the tokenizer's files, by name."""
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    made = {GENERATION_CONFIG: _encode_json({"_from_model_config": True} | ids)}
    source = tokenizer_from or loaded_from
    if source is None:
        return made
    found = _tokenizer_files(Path(source))
    require(
        tokenizer_from is None or bool(found.keys() - {GENERATION_CONFIG}),
        "tokenizer_from",
        str(source),
        f"a directory with any of {', '.join(TOKENIZER_FILES)}",
    )
    if "tokenizer.json" in found:
        try:
            tokenizer = load_tokenizer(Path(source), vocab_size=config.vocab_size)
            fields = tokenizer_config(tokenizer, config.max_position_embeddings)
            made["tokenizer_config.json"] = _encode_json(fields)
        except ValueError:
            if tokenizer_from is not None:
                raise
            # What a checkpoint had is carried along as it is, be it of use or not.
    return made | found


def _tokenizer_files(source: Path) -> dict[str, bytes]:
    if source.is_file():
        return {"tokenizer.json": source.read_bytes()}
    names = [n for n in (*TOKENIZER_FILES, GENERATION_CONFIG) if (source / n).is_file()]
    return {name: (source / name).read_bytes() for name in names}


def _write_json(file: Path, content: dict) -> None:
    file.write_bytes(_encode_json(content))


def _encode_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
