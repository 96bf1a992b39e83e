"""Kernels are chosen by the GPU that a program is for, which need not be there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dsv3_kernels.fp8_gemm.op import fp8_gemm
from dsv3_kernels.grouped_gemm.op import masked_rows, ragged_k, ragged_rows
from dsv3_kernels.logfmt.op import encode
from dsv3_kernels.mla_decode.op import mla_decode_rows
from dsv3_kernels.mla_prefill.op import mla_prefill
from dsv3_kernels.permute.op import sum_rows, take_rows
from dsv3_kernels.quantize.op import quantize
from dsv3_kernels.swiglu_quantize.op import swiglu_quantize
from dsv3_kernels.target import is_hopper

KINDS = {"NVIDIA H800": True, "NVIDIA H100 80GB HBM3": True, "NVIDIA GH200 480GB": True}
KINDS |= {"NVIDIA B200": False, "NVIDIA A100-SXM4-80GB": False}


def mesh_of(kind: str, platform: str = "gpu") -> AbstractMesh:
    device = AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    return AbstractMesh((8,), ("gpu",), (AxisType.Auto,), abstract_device=device)


def bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def fp8_product(x):
    return fp8_gemm(*quantize(x), *quantize(x, (128, 128)), jnp.bfloat16)


def attention(q, kv, k_rope):
    return mla_prefill(q, kv, k_rope, 0.1)


ROWS = bfloat16(128, 128), bfloat16(2, 128, 128), int32(2)
OPERATIONS = {
    "quantize": (quantize, (bfloat16(128, 128),)),
    "fp8_gemm": (fp8_product, (bfloat16(128, 128),)),
    "ragged_rows": (lambda *x: ragged_rows(*x, jnp.bfloat16, alignment=64), ROWS),
    "masked_rows": (
        lambda *x: masked_rows(*x, jnp.bfloat16),
        (bfloat16(2, 128, 128), *ROWS[1:]),
    ),
    "ragged_k": (
        lambda *x: ragged_k(*x, jnp.bfloat16, alignment=64),
        (bfloat16(128, 128), bfloat16(128, 128), int32(2)),
    ),
    "mla_prefill": (
        attention,
        (bfloat16(1, 128, 2, 192), bfloat16(1, 128, 2, 256), bfloat16(1, 128, 64)),
    ),
    "mla_decode": (
        lambda *x: mla_decode_rows(*x, 0.1),
        (bfloat16(2, 1, 16, 576), bfloat16(2, 128, 576), int32(2)),
    ),
    "take_rows": (take_rows, (bfloat16(16, 256), int32(8))),
    "sum_rows": (sum_rows, (bfloat16(16, 256), int32(8, 2))),
    "swiglu_quantize": (swiglu_quantize, (bfloat16(128, 512),)),
    "logfmt encode": (lambda x: encode(x, 10), (bfloat16(128, 256),)),
}


@pytest.mark.parametrize(("kind", "expected"), KINDS.items())
def test_hopper_is_known_by_its_names(kind, expected):
    with jax.sharding.use_abstract_mesh(mesh_of(kind)):
        assert is_hopper() == expected


def test_a_cpu_is_not():
    assert not is_hopper()
    with jax.sharding.use_abstract_mesh(mesh_of("H100", platform="cpu")):
        assert not is_hopper()


@pytest.mark.parametrize("name", OPERATIONS)
def test_only_for_hopper_is_there_a_kernel_to_choose(name):
    operation, arguments = OPERATIONS[name]

    def has_kernel(kind: str) -> bool:
        with jax.sharding.use_abstract_mesh(mesh_of(kind)):
            return "platform_index" in str(jax.make_jaxpr(operation)(*arguments))

    assert has_kernel("NVIDIA H800")
    assert not has_kernel("NVIDIA B200")
