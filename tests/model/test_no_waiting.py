"""No part of a training step waits for the device: nothing reads a tensor's value on the host."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from atmossl.batch import Batch, collate_views
from atmossl.masking.base import make_view
from atmossl.masking.random import RandomMasking
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.masked import MaskedModelling
from atmossl.training.distributed import clip_gradients
from tests.synthetic import spec, window

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


STREAMS = (spec("air"), spec("wind", variables=("u_component_of_wind",)))


def network(attention: str) -> Multiformer:
    torch.manual_seed(0)
    return Multiformer(
        streams=STREAMS, dim=16, num_layers=1, num_decoder_layers=1, num_heads=2, num_members=3,
        attention=attention, attention_window=(2, 2, 3),
    )  # fmt: skip


def batch(share: float) -> Batch:
    windows = tuple(window(s, seed=n) for n, s in enumerate(STREAMS))
    sampler = RandomMasking((share, share), {"mask": 1.0})
    return collate_views([(make_view(windows, sampler, np.random.default_rng(0)),)], [0])


class Watch(TorchDispatchMode):
    """Raises where an operation has to know values before the host can go on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        del types
        name = func.overloadpacket.__name__
        assert not name.startswith(_WAITING), f"aten.{name} waits for the device"
        if name == "index":  # by a mask: its number of hits is the size of what comes out
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, "indexing by a mask waits for the device"
        return func(*args, **(kwargs or {}))


def train_step(attention: str, device: str) -> None:
    model = network(attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    of = batch(0.5).to(device)
    objective = MaskedModelling(losses={"crps": 0.5, "ensemble_mse": 0.5, "statistical": 0.1})
    objective(model, of).total.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    with Watch(), waiting_is_an_error(device):
        with torch.autocast(device, torch.bfloat16):
            loss = objective(model, of).total
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


class waiting_is_an_error:
    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: Any) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


KINDS = ("full", "factorised", "temporal", "windowed")


@pytest.mark.parametrize("attention", KINDS)
def test_a_step_reads_no_value_on_the_host(attention: str) -> None:
    train_step(attention, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", KINDS)
def test_a_step_never_waits_for_the_gpu(attention: str) -> None:
    train_step(attention, "cuda")


def test_the_watch_sees_what_waits() -> None:
    x = torch.arange(3.0)
    for waits in (lambda: x.sum().item(), lambda: x[x > 1], lambda: bool(x[0] > 0)):
        with Watch(), pytest.raises(AssertionError, match="waits"):
            waits()
