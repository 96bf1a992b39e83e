"""Checkpoint steps on disk: `CHECKPOINTS/STEP/`, complete or not there, verified when read.

    checkpoints/300/manifest.json            size and SHA-256 of every file below; written last
    checkpoints/300/state/...                the arrays, in orbax's OCDBT format
    checkpoints/300/metadata/metadata        JSON of the caller: data position, config digest, ...
    checkpoints/400.orbax-checkpoint-tmp/    a save under way, or one that was killed

Orbax does the writing: `AsyncCheckpointer` copies arrays to host memory before `save` returns,
writes in the background (each process its own shards), and commits by renaming the temporary
directory. It does not notice flipped bits, so a manifest is added from its callback between
"all data is written" and the rename: the manifest becomes part of the atomic commit, and a
directory with a step's name and an intact manifest is a complete step whenever the process died.
Retention is ours (orbax's own manager counts damaged steps as kept ones and refuses to save a step
older than the newest directory, which is what resuming past a damaged step has to do).

The state is stored flat, `{"params/layers/0/kernel": array}`, by the names of its tree paths. So
files do not depend on container types, a mismatch is reported by tensor name, and part of a state
(the model without its optimizer) is read by prefix.
"""

import contextlib
import json
import logging
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dsv3_jax.checkpoint.manifest import MANIFEST, find_damage, require_intact, write_manifest

logger = logging.getLogger(__name__)

_STATE, _METADATA = "state", "metadata"
_TMP_SUFFIX = ocp.utils.TMP_DIR_SUFFIX
_DELETING_SUFFIX = ".deleting"
_UNWRITTEN = r"coroutine 'async_serialize_from_host\b.*' was never awaited"
"""What Python says at exit of writes that were still to come when one failed."""
_NO_STEP, _ONLY_DAMAGED = -1, -2  # what a search for the newest step can end in instead


@dataclass(frozen=True, kw_only=True)
class Restored:
    """One step read back: `state` has the structure of the abstract state it was asked for."""

    step: int
    state: Any
    metadata: dict[str, Any]


