"""A coupled step on a GPU, in every precision and compiled, is the step that a CPU takes."""

import pytest
import torch

from atmossl.model.blocks import attend
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.masked import MaskedModelling
from tests.model.test_compiled import batch
from tests.synthetic import spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # the compiler warns of its own doings
]
STREAMS = tuple(spec(name) for name in ("air", "wind", "sea"))
LOSSES = {"crps": 0.5, "ensemble_mse": 0.5, "statistical": 0.1}
OBJECTIVE = MaskedModelling(losses=LOSSES)
KINDS = ("full", "factorised", "temporal", "windowed")


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default torch rounds those of float32 to TF32's 11 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network(attention: str = "full", kernel_size: int = 1) -> Multiformer:
    torch.manual_seed(0)
    model = Multiformer(
        streams=STREAMS, dim=32, num_layers=2, num_decoder_layers=1, num_heads=2, num_members=3,
        attention=attention, attention_window=(2, 2, 3), kernel_size=kernel_size,
    )  # fmt: skip
    with torch.no_grad():  # away from the start, where coupling is shut
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def step(
    model: Multiformer, device: str, dtype: torch.dtype, objective: MaskedModelling = OBJECTIVE
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.to(device).zero_grad()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = objective(model, batch(0.5, streams=STREAMS).to(device)).total
    loss.backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach().cpu(), gradients


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("attention", "kernel_size"), [(k, 1) for k in KINDS] + [("full", 3)])
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "tolerance"),
    [(torch.float32, 1e-4, 2e-3), (torch.bfloat16, 3e-2, 0.15), (torch.float16, 5e-3, 3e-2)],
)
def test_loss_and_gradients_are_those_of_a_cpu(
    attention: str, kernel_size: int, compiled: bool, dtype: torch.dtype, loss_tolerance: float,
    tolerance: float,
) -> None:  # fmt: skip
    """Gradients to `tolerance` of each tensor's norm, for half precision rounds every product."""
    torch._dynamo.reset()
    expected, gradients = step(network(attention, kernel_size), "cpu", torch.float32)
    model, objective = network(attention, kernel_size), MaskedModelling(losses=LOSSES)
    if compiled:
        model.compile_blocks()
        objective.compile()
    found, others = step(model, "cuda", dtype, objective)
    torch.testing.assert_close(found, expected, rtol=loss_tolerance, atol=0.0)
    floor = 1e-3 * max(float(g.norm()) for g in gradients.values())
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() < tolerance * gradient.norm() + floor, name


def test_scaled_gradients_of_float16_train() -> None:
    model = network().to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cuda")
    of, losses = batch(0.5, streams=STREAMS).to("cuda"), []
    for _ in range(20):
        with torch.autocast("cuda", torch.float16):
            loss = OBJECTIVE(model, of).total
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_launch_holds_any_number_of_samples() -> None:
    rows = 2**16 + 3
    query, key, value = torch.randn(3, rows, 1, 20, 16, device="cuda", dtype=torch.bfloat16)
    out = attend(query, key, value, None)
    tail = attend(query[-5:], key[-5:], value[-5:], None)
    torch.testing.assert_close(out[-5:], tail, rtol=2e-2, atol=2e-2)
