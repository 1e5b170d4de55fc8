"""`atmossl info` of a training run that has not begun: what it will cost."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from atmossl.commands.common import device_for, plain
from atmossl.cost_estimate import advice, estimate
from atmossl.schema import TrainConfig, parse
from atmossl.training.throughput import matmul_rate


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
    cost, memory = costs.cost, memory_gib or _device_memory_gib()
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


def _device_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
