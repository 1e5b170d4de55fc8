"""Samples per second, FLOP/s and memory of one training step against this device's ceiling.

    python -m benchmarks.train_step model=small stream=atmosphere
    python -m benchmarks.train_step --reference
    python -m benchmarks.train_step --zeros experiment=atmorep_temperature \\
        trainer.precision=bf16-mixed trainer.compile=true data.batch_size=8

The step is that of `atmossl train` with the same overrides: its optimiser, precision, compiled
blocks and forgotten activations. `matmul_fraction`: floating-point operations of the matrix
products that a step needs, none done anew, over those of one large product in the same time; on a
GPU this is the model FLOPs utilisation. `nominal_fraction`: over the dense bfloat16 rate that the
maker states, for the GPUs whose rate is known here. `data_wait_share`: of the time of steps fed by
the loader.
`memory_estimate_over_peak` (GPUs; `benchmarks.scaling` has it for CPUs): the cost estimate,
without averaged weights, over what the allocator held. `top_costs`: shares of a step's time.
With --zeros fields are 0 and no store is read, nor a loader timed.

With --reference also against the same network written plainly (`benchmarks.reference_step`), at
AtmoRep's token size and a width of 256: one field, and three coupled ones. On a CPU these times are
CPU seconds of the process, the least of several steps taken in turns, so that other processes on
the machine do not count. Figures in bfloat16 are left out on a CPU that has none.

And against AtmoRep's public code, which was timed elsewhere: in float32 on two cores it took 1.4
samples/s for one field with 8.4 M parameters and 0.4 for three with 26 M, where a large product ran
at 142 GFLOP/s in float32 and 410 in bfloat16. `samples_per_s_vs_atmorep_at_equal_ceiling` is the
ratio of samples per FLOP/s of such a product, in bfloat16 against its float32 step on its own
machine with the other ceiling. Tokens are equal (1080 per field, 3 x 18 x 18 values each) and
parameters nearly (the figures say how many); the layers are this package's, a separate
cross-attention for every pair of streams among them, and so are the masks, which hide 0.39.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from atmossl.batch import Batch
from atmossl.build import apply_lora, build_data, build_model, build_objective, optimizer_settings
from atmossl.commands.cost import estimate, resident_bytes, sample_batch
from atmossl.composition import compose_with_tasks
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Network, half_is_fast
from atmossl.objectives.base import Objective
from atmossl.schema import TrainConfig, parse
from atmossl.training.optimizer import make_optimizer
from atmossl.training.recompute import recompute
from atmossl.training.throughput import flop_counter, model_flops
from benchmarks.reference_step import PlainLoss, unfused
from benchmarks.report import finish

_FIELDS = {"": "atmorep_temperature", "_three_fields": "atmorep_three_fields"}
_SIZES = (
    "experiment=atmorep_temperature", "paths.output=unused", "data.batch_size=1",
    "model.dim=256", "model.num_layers=4", "model.num_decoder_layers=4", "model.num_heads=8",
    "model.num_members=16", "model.feedforward_ratio=2.0",
)  # fmt: skip
_ATMOREP_SAMPLES_PER_S = {"": 1.4, "_three_fields": 0.4}
_ATMOREP_CEILING = {torch.float32: 142e9, torch.bfloat16: 410e9}
_ATMOREP_SIZES = {  # those that come nearest to its numbers of parameters, from above
    "": ("model.num_decoder_layers=3", "model.feedforward_ratio=1.0"),
    "_three_fields": (
        "model.num_layers=2", "model.num_decoder_layers=3", "model.feedforward_ratio=1.0",
    ),
}  # fmt: skip
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}
_SIDE = 2048  # of the matrices whose product is the ceiling on a CPU
_WARMUP = 3
_NOMINAL_FLOPS_PER_S = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # SXM, dense bfloat16
_PRODUCTS = 500  # on a GPU, whose clock falls under load: as long as the steps take
_NAME = 80  # characters of a kernel's name; some go on with types, in the hundreds


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Time of a call: on a GPU the mean of calls that do not wait for each other, else the median.
    The first calls warm up."""
    if device.type == "cuda":
        for _ in range(_WARMUP):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    size, repeats = (8192, _PRODUCTS) if device.type == "cuda" else (_SIDE, 5)
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds(lambda: a @ a, device, repeats)


def configuration(overrides: Sequence[str]) -> TrainConfig:
    values = compose_with_tasks("train", ["paths.output=unused", *overrides])
    values.pop("hydra", None)
    return parse(TrainConfig, values)