class CheckpointManager(contextlib.AbstractContextManager):
    """The steps under `directory`, of which the newest `keep` are retained.

    One save is in flight at a time. One that fails in the background raises OSError on the next
    call of `save`, `wait`, `restore` or `close`, once; earlier steps are untouched and later saves
    work. Use it as a context manager, or call `close`, so that the last save is complete at exit.
    With several processes every method is called by all of them.

    >>> with CheckpointManager(Path("runs/demo/checkpoints"), keep=3) as manager:
    ...     restored = manager.restore(abstract_state)  # None in a new run
    ...     manager.save(100, state, {"step": 100, "data": position})
    """

    def __init__(self, directory: Path, keep: int):
        if keep < 1:
            raise ValueError(f"keep is {keep}, expected at least 1 checkpoint step")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._in_flight: int | None = None
        self._has_saved = False
        self._damaged: set[int] = set()
        # Directories are created before `save` returns: where that fails in the background, orbax
        # leaves threads behind that wait for it.
        options = ocp.AsyncOptions(
            create_directories_asynchronously=False,
            post_finalization_callback=self._write_manifest,
        )
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=options),
            # Trained float32 weights shrink by a tenth at most, for cores that training needs.
            state=ocp.PyTreeCheckpointHandler(use_compression=False),
            metadata=ocp.JsonCheckpointHandler(),
        )
        self._checkpointer = ocp.AsyncCheckpointer(handler, async_options=options)
        # For good: asyncio reports lost writes when they are collected, at exit at the latest.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_orbax_traceback)
        if not isinstance(sys.unraisablehook, _WithoutLostWrites):
            sys.unraisablehook = _WithoutLostWrites(sys.unraisablehook)
        warnings.filterwarnings("ignore", message=_UNWRITTEN, category=RuntimeWarning)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def step_directory(self, step: int) -> Path:
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """The complete steps, ascending: every file of the manifest is there in its full size.

        Contents are verified by `restore` only.
        """
        return [
            step
            for step in _numbered(self.directory)
            if find_damage(self.step_directory(step), contents=False) is None
        ]

    def latest(self) -> int | None:
        """The newest of `steps`."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Starts to write `state`, a tree of arrays, and `metadata`, JSON, as step `step`.

        Returns when the arrays are copied to host memory, so that their buffers may be donated.
        Raises ValueError where an intact step of that number exists; a damaged one is replaced.
        """
        self.wait()
        if step < 0:
            raise ValueError(f"checkpoint step is {step}, expected a number of at least 0")
        path = self.step_directory(step)
        tensors = _named_tensors(state)
        try:
            metadata = json.loads(json.dumps(metadata))
        except TypeError as error:
            raise ValueError(f"metadata of {path} is not JSON: {error}") from error
        if path.exists() and find_damage(path) is None:
            raise ValueError(f"{path} already holds a complete checkpoint step; move it away first")
        self._in_flight, self._has_saved = step, True
        try:
            self._prepare(path)
            self._checkpointer.save(
                path,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(tensors), metadata=ocp.args.JsonSave(metadata)
                ),
            )
        except Exception as error:
            self._in_flight = None
            raise self._failure(step, error) from error

    def wait(self) -> None:
        """Returns when the step in flight is complete and older ones are retired.

        Raises OSError where that save failed; `save`, `restore` and `close` begin with this.
        """
        if self._in_flight is None:
            return
        step = self._in_flight
        try:
            self._checkpointer.wait_until_finished()
            if not self.step_directory(step).exists():
                raise OSError("the save ended without its final rename")
        except Exception as error:
            raise self._failure(step, error) from error
        finally:
            self._in_flight = None
        self._damaged.discard(step)
        self._retire(step)

    def close(self) -> None:
        """Completes the save in flight and ends the background threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            if self._has_saved:
                self._discard_leftovers()

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """The newest intact step, or `step`, placed by the shardings of `abstract_state`'s leaves.

        Leaves are `jax.ShapeDtypeStruct`; one without a sharding comes to the first local device.
        None where the directory holds no step. Unfinished and damaged steps are skipped with a
        logged warning. Raises ValueError where `step` is missing or damaged, where no step is
        intact, and where a tensor differs in name, shape or dtype.
        """
        self.wait()
        if step is None:
            step = self._newest_intact_step()
            if step is None:
                return None
        else:
            require_intact(self.step_directory(step))
        path = self.step_directory(step)
        state = _read_state(path, abstract_state, prefix="", whole=True)
        return Restored(step=step, state=state, metadata=_read_json(path / _METADATA / _METADATA))

    def _newest_intact_step(self) -> int | None:
        # Reading all of a step to verify it is one process's work; the others follow its choice.
        chosen = _NO_STEP
        if jax.process_index() == 0:
            chosen, self._damaged = _search(self.directory)
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        _require_not_only_damaged(self.directory, chosen)
        return None if chosen == _NO_STEP else chosen

    def _prepare(self, path: Path) -> None:
        if jax.process_index() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._discard_leftovers()
        if path.exists():
            logger.warning("%s: damaged checkpoint step is being replaced", path)
            _delete(path)

    def _write_manifest(self) -> None:
        """Called by orbax in its background thread (process 0): data written, not yet renamed."""
        write_manifest(self.directory / f"{self._in_flight}{_TMP_SUFFIX}", (_STATE, _METADATA))

    def _retire(self, saved: int) -> None:
        """Deletes what is older than the `keep` newest complete steps up to `saved`."""
        if jax.process_index() != 0:
            return
        complete = [s for s in self.steps() if s <= saved and s not in self._damaged]
        if len(complete) >= self._keep:
            for step in _numbered(self.directory):
                if step < complete[-self._keep]:
                    _delete(self.step_directory(step))

    def _discard_leftovers(self) -> None:
        """Deletes what killed or failed saves and interrupted deletions left behind."""
        if jax.process_index() == 0:
            for suffix in (_TMP_SUFFIX, _DELETING_SUFFIX):
                for path in self.directory.glob(f"*{suffix}"):
                    _delete(path)

    def _failure(self, step: int, error: Exception) -> OSError:
        # Writes that were under way besides the failed one go on and create their directory again.
        quiet_checks = 0
        for _ in range(50):
            self._discard_leftovers()
            time.sleep(0.05)
            quiet_checks = 0 if any(self.directory.glob(f"*{_TMP_SUFFIX}")) else quiet_checks + 1
            if quiet_checks == 3:
                break
        path = self.step_directory(step)
        return OSError(f"checkpoint step {step} could not be saved to {path}: {error}")


def find_step(path: Path) -> Path:
    """The step directory that `path` means: itself, or the newest intact one of a run directory.

    Raises ValueError where there is none, or where `path` is a step and damaged.
    """
    path = Path(path).absolute()
    if (path / MANIFEST).is_file() or path.name.isdecimal():
        require_intact(path)
        return path
    for directory in (path / "checkpoints", path):
        step, _ = _search(directory)
        _require_not_only_damaged(directory, step)
        if step != _NO_STEP:
            return directory / str(step)
    raise ValueError(f"{path} is neither a run directory with a complete checkpoint nor a step")


def read_metadata(step_directory: Path) -> dict[str, Any]:
    """The metadata that was saved with a step. Raises ValueError where that file is damaged."""
    name = f"{_METADATA}/{_METADATA}"
    require_intact(step_directory, only=name)
    return _read_json(step_directory / name)


def restore_subtree(step_directory: Path, abstract_subtree: Any, prefix: str) -> Any:
    """The part of a step's state whose tensor names start with `prefix`, e.g. `"params"`.

    `abstract_subtree` is the abstract state of that part alone, as in `CheckpointManager.restore`.
    Tensors of the step that it does not have are left unread. Raises ValueError as `restore` does.
    """
    require_intact(step_directory)
    return _read_state(step_directory, abstract_subtree, prefix=prefix, whole=False)


def stored_tensors(step_directory: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every tensor of a step."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(step_directory / _STATE).tree  # pyright: ignore[reportArgumentType]
    return {name: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for name, entry in tree.items()}


def _search(directory: Path) -> tuple[int, set[int]]:
    """The newest intact step or one of the codes above, and the steps found damaged."""
    for path in sorted(directory.glob(f"*{_TMP_SUFFIX}")):
        logger.warning("%s: skipped, its save did not finish", path)
    damaged: set[int] = set()
    for step in reversed(_numbered(directory)):
        damage = find_damage(directory / str(step))
        if damage is None:
            return step, damaged
        logger.warning("%s: checkpoint step skipped, %s", directory / str(step), damage)
        damaged.add(step)
    return (_ONLY_DAMAGED if damaged else _NO_STEP), damaged


def _require_not_only_damaged(directory: Path, step: int) -> None:
    if step == _ONLY_DAMAGED:
        raise ValueError(
            f"every checkpoint step in {directory} is damaged; move it away to start anew"
        )


def _read_state(path: Path, abstract: Any, *, prefix: str, whole: bool) -> Any:
    expected = _named_tensors(abstract, prefix)
    found = stored_tensors(path)
    _require_same_tensors(path, found, expected, whole)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
        for name, leaf in expected.items()
    }
    args = ocp.args.PyTreeRestore(
        item=targets,
        restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
        partial_restore=not whole,
    )
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        # Orbax declares its own Path and takes any.
        tensors = handler.restore(path / _STATE, args=args)  # pyright: ignore[reportArgumentType]
    leaves, structure = jax.tree.flatten(abstract)
    names = _tensor_names(abstract, prefix)
    return jax.tree.unflatten(
        structure,
        [
            tensors[name] if name in tensors else jax.numpy.zeros(leaf.shape, leaf.dtype)
            for name, leaf in zip(names, leaves, strict=True)
        ],
    )


def _require_same_tensors(
    path: Path, found: dict[str, Any], expected: dict[str, Any], whole: bool
) -> None:
    def describe(leaf: Any) -> str:
        return "no such tensor" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

    names = expected | found if whole else expected
    differences = [
        f"{name}: found {describe(found.get(name))}, expected {describe(expected.get(name))}"
        for name in sorted(names)
        if describe(found.get(name)) != describe(expected.get(name))
    ]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ValueError(
            f"checkpoint step {path} does not fit this config: {'; '.join(differences[:3])}{more}"
        )


def _tensor_names(tree: Any, prefix: str = "") -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    names = [f"{prefix}/{name}".strip("/") for name in names]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"state has tensors without a unique name: {sorted(names)}")
    return names


def _named_tensors(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Tensors by name, those without elements left out: orbax does not store them."""
    named = dict(zip(_tensor_names(tree, prefix), jax.tree.leaves(tree), strict=True))
    for name, leaf in named.items():
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(f"state tensor {name} is a {type(leaf).__name__}, expected an array")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"state tensor {name} is a typed PRNG key, expected its key_data")
    return {name: leaf for name, leaf in named.items() if leaf.size > 0}


