"""Samples per second, FLOP/s and memory of one training step against this device's ceiling.

    python -m benchmarks.train_step model=small stream=atmosphere
    python -m benchmarks.train_step --reference

With --reference also against the same network written plainly (`benchmarks.reference_step`), at
AtmoRep's token size and a width of 256: one field, and three coupled ones. On a CPU these times are
CPU seconds of the process, the least of several steps taken in turns, so that other processes on
the machine do not count.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from atmossl.batch import Batch, collate_views
from atmossl.build import build_data, build_model, build_module, build_objective
from atmossl.cli import compose_config
from atmossl.data.windows import SampleKey
from atmossl.objectives.base import Objective
from atmossl.preflight import sample_batch
from atmossl.schema import TrainConfig, parse
from atmossl.training.watch import flop_counter
from benchmarks.reference_step import PlainLoss, unfused
from benchmarks.report import finish

_FIELDS = {
    "": "atmorep_temperature",
    "_three_fields": "atmorep_three_fields",
}
_SIZES = (
    "experiment=atmorep_temperature", "paths.output=unused", "data.batch_size=1",
    "model.dim=256", "model.num_layers=4", "model.num_decoder_layers=4", "model.num_heads=8",
    "model.num_members=16", "model.feedforward_ratio=2.0",
)  # fmt: skip


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


def configuration(overrides: Sequence[str]) -> TrainConfig:
    values = compose_config("train", ["paths.output=unused", *overrides])
    values.pop("hydra", None)
    return parse(TrainConfig, values)


def training_step(
    model: nn.Module, objective: Objective, batch: Batch, dtype: torch.dtype, *, fused: bool
) -> Callable[[], None]:
    """One step of AdamW; `fused` as its kernel."""
    device = batch.sample_id.device
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=fused, foreach=False)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = objective(model, batch).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_turns(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least time of each step."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats + 1):  # the first warms up, and is slower
        for name, step in steps.items():
            on_gpu = torch.cuda.is_available()
            clock = time.perf_counter if on_gpu else time.process_time
            start = clock()
            step()
            if on_gpu:
                torch.cuda.synchronize()
            best[name] = min(best[name], clock() - start)
    return best


def against_reference(device: torch.device, repeats: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for suffix, stream in _FIELDS.items():
        config = configuration([*_SIZES, f"stream={stream}"])
        batch = sample_batch(config).to(device)
        model, objective = build_model(config, {}).to(device), build_objective(config, {})
        plain, plain_loss = unfused(model), PlainLoss(losses=config.objective.losses)
        with torch.no_grad():
            pairs = zip(model(batch.views[0]).streams, plain(batch.views[0]).streams, strict=True)
            for one, two in pairs:
                torch.testing.assert_close(one.members, two.members, rtol=1e-3, atol=1e-4)
        half, single = torch.bfloat16, torch.float32
        square = torch.randn(2048, 2048, device=device)
        reference = training_step(plain, plain_loss, batch, single, fused=False)
        with flop_counter() as counter:  # of the products that are needed, none done anew
            reference()
        times = in_turns(
            {
                "product": partial(torch.mm, square, square),
                "reference": reference,
                "fp32": training_step(model, objective, batch, single, fused=True),
                "bf16": training_step(model, objective, batch, half, fused=True),
            },
            repeats,
        )
        figures |= {
            f"speedup_vs_reference{suffix}": round(times["reference"] / times["fp32"], 3),
            f"speedup_bf16_vs_reference{suffix}": round(times["reference"] / times["bf16"], 3),
            f"speedup_bf16_vs_fp32{suffix}": round(times["fp32"] / times["bf16"], 3),
            f"reference_size_matmul_fraction_fp32{suffix}": round(
                counter.get_total_flops() / times["fp32"] / (2 * 2048**3 / times["product"]), 4
            ),
            f"reference_parameters{suffix}": sum(p.numel() for p in model.parameters()),
            f"reference_size_seconds_fp32{suffix}": round(times["fp32"], 3),
            f"reference_size_seconds_bf16{suffix}": round(times["bf16"], 3),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = configuration(arguments.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    datamodule, stats = build_data(config)
    module = build_module(config, stats, {}).to(device)
    samples = [datamodule.train_set[SampleKey(0, n)] for n in range(config.data.batch_size)]
    views, ids = zip(*samples, strict=True)
    batch = collate_views(list(views), list(ids)).to(device)
    mixed = config.trainer.precision != "32-true"
    dtype = torch.bfloat16 if mixed else torch.float32
    step = training_step(module.model, module.objective, batch, dtype, fused=True)
    with flop_counter() as counter:
        step()
    flops = counter.get_total_flops()
    step_seconds = seconds(step, device, arguments.repeats)
    ceiling = matmul_ceiling(device, dtype)
    num_tokens = sum(s.corruption.numel() for view in batch.views for s in view.streams)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    figures = {
        "samples_per_s": round(len(samples) / step_seconds, 3),
        "tokens_per_s": round(num_tokens / step_seconds, 1),
        "flops_per_s": round(flops / step_seconds),
        "matmul_ceiling_flops_per_s": round(ceiling),
        "matmul_fraction": round(flops / step_seconds / ceiling, 4),
        "peak_memory_mib": round(peak),
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "overrides": arguments.overrides,
    }
    if arguments.reference:
        figures |= against_reference(device, arguments.repeats)
    finish("train_step", figures)


if __name__ == "__main__":
    main()
