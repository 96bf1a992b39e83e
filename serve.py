"""`python serve.py CHECKPOINT [--port P] [--set serve.field=value ...]` is `dsv3 serve`."""

import sys

from dsv3_jax.cli import run

if __name__ == "__main__":
    sys.exit(run(["serve", *sys.argv[1:]]))
