"""Compiled blocks compute what plain ones do, without compiling again for every batch."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from atmossl.batch import Batch, collate_views
from atmossl.losses import LOSSES
from atmossl.masking.base import make_view
from atmossl.masking.random import RandomMasking
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.masked import MaskedModelling
from tests.synthetic import spec, window

pytestmark = pytest.mark.filterwarnings("default")  # the compiler warns of its own doings

STREAMS = (spec("air"), spec("wind", variables=("u_component_of_wind",)))
OBJECTIVE = MaskedModelling(losses={"crps": 1.0})


def network(attention: str, streams=STREAMS) -> Multiformer:
    torch.manual_seed(0)
    return Multiformer(
        streams=streams, dim=16, num_layers=1, num_decoder_layers=1, num_heads=2, num_members=3,
        attention=attention, attention_window=(2, 2, 3), neighbourhood=1,
    )  # fmt: skip


def batch(share: float, seed: int = 0, streams=STREAMS) -> Batch:
    windows = tuple(window(s, seed=n) for n, s in enumerate(streams))
    sampler = RandomMasking((share, share), {"mask": 1.0})
    return collate_views([(make_view(windows, sampler, np.random.default_rng(seed)),)], [0])


def step(model: nn.Module, of: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = OBJECTIVE(model, of).total
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)
def test_compiled_and_plain_steps_agree() -> None:
    """To 1e-5 of the loss and 1e-4 of the gradients: fused kernels round in another order."""
    one_stream = STREAMS[:1]
    plain, compiled = network("full", one_stream), network("full", one_stream)
    compiled.compile_blocks()
    for share in (0.5, 0.3):
        of = batch(share, streams=one_stream)
        (expected, gradients), (found, others) = step(plain, of), step(compiled, of)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["full", "windowed"])
def test_a_third_number_of_hidden_tokens_compiles_nothing(attention: str) -> None:
    """The second shows which sizes change."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        del inputs
        nonlocal graphs
        graphs += 1
        return graph

    model = network(attention)
    model.compile_blocks(count)
    for share in (0.5, 0.3):
        step(model, batch(share))
    first = graphs
    assert first > 0
    for share in (0.4, 0.6, 0.8):
        step(model, batch(share))
    assert graphs == first


@pytest.mark.parametrize("scaled", [False, True])
def test_compiled_losses_are_one_graph_and_agree(scaled: bool) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        del inputs
        nonlocal graphs
        graphs += 1
        return graph

    scales = (
        {
            "air": torch.rand(
                STREAMS[0].num_levels // STREAMS[0].token_size.level, STREAMS[0].patch
            )
            + 0.5
        }
        if scaled
        else {}
    )
    plain, compiled = (
        MaskedModelling(losses=dict.fromkeys(LOSSES, 0.5), scales=scales) for _ in range(2)
    )
    compiled.compile(count)
    model, of = network("full", STREAMS[:1]), batch(0.5, streams=STREAMS[:1])
    results = []
    for objective in (plain, compiled):
        model.zero_grad()
        loss = objective(model, of).total
        loss.backward()
        results.append((loss.detach(), model.tail["air"].project.weight.grad.clone()))
    torch.testing.assert_close(*results)
    assert graphs == 1
