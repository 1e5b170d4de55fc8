"""A linear layer by oneDNN is the layer that torch computes, to float32's rounding."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from atmossl.model.network import AVAILABLE, Linear
from atmossl.training.throughput import flop_counter

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch was built without oneDNN")


@pytest.fixture(autouse=True)
def whatever_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atmossl.model.network.FASTER", True)


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_float64(bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(96, 256, bias=bias)
    x = torch.randn(2, 131, 96, requires_grad=True)
    upstream = torch.randn(256, 131, 2).permute(2, 1, 0)  # not contiguous
    exact = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    expected = functional.linear(*exact)
    expected.backward(upstream.double())
    out = layer(x)
    assert type(out.grad_fn).__name__ == "_OneDnnBackward"
    out.backward(upstream)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for one, two in zip((x, *layer.parameters()), exact, strict=True):
        torch.testing.assert_close(one.grad.double(), two.grad, rtol=1e-5, atol=1e-4)


def test_its_operations_are_counted() -> None:
    layer, x = Linear(96, 512), torch.randn(1, 131, 96, requires_grad=True)
    with flop_counter() as counter:
        layer(x).sum().backward()
    with FlopCounterMode(display=False) as plain:
        functional.linear(x, layer.weight, layer.bias).sum().backward()
    assert counter.get_total_flops() == plain.get_total_flops() == 3 * 2 * 131 * 96 * 512
