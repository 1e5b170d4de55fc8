"""Measures how fast a run is and what its steps cost: throughput, share of the device's rate,
traces."""

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from atmossl.atomic_files import write_atomically
from atmossl.batch import Batch, View
from atmossl.model.network import AVAILABLE as BY_ONEDNN
from atmossl.model.network import half_is_fast

_COUNTED_BATCHES = 4
PASSES_OF_A_STEP = 3  # forward, and backward that costs two of these in matrix products


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The rate in FLOP/s of a large square matrix product on this device, the best of `repeats`
    tries."""
    size = 8192 if device.type == "cuda" else 1024
    if dtype == torch.bfloat16 and not half_is_fast(device):
        size = 128  # as fast per operation, and over in less than a minute
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    del args, kwargs
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    del args, kwargs
    return sdpa_backward_flop_count(gradient, query, key, value)


def _linear(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    del args, kwargs
    return 2 * math.prod(x) * weight[0]


def flop_counter() -> FlopCounterMode:
    """torch's counter of floating-point operations in matrix products. It knows the fused
    attention of GPUs, but not that of CPUs, nor oneDNN's products."""
    aten: Any = torch.ops.aten
    counted = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    if BY_ONEDNN:
        counted[torch.ops.mkldnn._linear_pointwise] = _linear
    return FlopCounterMode(display=False, custom_mapping=counted)


@torch.no_grad()
def model_flops(model: nn.Module, view: View) -> int:
    """The floating-point operations of a training step's matrix products: forward, plus twice
    that for backward. Activations that are computed again do not count."""
    with flop_counter() as counter, torch.compiler.set_stance("force_eager"):
        model(view)
    return PASSES_OF_A_STEP * counter.get_total_flops()


class Throughput(L.Callback):
    """Logs, since the last log: samples and tokens per second over all devices, `mfu` (model FLOP/s
    over the rate of a large matrix product measured at the start), the share of the time spent
    waiting for data, and the device's memory at its peak.

    FLOPs are the mean of the first batches: masks make batches differ a little.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._start = self._wait_start = self._waited = self._rate = 0.0
        self._samples = self._tokens = 0
        self._flops: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        precision = str(trainer.precision)
        self._rate = matmul_rate(pl_module.device, mixed.get(precision, torch.float32))
        self._restart()

    def _restart(self) -> None:
        self._start = self._wait_start = time.perf_counter()
        self._waited, self._samples, self._tokens = 0.0, 0, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Batch, idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._wait_start
        if len(self._flops) < _COUNTED_BATCHES:
            with trainer.precision_plugin.forward_context():
                self._flops.append(sum(model_flops(pl_module.model, v) for v in batch.views))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, idx: int
    ) -> None:
        ranks = trainer.world_size
        self._samples += len(batch.sample_id) * ranks
        streams = [stream for view in batch.views for stream in view.streams]
        self._tokens += sum(stream.corruption.numel() for stream in streams) * ranks
        self._wait_start = time.perf_counter()
        if (idx + 1) % self.every:
            return
        elapsed = self._wait_start - self._start
        pl_module.log("samples_per_s", self._samples / elapsed, prog_bar=True)
        pl_module.log("tokens_per_s", self._tokens / elapsed)
        flops_per_s = self.every * sum(self._flops) / len(self._flops) / elapsed
        pl_module.log("mfu", flops_per_s / self._rate)
        pl_module.log("data_wait_share", self._waited / elapsed)
        if pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(pl_module.device)
            pl_module.log("gpu_memory_gib", peak / 2**30)
        self._restart()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart()  # validation is no training time


class TraceSteps(L.Callback):
    """Records the batches `first` to `first + count - 1` with torch's profiler, and writes
    `trace-rankN.json` (for ui.perfetto.dev) and `costs-rankN.txt` (the costliest operations)."""

    def __init__(self, folder: Path, *, first: int, count: int) -> None:
        self.folder = folder
        self.first = first
        self.last = first + count - 1
        self._profile: profile | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, idx: int
    ) -> None:
        if idx == self.first:
            activities = [ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, idx: int
    ) -> None:
        recorded = self._profile
        if recorded is None or idx != self.last:
            return
        self._profile = None
        recorded.stop()
        rank = trainer.global_rank
        trace, costs = self.folder / f"trace-rank{rank}.json", self.folder / f"costs-rank{rank}.txt"
        write_atomically(trace, lambda partial: recorded.export_chrome_trace(str(partial)))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=key, row_limit=30)
        write_atomically(costs, lambda partial: partial.write_text(table))
