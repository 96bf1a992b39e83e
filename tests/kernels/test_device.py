"""Every kernel at the model's shapes on a Hopper GPU, against its reference, and timed.

Only `pytest -m device` runs these; `-s` shows the times. Nothing of them has run yet: no GPU of the
kind was at hand when they were written.
"""

import jax
import pytest

from dsv3_kernels import bench
from dsv3_kernels.target import is_hopper

LARGEST_ERROR = {"bfloat16": 1e-3, "float32": 1e-5}
"""Relative, in the Frobenius norm; in the worst row four times that."""


@pytest.mark.device
def test_every_kernel_at_full_size():
    cases = bench.all_cases()
    if not is_hopper():
        pytest.skip(f"{len(cases)} cases need a Hopper GPU, this is {jax.devices()[0].device_kind}")
    wrong = []
    for case in cases:
        seconds = bench.timed(case)
        share = case.work / seconds / bench.PEAK[case.unit]
        print(f"{case.op} {case.name}: {1e6 * seconds:.1f} us, {share:.1%} of {case.unit}")
        if case.reference is not None and not has_references_results(case):
            wrong.append(f"{case.op} {case.name}")
    assert not wrong


def has_references_results(case: bench.Case) -> bool:
    arguments = jax.jit(case.make)(jax.random.key(1))
    got = jax.tree.leaves(jax.jit(case.run)(*arguments))
    assert case.reference is not None
    want = jax.tree.leaves(jax.jit(case.reference)(*arguments))
    for mine, theirs in zip(got, want, strict=True):
        if theirs.dtype.name not in LARGEST_ERROR:  # values in 8 bits
            if float((mine == theirs).mean()) < 0.9999:
                return False
            continue
        allowed = LARGEST_ERROR[theirs.dtype.name]
        whole, worst_row = bench.relative_error(mine, theirs)
        if whole > allowed or worst_row > 4 * allowed:
            return False
    return True
