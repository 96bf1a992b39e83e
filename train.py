"""`python train.py CONFIG [--set section.field=value ...]` is `dsv3 train`."""

import sys

from dsv3_jax.cli import run

if __name__ == "__main__":
    sys.exit(run(["train", *sys.argv[1:]]))