def _numbered(directory: Path) -> list[int]:
    """The numbers that are names of subdirectories, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_bytes())


def _delete(path: Path) -> None:
    """Deletes a directory; renamed first, so that a half-deleted step never looks like a step."""

    def report(_: Any, file: str, error: BaseException) -> None:
        logger.warning("%s could not be deleted: %s", file, error)

    doomed = path
    if not path.name.endswith(_DELETING_SUFFIX):
        doomed = path.with_name(path.name + _DELETING_SUFFIX)
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            path.rename(doomed)
        except OSError as error:
            report(None, str(path), error)
            return
    shutil.rmtree(doomed, onexc=report)


def _is_not_orbax_traceback(record: logging.LogRecord) -> bool:
    """A log filter against tracebacks out of orbax: it logs one failed write from each of its
    threads, hundreds of lines, and then raises it, which `CheckpointManager` passes on, once."""
    if not record.exc_info or record.exc_info[1] is None:
        return True
    _, error, stack = record.exc_info
    # A write whose result nobody fetched was never raised: its message names the directory.
    frames = traceback.extract_tb(stack)
    from_orbax = any("orbax" in Path(frame.filename).parts for frame in frames)
    return not from_orbax and _TMP_SUFFIX not in str(error)


class _WithoutLostWrites:
    """A `sys.unraisablehook` against the tracebacks of writes that end after a failed one closed
    their event loop: their native threads report them, where no caller can catch them."""

    def __init__(self, hook: Callable[[Any], Any]):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        frames = traceback.extract_tb(unraisable.exc_traceback)
        within_asyncio = {Path(frame.filename).parent.name for frame in frames} == {"asyncio"}
        if not (within_asyncio and str(unraisable.exc_value) == "Event loop is closed"):
            self._hook(unraisable)
