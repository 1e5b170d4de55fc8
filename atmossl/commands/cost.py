"""`atmossl info` of a training run that has not begun: estimates what it will cost, before it takes
a device."""

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from atmossl.batch import PRIMARY, Batch, StreamSpec, StreamWindow, collate_views
from atmossl.build import apply_lora, build_model, build_objective, optimizer_settings
from atmossl.commands.common import plain
from atmossl.data.store import entries_of, open_records, paired
from atmossl.masking.views import make_views
from atmossl.model.network import Network, device_memory
from atmossl.objectives.base import Objective
from atmossl.schema import TrainConfig, device_for, parse
from atmossl.training.cost import StepCost, measure_step
from atmossl.training.optimizer import freeze, make_optimizer, named_parameters
from atmossl.training.recompute import recompute
from atmossl.training.throughput import matmul_rate

_STEP_HOURS = 6.0  # any: a cost does not depend on it
_GPU_SHARE = 0.9  # of its memory for tensors; the rest is its runtime's, and fragments
# Of tensors: what malloc keeps of those that were freed. It holds on to blocks of up to 32 MiB, and
# those of one layer do not fit the holes of another (measured by benchmarks.scaling)
_HOST_HOLDS = 1.8


def show_estimate(values: Mapping[str, Any], memory_gib: float | None, *, check: bool) -> None:
    """Print what a training run will cost on each device.

    memory_gib: of one device; None takes the GPU that is visible here, or this machine's.
    Raises:
        ValueError: `check`, and the run does not fit; with advice.
    """
    config: TrainConfig = parse(TrainConfig, plain(values))
    accelerator, here = config.trainer.accelerator, torch.cuda.is_available()
    on_host = accelerator == "cpu" or (accelerator == "auto" and not here and memory_gib is None)
    costs = estimate(config, on_host=on_host)
    cost, memory = costs.cost, memory_gib or device_memory() / 2**30
    table = Table("what", "value", show_header=False)
    rows = {f"parameters of {part}": f"{count:,}" for part, count in cost.parameters.items()}
    rows["parameters"] = f"{sum(cost.parameters.values()):,}"
    rows |= {f"tokens per sample, {name}": f"{count:,}" for name, count in costs.tokens.items()}
    rows["hidden share of tokens"] = f"{costs.hidden_share:.2f}"
    samples = config.trainer.accumulate * costs.batch_size * costs.num_devices
    rows["samples per step"] = f"{samples} on {costs.num_devices} devices"
    rows["FLOPs per sample"] = f"{cost.flops / costs.batch_size:.4g}"
    rows["FLOPs per step"] = f"{cost.flops / costs.batch_size * samples:.4g}"
    kinds = {
        "weights": cost.weights,
        "averaged weights": cost.averaged,
        "optimiser": cost.optimizer,
        "gradients": cost.gradients,
        "activations": cost.activations,
    }
    rows |= {f"{kind}, unsharded": _gib(size) for kind, size in kinds.items()}
    rows[f"tensors per device, {config.trainer.strategy}"] = _gib(costs.device_bytes)
    holder = "process with its libraries" if on_host else "device with its runtime"
    rows[f"memory of a {holder}"] = _gib(costs.process_bytes)
    rows["there is"] = f"{memory:.1f} GiB"
    if memory_gib is None:  # the device that is asked about is this one
        speed = 0.5 * _matmul_rate(config) / cost.flops * costs.batch_size
        rows["samples/s per device at half this device's rate"] = f"{speed:.3g}"
        rows["data rate per device then"] = f"{speed * costs.bytes_per_sample / 2**20:.3g} MiB/s"
    for key, value in rows.items():
        table.add_row(key, value)
    Console(markup=False).print(table)
    needs = f"needs {_gib(costs.process_bytes)} of {memory:.3g} GiB per device"
    if costs.fits(memory):
        Console(markup=False).print(f"fits: {needs}", highlight=False)
        return
    message = f"does not fit: {needs}; try {advice(config, costs, memory)}"
    if check:
        raise ValueError(message)
    Console(markup=False).print(message, highlight=False)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3g} GiB"


def _matmul_rate(config: TrainConfig) -> float:
    device = torch.device(
        device_for(config.trainer.accelerator) if torch.cuda.is_available() else "cpu"
    )
    mixed = config.trainer.precision != "32-true"
    return matmul_rate(device, torch.bfloat16 if mixed else torch.float32)


@dataclass(frozen=True)
class Estimate:
    """The cost of a training run.

    tokens: per sample, by stream. bytes_per_sample: of the fields that a loader reads.
        device_bytes: of tensors at the peak. on_host: whether the device is a CPU.
    """

    cost: StepCost
    tokens: dict[str, int]
    hidden_share: float
    bytes_per_sample: int
    num_devices: int
    device_bytes: int
    batch_size: int
    on_host: bool

    @property
    def process_bytes(self) -> int:
        """The memory of a process: tensors, what the allocator keeps beside them, and the
        runtime. On the host the runtime is measured by this process, which has loaded what a
        training process loads."""
        if self.on_host:
            return resident_bytes() + round(_HOST_HOLDS * self.device_bytes)
        return round(self.device_bytes / _GPU_SHARE)

    def room(self, memory_gib: float) -> float:
        """How many bytes of a device's memory tensors may take."""
        whole = memory_gib * 2**30
        return (whole - resident_bytes()) / _HOST_HOLDS if self.on_host else _GPU_SHARE * whole

    def fits(self, memory_gib: float) -> bool:
        return self.device_bytes <= self.room(memory_gib)


