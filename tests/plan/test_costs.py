"""FLOPs and bytes of single kernels, by hand."""

import pytest

from dsv3_jax.plan.costs import Cost, instruction_cost
from dsv3_jax.plan.hlo import parse_module
from tests.plan.programs import DOT, HALF, LAYERS, ROWS, WEIGHT


def cost_of(text: str, computation: str, name: str) -> tuple[Cost, tuple[str, ...]]:
    module = parse_module(text)
    where = module.computations[computation]
    return instruction_cost(module, where, where.by_name[name])


def one(lines: str) -> str:
    """A program whose entry has these lines."""
    return f"HloModule one, is_scheduled=true\n\nENTRY %main () -> f32[] {{\n{lines}\n}}\n"


def test_a_fused_product():
    cost, _ = cost_of(LAYERS, "body", "gemm_fusion")
    assert cost == Cost(bf16_flops=DOT, hbm_bytes=ROWS + WEIGHT + HALF)


def test_an_update_in_place_moves_the_update():
    """Its number of a row (4 bytes), the new row read, and the row written; not the ring."""
    assert cost_of(LAYERS, "body", "store_fusion")[0] == Cost(hbm_bytes=4 + HALF + HALF)


def test_a_cublas_call_in_fp8_without_its_workspace():
    cost, _ = cost_of(LAYERS, "expert", "fp8")
    assert cost == Cost(fp8_flops=DOT, hbm_bytes=HALF / 2 + WEIGHT / 2 + 4 + 4 + ROWS)


def test_kernels_of_ours():
    """Their names say what they do; quantising is no product."""
    call = 'custom_call_target="mosaic_gpu_v2"'
    metadata = 'metadata={op_name="jit(step)/jit(fp8_gemm)/cond/fp8_flops=251658240/fp8_gemm"}'
    program = one(f"""  %a = f8e4m3fn[2,256,384] parameter(0)
  %b = f8e4m3fn[2,640,384] parameter(1)
  %a_scale = f32[2,3,256] parameter(2)
  %b_scale = f32[2,3,5] parameter(3)
  %x = bf16[256,384] parameter(4)
  %y = bf16[2,256,640] custom-call(%a, %a_scale, %b, %b_scale), {call}, {metadata}
  ROOT %q = (f8e4m3fn[256,384], f32[3,256]) custom-call(%x), {call}""")
    cost, unknown = cost_of(program, "main", "y")
    operands = 2 * 256 * 384 + 2 * 640 * 384 + 4 * (2 * 3 * 256 + 2 * 3 * 5)
    assert unknown == ()
    assert cost == Cost(fp8_flops=251658240.0, hbm_bytes=operands + 2 * (2 * 256 * 640))
    cost, unknown = cost_of(program, "main", "q")
    assert unknown == ()
    assert cost == Cost(hbm_bytes=2 * 256 * 384 + 256 * 384 + 4 * 3 * 256)


@pytest.mark.parametrize("name", ["state", "x", "branch", "all-to-all-done", "one"])
def test_bookkeeping_is_free(name):
    assert cost_of(LAYERS, "body", name)[0] == Cost()


@pytest.mark.parametrize(
    ("types", "attributes", "unit"),
    [
        (("bf16", "bf16"), "", "bf16_flops"),
        (("f16", "f16"), "", "bf16_flops"),
        (("f8e4m3fn", "f8e5m2"), "", "fp8_flops"),
        (("bf16", "f8e4m3fn"), "", "bf16_flops"),
        (("f32", "f32"), "", "tf32_flops"),
        (("f32", "f32"), ", operand_precision={highest,highest}", "fp32_flops"),
        (("f32", "f32"), ", algorithm=dot_bf16_bf16_f32", "bf16_flops"),
        (("f32", "f32"), ", algorithm=dot_f32_f32_f32", "fp32_flops"),
        (("f64", "f64"), "", "fp32_flops"),
    ],
)
def test_which_unit_multiplies(types, attributes, unit):
    """Batched: 3 products of 4 x 5 by 5 x 6."""
    left, right = types
    text = one(
        f"  %a = {left}[3,4,5]{{2,1,0}} parameter(0)\n"
        f"  %b = {right}[3,5,6]{{2,1,0}} parameter(1)\n"
        "  ROOT %d = f32[3,4,6]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, rhs_batch_dims={0},"
        f" lhs_contracting_dims={{2}}, rhs_contracting_dims={{1}}{attributes}"
    )
    cost, _ = cost_of(text, "main", "d")
    assert getattr(cost, unit) == cost.flops == 2 * 3 * 4 * 5 * 6


def test_slices_count_as_slices():
    text = one(
        "  %all = f32[100,8]{1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n"
        "  ROOT %part = f32[2,8]{1,0} dynamic-slice(%all, %i, %i), dynamic_slice_sizes={2,8}"
    )
    assert cost_of(text, "main", "part")[0].hbm_bytes == 2 * 64


def test_an_unknown_call_is_named():
    text = one(
        "  %a = f32[8]{0} parameter(0)\n"
        '  ROOT %call = f32[8]{0} custom-call(%a), custom_call_target="someones_kernel"'
    )
    assert cost_of(text, "main", "call") == (Cost(hbm_bytes=64), ("someones_kernel",))
