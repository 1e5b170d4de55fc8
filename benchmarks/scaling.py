"""How cost grows: step time with tokens, memory against its estimate, two ranks against one.

    python -m benchmarks.scaling

`step_time_exponent_*`: slope of log time over log tokens from 256 to 4096 tokens, CPU seconds of
the process on one thread (GPU: time). `memory_estimate_over_measured`: the cost estimate's estimate
over the most that tensors take in two steps; `memory_estimate_over_resident`: its estimate of the
whole process over what that holds at most. `weak_efficiency_2_ranks`: time of a step on one rank
with one thread over that of two gloo ranks with one each and twice the batch, by the clock on the
wall, so the machine must be idle. `bytes_over_minimum`: bytes that a rank hands to all-reduce in a
step over those of its gradients. `projection` extends this to many GPUs by assumed rates
(`benchmarks.projection`); it is no measurement.
"""

import argparse
import math
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from queue import Empty
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from atmossl.batch import Batch, StreamSpec, TokenSize, collate_views
from atmossl.build import build_model, build_objective
from atmossl.commands.cost import estimate, resident_bytes, sample_batch, window_of_zeros
from atmossl.masking.base import make_view
from atmossl.masking.random import RandomMasking
from atmossl.model.blocks import Attention
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.masked import MaskedModelling
from benchmarks.projection import Cluster, Step, table
from benchmarks.report import finish
from benchmarks.train_step import configuration, in_turns, training_step

_GRIDS = ((4, 8, 8), (4, 8, 16), (8, 8, 16), (8, 16, 16), (8, 16, 32))  # 1x to 16x tokens
# with the neighbourhood of its convolutions
_KINDS: dict[Attention, int] = {"full": 1, "factorised": 1, "windowed": 1, "temporal": 3}
_RUN = ("experiment=quickstart", "optimizer=adamw", "optimizer.warmup_steps=1", "data.batch_size=4")
_GPUS = (8, 64, 512)
_PROJECTED = ("experiment=arco_large", "trainer.devices=1")
_DEVICE_FLOPS = 4e14  # a recent GPU's in bfloat16, as far as large products reach it
_CLUSTERS = {
    "eight adapters of 400 Gbit/s per node": Cluster(8, 4e11, 8 * 5e10, 1e-6, 5e-6),
    "one adapter of 200 Gbit/s per node": Cluster(8, 4e11, 2.5e10, 1e-6, 5e-6),
}


def tokens_batch(grid: tuple[int, int, int]) -> tuple[StreamSpec, Batch]:
    """One sample of one stream with that many tokens, half of them hidden."""
    spec = StreamSpec("air", ("temperature",), (500,), TokenSize(1, 2, 2))
    window = window_of_zeros(spec, grid[0], 2 * grid[1], 2 * grid[2])
    sampler = RandomMasking((0.5, 0.5), {"mask": 1.0})
    view = make_view((window,), sampler, np.random.default_rng(0))
    return spec, collate_views([(view,)], [0])


def growth(device: torch.device, repeats: int) -> dict[str, Any]:
    """Exponents of step time, and what a step keeps for its backward pass, by kind of attention."""
    figures: dict[str, Any] = {}
    objective = MaskedModelling(losses={"crps": 1.0})
    for kind, kernel_size in _KINDS.items():
        times, saved_bytes = [], []
        for grid in _GRIDS:
            spec, batch = tokens_batch(grid)
            model = Multiformer(
                streams=(spec,), dim=128, num_layers=2, num_decoder_layers=1, num_heads=4,
                num_members=4, attention=kind, kernel_size=kernel_size,
            ).to(device)  # fmt: skip
            step = training_step(model, objective, batch.to(device), torch.float32, fused=True)
            times.append(in_turns({kind: step}, repeats)[kind])
            saved_bytes.append(kept_bytes(step))
        tokens = [math.prod(grid) for grid in _GRIDS]
        slope = np.polyfit(np.log(tokens), np.log(times), 1)[0]
        figures[f"step_time_exponent_{kind}"] = round(float(slope), 3)
        figures[f"step_seconds_{kind}"] = [round(x, 4) for x in times]
        figures[f"kept_mib_{kind}"] = [round(x / 2**20, 1) for x in saved_bytes]
    return figures | {"tokens": [math.prod(grid) for grid in _GRIDS]}


