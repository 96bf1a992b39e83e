"""Our reader and writer against the safetensors package, and damaged files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsv3_jax.export.safetensors_io import (
    DTYPES,
    read_ahead,
    read_header,
    read_tensor,
    same_values,
    write_file,
)
from tests.export.hub_files import assert_same_tensors, read_checkpoint


def some_tensors() -> dict[str, np.ndarray]:
    """All dtypes; sizes that leave whatever follows unaligned in this order."""
    rng = np.random.default_rng(0)
    shapes = {"F8_E4M3": (3, 5), "BF16": (7,), "F32": (2, 3), "F16": (5, 1)}
    made = {name: rng.standard_normal(s).astype(DTYPES[name]) for name, s in shapes.items()}
    return made | {"empty": np.zeros((0, 4), np.float32), "scalar": np.full((), 3, np.float32)}


def write(file: Path, tensors: dict[str, np.ndarray]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    layout = {name: (names[t.dtype], t.shape) for name, t in tensors.items()}
    write_file(file, layout, tensors.items())


def test_the_package_reads_what_we_write(tmp_path):
    write(tmp_path / "a.safetensors", some_tensors())
    assert_same_tensors(read_checkpoint(tmp_path), some_tensors())
    for tensor in read_header(tmp_path / "a.safetensors").values():
        assert tensor.offset % DTYPES[tensor.dtype].itemsize == 0, tensor  # torch needs it


def test_we_read_what_the_package_writes(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(some_tensors(), file, {"format": "pt"})
    header = read_header(file)
    assert_same_tensors({n: read_tensor(t) for n, t in header.items()}, some_tensors())
    ahead = zip(header, read_ahead(header.values()), strict=True)
    assert_same_tensors(dict(ahead), some_tensors())
    assert list(read_ahead([])) == []


def test_same_values_looks_at_every_chunk(tmp_path):
    a = np.arange(1000, dtype=np.float32)
    b = a.copy()
    b[-1] += 1
    write(tmp_path / "f", {"a": a, "same": a, "b": b, "half": a.astype(np.float16)})
    header = read_header(tmp_path / "f")
    assert same_values(header["a"], header["same"], chunk_bytes=64)
    assert not same_values(header["a"], header["b"], chunk_bytes=64)
    assert not same_values(header["a"], header["half"])


def edit_header(file: Path, **entries) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header = {n: e for n, e in (header | entries).items() if e is not None}
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])


def damage_nothing_there(file):
    file.unlink()
    return "No such file or directory"


def damage_empty(file):
    file.write_bytes(b"")
    return "found 0 bytes"


def damage_cut_in_header(file):
    os.truncate(file, 20)
    return "found 20 bytes that announce a header of"


def damage_cut_in_data(file):
    os.truncate(file, file.stat().st_size - 3)
    return "expected 1[0-9]{2} by its header"


def damage_longer(file):
    with open(file, "ab") as out:
        out.write(b"more")
    return "by its header"


def damage_not_json(file):
    file.write_bytes((8).to_bytes(8, "little") + b"{{{{{{{{")
    return "header is no JSON object"


def damage_list(file):
    file.write_bytes((2).to_bytes(8, "little") + b"[]")
    return "header is no JSON object"


def damage_dtype(file):
    edit_header(file, b=dict(dtype="F4", shape=[3], data_offsets=[16, 28]))
    return "tensor b has the header entry .*'F4'.*, expected a known dtype"


def damage_shape(file):
    edit_header(file, b=dict(dtype="F32", shape=[4], data_offsets=[16, 28]))
    return r"tensor b has 12 bytes, expected 16 for F32\[4\]"


def damage_overlap(file):
    edit_header(file, b=dict(dtype="F32", shape=[3], data_offsets=[12, 24]))
    return "tensor b begins at byte .*, expected"


def damage_not_an_object(file):
    edit_header(file, b="x")
    return "tensor b has the header entry 'x'"


@pytest.mark.parametrize("damage", [v for k, v in globals().items() if k.startswith("damage_")])
def test_damage_is_named_from_the_header(tmp_path, damage):
    file = tmp_path / "a.safetensors"
    save_file({"a": np.ones(4, np.float32), "b": np.ones(3, np.float32)}, file)
    message = damage(file)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_file_that_shrinks_after_its_header_was_read(tmp_path):
    save_file({"a": np.ones(4, np.float32)}, tmp_path / "f")
    tensor = read_header(tmp_path / "f")["a"]
    os.truncate(tmp_path / "f", tensor.offset + 2)
    with pytest.raises(ValueError, match="ends inside tensor a"):
        read_tensor(tensor)
