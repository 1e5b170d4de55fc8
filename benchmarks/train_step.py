"""Samples per second, FLOP/s and memory of one training step against this device's ceiling.

python -m benchmarks.train_step model=small stream=atmosphere
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from atmossl.build import build_data, build_module
from atmossl.cli import compose_config
from atmossl.data.datamodule import Collate
from atmossl.data.windows import SampleKey
from atmossl.schema import TrainConfig, parse
from benchmarks.report import finish


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after one for warming up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds(lambda: a @ a, device, repeats=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    values = compose_config("train", ["paths.output=unused", *arguments.overrides])
    values.pop("hydra", None)
    config: TrainConfig = parse(TrainConfig, values)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    datamodule, stats = build_data(config)
    module = build_module(config, stats, {}).to(device)
    samples = [datamodule.train_set[SampleKey(0, n)] for n in range(config.data.batch_size)]
    batch = Collate(len(samples))(samples).to(device)
    optimizer = torch.optim.AdamW(module.model.parameters(), 1e-4, fused=True)
    mixed = config.trainer.precision != "32-true"
    dtype = torch.bfloat16 if mixed else torch.float32

    def forward_backward() -> None:
        with torch.autocast(device.type, dtype, enabled=mixed):
            loss = module.objective(module.model, batch).total
        loss.backward()

    def step() -> None:
        forward_backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        forward_backward()
    optimizer.zero_grad()
    flops = counter.get_total_flops()
    step_seconds = seconds(step, device, arguments.repeats)
    ceiling = matmul_ceiling(device, dtype)
    num_tokens = sum(s.corruption.numel() for view in batch.views for s in view.streams)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    finish(
        "train_step",
        {
            "samples_per_s": round(len(samples) / step_seconds, 3),
            "tokens_per_s": round(num_tokens / step_seconds, 1),
            "flops_per_s": round(flops / step_seconds),
            "matmul_ceiling_flops_per_s": round(ceiling),
            "matmul_fraction": round(flops / step_seconds / ceiling, 4),
            "peak_memory_mib": round(peak),
            "parameters": sum(p.numel() for p in module.model.parameters()),
            "overrides": arguments.overrides,
        },
    )


if __name__ == "__main__":
    main()
