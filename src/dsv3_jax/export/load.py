"""One door to every checkpoint: Hugging Face directories, run directories, steps of runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from dsv3_jax.checkpoint import CheckpointManager, find_step, restore_subtree
from dsv3_jax.config import ModelConfig, from_dict, to_dict
from dsv3_jax.config.checks import require_one_of
from dsv3_jax.export.fp8_weights import converted, model_structure
from dsv3_jax.export.hub_directory import CONFIG, read_hub_config, read_json_object
from dsv3_jax.export.huggingface import MODEL_DTYPES, TOKENIZER_FILES, load_hf
from dsv3_jax.export.new_directory import new_directory, require_new
from dsv3_jax.model.router import SelectionBias
from dsv3_jax.model.spread import set_mesh
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.inference import abstract_weights, check_division, inference_mesh

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.json"


def load(
    path: str | Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> Transformer:
    """The model of a Hugging Face directory, of a run's newest intact step, or of one step.

    With a `mesh` of axes among data, node and gpu its experts are spread over (node, gpu), all else
    is on every device, and `model(tokens)` splits the batch over all of them.

    `dtype` is float32, bfloat16, float16 or float8_e4m3fn; the last keeps what FP8 checkpoints have
    in blocks as they have it, or quantises it so, computes those products in FP8 and the rest in
    BF16. The selection bias stays FP32.
    Raises ValueError, one line, that names what is wrong.
    """
    require_one_of("dtype", dtype, *MODEL_DTYPES)
    mesh = None if mesh is None else inference_mesh(mesh)
    root, config = _find_config(Path(path))
    is_hub = "model_type" in config
    model_config = read_hub_config(root) if is_hub else _run_model_config(root, config)
    if mesh is not None:
        check_division(model_config.n_routed_experts, mesh, f"{root}: n_routed_experts")
    model = load_hf(root, dtype, mesh) if is_hub else _load_run(path, model_config, dtype, mesh)
    model.files_from = str(root)
    if mesh is not None:
        set_mesh(model, mesh)
    return model


def _load_run(
    path: str | Path, model_config: ModelConfig, dtype: str, mesh: jax.sharding.Mesh | None
) -> Transformer:
    step = find_step(Path(path))
    structure = nnx.split(model_structure(model_config, "float32"), nnx.Param, SelectionBias)
    stored = structure if mesh is None else abstract_weights(structure, mesh)
    state = restore_subtree(step, {"params": stored[1], "selection_bias": stored[2]}, prefix="")
    graph, params, _ = nnx.split(model_structure(model_config, dtype), nnx.Param, SelectionBias)
    params = converted(state["params"], params)
    return nnx.merge(graph, params, state["selection_bias"])


def read_model_config(path: str | Path) -> ModelConfig:
    """The model's config alone, for every path that `load` takes."""
    root, config = _find_config(Path(path))
    if "model_type" in config:
        return read_hub_config(root)
    return _run_model_config(root, config)


def find_tokenizer(path: str | Path) -> Path | None:
    """The tokenizer.json that belongs to a checkpoint, for every path that `load` takes."""
    file = _find_config(Path(path))[0] / TOKENIZER
    return file if file.is_file() else None


def import_hf(source: Path, target: Path) -> Path:
    """Makes the run directory `target` of a Hugging Face checkpoint; returns its one step.

    Weights are FP32, as a run's are; FP8 scales are not kept. The directory appears whole or not
    at all. Raises ValueError where `target` exists and is not empty, else as `load_hf` does.
    """
    require_new(target)
    model = load_hf(source)
    # Named as the trainer's state is, so that both are read in one way.
    params, selection_bias = nnx.state(model, nnx.Param), nnx.state(model, SelectionBias)
    state = {"params": params, "selection_bias": selection_bias}
    with new_directory(target) as directory:
        with CheckpointManager(directory / CHECKPOINTS, keep=1) as manager:
            manager.save(0, state, {"step": 0, "imported_from": str(source)})
        run = {"model": to_dict(model.config), "imported_from": str(source)}
        (directory / CONFIG).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
    return target / CHECKPOINTS / "0"


def _find_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """The directory whose config.json tells what `path` is, and that file's content."""
    expected = "expected a Hugging Face directory, a run directory or one of its steps"
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise ValueError(f"{path}: found {found}, {expected}")
    path = path.absolute()
    is_step = path.parent.name == CHECKPOINTS and not (path / CONFIG).exists()
    root = path.parent.parent if is_step else path
    if not (root / CONFIG).is_file():
        content = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "no files"
        raise ValueError(f"{path}: found {content}, {expected}, with a {CONFIG}")
    config = read_json_object(root / CONFIG)
    if not is_step and "model_type" in config:
        return root, config
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"{root / CONFIG}: found neither model_type nor model in it, {expected}")
    return root, config


def _run_model_config(root: Path, config: dict[str, Any]) -> ModelConfig:
    try:
        return from_dict(ModelConfig, config["model"], "model")
    except ValueError as error:
        raise ValueError(f"{root / CONFIG}: {error}") from error
