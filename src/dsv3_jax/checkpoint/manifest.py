"""`manifest.json` of a checkpoint step: what each file must be, so that damage is noticed.

{"files": {"state/manifest.ocdbt": {"bytes": 116, "sha256": "0f3c..."}, ...}}
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"


def write_manifest(directory: Path, items: tuple[str, ...]) -> None:
    """Writes the manifest of every file under the subdirectories `items` of `directory`."""
    files = [
        file for item in items for file in sorted((directory / item).rglob("*")) if file.is_file()
    ]
    entries = {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, _sha256(files), strict=True)
    }
    with open(directory / MANIFEST, "w") as out:
        json.dump({"files": entries}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def find_damage(step_directory: Path, contents: bool = True, only: str | None = None) -> str | None:
    """What is wrong with a step, naming the file, or None. `only` checks one of its files.

    Without `contents` files are looked at but not read.
    """
    manifest = step_directory / MANIFEST
    try:
        entries = json.loads(manifest.read_bytes())["files"]
        expected = {
            step_directory / name: (int(entries[name]["bytes"]), str(entries[name]["sha256"]))
            for name in (entries if only is None else [only])
        }
        for file, (size_bytes, _) in expected.items():
            found_bytes = file.stat().st_size
            if found_bytes != size_bytes:
                return f"{file} has {found_bytes} bytes, expected {size_bytes}"
        if contents:
            for file, digest in zip(expected, _sha256(expected), strict=True):
                if digest != expected[file][1]:
                    return f"{file} is not what was saved (its SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} is not a readable manifest ({type(error).__name__}: {error})"
    return None


def require_intact(step_directory: Path, only: str | None = None) -> None:
    """Raises ValueError for a step that is missing or damaged, `only` as in `find_damage`."""
    if not step_directory.is_dir():
        raise ValueError(f"there is no checkpoint step {step_directory}")
    damage = find_damage(step_directory, only=only)
    if damage is not None:
        raise ValueError(f"checkpoint step {step_directory} is damaged: {damage}")


def _sha256(files: Iterable[Path]) -> list[str]:
    def digest(file: Path) -> str:
        with open(file, "rb") as contents:
            return hashlib.file_digest(contents, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(digest, files))
