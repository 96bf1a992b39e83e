"""The one door: Hugging Face directories, runs, steps, and everything that is none of them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.checkpoint import CheckpointManager
from dsv3_jax.config import DataConfig, RunConfig
from dsv3_jax.export.huggingface import load_hf
from dsv3_jax.export.load import find_tokenizer, import_hf, load, read_model_config
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.train.run_directory import write_config
from dsv3_jax.train.state import init_state, split_model
from tests.export.hub_files import TINY, hub_tensors, read_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hub"), TINY, hub_tensors(TINY, "BF16"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny) -> Path:
    """A run directory as the trainer writes it, with steps 1 and 2 (weights doubled)."""
    model = load_hf(tiny)
    config = RunConfig(model=model.config, data=DataConfig(seq_len=32))
    directory = tmp_path_factory.mktemp("runs") / "named"
    write_config(directory, config)
    (directory / "tokenizer.json").write_text("{}")
    _, params, selection_bias = split_model(model)
    with CheckpointManager(directory / "checkpoints", keep=5) as manager:
        for step in (1, 2):
            scaled = jax.tree.map(lambda leaf, step=step: leaf * jnp.float32(step), params)
            state = init_state(config.optimizer, scaled, selection_bias)
            manager.save(step, state, {"step": step})
    return directory


def assert_same_model(found: Transformer, expected: Transformer, factor: float = 1.0) -> None:
    assert found.config == expected.config
    scaled = jax.tree.map(lambda leaf: leaf * jnp.float32(factor), nnx.state(expected, nnx.Param))
    for kind, state in ((nnx.Param, scaled), (nnx.Not(nnx.Param), None)):
        state = nnx.state(expected, kind) if state is None else state
        pairs = zip(jax.tree.leaves(nnx.state(found, kind)), jax.tree.leaves(state), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(a, b)


def test_hugging_face_directory(tiny):
    model = load(str(tiny))
    assert_same_model(model, load_hf(tiny))
    assert read_model_config(tiny) == model.config
    assert find_tokenizer(tiny) is None


def test_run_directory_and_step(run, tiny):
    expected = load_hf(tiny)
    assert_same_model(load(run), expected, factor=2.0)
    assert_same_model(load(run / "checkpoints" / "1"), expected)
    for path in (run, run / "checkpoints" / "2"):
        assert read_model_config(path) == expected.config
        assert find_tokenizer(path) == run / "tokenizer.json"


def test_relative_paths(run, monkeypatch):
    monkeypatch.chdir(run / "checkpoints" / "1")
    assert find_tokenizer(".") == run / "tokenizer.json"
    monkeypatch.chdir(run.parent)
    assert read_model_config("named") == read_model_config(run)


def test_dtype_of_a_run(run):
    model = load(run, "bfloat16")
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert model.moe_layers.mlp.gate.e_score_correction_bias.dtype == jnp.float32


def test_imported_run(tmp_path, tiny):
    (tiny / "tokenizer.json").write_text("{}")
    step = import_hf(tiny, tmp_path / "runs" / "imported")
    assert step == tmp_path / "runs" / "imported" / "checkpoints" / "0"
    for path in (step, tmp_path / "runs" / "imported"):
        assert_same_model(load(path), load_hf(tiny))
    assert find_tokenizer(step).read_text() == "{}"
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="imported exists, expected a new or an empty directory"):
        import_hf(tiny, tmp_path / "runs" / "imported")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["imported"]


def test_arguments_are_checked(tiny):
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float32, bfloat16"):
        load(tiny, "int8")
    with pytest.raises(ValueError, match=r"mesh axis 'model' of size is 1, expected data, node"):
        load(tiny, mesh=jax.sharding.Mesh(jax.devices()[:1], ("model",)))


def nowhere(path):
    return "found nothing, expected a Hugging Face directory, a run directory or one of its"


def a_file(path):
    path.write_text("")
    return "found a file, expected a Hugging Face directory"


def empty(path):
    path.mkdir()
    return "found no files, expected a Hugging Face directory"


def something_else(path):
    path.mkdir()
    (path / "weights.bin").write_text("")
    return "found weights.bin, expected a Hugging Face directory"


def damaged_config(path):
    path.mkdir()
    (path / "config.json").write_text("{")
    return "config.json: no JSON"


def other_config(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    return "config.json: found neither model_type nor model in it"


def other_model(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return "config.json: model_type is 'llama', expected deepseek_v3 or kimi_k2"


def run_of_another_version(path):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model": {"hidden_sizes": 3}}))
    return "config.json: model.hidden_sizes is 3, expected one of"


def run_without_steps(path):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model": {}}))
    return "is neither a run directory with a complete checkpoint nor a step"


@pytest.mark.parametrize(
    "make",
    [
        *(nowhere, a_file, empty, something_else, damaged_config, other_config, other_model),
        *(run_of_another_version, run_without_steps),
    ],
)
def test_what_is_no_checkpoint(tmp_path, make):
    message = make(tmp_path / "it")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "it")
    assert str(caught.value).startswith(str(tmp_path / "it"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_step_that_is_damaged_or_missing(run, tmp_path):
    with pytest.raises(ValueError, match=r"there is no checkpoint step|found nothing"):
        load(run / "checkpoints" / "7")
    target = tmp_path / "copy" / "checkpoints" / "1"
    target.mkdir(parents=True)
    (tmp_path / "copy" / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(ValueError, match=r"checkpoints/1 is damaged: .*manifest.json is missing"):
        load(target)


def test_config_of_a_sharded_checkpoint_needs_no_shard(tmp_path, tiny):
    write_checkpoint(tmp_path / "in", TINY, read_checkpoint(tiny), shards=2)
    for shard in (tmp_path / "in").glob("*.safetensors"):
        shard.unlink()
    assert read_model_config(tmp_path / "in") == read_model_config(tiny)
