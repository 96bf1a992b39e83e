"""Reading a compiled program's text."""

import pytest

from dsv3_jax.plan.hlo import Array, dtype_bits, parse_arrays, parse_module
from tests.plan.programs import LAYERS, ROWS


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("pred", 8),
        ("bf16", 16),
        ("f32", 32),
        ("s4", 4),
        ("u64", 64),
        ("f8e4m3fn", 8),
        ("f8e8m0fnu", 8),
        ("f4e2m1fn", 4),
        ("c64", 64),
        ("token", 0),
    ],
)
def test_bits_of_types(dtype, bits):
    assert dtype_bits(dtype) == bits


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="'q7' is unknown"):
        dtype_bits("q7")


def test_bytes_of_arrays():
    assert Array("f32", ()).nbytes == 4
    assert Array("bf16", (3, 5)).nbytes == 30
    assert Array("s4", (3,)).nbytes == 2  # packed, and rounded up
    assert Array("f32", (0, 7)).nbytes == 0


def test_shapes_are_flattened():
    shape = "((f32[2,3]{1,0:T(8,128)S(5)}), /*index=1*/u32[], bf16[<=4]{0})"
    assert parse_arrays(shape) == (Array("f32", (2, 3)), Array("u32", ()), Array("bf16", (4,)))


def test_a_program_in_schedule_order():
    module = parse_module(LAYERS)
    assert module.partitions == 16
    assert module.entry.name == "main"
    assert set(module.computations) == {
        *("add", "gemm", "store", "keep", "expert", "wrapped", "body", "less", "main")
    }
    assert [line.name for line in module.entry.instructions][-3:] == ["while", "out", "permuted"]
    assert module.entry.root.name == "permuted"
    assert module.entry.operand(module.entry.root, 0).name == "out"


def test_an_instruction_s_parts():
    body = parse_module(LAYERS).computations["body"]
    start = body.by_name["all-to-all-start"]
    assert start.opcode == "all-to-all-start"
    assert start.operands == ("x",)
    assert start.result_bytes == 2 * ROWS  # operand and result
    assert start.attribute("replica_groups") == "mesh['data'=1,'node'=2,'gpu'=8] {'node','gpu'}"
    assert start.numbers("dimensions") == (0,)
    assert start.op_name == "jit(step)/while/body/dispatch"
    assert start.attribute("split") is None
    assert body.by_name["gemm_fusion"].called("calls") == "gemm"
    assert body.by_name["conditional"].attribute("branch_computations") == "{%keep, %expert}"
    assert body.by_name["one"].text == "1"
    assert body.by_name["one"].op_name == ""
    assert body.root.operands == ("next", "combine", "w1", "w2", "store_fusion")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module @jit_step {", "expected the text of a compiled program"),
        (LAYERS.replace(", is_scheduled=true", ""), "is_scheduled=true"),
        (LAYERS.replace("ENTRY ", ""), "expected an ENTRY computation"),
        (LAYERS.replace("ROOT %permuted", "%permuted"), "computation main has no ROOT"),
    ],
)
def test_another_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_module(text)