def resident_bytes() -> int:
    """The most memory that this process has held so far. Linux tells of the process alone in /proc;
    what `getrusage` tells counts the memory of the parent that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def estimate(config: TrainConfig, *, on_host: bool = False) -> Estimate:
    """Estimate the cost of a run by one step with tensors that have shapes but no values.

    on_host: whether it will run on a CPU; its tensors are the same.
    Raises:
        ValueError: `data.window` asks for the whole grid of a store that cannot be opened, or a
            stream's own data cannot.
    """

    def build() -> tuple[Network, Objective]:
        model = build_model(config, {})
        apply_lora(config, model)
        objective = build_objective(config, {}, model)
        settings = optimizer_settings(config, model.ends)
        freeze(named_parameters(model, objective), settings.freeze, only=settings.only)
        recompute(model, config.trainer.recompute)
        return model, objective

    batch = sample_batch(config)
    cost = measure_step(
        build,
        lambda network, objective: make_optimizer(
            network, objective, optimizer_settings(config, network.ends), fused=True
        ),
        batch,
        precision=config.trainer.precision,
    )
    devices = config.trainer.num_devices
    shards = devices if config.trainer.strategy == "fsdp" else 1
    share = 0.5 if config.trainer.precision == "bf16-mixed" else 1.0
    streams = batch.views[0].streams  # those of other views have the same shapes
    num_windows = len({view.lag_hours for view in config.objective.views})
    size = config.data.batch_size
    return Estimate(
        cost=cost,
        tokens={s.spec.name: s.corruption[0].numel() for s in streams},
        hidden_share=float(torch.cat([s.hidden.flatten() for s in streams]).float().mean()),
        bytes_per_sample=num_windows * sum(4 * s.target[0].numel() for s in streams),
        num_devices=devices,
        device_bytes=cost.per_device(
            shards,
            share,
            accumulates=config.trainer.accumulate > 1,
            offloads=config.trainer.cpu_offload,
        ),
        batch_size=size,
        on_host=on_host,
    )


def sample_batch(config: TrainConfig) -> Batch:
    """A batch of the configured size with masks drawn as in training and fields of zeros."""
    shapes = _window_shapes(config)
    views = []
    for number in range(config.data.batch_size):
        windows = tuple(
            window_of_zeros(spec, *shape) for spec, shape in zip(config.specs, shapes, strict=True)
        )
        rng = np.random.default_rng([config.seed, number])
        specs, guess = config.objective.views, config.data.first_guess
        views.append(
            make_views([windows] * len(specs), specs, config.masking, rng, first_guess=guess)
        )
    return collate_views(views, list(range(len(views))))


def _window_shapes(config: TrainConfig) -> list[tuple[int, int, int]]:
    """The points (time, lat, lon) of every stream's window. Stores are opened only if they
    determine the shape."""
    window = config.data.window
    if window.lat and window.lon and {spec.data for spec in config.specs} == {PRIMARY}:
        return [(window.time, window.lat, window.lon)] * len(config.specs)
    entries = entries_of(config.specs, config.data.name, config.data.catalog)
    records = open_records(config.specs, entries, "train")
    segment = paired(records)[0]
    return [window.on(segment).points(segment, spec) for spec in config.specs]


def window_of_zeros(spec: StreamSpec, num_times: int, num_lat: int, num_lon: int) -> StreamWindow:
    """A window of a stream with plausible coordinates and values of 0, to find shapes."""
    shape = (len(spec.variables), spec.num_levels, num_times, num_lat, num_lon)
    return StreamWindow(
        spec=spec,
        fields=torch.zeros(shape),
        time_hours=torch.arange(num_times, dtype=torch.float64) * _STEP_HOURS,
        level_hpa=torch.tensor(spec.level_values, dtype=torch.float32),
        lat=torch.linspace(-80.0, 80.0, num_lat),
        lon=torch.arange(num_lon) * (360.0 / num_lon),
        weight=torch.ones(num_lat),
    )


def advice(config: TrainConfig, estimated: Estimate, memory_gib: float) -> str:
    """Changes with which a run would fit, cheapest first."""
    cost, trainer = estimated.cost, config.trainer
    fixed = estimated.device_bytes - cost.activations - cost.batch
    free = estimated.room(memory_gib) - fixed
    per_sample = (cost.activations + cost.batch) / estimated.batch_size
    ways = []
    if trainer.precision == "32-true":
        ways.append("trainer.precision=bf16-mixed")
    if trainer.recompute != "full":
        ways.append("trainer.recompute=full")
    if free >= per_sample and estimated.batch_size > 1:
        size = int(free // per_sample)
        factor = -(-estimated.batch_size // size) * trainer.accumulate
        ways.append(f"data.batch_size={size} trainer.accumulate={factor}")
    if trainer.strategy != "fsdp":
        ways.append("trainer.strategy=fsdp on several devices")
    elif free < per_sample:
        if not trainer.cpu_offload:
            ways.append("trainer.cpu_offload=true")
        ways.append(f"more than {estimated.num_devices} devices")
    ways.append("a smaller model or window")
    return "; or ".join(ways)
