"""Every tolerance of the tests, with what was measured when it was set.

All are relative to the largest magnitude of the expected array, see `assert_close`. The measured
figures are on two x86 cores; a tolerance is about ten times the measured value.
"""

import numpy as np

FLOAT32_OP = 4e-6
"""One float32 operation (norm, rotation, attention, router, experts) against float64: 4e-7."""
FLOAT32_GRADIENTS_OP = 5e-6
"""Gradients of one float32 operation against float64: 4e-7."""
FLOAT32_LOGITS = 1e-5
"""Hidden states and logits of a whole float32 model against float64: 1.7e-6. The bar is 2e-4."""
FLOAT32_GRADIENTS = 5e-5
"""Gradients of every tensor of a float32 model against float64: 5e-6. The bar is 1e-4."""
BFLOAT16_OP = 2e-2
"""One bfloat16 operation against float64 on the same bfloat16 values: 6e-3."""
BFLOAT16_LOGITS = 5e-2
"""Logits of a tiny bfloat16 model against float64, where rounding tips no choice of experts."""


def assert_close(found, expected, tolerance: float, name: str = "") -> None:
    """Same shape, and max |found - expected| at most `tolerance` times max |expected|."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    if found.size:
        error = float(np.max(np.abs(found - expected)))  # NaN fails the comparison below
        allowed = tolerance * float(np.max(np.abs(expected)))
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"
