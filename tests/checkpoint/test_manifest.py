"""Every way in which a file can differ from what the manifest says."""

import json

import pytest

from dsv3_jax.checkpoint.manifest import find_damage, require_intact, write_manifest


@pytest.fixture
def step(tmp_path):
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "values").write_bytes(bytes(range(100)))
    (tmp_path / "state" / "empty").write_bytes(b"")
    (tmp_path / "metadata").write_text("not under an item")
    write_manifest(tmp_path, ("state",))
    return tmp_path


def test_an_intact_step_has_no_damage(step):
    assert find_damage(step) is None
    assert find_damage(step, only="state/d/values") is None
    (step / "metadata").write_text("changed, and not the manifest's business")
    assert find_damage(step) is None
    require_intact(step)


def test_damage_is_named_by_file(step):
    values = step / "state" / "d" / "values"
    values.write_bytes(bytes(99))
    assert find_damage(step) == f"{values} has 99 bytes, expected 100"
    assert find_damage(step, contents=False) == find_damage(step)
    assert find_damage(step, only="state/empty") is None
    values.write_bytes(bytes(100))
    assert find_damage(step) == f"{values} is not what was saved (its SHA-256 differs)"
    assert find_damage(step, contents=False) is None
    values.unlink()
    assert find_damage(step) == f"{values} is missing"
    with pytest.raises(ValueError, match="values is missing"):
        require_intact(step)
    with pytest.raises(ValueError, match=r"there is no checkpoint step .*/nowhere"):
        require_intact(step / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"a": {}}}'])
def test_a_broken_manifest_is_damage(step, text):
    (step / "manifest.json").write_text(text)
    assert "manifest.json is not a readable manifest" in find_damage(step)
    (step / "manifest.json").unlink()
    assert find_damage(step) == f"{step / 'manifest.json'} is missing"


def test_a_file_that_the_manifest_lacks_is_not_trusted(step):
    assert "KeyError" in find_damage(step, only="state/other")


def test_every_flipped_bit_of_the_manifest_is_noticed_or_harmless(step):
    manifest = step / "manifest.json"
    good = manifest.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        manifest.write_bytes(bad)
        if find_damage(step) is None:
            assert json.loads(bytes(bad))["files"] == json.loads(good)["files"]