def kept_bytes(step: Callable[[], None]) -> int:
    """Bytes of the tensors that a step saves for its backward pass, each storage once."""
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(seen.values())


def in_process(function: Callable[..., None], *arguments: Any, ranks: int = 1) -> list[Any]:
    """What each of several fresh processes puts into its queue."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    started = [
        context.Process(target=function, args=(queue, rank, ranks, *arguments))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    results = []
    while len(results) < ranks:
        try:
            results.append(queue.get(timeout=1.0))
        except Empty:
            if any(process.exitcode for process in started):
                raise SystemExit("a process of the benchmark failed; see above") from None
    for process in started:
        process.join()
    return results


def estimate_memory(queue: Any, rank: int, ranks: int) -> None:
    """The cost estimate's bytes of tensors and of the process, without averaged weights."""
    del rank, ranks
    cost_estimate = estimate(configuration(_RUN), on_host=True)
    plain = replace(cost_estimate, device_bytes=cost_estimate.cost.peak)
    queue.put((plain.device_bytes, plain.process_bytes))


def measure_memory(queue: Any, rank: int, ranks: int) -> None:
    """The most bytes that torch's tensors take from the model's making to the end of the second
    step, and that the process holds, libraries and freed blocks included."""
    del rank, ranks
    torch.set_num_threads(1)
    config = configuration(_RUN)
    batch = sample_batch(config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_model(config, {})
        objective = build_objective(config, {}, model)
        step = training_step(model, objective, batch, torch.float32, fused=True)
        for _ in range(2):
            step()
    held = resident_bytes()
    events = profiler.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    queue.put((max(_allocated(events)), held))


def _allocated(events: Iterable[Any]) -> Iterator[int]:
    """Bytes held after every allocation."""
    for event in events:
        if event.name == "[memory]":
            yield event.extra_fields.total_allocated
        yield from _allocated(event.children)


def measure_ranks(queue: Any, rank: int, ranks: int, port: int, repeats: int) -> None:
    """Median seconds of a step, and bytes handed to all-reduce over those of the gradients."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    config = configuration(_RUN)
    network = build_model(config, {})
    model = DistributedDataParallel(network, gradient_as_bucket_view=True)
    handed = 0

    def count(state, bucket):  # without types, for torch compares them with its own
        del state
        nonlocal handed
        handed += bucket.buffer().numel() * bucket.buffer().element_size()
        work = dist.all_reduce(bucket.buffer().div_(ranks), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    model.register_comm_hook(None, count)
    batch, objective = sample_batch(config), build_objective(config, {}, network)
    step = training_step(model, objective, batch, torch.float32, fused=True)
    times = []
    for _ in range(repeats + 2):
        handed, start = 0, time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    minimum = sum(4 * p.numel() for p in model.parameters())
    queue.put((statistics.median(times[2:]), handed / minimum))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def projection(bytes_over_minimum: float) -> dict[str, Any]:
    """Weak-scaling efficiency of the large model on nodes of eight GPUs, by network."""
    cost = estimate(configuration(_PROJECTED)).cost
    step = Step(
        seconds=cost.flops / _DEVICE_FLOPS,
        parameters=sum(cost.parameters.values()),
        units=len(cost.units) + 1,  # and the rest
        overhead=bytes_over_minimum,
    )
    return {
        "by_network": {name: table(step, cluster, _GPUS) for name, cluster in _CLUSTERS.items()},
        "assumed": {
            "run": _PROJECTED,
            "device_flops_per_s": _DEVICE_FLOPS,
            "clusters": {name: asdict(cluster) for name, cluster in _CLUSTERS.items()},
        },
        "step": asdict(step),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = growth(device, arguments.repeats)
    ((measured, resident),) = in_process(measure_memory)
    ((tensors, process),) = in_process(estimate_memory)
    figures["memory_estimate_over_measured"] = round(tensors / measured, 3)
    figures["memory_estimate_over_resident"] = round(process / resident, 3)
    repeats = 2 * arguments.repeats
    ((alone, _),) = in_process(measure_ranks, free_port(), repeats)
    together = in_process(measure_ranks, free_port(), repeats, ranks=2)
    figures["weak_efficiency_2_ranks"] = round(alone / max(t for t, _ in together), 3)
    figures["bytes_over_minimum"] = round(together[0][1], 4)
    figures["projection"] = projection(figures["bytes_over_minimum"])
    finish("scaling", figures)


if __name__ == "__main__":
    main()
