"""Weak-scaling efficiency on many GPUs, from bytes and assumed rates: a projection, no measurement.

A step is followed part by part. The device computes; the network carries one collective at a time,
beside the computation. A ring of n devices takes, for S bytes,

    all-gather, reduce-scatter    hops of the ring + S (n - 1) / n / rate
    all-reduce                    2 ceil(log2 n) hops + 2 S (n - 1) / n / rate

(Thakur, Rabenseifner and Gropp 2005, IJHPCA 19; no algorithm sends fewer bytes: Patarasuk and Yuan
2009, JPDC 69. The all-reduce goes by trees as NCCL's does between nodes, so its latency grows with
log2 n; a ring's grows with n.) Everything is spread over all n devices, in one group.

DDP (Li et al. 2020, VLDB 13) all-reduces float32 gradients in buckets of 25 MiB while the backward
pass goes on: 2 x 4 bytes per parameter, all of them in two thirds of the step. FSDP2 (Zhao et al.
2023, VLDB 16) gathers every unit's weights in the forward pass and again in the backward pass, each
while the unit before is computed, and then scatters its float32 gradients: (2 + 2 + 4) bytes per
parameter with bfloat16 weights, as many as DDP, of which a quarter is in the forward pass;
(4 + 4 + 4) in float32, 1.5 times as many (Rajbhandari et al. 2020, ZeRO, section 7).
"""

import math
from dataclasses import dataclass

BUCKET_BYTES = 25 * 2**20  # of torch's DistributedDataParallel
_FORWARD = 1 / 3  # of a step's matrix products


@dataclass(frozen=True)
class Cluster:
    """within, between: bytes per second that a ring carries through the devices of a node, and
    through all network adapters of one; hop_*: seconds of latency from a device to the next."""

    devices_per_node: int
    within: float
    between: float
    hop_within: float
    hop_between: float

    def rate(self, count: int) -> float:
        return self.within if count <= self.devices_per_node else min(self.within, self.between)

    def gather(self, size: float, count: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size` bytes in all: a ring goes through
        all devices of a node before it leaves it."""
        crossings = math.ceil(count / self.devices_per_node) - 1
        latency = (count - 1 - crossings) * self.hop_within + crossings * self.hop_between
        return latency + ring_bytes(size, count) / self.rate(count)

    def all_reduce(self, size: float, count: int) -> float:
        """Seconds of an all-reduce: a tree of nodes, whose root is their first devices'."""
        crossings = math.ceil(math.log2(math.ceil(count / self.devices_per_node)))
        inside = math.ceil(math.log2(min(count, self.devices_per_node)))
        latency = 2 * (inside * self.hop_within + crossings * self.hop_between)
        return latency + 2 * ring_bytes(size, count) / self.rate(count)


@dataclass(frozen=True)
class Step:
    """seconds: of computation alone on one device. units: parts that FSDP gathers at a time.

    weight_bytes: of a gathered weight, 2 for bfloat16. overhead: bytes that are really handed to
    the collectives over the least there is.
    """

    seconds: float
    parameters: float
    units: int
    weight_bytes: int = 2
    overhead: float = 1.0


def ring_bytes(size: float, count: int) -> float:
    """Bytes that each of `count` devices sends in an all-gather or a reduce-scatter."""
    return size * (count - 1) / count


def ddp_bytes(step: Step, count: int) -> float:
    """Bytes that a device sends per step."""
    return 2 * ring_bytes(4 * step.parameters, count) * step.overhead


def fsdp_bytes(step: Step, count: int) -> float:
    return ring_bytes((2 * step.weight_bytes + 4) * step.parameters, count) * step.overhead


def pass_seconds(parts: int, compute: float, *, gather: float, scatter: float) -> float:
    """Seconds of a pass over `parts` equal parts, all times being those of one part.

    A part is computed once it is gathered; the next one is gathered from then on; what is scattered
    follows the computation. The network does one thing at a time.
    """
    network = device = 0.0
    gathered = network = gather
    for part in range(parts):
        start = max(device, gathered if gather else 0.0)
        if gather and part < parts - 1:
            network = gathered = max(network, start) + gather
        device = start + compute
        if scatter:
            network = max(network, device) + scatter
    return max(device, network)


def ddp_efficiency(step: Step, cluster: Cluster, count: int) -> float:
    size = 4 * step.parameters * step.overhead
    buckets = math.ceil(size / BUCKET_BYTES)
    backward = pass_seconds(
        buckets,
        (1 - _FORWARD) * step.seconds / buckets,
        gather=0.0,
        scatter=cluster.all_reduce(size / buckets, count),
    )
    return step.seconds / (_FORWARD * step.seconds + backward)


def fsdp_efficiency(step: Step, cluster: Cluster, count: int) -> float:
    unit = step.parameters * step.overhead / step.units
    gather = cluster.gather(step.weight_bytes * unit, count)
    scatter = cluster.gather(4 * unit, count)
    compute = step.seconds / step.units
    forward = pass_seconds(step.units, _FORWARD * compute, gather=gather, scatter=0.0)
    backward = pass_seconds(step.units, (1 - _FORWARD) * compute, gather=gather, scatter=scatter)
    return step.seconds / (forward + backward)


def table(step: Step, cluster: Cluster, counts: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Efficiency by strategy and number of devices."""
    kinds = {"ddp": ddp_efficiency, "fsdp2": fsdp_efficiency}
    return {
        name: {str(count): round(efficiency(step, cluster, count), 3) for count in counts}
        for name, efficiency in kinds.items()
    }
