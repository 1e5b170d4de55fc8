"""Tests run side by side, so each process and those that it starts take one thread; more would wait
for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts the cores

import torch  # noqa: E402

torch.set_num_threads(1)
