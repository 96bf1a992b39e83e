"""The bench of kernels: what it prints and writes of what it is told was compiled."""

import json

import pytest

from dsv3_jax.plan import bench_kernels
from dsv3_jax.plan.bench_kernels import BEGIN, END, as_objects, bench_static, markdown, write_table
from dsv3_kernels.bench import OPS, PEAK, Case, StaticReport, all_cases
from dsv3_kernels.published import Comparison
from dsv3_kernels.sass import Kernel, Loop

LOOP = Loop(instructions={"QGMMA": 4, "FFMA": 96}, tensor_cycles=384.0, operand_bytes=32768)
KERNEL = Kernel(
    registers=168,
    spilled_bytes=0,
    shared_memory_bytes=216064,
    instructions={"QGMMA": 8, "UTMALDG": 4, "UTMASTG": 3, "FFMA": 200},
    main_loop=LOOP,
)


def report(**changes) -> StaticReport:
    case = Case(
        op="fp8_gemm",
        name="o_proj forward",
        run=lambda: None,
        make=lambda key: (),
        unit="fp8",
        work=PEAK["fp8"] / 1000,
        predict=lambda kernels: {},
    )
    shares = {"tiles": 0.9, "tiles' costs": 0.5}
    return StaticReport(case=case, kernels=[KERNEL], shares=shares, **changes)


def test_a_report_predicts_by_its_hardest_limit():
    assert (report().limit, report().share) == ("tiles' costs", 0.5)
    assert report().microseconds == pytest.approx(2000)  # a millisecond of work at half the peak


def test_what_json_has_of_a_kernel():
    [found] = as_objects([report()])
    assert json.loads(json.dumps(found)) == found
    assert (found["op"], found["case"], found["unit"]) == ("fp8_gemm", "o_proj forward", "fp8")
    assert found["share"] == 0.5 and found["shares"]["tiles"] == 0.9
    [kernel] = found["compiled"]
    assert (kernel["registers"], kernel["spilled_bytes"]) == (168, 0)
    assert kernel["instructions"]["UTMALDG"] == 4
    assert kernel["main_loop"]["tensor_cycles"] == 384
    assert kernel["main_loop"]["issue_slots"] == 100


def test_a_table_takes_the_old_ones_place(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    published = [Comparison(what="a product", measured=0.5, predicted=0.6)]
    write_table(readme, markdown([report()], published))
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| op |") and text.endswith(f"\n{END}\nafter\n")
    row = "| fp8_gemm | o_proj forward | 50.0% | FP8 | tiles' costs | 168 | 0 | 211 KB | 8 | 7 |"
    assert f"{row} 384 : 100 |\n" in text and "old" not in text
    assert "| a product | 50.0% | 60.0% | +20% |\n" in text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_file_without_a_place_for_the_table_is_refused_before_anything_is_compiled(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(bench_kernels, "compiled", None)
    readme = tmp_path / "README.md"
    readme.write_text("text\n")
    with pytest.raises(ValueError, match=r"README.md has no lines .* expected one of each"):
        bench_static(None, as_json=False, readme=readme)
    with pytest.raises(ValueError, match="--op is 'permute', expected none with --write"):
        bench_static("permute", as_json=False, readme=readme)
    with pytest.raises(ValueError, match="op is 'fly', expected one of quantize, fp8_gemm"):
        bench_static("fly", as_json=False, readme=None)
    assert readme.read_text() == "text\n"


def test_every_op_has_cases_of_its_own():
    names = [(case.op, case.name) for case in all_cases()]
    assert {op for op, _ in names} == set(OPS) and len(set(names)) == len(names)
