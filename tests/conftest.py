"""What every test runs under: the CPU, strict dtype promotion, repeatable property tests.

pytest's jaxtyping option (pyproject.toml) checks the annotations of both packages while they run.
It works on import, so nothing here may import them.
"""

import os

# Before JAX is imported, and in the environment, so that a test's subprocesses run under them too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis

hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")

LONGEST = ("test_layout.py", "test_loop.py", "test_cli.py")
"""Files, which one worker each runs."""


def pytest_collection_modifyitems(items):
    """The longest files first, as no other worker could help with the last."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
