"""Checkpoints made by hand, loaded and saved again: the same bytes, or an error with a name."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dsv3_jax.export import huggingface, safetensors_io
from dsv3_jax.export.huggingface import load_hf, save_hf
from dsv3_jax.model.linear import BlockScale
from dsv3_jax.model.router import SelectionBias
from dsv3_jax.model.transformer import Transformer
from tests.export.hub_files import (
    ONE_LAYER,
    RAGGED,
    TINY,
    assert_same_tensors,
    dequantise_by_hand,
    hub_tensors,
    quantise_by_hand,
    read_checkpoint,
    write_checkpoint,
)

UP_PROJ = "model.layers.2.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def tiny_tensors() -> dict[str, np.ndarray]:
    return hub_tensors(TINY, "BF16")


@pytest.fixture
def tiny(tmp_path, tiny_tensors) -> Path:
    """A single-file BF16 checkpoint."""
    return write_checkpoint(tmp_path / "tiny", TINY, tiny_tensors)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, tiny_tensors) -> Transformer:
    """What it holds, loaded once; not to be changed."""
    return load_hf(write_checkpoint(tmp_path_factory.mktemp("tiny"), TINY, tiny_tensors))


@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("bfloat16", 3)])
def test_bfloat16_comes_back_bit_by_bit(tmp_path, tiny_tensors, dtype, shards):
    write_checkpoint(tmp_path / "in", TINY, tiny_tensors, shards)
    model = load_hf(tmp_path / "in", dtype)
    params = nnx.state(model, nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    biases = jax.tree.leaves(nnx.state(model, SelectionBias))
    assert [leaf.dtype for leaf in biases] == [jnp.float32] * 2
    save_hf(model, tmp_path / "out", "bfloat16", max_shard_bytes=20_000 if shards > 1 else 10**9)
    assert_same_tensors(read_checkpoint(tmp_path / "out"), tiny_tensors)


@pytest.mark.parametrize("stored", ["F32", "F16"])
def test_float32_and_float16_are_exact_in_float32(tmp_path, stored):
    tensors = hub_tensors(TINY, stored)
    model = load_hf(write_checkpoint(tmp_path / "in", TINY, tensors))
    save_hf(model, tmp_path / "out", "float32")
    expected = {name: t.astype(np.float32) for name, t in tensors.items()}
    assert_same_tensors(read_checkpoint(tmp_path / "out"), expected)
    save_hf(model, tmp_path / "rounded", "bfloat16")
    rounded = read_checkpoint(tmp_path / "rounded")
    assert rounded[UP_PROJ].tobytes() == tensors[UP_PROJ].astype(ml_dtypes.bfloat16).tobytes()


def test_fp8_comes_back_bit_by_bit(tmp_path):
    """Scales of the V3.1 kind (powers of two) in one layer, others 1.37 times what amax gives."""
    tensors = hub_tensors(RAGGED, "F8_E4M3")
    for name, scale in tensors.items():
        if name.endswith("_scale_inv"):
            is_last = name.startswith("model.layers.1.")
            tensors[name] = np.exp2(np.ceil(np.log2(scale))) if is_last else scale * 1.37
            tensors[name] = tensors[name].astype(np.float32)
    write_checkpoint(tmp_path / "in", RAGGED, tensors, shards=2)
    model = load_hf(tmp_path / "in", "bfloat16")
    save_hf(model, tmp_path / "out", "float8_e4m3fn", max_shard_bytes=30_000)
    assert_same_tensors(read_checkpoint(tmp_path / "out"), tensors)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "scale_fmt" not in quantization


def test_arrays_put_together_on_the_device_are_the_same(tmp_path, monkeypatch):
    """As only large ones are otherwise."""
    monkeypatch.setattr(huggingface, "HOST_BYTES", 0)
    tensors = hub_tensors(ONE_LAYER, "F8_E4M3")
    model = load_hf(write_checkpoint(tmp_path / "in", ONE_LAYER, tensors))
    save_hf(model, tmp_path / "out", "float8_e4m3fn")
    assert_same_tensors(read_checkpoint(tmp_path / "out"), tensors)


def test_fp8_values_and_scales_in_the_model(tmp_path):
    tensors = hub_tensors(RAGGED, "F8_E4M3")
    plain = "model.layers.1.mlp.experts.1.gate_proj.weight"  # this one not in FP8
    scale = tensors.pop(plain + "_scale_inv")
    tensors[plain] = dequantise_by_hand(tensors[plain], scale).astype(ml_dtypes.bfloat16)
    model = load_hf(write_checkpoint(tmp_path / "in", RAGGED, tensors))
    experts = model.moe_layers.mlp.experts
    assert experts.gate_up_proj_scale_inv.shape == (1, 2, 2, 2, 2)
    assert experts.down_proj_scale_inv.shape == (1, 2, 2, 2)
    assert np.isnan(experts.gate_up_proj_scale_inv[0, 1, 0]).all()
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    np.testing.assert_array_equal(
        experts.gate_up_proj_scale_inv[0, 1, 1], tensors[name + "_scale_inv"]
    )
    expected = dequantise_by_hand(tensors[name], tensors[name + "_scale_inv"])
    np.testing.assert_array_equal(experts.gate_up_proj[0, 1, 1], expected)
    latent = model.mtp.block.self_attn.kv_a_proj_with_mqa
    assert latent.weight_scale_inv.shape == (1, 1, 2)
    assert not jax.tree.leaves(nnx.state(model.embed_tokens, BlockScale))

    @nnx.jit
    def mtp_logits(model, rows):  # both scans and the MTP module carry the scales along
        return model.logits(model.hidden_states(rows).mtp[0])

    assert np.isfinite(mtp_logits(model, jnp.arange(12).reshape(2, 6))).all()


def test_fp8_of_a_model_that_had_none(tmp_path):
    tensors = hub_tensors(ONE_LAYER, "BF16")
    model = load_hf(write_checkpoint(tmp_path / "in", ONE_LAYER, tensors))
    save_hf(model, tmp_path / "out", "float8_e4m3fn")
    saved = read_checkpoint(tmp_path / "out")
    expected = {}
    for name, tensor in tensors.items():
        if name + "_scale_inv" in saved:
            expected |= quantise_by_hand(name, tensor.astype(np.float32))
        else:
            expected[name] = tensor
    assert_same_tensors(saved, expected)
    assert saved.keys() == hub_tensors(ONE_LAYER, "F8_E4M3").keys()


def test_all_power_of_two_scales_are_said_to_be_ue8m0(tmp_path):
    tensors = hub_tensors(ONE_LAYER, "F8_E4M3")
    for name, scale in tensors.items():
        if name.endswith("_scale_inv"):
            tensors[name] = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
    model = load_hf(write_checkpoint(tmp_path / "in", ONE_LAYER, tensors), "bfloat16")
    save_hf(model, tmp_path / "out", "float8_e4m3fn")
    assert_same_tensors(read_checkpoint(tmp_path / "out"), tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"
    assert load_hf(tmp_path / "out").config == model.config


def test_layout_of_one_shard_and_of_several(tmp_path, tiny_model):
    save_hf(tiny_model, tmp_path / "one")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "mtp.safetensors")
    }
    save_hf(tiny_model, tmp_path / "many", max_shard_bytes=15_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    total = len(shards)
    assert shards == [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    (tmp_path / "many" / "mtp.safetensors").unlink()
    tensors = read_checkpoint(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for shard in shards:
        assert (tmp_path / "many" / shard).stat().st_size < 15_000 + 10_000  # and its header
    generation = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 1)


def test_mtp_copies_may_be_left_out_but_not_differ(tmp_path, tiny_tensors):
    copy = "model.layers.3.shared_head.head.weight"
    fewer = {n: t for n, t in tiny_tensors.items() if "layers.3.embed_tokens" not in n}
    del fewer[copy]
    model = load_hf(write_checkpoint(tmp_path / "fewer", TINY, fewer))
    save_hf(model, tmp_path / "out")
    assert_same_tensors(read_checkpoint(tmp_path / "out"), tiny_tensors)
    other = tiny_tensors | {copy: tiny_tensors[copy] + np.ones((), ml_dtypes.bfloat16)}
    write_checkpoint(tmp_path / "other", TINY, other)
    with pytest.raises(ValueError, match=rf"{copy}: found other values than lm_head.weight has"):
        load_hf(tmp_path / "other")


def test_mtp_modules_have_their_own_file(tmp_path, tiny_model, tiny_tensors):
    for shard_bytes in (10**9, 15_000):
        out = tmp_path / str(shard_bytes)
        save_hf(tiny_model, out, max_shard_bytes=shard_bytes)
        mtp = {n: t for n, t in tiny_tensors.items() if n.startswith("model.layers.3.")}
        stored = safetensors.deserialize((out / "mtp.safetensors").read_bytes())
        assert {name for name, _ in stored} == mtp.keys()
        assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
        again = load_hf(out, "bfloat16")
        assert again.config == tiny_model.config
        save_hf(again, out / "again")
        assert_same_tensors(read_checkpoint(out / "again"), tiny_tensors)


def test_a_tensor_in_both_files_is_an_error(tmp_path, tiny_model):
    save_hf(tiny_model, tmp_path / "out")
    double = {"lm_head.weight": np.zeros((48, 24), np.float32)}
    safetensors.numpy.save_file(double, tmp_path / "out" / "mtp.safetensors")
    with pytest.raises(ValueError, match=r"mtp\.safetensors: found tensor lm_head\.weight, which"):
        load_hf(tmp_path / "out")


def test_rotary_frequencies_are_passed_over(tmp_path, tiny_tensors):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    model = load_hf(write_checkpoint(tmp_path / "in", TINY, tiny_tensors | extra))
    save_hf(model, tmp_path / "out")
    assert_same_tensors(read_checkpoint(tmp_path / "out"), tiny_tensors)


# What may be wrong with a checkpoint: each function breaks one and returns the error to expect.


def break_missing(directory, tensors):
    del tensors["model.layers.1.mlp.gate.weight"]
    return "tensor model.layers.1.mlp.gate.weight: found none, expected plain [4, 24]"


def break_extra(directory, tensors):
    tensors["model.layers.0.self_attn.q_a_proj.bias"] = np.zeros(12, np.float32)
    return "found tensor model.layers.0.self_attn.q_a_proj.bias F32[12], expected no such tensor"


def break_layer_beyond_the_last(directory, tensors):
    tensors["model.layers.4.input_layernorm.weight"] = np.zeros(24, np.float32)
    return "found tensor model.layers.4.input_layernorm.weight F32[24], expected no such"


def break_half_an_mtp_module(directory, tensors):
    del tensors["model.layers.3.eh_proj.weight"]
    return "tensor model.layers.3.eh_proj.weight: found none, expected plain [24, 48]"


def break_shape(directory, tensors):
    tensors[UP_PROJ] = tensors[UP_PROJ].T.copy()
    return f"tensor {UP_PROJ}: found BF16[24, 16], expected F32 or BF16 or F16 or F8_E4M3 [16, 24]"


def break_dtype(directory, tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64)
    return "tensor lm_head.weight: found F64[48, 24], expected F32 or BF16 or F16 [48, 24]"


def break_fp8_norm(directory, tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)
    return "tensor model.norm.weight: found F8_E4M3[24], expected F32 or BF16 or F16 [24]"


def break_scale_missing(directory, tensors):
    tensors[UP_PROJ] = tensors[UP_PROJ].astype(ml_dtypes.float8_e4m3fn)
    return f"tensor {UP_PROJ}_scale_inv: found none, expected F32[1, 1] as {UP_PROJ} is F8_E4M3"


def break_scale_without_fp8(directory, tensors):
    tensors[UP_PROJ + "_scale_inv"] = np.ones((1, 1), np.float32)
    return f"found tensor {UP_PROJ}_scale_inv F32[1, 1], expected no such tensor"


def break_scale_shape(directory, tensors):
    tensors[UP_PROJ] = tensors[UP_PROJ].astype(ml_dtypes.float8_e4m3fn)
    tensors[UP_PROJ + "_scale_inv"] = np.ones((1, 2), np.float32)
    return f"tensor {UP_PROJ}_scale_inv: found F32[1, 2], expected F32 [1, 1]"


BREAKS = [function for name, function in globals().items() if name.startswith("break_")]


@pytest.fixture
def nothing_allocated(monkeypatch):
    """Fails the test if loading gets as far as to allocate."""

    def allocate(*arguments):
        pytest.fail("the model was allocated before the error")

    monkeypatch.setattr(huggingface, "_allocate", allocate)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("damage", BREAKS)
def test_wrong_tensor_is_named(tmp_path, tiny_tensors, damage, shards, nothing_allocated):
    tensors = dict(tiny_tensors)
    message = damage(tmp_path, tensors)
    write_checkpoint(tmp_path / "in", TINY, tensors, shards)
    with pytest.raises(ValueError) as caught:
        load_hf(tmp_path / "in")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "in"))
    assert "\n" not in str(caught.value)


def lose_a_shard(directory):
    (directory / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors: no such shard, expected by model.safetensors.index"


def cut_a_shard(directory):
    file = directory / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    return "model-00002-of-00002.safetensors: found "


def swap_shards(directory):
    a, b = sorted(directory.glob("*.safetensors"))
    a.rename(directory / "x")
    b.rename(a)
    (directory / "x").rename(b)
    return "-of-00002.safetensors: found tensor model."


def edit_index(directory, change):
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def forget_in_index(directory):
    edit_index(directory, lambda weight_map: weight_map.pop("model.norm.weight"))
    return "found tensor model.norm.weight, expected in no shard by model.safetensors.index.json"


def invent_in_index(directory):
    edit_index(directory, lambda m: m.update({"x.weight": "model-00001-of-00002.safetensors"}))
    return "found no tensor x.weight, expected by model.safetensors.index.json"


def empty_index(directory):
    edit_index(directory, dict.clear)
    return "found no map from tensors to shards"


def damaged_index(directory):
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {')
    return "model.safetensors.index.json: no JSON"


def both_forms(directory):
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "model.safetensors")
    return "found model.safetensors and model.safetensors.index.json"


def no_tensors(directory):
    for file in directory.glob("model*"):
        file.unlink()
    return "found config.json, expected model.safetensors or model.safetensors.index.json"


def no_config(directory):
    (directory / "config.json").unlink()
    return "config.json: No such file or directory"


def list_as_config(directory):
    (directory / "config.json").write_text("[]")
    return "config.json: found a list, expected a JSON object"


def other_model(directory):
    (directory / "config.json").write_text(json.dumps(TINY | {"model_type": "deepseek_v2"}))
    return "config.json: model_type is 'deepseek_v2', expected deepseek_v3 or kimi_k2"


@pytest.mark.parametrize(
    "damage",
    [
        *(lose_a_shard, cut_a_shard, swap_shards, forget_in_index, invent_in_index, empty_index),
        *(damaged_index, both_forms, no_tensors, no_config, list_as_config, other_model),
    ],
)
def test_wrong_file_is_named(tmp_path, tiny_tensors, damage, nothing_allocated):
    directory = write_checkpoint(tmp_path / "in", TINY, tiny_tensors, shards=2)
    message = damage(directory)
    with pytest.raises(ValueError) as caught:
        load_hf(directory)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(directory))
    assert "\n" not in str(caught.value)


def test_fp8_without_its_config(tmp_path, nothing_allocated):
    write_checkpoint(tmp_path / "in", TINY, hub_tensors(TINY, "F8_E4M3"))
    (tmp_path / "in" / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ValueError, match=r"config.json: quantization_config is missing"):
        load_hf(tmp_path / "in")


def test_arguments_are_checked(tmp_path, tiny, tiny_model):
    with pytest.raises(ValueError, match="dtype is 'float8', expected one of float32, bfloat16"):
        load_hf(tiny, "float8")
    with pytest.raises(ValueError, match="expected a Hugging Face checkpoint directory"):
        load_hf(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="weights is 'int4', expected one of bfloat16, float32"):
        save_hf(tiny_model, tmp_path / "out", "int4")
    with pytest.raises(ValueError, match="max_shard_bytes is 0, expected at least 1"):
        save_hf(tiny_model, tmp_path / "out", max_shard_bytes=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_what_exists_is_not_overwritten(tmp_path, tiny, tiny_model):
    before = read_checkpoint(tiny)
    for target in (tiny, tiny / "config.json"):
        with pytest.raises(ValueError, match=f"^{target} exists, expected a new or an empty dir"):
            save_hf(tiny_model, target)
    assert_same_tensors(read_checkpoint(tiny), before)
    (tmp_path / "empty").mkdir()
    save_hf(tiny_model, tmp_path / "empty")
    save_hf(tiny_model, tmp_path / "new" / "parents" / "too")
    assert_same_tensors(read_checkpoint(tmp_path / "empty"), before)
    assert_same_tensors(read_checkpoint(tmp_path / "new" / "parents" / "too"), before)


def test_full_disk_leaves_nothing(tmp_path, tiny_model, monkeypatch):
    written = []

    def write(file, layout, tensors):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(file)
        return safetensors_io.write_file(file, layout, tensors)

    monkeypatch.setattr(huggingface, "write_file", write)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_hf(tiny_model, tmp_path / "out", max_shard_bytes=15_000)
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)
    assert written and not list(tmp_path.iterdir())


def test_weights_that_fp8_cannot_hold(tmp_path):
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    tensors = hub_tensors(ONE_LAYER, "BF16")
    tensors[name][3, 2] = np.nan
    model = load_hf(write_checkpoint(tmp_path / "in", ONE_LAYER, tensors))
    with pytest.raises(ValueError, match=f"^{name} has values that are not finite"):
        save_hf(model, tmp_path / "out", "float8_e4m3fn")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    save_hf(model, tmp_path / "out", "bfloat16")
    assert_same_tensors(read_checkpoint(tmp_path / "out"), tensors)


def test_a_model_that_was_changed_has_no_hub_form(tmp_path, tiny):
    model = load_hf(tiny)
    model.moe_layers.mlp.gate.temperature = nnx.Param(jnp.ones((2,)))
    with pytest.raises(ValueError, match=r"moe_layers\.mlp\.gate\.temp.*, expected only arrays"):
        save_hf(model, tmp_path / "out")
    del model.moe_layers.mlp.gate.temperature
    model.norm.weight = nnx.Param(jnp.ones((3,)))
    with pytest.raises(ValueError, match=r"shape of model.norm.weight is \(3,\), expected \[24\]"):
        save_hf(model, tmp_path / "out")
    del model.norm.weight
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight is missing, expected an array that has"
    ):
        save_hf(model, tmp_path / "out")


TOKENIZER = json.dumps(
    dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[
            dict(
                id=i,
                content=content,
                single_word=False,
                lstrip=False,
                rstrip=False,
                normalized=False,
                special=True,
            )
            for i, content in enumerate(("<s>", "</s>"))
        ],
        normalizer=None,
        pre_tokenizer=None,
        post_processor=None,
        decoder=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True),
        model=dict(type="BPE", vocab={"<s>": 0, "</s>": 1, "a": 2, "b": 3}, merges=[]),
    )
)


def test_tokenizer_files_come_along(tmp_path, tiny_model):
    model = tiny_model
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(ValueError, match=r"tokenizer_from is .*source', expected a directory with"):
        save_hf(model, tmp_path / "out", tokenizer_from=source)
    (source / "tokenizer.json").write_text(TOKENIZER)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    save_hf(model, tmp_path / "a", tokenizer_from=source)
    for file in source.iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    made = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert (made["bos_token"], made["eos_token"], made["model_max_length"]) == ("<s>", "</s>", 64)
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>", "chat_template": "x"}')
    save_hf(model, tmp_path / "b", tokenizer_from=source)
    config = (tmp_path / "b" / "tokenizer_config.json").read_text()
    assert config == '{"bos_token": "<s>", "chat_template": "x"}'
    save_hf(model, tmp_path / "c", tokenizer_from=source / "tokenizer.json")
    assert (tmp_path / "c" / "tokenizer.json").read_text() == TOKENIZER


def test_what_a_loaded_directory_had_comes_along_as_it_was(tmp_path, tiny_model):
    save_hf(tiny_model, tmp_path / "source")
    files = {"tokenizer.json": "not one", "generation_config.json": '{"eos_token_id": [1, 2]}'}
    for name, text in files.items():
        (tmp_path / "source" / name).write_text(text)
    save_hf(load_hf(tmp_path / "source"), tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
    model = load_hf(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    save_hf(model, tmp_path / "again")
    assert not (tmp_path / "again" / "tokenizer.json").exists()


def test_tokenizer_of_another_model_is_refused(tmp_path, tiny_model):
    larger = json.loads(TOKENIZER)
    larger["model"]["vocab"]["c"] = 48
    (tmp_path / "tokenizer.json").write_text(json.dumps(larger))
    with pytest.raises(ValueError, match="has token ids up to 48, expected at most 47"):
        save_hf(tiny_model, tmp_path / "out", tokenizer_from=tmp_path)


PEAK_PROGRAM = """
import re, sys
import jax
from flax import nnx
from dsv3_jax.export.huggingface import load_hf, save_hf

def memory(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

load_hf(sys.argv[1]), save_hf(load_hf(sys.argv[1]), sys.argv[3] + "/warm")
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
model = load_hf(sys.argv[2], "bfloat16")
model_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
print(model_bytes, memory("VmHWM") - before)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
save_hf(model, sys.argv[3] + "/out", max_shard_bytes=int(sys.argv[4]))
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's to tell")
def test_host_memory_stays_under_two_shards_above_the_model(tmp_path, tiny):
    config = TINY | dict(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=6,
        n_routed_experts=16,
        q_lora_rank=256,
    )
    write_checkpoint(tmp_path / "in", config, hub_tensors(config, "BF16"), shards=4)
    shard_bytes = max(file.stat().st_size for file in (tmp_path / "in").glob("*.safetensors"))
    arguments = (tiny, tmp_path / "in", tmp_path, shard_bytes)
    done = subprocess.run(
        [sys.executable, "-c", PEAK_PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    model_bytes, load_peak, save_peak = map(int, done.stdout.split())
    assert model_bytes > 200e6
    assert load_peak - model_bytes < 2 * shard_bytes
    assert save_peak < 2 * shard_bytes
