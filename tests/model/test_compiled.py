"""Compiled blocks compute what plain ones do, without compiling again for every batch."""

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from atmossl.batch import Batch, collate_views
from atmossl.losses import LOSSES
from atmossl.masking.base import make_view
from atmossl.masking.random import RandomMasking
from atmossl.model.atmorep_files import load_atmorep
from atmossl.model.atmorep_network import AtmoRepNetwork, streams_of
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.masked import MaskedModelling
from tests.model.plain_atmorep import field, write_model
from tests.model.test_atmorep import inputs_of
from tests.synthetic import spec, window

pytestmark = pytest.mark.filterwarnings("default")  # the compiler warns of its own doings

STREAMS = (spec("air"), spec("wind", variables=("u_component_of_wind",)))
OBJECTIVE = MaskedModelling(losses={"crps": 1.0})


def network(attention: str, streams=STREAMS, num_decoder_layers: int = 1) -> Multiformer:
    torch.manual_seed(0)
    return Multiformer(
        streams=streams, dim=16, num_layers=1, num_decoder_layers=num_decoder_layers, num_heads=2,
        num_members=3, attention=attention, attention_window=(2, 2, 3), kernel_size=1,
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
    """To 1e-5 of the loss and 1e-4 of the gradients: fused kernels round in another order. A C++
    compiler is slow: it gets encoder and tail alone, and sizes that vary from the first batch on.
    No worker of inductor's is started for them."""
    one_stream = STREAMS[:1]
    plain, compiled = (network("full", one_stream, num_decoder_layers=0) for _ in range(2))
    compiled.compile_blocks()
    for share in (0.5, 0.3):
        of = batch(share, streams=one_stream)
        expected, gradients = step(plain, of)
        compiler = {"compile_threads": 1}
        with inductor.patch(compiler), dynamo.patch(assume_static_by_default=False):
            found, others = step(compiled, of)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "num_streams", "num_decoder_layers"), [("full", 2, 1), ("windowed", 1, 0)]
)
def test_a_third_number_of_hidden_tokens_compiles_nothing(
    attention: str, num_streams: int, num_decoder_layers: int
) -> None:
    """The second shows which sizes change. What is traced computes what plain blocks do."""
    streams, graphs = STREAMS[:num_streams], 0

    def count(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        del inputs
        nonlocal graphs
        graphs += 1
        return graph

    plain, model = (network(attention, streams, num_decoder_layers) for _ in range(2))
    model.compile_blocks(count)
    for share in (0.5, 0.3):
        step(model, batch(share, streams=streams))
    first = graphs
    assert first > 0
    for share in (0.4, 0.6, 0.8):
        of = batch(share, streams=streams)
        torch.testing.assert_close(step(model, of), step(plain, of))
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
    compiled.compile_blocks(count)
    model, of = network("full", STREAMS[:1]), batch(0.5, streams=STREAMS[:1])
    results = []
    for objective in (plain, compiled):
        model.zero_grad()
        loss = objective(model, of).total
        loss.backward()
        results.append((loss.detach(), model.tail["air"].project.weight.grad.clone()))
    torch.testing.assert_close(*results)
    assert graphs == 1


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)
def test_an_imported_network_of_atmorep_compiles_to_what_it_is(tmp_path: Path) -> None:
    """Two coupled fields: members of every hidden token, and gradients of all weights."""
    fields = [field("temperature", 8, ("velocity_u",)), field("velocity_u", 8)]
    write_model(tmp_path, fields, ["temperature"])
    plain, compiled = (imported_network(tmp_path) for _ in range(2))
    compiled.compile_blocks()
    counters.clear()
    given = inputs_of(plain.core)
    with inductor.patch({"compile_threads": 1, "cpp.simdlen": 1}):  # scalar kernels compile faster
        found, expected = (network.core(given) for network in (compiled, plain))
        index = {0: torch.arange(4)}
        of_compiled, of_plain = (out["temperature"].of_tokens(index) for out in (found, expected))
        for members in (of_compiled, of_plain):
            members.square().mean().backward()
    assert counters["stats"]["unique_graphs"] > 0
    difference = float((of_compiled - of_plain).abs().max())
    assert difference < 1e-6, difference
    gradients = {name: weight.grad for name, weight in plain.named_parameters()}
    for name, weight in compiled.named_parameters():
        expected_gradient = gradients[name.replace("_orig_mod.", "")]
        if weight.grad is None:
            assert expected_gradient is None, name
        else:
            torch.testing.assert_close(weight.grad, expected_gradient, rtol=1e-3, atol=1e-6)


def imported_network(folder: Path) -> AtmoRepNetwork:
    core = load_atmorep(folder)
    network = AtmoRepNetwork(streams=streams_of(core.settings), **asdict(core.settings))
    network.core.load_state_dict(core.state_dict())
    return network
