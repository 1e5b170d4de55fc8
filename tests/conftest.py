"""Tests run side by side, so each process takes one thread; more would wait for each other."""

import torch

torch.set_num_threads(1)
