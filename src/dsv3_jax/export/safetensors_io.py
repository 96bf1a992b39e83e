"""Safetensors files, header first and one tensor at a time.

    8 bytes     length N of the header, little endian
    N bytes     JSON: {"__metadata__": {"format": "pt"},
                "lm_head.weight": {"dtype": "BF16", "shape": [8, 4], "data_offsets": [0, 64]}}
    the rest    the tensors' bytes, without gaps; offsets count from here

Not through the `safetensors` package: its NumPy interface has no FP8, reads through a memory map
(the whole file ends up resident) and writes a file only from all its tensors at once. It is the
second opinion in the tests.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""The dtypes that a model's tensors may have."""

_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2} | {
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `offset` bytes from the start of `file`. `dtype` is the header's."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header alone, in the order of their bytes.

    Raises ValueError that names the file where it is missing, cut short or damaged.
    """
    try:
        with open(file, "rb") as source:
            file_bytes = os.fstat(source.fileno()).st_size
            header_bytes = int.from_bytes(source.read(8), "little")
            if file_bytes < 8 or not 2 <= header_bytes <= min(file_bytes - 8, _MAX_HEADER_BYTES):
                raise ValueError(
                    f"{file}: found {file_bytes} bytes that announce a header of {header_bytes},"
                    " expected a complete safetensors file"
                )
            header = json.loads(source.read(header_bytes))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        start = 8 + header_bytes
        tensors = [_stored_tensor(file, name, start, entry) for name, entry in entries.items()]
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}, expected a safetensors file") from error
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{file}: header is no JSON object ({error})") from error
    end = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.size_bytes)):
        if tensor.offset != end:
            raise ValueError(
                f"{file}: tensor {tensor.name} begins at byte {tensor.offset}, expected {end}"
            )
        end += tensor.size_bytes
    if file_bytes != end:
        raise ValueError(f"{file}: found {file_bytes} bytes, expected {end} by its header")
    return {t.name: t for t in sorted(tensors, key=lambda t: t.offset)}


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """The values, in their stored dtype."""
    return read_slice(tensor, 0, tensor.size_bytes).view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def read_slice(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Bytes `start` to `stop` of the tensor, uint8."""
    buffer = np.empty(stop - start, np.uint8)
    with open(tensor.file, "rb", buffering=0) as source:
        source.seek(tensor.offset + start)
        view = memoryview(buffer)
        while view:
            count = source.readinto(view)
            if not count:
                raise ValueError(f"{tensor.file}: ends inside tensor {tensor.name}")
            view = view[count:]
    return buffer


def read_ahead(tensors: Iterable[StoredTensor]) -> Iterator[np.ndarray]:
    """The values of each tensor; the next one is read meanwhile, by a thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: Future[np.ndarray] | None = None
        for tensor in tensors:
            previous, pending = pending, pool.submit(read_tensor, tensor)
            if previous is not None:
                yield previous.result()
                del previous
        if pending is not None:
            yield pending.result()


def same_values(a: StoredTensor, b: StoredTensor, chunk_bytes: int = 2**24) -> bool:
    """Whether two tensors agree in dtype, shape and every bit; compared in chunks."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    chunks = (
        (start, min(start + chunk_bytes, a.size_bytes))
        for start in range(0, a.size_bytes, chunk_bytes)
    )
    return all(np.array_equal(read_slice(a, *c), read_slice(b, *c)) for c in chunks)


def write_file(
    file: Path,
    layout: dict[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes the `tensors` of `layout`, name to (dtype, shape), which come one at a time.

    Larger items lie first, whatever the order they come in, so that every tensor is aligned (torch
    refuses others). The file is on the disk, not only in its cache, when this returns.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda e: -DTYPES[e[1][0]].itemsize):
        offsets[name], end = end, end + stored_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offsets[name], end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        start = out.tell()
        for name, values in tensors:
            dtype, shape = layout[name]
            assert (values.dtype, values.shape) == (DTYPES[dtype], shape), name
            out.seek(start + offsets.pop(name))
            out.write(memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8)))
        assert not offsets, f"no values came for {sorted(offsets)}"
        out.flush()
        os.fsync(out.fileno())


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor in a file."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def _stored_tensor(file: Path, name: str, start: int, entry: Any) -> StoredTensor:
    """One entry of a header; `start` is where the tensors' bytes begin."""
    try:
        dtype, shape = entry["dtype"], tuple(map(int, entry["shape"]))
        begin, end = map(int, entry["data_offsets"])
        item_bytes = DTYPES[dtype].itemsize if dtype in DTYPES else _ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: tensor {name} has the header entry {entry!r}, expected a known dtype, shape"
            " and data_offsets"
        ) from error
    size_bytes = math.prod(shape) * item_bytes
    if min(shape, default=0) < 0 or begin < 0 or end - begin != size_bytes:
        raise ValueError(
            f"{file}: tensor {name} has {end - begin} bytes, expected {size_bytes} for"
            f" {dtype}{list(shape)}"
        )
    return StoredTensor(name, file, dtype, shape, start + begin, size_bytes)
