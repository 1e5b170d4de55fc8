"""Predict, as `atmossl predict` does, where a launcher such as srun wants a script."""

import sys

from atmossl.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