def stepper(
    model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> Callable[[Batch], None]:
    """One optimiser step on a batch; gradients of float16 are scaled."""

    def step(batch: Batch) -> None:
        device = batch.sample_id.device.type
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = objective(model, batch).total
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    scaler = torch.amp.GradScaler(enabled=dtype == torch.float16)
    return step


def training_step(
    model: nn.Module, objective: Objective, batch: Batch, dtype: torch.dtype, *, fused: bool
) -> Callable[[], None]:
    """One step of AdamW; `fused` as its kernel."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=fused, foreach=False)
    return partial(stepper(model, objective, optimizer, dtype), batch)


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
        model = build_model(config, {}).to(device)
        objective = build_objective(config, {}, model)
        assert isinstance(model, Multiformer)
        plain, plain_loss = unfused(model), PlainLoss(losses=config.objective.arguments["losses"])
        with torch.no_grad():
            pairs = zip(model(batch.views[0]).streams, plain(batch.views[0]).streams, strict=True)
            for fused_stream, plain_stream in pairs:
                torch.testing.assert_close(
                    fused_stream.members, plain_stream.members, rtol=1e-3, atol=1e-4
                )
        single = torch.float32
        square = torch.randn(_SIDE, _SIDE, device=device)
        reference = training_step(plain, plain_loss, batch, single, fused=False)
        with flop_counter() as counter:  # of the products that are needed, none done anew
            reference()
        steps = {
            "product": partial(torch.mm, square, square),
            "reference": reference,
            "fp32": training_step(model, objective, batch, single, fused=True),
        }
        if half_is_fast(device):
            steps["bf16"] = training_step(model, objective, batch, torch.bfloat16, fused=True)
        times = in_turns(steps, repeats)
        if "bf16" in times:
            figures |= {
                f"speedup_bf16_vs_reference{suffix}": round(times["reference"] / times["bf16"], 3),
                f"speedup_bf16_vs_fp32{suffix}": round(times["fp32"] / times["bf16"], 3),
                f"reference_size_seconds_bf16{suffix}": round(times["bf16"], 3),
            }
        figures |= {
            f"speedup_vs_reference{suffix}": round(times["reference"] / times["fp32"], 3),
            f"reference_size_matmul_fraction_fp32{suffix}": round(
                counter.get_total_flops() / times["fp32"] / (2 * _SIDE**3 / times["product"]), 4
            ),
            f"reference_parameters{suffix}": sum(p.numel() for p in model.parameters()),
            f"reference_size_seconds_fp32{suffix}": round(times["fp32"], 3),
        }
    return figures


def against_atmorep(device: torch.device, repeats: int) -> dict[str, Any]:
    """Samples per FLOP/s of a large product, over those of AtmoRep's public code."""
    figures: dict[str, Any] = {}
    for suffix, stream in _FIELDS.items():
        config = configuration([*_SIZES, f"stream={stream}", *_ATMOREP_SIZES[suffix]])
        batch = sample_batch(config).to(device)
        model = build_model(config, {}).to(device)
        objective = build_objective(config, {}, model)
        for dtype, ceiling in _ATMOREP_CEILING.items():
            if dtype == torch.bfloat16 and not half_is_fast(device):
                continue
            square = torch.randn(_SIDE, _SIDE, device=device, dtype=dtype)
            times = in_turns(
                {
                    "product": partial(torch.mm, square, square),
                    "step": training_step(model, objective, batch, dtype, fused=True),
                },
                repeats,
            )
            theirs = _ATMOREP_SAMPLES_PER_S[suffix] / ceiling
            ours = times["product"] / times["step"] / (2 * _SIDE**3)
            kind = "_bf16" if dtype == torch.bfloat16 else ""
            key = f"samples_per_s_vs_atmorep_at_equal_ceiling{kind}{suffix}"
            figures[key] = round(ours / theirs, 3)
        size = sum(p.numel() for p in model.parameters())
        figures[f"atmorep_size_parameters{suffix}"] = size
    return figures


def top_costs(step: Callable[[], object], device: torch.device, count: int = 8) -> dict[str, float]:
    """Shares of a step's time that the costliest kernels take, or operations on a CPU."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in recorded.key_averages():
        if not on_gpu:
            spent = event.self_cpu_time_total
        elif event.device_type.name == "CUDA" and not event.is_user_annotation:
            spent = event.self_device_time_total
        else:
            continue
        name = event.key[:_NAME]
        times[name] = times.get(name, 0.0) + spent
    total = sum(times.values())
    costly = sorted(times, key=lambda name: -times[name])[:count]
    return {name: round(times[name] / total, 4) for name in costly}


def waiting_share(
    loader: Iterable[Batch], step: Callable[[Batch], None], device: torch.device, count: int
) -> float:
    """Of the time of `count` steps, the part in which the next batch was not there."""
    batches, waited = iter(loader), 0.0
    step(next(batches).to(device))
    started = time.perf_counter()
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize()
    return waited / (time.perf_counter() - started)


def from_data(config: TrainConfig) -> tuple[Iterable[Batch], dict[str, torch.Tensor]]:
    """The run's own loader, and the scales of its streams."""
    datamodule, stats = build_data(config)
    datamodule.trainer = SimpleNamespace(  # type: ignore[assignment]  # what the loader asks for
        global_rank=0, world_size=1, global_step=0, accumulate_grad_batches=1
    )
    scales = {spec.name: stats[spec.data].residual_scale(spec) for spec in config.specs}
    return datamodule.train_dataloader(), scales


def step_of_run(
    config: TrainConfig, scales: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[Network, Callable[[Batch], None]]:
    """The model of a run and its optimiser step."""
    model = build_model(config, scales)
    apply_lora(config, model)
    recompute(model.to(device), config.trainer.recompute)
    dtype = _DTYPES[config.trainer.precision]
    fused = dtype != torch.float16
    objective, settings = build_objective(config, scales, model), optimizer_settings(config)
    optimizer = make_optimizer(model, objective, settings, fused=fused)
    return model, stepper(model, objective, optimizer, dtype)


def needed_flops(
    model: nn.Module, step: Callable[[], object], batch: Batch, dtype: torch.dtype
) -> int:
    """Of the matrix products of a step: those that it does, or three times those of its forward
    pass where it does some anew."""
    with flop_counter() as counter, torch.compiler.set_stance("force_eager"):
        step()
    device = batch.sample_id.device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        forward = sum(model_flops(model, view) for view in batch.views)
    return min(forward, counter.get_total_flops())


def of_run(
    config: TrainConfig, device: torch.device, repeats: int, *, zeros: bool
) -> dict[str, Any]:
    """Figures of a run's step."""
    loader, scales = (None, {}) if zeros else from_data(config)
    batch = sample_batch(config) if loader is None else next(iter(loader))
    batch, dtype = batch.to(device), _DTYPES[config.trainer.precision]
    model, any_step = step_of_run(config, scales, device)
    step = partial(any_step, batch)
    flops = needed_flops(model, step, batch, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step_seconds = seconds(step, device, repeats)
    peak = peak_bytes(device)
    ceiling = matmul_ceiling(device, dtype)
    figures = {
        "samples_per_s": round(len(batch.sample_id) / step_seconds, 3),
        "tokens_per_s": round(num_tokens(batch) / step_seconds, 1),
        "flops_per_s": round(flops / step_seconds),
        "matmul_ceiling_flops_per_s": round(ceiling),
        "matmul_fraction": round(flops / step_seconds / ceiling, 4),
        "peak_memory_mib": round(peak / 2**20),
        "parameters": sum(p.numel() for p in model.parameters()),
        "top_costs": top_costs(step, device),
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for card, nominal in _NOMINAL_FLOPS_PER_S.items():
            if card in name and dtype == torch.bfloat16:
                figures["nominal_fraction"] = round(flops / step_seconds / nominal, 4)
        cost = estimate(config).cost
        figures["memory_estimate_over_peak"] = round((cost.peak + cost.batch) / peak, 3)
    if loader is not None:
        share = waiting_share(loader, any_step, device, 4 * repeats)
        figures["data_wait_share"] = round(share, 4)
    return figures


def num_tokens(batch: Batch) -> int:
    return sum(s.corruption.numel() for view in batch.views for s in view.streams)


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors held on a GPU; of a CPU's process, libraries included."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--zeros", action="store_true")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configuration(arguments.overrides)
    figures = of_run(config, device, arguments.repeats, zeros=arguments.zeros)
    figures["overrides"] = arguments.overrides
    if arguments.reference:
        figures |= against_reference(device, arguments.repeats)
        figures |= against_atmorep(device, arguments.repeats)
    finish("train_step", figures)


if __name__ == "__main__":
    main()
