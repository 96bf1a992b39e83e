"""`runs/NAME/`: what is written there besides metrics and checkpoints, and whose run it is."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from dsv3_jax.config import RunConfig, to_dict

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
CHECKPOINTS = "checkpoints"
PLOT_FILE = "training.png"
PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


def run_directory(config: RunConfig) -> Path:
    """runs/NAME under the current directory."""
    return Path("runs") / config.train.name


def write_config(directory: Path, config: RunConfig) -> None:
    """Writes the resolved config with the versions and the commit it runs with, atomically."""
    write_json(directory / CONFIG_FILE, to_dict(config) | {"environment": _environment()})


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` as a whole: it is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def require_same_model(directory: Path, config: RunConfig) -> None:
    """Raises ValueError if `directory` holds a run of another model.

    Steps, optimizer and the like may change when a run goes on; the shapes may not.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error!r}, expected the config of the run there") from error
    now = to_dict(config)["model"]
    changed = sorted(key for key in now if before.get(key) != now[key])
    if changed:
        key = changed[0]
        raise ValueError(
            f"{directory} holds a run with model.{key} = {before.get(key)!r}, expected {now[key]!r}"
            " as this config has: choose another train.name or move that directory away"
        )


def _environment() -> dict[str, Any]:
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _git_commit() -> str | None:
    """The commit of the source this runs from, None outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
