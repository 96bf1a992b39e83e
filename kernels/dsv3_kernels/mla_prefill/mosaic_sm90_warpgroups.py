"""What both backward kernels on Hopper have: buffers, barriers, and how warpgroups take turns."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.mla_prefill.mosaic_sm90 import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    STORE_COLUMNS,
    Plan,
    swizzled,
)
from dsv3_kernels.mla_prefill.tiles import ROWS, V_DIM


def scratch_of(plan: Plan, kept: int, passing: int) -> dict[str, Any]:
    """Buffers and barriers that both kernels have; `kept` and `passing` count copies."""
    stages = plan.tiles.stages
    return dict(
        out_smem=swizzled(2, ROWS, STORE_COLUMNS),
        kept_full=plgpu.Barrier(num_arrivals=kept),
        kept_free=plgpu.Barrier(num_arrivals=2),  # warpgroups
        full=plgpu.Barrier(num_arrivals=passing, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        meeting=plgpu.Barrier(num_arrivals=2),
    )


def run(plan: Plan, warpgroup, program, produce, consume) -> None:
    """All turns of a program, in each of its warpgroups."""

    def consume_all(number: int):
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        turns = plan.turns.count(program)
        lax.fori_loop(0, turns, functools.partial(consume, number), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        lax.fori_loop(0, plan.turns.count(program), produce, jnp.int32(0))

    # A copy of the code for each: where a warpgroup's rows are is then no variable, and takes no
    # registers.
    for number in range(2):
        pl.when(warpgroup == number)(functools.partial(consume_all, number))


def store(values, smem, destination) -> None:
    """`values` [64, columns] to `destination`, 64 columns at a time through `smem`."""
    for first in range(0, values.shape[1], STORE_COLUMNS):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem[...] = values[:, first : first + STORE_COLUMNS].astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, destination.at[:, pl.ds(first, STORE_COLUMNS)])


def read_bytes(plan: Plan) -> int:
    """Of q, kv, k_rope, d_out, lse and delta."""
    return plan.input_bytes + plan.batch * plan.seq * plan.heads * (2 * V_DIM + 2 * 4)
