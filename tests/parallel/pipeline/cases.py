"""Which schedules the tests draw, and the durations of the papers' figures."""

from hypothesis import strategies as st

from dsv3_jax.parallel.pipeline.simulate import Durations

NAMES = ("1f1b", "zb1p", "dualpipe", "dualpipev")
PAPER = Durations(forward=1.0, overlapped=2.5, backward=2.0, weight=1.0)
"""F = W = B - W, as the papers draw their figures."""


@st.composite
def schedule_arguments(draw, names=NAMES, most_stages=10, more_micro_batches=12):
    """(name, stages, micro_batches) that exist, small ones and the least of each included."""
    name = draw(st.sampled_from(names))
    extra = draw(st.integers(0, more_micro_batches))
    if name in ("1f1b", "zb1p"):
        return name, draw(st.integers(1, most_stages)), 1 + extra
    stages = 2 * draw(st.integers(1, most_stages // 2))
    return name, stages, 2 * stages + extra // 2 * 2 if name == "dualpipe" else stages + extra
