"""Programs of these tests are compiled quickly and run slowly: most run once."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """XLA's backend without its optimizations, in this process and in those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
