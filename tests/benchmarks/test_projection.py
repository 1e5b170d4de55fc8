"""The projected efficiency against closed forms, and its bytes against those that torch hands to
its collectives."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.projection import (
    Cluster,
    Step,
    ddp_bytes,
    ddp_efficiency,
    fsdp_bytes,
    fsdp_efficiency,
    pass_seconds,
)

STEP = Step(seconds=0.3, parameters=1e9, units=50)
SLOW = Cluster(8, within=4e11, between=1.25e10, hop_within=1e-6, hop_between=5e-6)
KINDS = (ddp_efficiency, fsdp_efficiency)


@pytest.mark.parametrize("efficiency", KINDS)
def test_a_network_without_limits_costs_nothing(efficiency) -> None:
    free = Cluster(8, within=math.inf, between=math.inf, hop_within=0.0, hop_between=0.0)
    for count in (2, 8, 512):
        assert efficiency(STEP, free, count) == pytest.approx(1.0)


@pytest.mark.parametrize("efficiency", KINDS)
def test_more_devices_or_a_slower_network_are_never_more_efficient(efficiency) -> None:
    found = [efficiency(STEP, SLOW, count) for count in (8, 16, 64, 512)]
    assert found == sorted(found, reverse=True) and found[-1] < found[0]
    assert efficiency(STEP, replace(SLOW, between=2e10), 64) > found[2]


def test_all_of_the_communication_shows_where_there_is_no_computation() -> None:
    """Seconds of the step are then its bytes over the rate."""
    still, count = replace(STEP, seconds=1e-12), 64
    smooth = replace(SLOW, hop_within=0.0, hop_between=0.0)
    for efficiency, sent in ((ddp_efficiency, ddp_bytes), (fsdp_efficiency, fsdp_bytes)):
        seconds = still.seconds / efficiency(still, smooth, count)
        assert seconds == pytest.approx(sent(still, count) / smooth.between, rel=1e-6)


def test_what_cannot_hide_is_the_ends_or_the_longer_of_both() -> None:
    """A pipeline of equal parts: first in (or last out) and all of the slower one."""
    for compute, talk in ((3.0, 1.0), (1.0, 3.0)):
        expected = max(10 * compute + talk, compute + 10 * talk)
        assert pass_seconds(10, compute, gather=talk, scatter=0.0) == pytest.approx(expected)
        assert pass_seconds(10, compute, gather=0.0, scatter=talk) == pytest.approx(expected)
    assert pass_seconds(10, 5.0, gather=1.0, scatter=2.0) == pytest.approx(1 + 50 + 2)
    assert pass_seconds(10, 0.0, gather=1.0, scatter=2.0) == pytest.approx(30)


def test_as_many_bytes_hide_better_where_a_part_of_them_is_in_the_forward_pass() -> None:
    """DDP and FSDP2 with bfloat16 weights send the same; float32 weights cost half of it more."""
    assert fsdp_bytes(STEP, 64) == ddp_bytes(STEP, 64)
    single = replace(STEP, weight_bytes=4)
    assert fsdp_bytes(single, 64) == 1.5 * ddp_bytes(single, 64)
    smooth = replace(SLOW, hop_within=0.0, hop_between=0.0)
    ddp, fsdp = (efficiency(STEP, smooth, 64) for efficiency in KINDS)
    assert ddp < fsdp
    assert fsdp_efficiency(single, smooth, 64) < fsdp


def test_the_latency_of_rings_grows_with_the_devices_and_that_of_trees_does_not() -> None:
    gather, reduce = SLOW.gather(1.0, 4096), SLOW.all_reduce(1.0, 4096)
    assert gather == pytest.approx((4096 - 512) * 1e-6 + 511 * 5e-6, rel=1e-3)  # of 512 nodes
    assert reduce == pytest.approx(2 * (3 * 1e-6 + 9 * 5e-6), rel=1e-3)


class Counted:
    """Stands for a collective of FSDP, and counts the whole tensor's bytes."""

    def __init__(self, counts: Counter, kind: str) -> None:
        self.counts, self.kind = counts, kind

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, device=device)

    def __call__(self, *tensors: torch.Tensor, **others: Any) -> dist.Work:
        given = [*tensors, *(x for x in others.values() if isinstance(x, torch.Tensor))]
        self.counts[self.kind] += max(x.nbytes for x in given if isinstance(x, torch.Tensor))
        return dist.barrier(async_op=True)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_hands_the_projected_bytes_to_its_collectives(dtype: torch.dtype) -> None:
    """Rank 0 of 8, whose collectives do nothing. Only the root is not gathered a second time."""
    counts, width, layers, ranks = Counter(), 64, 5, 8
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        model = torch.nn.Sequential(
            *(torch.nn.Linear(width, width, bias=False) for _ in range(layers))
        )
        mesh = init_device_mesh("cpu", (ranks,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for part in (*model, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_custom_all_gather(Counted(counts, "gather"))  # type: ignore[arg-type]
                part.set_custom_reduce_scatter(Counted(counts, "scatter"))  # type: ignore[arg-type]
        model(torch.ones(2, width)).float().sum().backward()
        ddp = DistributedDataParallel(torch.nn.Linear(width, width))
        handed = 0

        def hook(state, bucket):  # without types, for torch compares them with its own
            del state
            nonlocal handed
            handed += bucket.buffer().nbytes
            future: torch.futures.Future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        ddp.register_comm_hook(None, hook)
        ddp(torch.ones(2, width)).sum().backward()
        assert handed == 4 * (width**2 + width)
    finally:
        dist.destroy_process_group()
    size = torch.finfo(dtype).bits // 8
    step = Step(seconds=1.0, parameters=layers * width**2, units=layers, weight_bytes=size)
    sent = (counts["gather"] + counts["scatter"]) * (ranks - 1) / ranks
    assert sent == fsdp_bytes(step, ranks)
