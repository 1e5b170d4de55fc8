"""Estimates what a training step costs in memory and operations without running it, from tensors
that have shapes but no values."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.distributed._tools.mem_tracker import _TOTAL_KEY, MemTracker
from torch.utils.hooks import RemovableHandle

from atmossl.batch import Batch
from atmossl.model.network import Network
from atmossl.objectives.base import Objective
from atmossl.training.optimizer import named_parameters
from atmossl.training.throughput import PASSES_OF_A_STEP, flop_counter, model_flops

_device_of: Any = torch.ops.prim.device.default  # what `tensor.device` calls
_aten: Any = torch.ops.aten
_VIEWS = {
    _aten.view.default, _aten._unsafe_view.default, _aten.permute.default, _aten.transpose.int,
    _aten.slice.Tensor, _aten.select.int, _aten.expand.default, _aten.unsqueeze.default,
    _aten.detach.default,
}  # fmt: skip
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class StepCost:
    """The memory of a training step with one device's batch, in bytes, as if nothing were sharded.

    peak: the most that weights, gradients, optimiser states and activations take together.
    gradients_at_peak: their share of it. units: bytes of every part that FSDP gathers at a time.
    """

    parameters: dict[str, int]
    flops: int
    weights: int
    averaged: int
    optimizer: int
    gradients: int
    gradients_at_peak: int
    peak: int
    units: tuple[int, ...]
    batch: int

    @property
    def activations(self) -> int:
        """The bytes at the peak beside weights, gradients and optimiser states."""
        return self.peak - self.weights - self.optimizer - self.gradients_at_peak

    def per_device(
        self,
        num_shards: int,
        bytes_share: float,
        *,
        accumulates: bool = False,
        offloads: bool = False,
    ) -> int:
        """The bytes at the peak if weights, gradients and states are cut into `num_shards`.

        bytes_share: of a gathered weight over a stored one, 0.5 for bfloat16.
        accumulates: whole gradients stay on every device until the last batch of a step.
        offloads: the shards are in the host's memory.
        Two gathered units are there at a time, one in use and one on its way; what belongs to no
        unit stays gathered from the first use on.
        """
        total = self.peak + self.averaged + self.batch
        if num_shards == 1 and not offloads:
            return total
        spread = self.weights + self.averaged + self.optimizer + self.gradients_at_peak
        rest = self.weights - sum(self.units)
        gathered = bytes_share * (rest + 2 * max(self.units, default=0))
        gathered += self.gradients if accumulates else 0
        shard = 0.0 if offloads else spread / num_shards
        return round(total - spread + shard + gathered)


class _Tracker(MemTracker):
    """Notes the peak memory of the whole step alone. torch's own tracker looks at every module
    after every operation, which takes minutes for a model of 100 blocks. It also counts the
    operations of forward passes of the network, which saves a pass that counts them alone."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.passes, self.flops = 0, 0
        self._counts_of, self._in_pass = flop_counter().flop_registry, False
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._in_pass = True

    def _end(self, *_: Any) -> None:
        self._in_pass, self.passes = False, self.passes + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device_of and isinstance(args[0], FakeTensor):  # three of four calls
            return args[0].fake_device
        if func in _VIEWS and self._knows(args[0]):
            return _view(func, args, kwargs or {})
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self._in_pass and func._overloadpacket in self._counts_of:
            count = self._counts_of[func._overloadpacket]
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    def _knows(self, tensor: Any) -> bool:
        """Whether it is a tensor without values whose memory is counted."""
        no_values = isinstance(tensor, FakeTensor) and tensor.constant is None
        return no_values and tensor.untyped_storage() in self._WINFO

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, held in self._curr_mem_snap.items():
            if held[_TOTAL_KEY] > self._peak_mem.get(device, 0):
                self._peak_mem[device] = held[_TOTAL_KEY]
                self._peak_mem_snap[device] = dict(held)


def measure_step(
    build: Callable[[], tuple[Network, Objective]],
    make_optimizer: Callable[[Network, Objective], torch.optim.Optimizer],
    batch: Batch,
    *,
    precision: str,
) -> StepCost:
    """Measure a training step with tensors that have shapes but no values.

    Forward and backward pass are followed once, since that takes half a minute of a large model.
    What they hold in later steps is the same with the states of the optimiser beside it.
    """
    with FakeTensorMode() as mode:
        model, objective = build()
        shapes: Batch = batch._map(mode.from_tensor)
        named = named_parameters(model, objective)
        optimizer, parameters = make_optimizer(model, objective), list(named.values())
        tracker = _Tracker(model)
        for frozen in (p for p in parameters if not p.requires_grad):
            # or it would ask them for their gradients
            tracker._param_to_grad_hook_handles[frozen] = (_no_hook(), _no_hook())
        tracker.track_external(model, objective, optimizer)
        dtype = _DTYPES.get(precision)
        with tracker:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = objective(model, shapes).total
            flops, passes = PASSES_OF_A_STEP * tracker.flops, tracker.passes
            loss.backward()
            del loss
            in_passes = _peak(tracker)
            optimizer.step()  # makes the states, which all passes but these find there
            optimizer.step()
        in_all = _peak(tracker)
        if passes != len(shapes.views):  # an objective that calls parts of the network
            flops = sum(model_flops(model, view) for view in shapes.views)
        states = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
        trained = [p for p in parameters if p.requires_grad]
        learns = any(p.requires_grad for p in objective.parameters())
        in_passes["Total"] += _bytes(states)
        peak = max(in_passes, in_all, key=lambda kinds: kinds["Total"])
        return StepCost(
            parameters=_parts(named),
            flops=flops,
            weights=_bytes(parameters) + _bytes((*model.buffers(), *objective.buffers())),
            averaged=_bytes((*model.parameters(), *(objective.parameters() if learns else ()))),
            optimizer=_bytes(states),
            gradients=_bytes(trained),
            gradients_at_peak=peak["GRAD"],
            peak=peak["Total"],
            units=tuple(_bytes(m.parameters()) for m in (*model.blocks, *objective.blocks)),
            batch=_batch_bytes(batch),
        )


def _view(func: Any, args: Any, kwargs: Any) -> FakeTensor:
    """A view of a tensor whose memory is counted, so that there is nothing to note. The general way
    takes several times as long, and most operations of a network are views."""
    tensor = args[0]
    with in_kernel_invocation_manager(tensor.fake_mode):
        shape = func(*args, **kwargs)
    return FakeTensor(tensor.fake_mode, shape, tensor.fake_device)


def _peak(tracker: _Tracker) -> dict[str, int]:
    """The bytes at the peak until now, by what holds them; `Total` is their sum."""
    held = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(kind).rpartition(".")[2]: size for kind, size in held.items()}


def _no_hook() -> RemovableHandle:
    return RemovableHandle(OrderedDict())


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _parts(named: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """The number of parameters by part of the model; the coupling between streams is a part of
    its own."""
    parts: dict[str, int] = {}
    for name, parameter in named.items():
        part = "coupling" if ".coupling." in name else name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def _batch_bytes(batch: Batch) -> int:
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    batch._map(note)
    return sum(sizes)
