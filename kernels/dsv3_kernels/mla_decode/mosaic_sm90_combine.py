"""Parts of attention put together on Hopper: a row of the output, one program.

    program: one warpgroup, 4 of the 512 columns a thread
      for some of the request's parts at once: read their m, l and output
      out = out * 2^(old m - m) + part * 2^(its m - m), l likewise
      out / l, and the log-sum-exp -> memory

Bound: memory's latency. All parts of a request are asked for at once where it has no more than its
fair share of them, else 16 of them at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from dsv3_kernels.mla_decode.reference import LOG2_E
from dsv3_kernels.mla_decode.schedule import Schedule
from dsv3_kernels.mla_decode.tiles import LOWEST

MOST_AT_ONCE = 16


def combine(
    parts: Float[Array, "slots filled_rows v_dim"],
    stats: Float[Array, "slots two filled_rows"],
    cuts: Schedule,
    rows: int,
) -> tuple[Float[Array, "batch rows v_dim"], Float[Array, "batch rows"]]:
    """The output and the log-sum-exp of all parts of each request; 0 and -inf of none."""
    batch, v_dim = cuts.origins.shape[0], parts.shape[-1]
    at_once = min(MOST_AT_ONCE, cuts.requests.shape[0] // batch + 2)
    return plgpu.kernel(
        functools.partial(_kernel, at_once),
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, v_dim), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, rows), jnp.float32),
        ),
        grid=(rows, batch),
        grid_names=("row", "request"),
        kernel_name="mla_decode_combine",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(parts, stats, cuts.origins, cuts.ends, cuts.size)


def _kernel(at_once, parts, stats, origins, ends, size, out, lse):
    row, b = map(lax.axis_index, ("row", "request"))
    v_dim = parts.shape[-1]
    layout = plgpu.Layout.WG_STRIDED((v_dim,), vec_size=4)
    first = lax.div(origins[b], size[0])
    last = lax.div(ends[b] - 1, size[0])
    count = jnp.where(origins[b] < ends[b], last - first + 1, 0)

    def read(i):
        slot = b + first + lax.min(i, count - 1)
        part = plgpu.load(parts.at[slot, row], layout=layout, optimized=False)
        return jnp.where(i < count, stats[slot, 0, row], LOWEST), stats[slot, 1, row], part

    def add(turn, carry):
        total, largest, mixed = carry
        read_parts = [read(turn * at_once + i) for i in range(at_once)]
        raised = largest
        for of_part, _, _ in read_parts:
            raised = jnp.maximum(raised, of_part)
        shrink = jnp.exp2(largest - raised)
        total, mixed = total * shrink, mixed * shrink
        for of_part, weight, part in read_parts:
            share = jnp.exp2(of_part - raised)
            total, mixed = total + weight * share, mixed + part * share
        return total, raised, mixed

    zeros = plgpu.layout_cast(jnp.zeros((v_dim,), jnp.float32), layout)
    start = jnp.float32(0), jnp.float32(LOWEST), zeros
    turns = lax.div(count + (at_once - 1), at_once)
    total, largest, mixed = lax.fori_loop(0, turns, add, start)
    seen = total > 0
    out[b, row] = (mixed * jnp.where(seen, 1 / total, 0.0)).astype(jnp.bfloat16)
    lse[b, row] = jnp.where(seen, (largest + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)
