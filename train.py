"""`python train.py CONFIG [--set section.field=value ...]` is `dsv3 train`."""

import sys

from dsv3_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
