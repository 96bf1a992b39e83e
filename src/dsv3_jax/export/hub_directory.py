"""What a Hugging Face checkpoint directory holds, checked from its headers alone."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.export.config_json import model_config_from_hub
from dsv3_jax.export.names import TensorEntry, is_ignored, tensor_entries
from dsv3_jax.export.safetensors_io import StoredTensor, read_header, same_values

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MTP_FILE = "mtp.safetensors"
"""MTP modules beside the main model's file or shards, and in no index (see `huggingface`)."""
FP8 = "F8_E4M3"
UNQUANTISED = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class HubTensor:
    """One entry of the table with where its values lie, and its scales if it is FP8."""

    entry: TensorEntry
    values: StoredTensor
    scale: StoredTensor | None


@dataclass(frozen=True)
class HubCheckpoint:
    """A checkpoint found complete and consistent; `tensors` in the order of its files."""

    config: ModelConfig
    tensors: tuple[HubTensor, ...]


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that names the file if it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}, expected a JSON file") from error
    except ValueError as error:
        raise ValueError(f"{file}: no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: found a {type(content).__name__}, expected a JSON object")
    return content


def read_hub_config(directory: Path) -> ModelConfig:
    """The model of a checkpoint directory, without a look at its shards if there is an index."""
    index = _read_index(directory)
    names = read_header(directory / SINGLE) if index is None else index
    return _model_config(directory, [*names, *_read_mtp_file(directory, index)])


def open_hub_checkpoint(directory: Path) -> HubCheckpoint:
    """The checkpoint in `directory`, every tensor found and of the right shape.

    Reads headers, and of the tensors only the MTP modules' copies of embedding and head with what
    they are copies of. Raises ValueError that names file, tensor, what was found and what was
    expected for anything missing, extra, misshapen, cut short, or at odds with the index.
    """
    stored = _read_headers(directory)
    config = _model_config(directory, stored)
    entries = list(tensor_entries(config))
    tensors = _match(directory, entries, stored)
    has_quantization = read_json_object(directory / CONFIG).get("quantization_config") is not None
    for tensor in tensors:
        if tensor.scale is not None and not has_quantization:
            raise ValueError(
                f"{directory / CONFIG}: quantization_config is missing, expected one that gives the"
                f" block size of {tensor.values.name}, which is {FP8}"
            )
    _check_copies(tensors)
    needed = [tensor for tensor in tensors if not tensor.entry.is_copy]
    needed.sort(key=lambda tensor: (tensor.values.file, tensor.values.offset))
    return HubCheckpoint(config, tuple(needed))


def _model_config(directory: Path, tensor_names: Iterable[str]) -> ModelConfig:
    file = directory / CONFIG
    return model_config_from_hub(read_json_object(file), tensor_names, file=str(file))


def _read_index(directory: Path) -> dict[str, str] | None:
    """The index's map from tensor to shard, or None where `model.safetensors` is all there is."""
    file = directory / INDEX
    if not file.exists():
        if not (directory / SINGLE).exists():
            found = sorted(path.name for path in directory.iterdir())
            raise ValueError(
                f"{directory}: found {', '.join(found)}, expected {SINGLE} or {INDEX} among them"
            )
        return None
    weight_map = read_json_object(file).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else []
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise ValueError(f"{file}: found no map from tensors to shards, expected one in weight_map")
    if (directory / SINGLE).exists() and SINGLE not in shards:
        raise ValueError(
            f"{directory}: found {SINGLE} and {INDEX}, which does not name it, expected only one"
        )
    return weight_map


def _read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint; the index, if there is one, agrees with its shards."""
    weight_map = _read_index(directory)
    mtp = _read_mtp_file(directory, weight_map)
    stored = read_header(directory / SINGLE) if weight_map is None else {}
    if weight_map is not None:
        stored = _read_shards(directory, weight_map)
    for name in stored.keys() & mtp.keys():
        raise ValueError(
            f"{directory / MTP_FILE}: found tensor {name}, which {stored[name].file} has as well,"
            " expected it in one of them"
        )
    return stored | mtp


def _read_mtp_file(directory: Path, weight_map: dict[str, str] | None) -> dict[str, StoredTensor]:
    """The tensors of the MTP modules' own file, if there is one that the index does not name."""
    if not (directory / MTP_FILE).is_file() or MTP_FILE in (weight_map or {}).values():
        return {}
    return read_header(directory / MTP_FILE)


def _read_shards(directory: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    """The tensors of all shards, each where the index says."""
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise ValueError(f"{directory / shard}: no such shard, expected by {INDEX}")
        for name, tensor in read_header(directory / shard).items():
            if weight_map.get(name) != shard:
                place = weight_map.get(name, "in no shard")
                raise ValueError(
                    f"{directory / shard}: found tensor {name}, expected {place} by {INDEX}"
                )
            stored[name] = tensor
    for name, shard in weight_map.items():
        if name not in stored:
            raise ValueError(f"{directory / shard}: found no tensor {name}, expected by {INDEX}")
    return stored


def _match(
    directory: Path, entries: list[TensorEntry], stored: dict[str, StoredTensor]
) -> list[HubTensor]:
    """Entries with their tensors; a tensor without an entry, and the reverse, is an error."""
    matched, used = [], set()
    for entry in entries:
        values = stored.get(entry.hub_name)
        if values is None:
            if entry.is_copy:
                continue
            raise _missing(directory, entry.hub_name, f"{entry.storage} {list(entry.shape)}")
        may_be_fp8 = entry.storage == "quantised"
        _require_tensor(values, entry.shape, (*UNQUANTISED, FP8) if may_be_fp8 else UNQUANTISED)
        used.add(entry.hub_name)
        scale = None
        if values.dtype == FP8:
            scale = stored.get(entry.scale_name)
            if scale is None:
                expected = f"F32{list(entry.scale_shape)} as {entry.hub_name} is {FP8}"
                raise _missing(directory, entry.scale_name, expected)
            _require_tensor(scale, entry.scale_shape, ("F32",))
            used.add(entry.scale_name)
        matched.append(HubTensor(entry, values, scale))
    for name, tensor in stored.items():
        if name not in used and not is_ignored(name):
            raise ValueError(
                f"{tensor.file}: found tensor {name} {tensor}, expected no such tensor in the"
                " model of config.json"
            )
    return matched


def _require_tensor(tensor: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape:
        raise ValueError(
            f"{tensor.file}: tensor {tensor.name}: found {tensor}, expected"
            f" {' or '.join(dtypes)} {list(shape)}"
        )


def _missing(directory: Path, name: str, expected: str) -> ValueError:
    return ValueError(f"{directory}: tensor {name}: found none, expected {expected}")


def _check_copies(tensors: list[HubTensor]) -> None:
    """The model shares embedding and head with its MTP modules; other values would be lost."""
    originals = {t.entry.path: t.values for t in tensors if not t.entry.is_copy}
    for tensor in tensors:
        if tensor.entry.is_copy:
            original = originals[tensor.entry.path]
            if not same_values(original, tensor.values):
                raise ValueError(
                    f"{tensor.values.file}: tensor {tensor.values.name}: found other values than"
                    f" {original.name} has, expected a copy (MTP modules share it)"
                )
