"""Spreads a model over devices: replicated (DDP) or sharded (FSDP2)."""

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from atmossl.atomic_files import partial_path, publish, remove
from atmossl.checkpoint_files import (
    METADATA,
    UnsoundError,
    read_contents,
    save_contents,
    write_manifest,
)
from atmossl.model.network import Network
from atmossl.objectives.base import Objective
from atmossl.shards import SafePlanner, ShardReader, as_unsound, by_index, by_name
from atmossl.training.distributed import failing_together

CheckpointFormat = Literal["file", "sharded"]


class ShardedStrategy(ModelParallelStrategy):
    """A strategy for models that one device cannot hold (FSDP2): weights, gradients and optimiser
    states are spread over all devices, and gathered block by block for the computation.

    compute_dtype: of the gathered weights; gradients are reduced in float32, and the shards, hence
        the optimiser, stay float32.
    checkpoint_format: `file`, gathered on the first rank; or `sharded`, a folder that every rank
        writes its part of. Either can be read by any number of devices and any strategy.
    async_checkpoint: write shards while training goes on, from a copy on the host; the next save
        waits for the one before. Of a file, the strategy's checkpoint_io knows.
    cpu_offload: keep the shards of weights, gradients and states on the host, which takes the
        optimiser's step, too.
    """

    def __init__(
        self,
        *,
        compute_dtype: torch.dtype | None,
        checkpoint_format: CheckpointFormat,
        async_checkpoint: bool,
        cpu_offload: bool,
    ) -> None:
        super().__init__(save_distributed_checkpoint=checkpoint_format == "sharded")
        self.policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self.offloads = cpu_offload
        self._pool = ThreadPoolExecutor(1) if async_checkpoint else None
        self._saving_group: Any = None
        self._pending: Future | None = None
        self._learning: list[FSDPModule] = []

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def _get_process_group_backend(self) -> str:
        """The backend of the process group. It includes one of the host, for random states and
        signals."""
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"

    def shard(self, models: Sequence[Network | Objective]) -> None:
        """Shard networks and objectives, each only once; each of their blocks is gathered on its
        own. Modules without weights stay as they are."""
        pin = self.root_device.type == "cuda"
        how: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": self.policy,
            "offload_policy": CPUOffloadPolicy(pin) if self.offloads else OffloadPolicy(),
        }
        for model in models:
            if isinstance(model, FSDPModule) or not any(True for _ in model.parameters()):
                continue
            for part in model.blocks:
                fully_shard(part, **how)
            sharded = fully_shard(model, **how)
            if isinstance(model, Network):  # else these would find only a part of every weight
                for name in ("encode", "reconstruct", "predict"):
                    register_fsdp_forward_method(model, name)
            if any(parameter.requires_grad for parameter in model.parameters()):
                self._learning.append(sharded)  # others, such as teachers, have no gradients

    def model_to_device(self) -> None:
        """Move the model to the device; of an offloaded model only the buffers, which are not
        sharded."""
        if not self.offloads:
            super().model_to_device()
            return
        for part in self._module.modules():
            for name, buffer in list(part.named_buffers(recurse=False)):
                setattr(part, name, buffer.to(self.root_device))

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """A context in which the gradients of accumulated batches are added up on every rank, to
        be reduced once."""
        for model in self._learning:
            model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for model in self._learning:
                model.set_requires_gradient_sync(True)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        sharded = self._save_distributed_checkpoint
        options = StateDictOptions(full_state_dict=not sharded, cpu_offload=True)
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning wraps it
        state = get_optimizer_state_dict(self._module, optimizer, options=options)
        return state if sharded or not self.is_global_zero else by_index(state)

    @property
    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(str(filepath)))
        if not self._save_distributed_checkpoint:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path)
            return
        self.wait_for_checkpoint()
        partial = partial_path(path)
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        states = checkpoint.pop("optimizer_states", [])
        tensors |= {f"optimizer_{number}": state for number, state in enumerate(states)}
        with failing_together(f"saving {path}"):
            if self.is_global_zero:
                remove(partial)
                partial.mkdir(parents=True)
                save_contents(checkpoint, partial / METADATA)
        if self._pool is not None:
            self._save_later(tensors, partial, path)
            return
        with as_system_error():
            save(tensors, checkpoint_id=partial)
        with failing_together(f"saving {path}"):
            if self.is_global_zero:
                _publish_whole(partial, path)

    def _save_later(self, tensors: dict[str, Any], partial: Path, path: Path) -> None:
        """Copy the tensors to the host now, and write them in a thread. The first rank finishes
        after all others."""
        assert self._pool is not None
        if self._saving_group is None:  # the training's own groups are busy meanwhile
            self._saving_group = dist.new_group(backend="gloo")
        written = async_save(tensors, checkpoint_id=partial, process_group=self._saving_group)
        assert isinstance(written, Future)

        def commit() -> None:
            with as_system_error():
                written.result()
            if self.is_global_zero:
                _publish_whole(partial, path)

        self._pending = self._pool.submit(commit)

    def wait_for_checkpoint(self) -> None:
        """Wait on all ranks until the last checkpoint is on the disk; raises errors of writing."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with failing_together("saving a checkpoint"):
                pending.result()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        del weights_only  # always
        self.wait_for_checkpoint()
        path = Path(self.broadcast(str(checkpoint_path)))
        return self._load_shards(path) if path.is_dir() else self._load_file(path)

    def _load_shards(self, path: Path) -> dict[str, Any]:
        """Load this rank's part of the shards, however many ranks wrote them."""

        def read(into: dict[str, Any]) -> None:
            try:
                with as_unsound():
                    load(into, storage_reader=ShardReader(path), planner=SafePlanner())
            except UnsoundError as error:
                raise ValueError(f"resume: {path} {error}") from error

        module = self._module
        state = {"state_dict": get_model_state_dict(module)}
        read(state)
        set_model_state_dict(module, state["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{number}"
            saved: dict[str, Any] = {key: get_optimizer_state_dict(module, optimizer)}
            read(saved)
            set_optimizer_state_dict(module, optimizer, saved[key])
        return torch.load(path / METADATA, map_location="cpu", weights_only=True)

    def _load_file(self, path: Path) -> dict[str, Any]:
        module, contents = self._module, read_contents(path)
        options = StateDictOptions(full_state_dict=True, cpu_offload=self.offloads)
        set_model_state_dict(module, contents.pop("state_dict"), options=options)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for optimizer, saved in zip(self.optimizers, contents["optimizer_states"], strict=True):
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            set_optimizer_state_dict(module, optimizer, by_name(saved, order), options=options)
        return contents

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Do nothing: `load_checkpoint` has loaded the state of the optimiser."""


def _publish_whole(partial: Path, path: Path) -> None:
    """Give a folder of shards its name once the checksums of all shards lie beside them."""
    write_manifest(partial)
    publish(partial, path)


@contextmanager
def as_system_error() -> Generator[None]:
    """Turn torch's error for failures on some ranks, which is no `Exception`, into an OSError."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        words = f"rank {rank} could not write its shards; is the disk full? {reason}"
        raise OSError(words) from error


def choose_strategy(
    name: Literal["auto", "ddp", "fsdp"],
    *,
    precision: str,
    checkpoint_format: CheckpointFormat,
    async_checkpoint: bool,
    cpu_offload: bool,
    has_idle_parameters: bool,
) -> Any:
    """The Lightning strategy of a configuration.

    has_idle_parameters: some get no gradient, as the last layer of a stream that is context only;
        DDP has to look for them, which costs a walk through the graph at every step.
    """
    if name == "fsdp":
        dtype = torch.bfloat16 if precision == "bf16-mixed" else None
        return ShardedStrategy(
            compute_dtype=dtype,
            checkpoint_format=checkpoint_format,
            async_checkpoint=async_checkpoint,
            cpu_offload=cpu_offload,
        )
    if name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=has_idle_parameters)
    return "auto"
