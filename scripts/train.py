"""Train, as `atmossl train` does, where a launcher such as srun or torchrun wants a script."""

import sys

from atmossl.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
