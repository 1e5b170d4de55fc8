"""Objectives on pairs of views: one rank or several, what they compare, how collapse shows."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from atmossl.batch import Batch, collate_views
from atmossl.cli import main
from atmossl.latent_losses import alignment, rankme, uniformity
from atmossl.losses import Losses
from atmossl.masking.random import RandomMasking
from atmossl.masking.views import ViewSpec, make_views
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.contrastive import Contrastive
from atmossl.objectives.pairs import PairMeasures, close_in_time
from tests.processes import CONTEXT, HANGS_AFTER_SECONDS, training
from tests.synthetic import spec, window

STREAMS = (spec("air"), spec("wind", variables=("u_component_of_wind",), token=(2, 4, 4)))
LOSSES = ("nt_xent", "vicreg", "simsiam", "barlow_twins")
LAG_HOURS = (6.0, 24.0)
NUM_SAMPLES = 8  # of all ranks; samples 2 n and 2 n + 1 are a day apart, others thirty and more


def network() -> Multiformer:
    torch.manual_seed(0)
    return Multiformer(
        streams=STREAMS, dim=16, num_layers=1, num_decoder_layers=1, num_heads=2, num_members=2
    )


def objective(model: Multiformer, loss: str = "nt_xent") -> Contrastive:
    torch.manual_seed(1)
    return Contrastive(network=model, lag_hours=LAG_HOURS, loss=loss, projection_dim=8)  # type: ignore[arg-type]


def start_of(number: int) -> float:
    return 24.0 * (30 * (number // 2) + number % 2)


def pairs(numbers: Sequence[int]) -> Batch:
    """Random states, the later one an equal part of the earlier one."""
    samples, specs = [], (ViewSpec(), ViewSpec(lag_hours=LAG_HOURS, tells_time=False))
    for number in numbers:
        early, late = [], []
        for row, stream in enumerate(STREAMS):
            first = window(stream, seed=10 * number + row)
            other = window(stream, seed=10 * number + row + 5)
            lag = LAG_HOURS[number % 2]
            early.append(replace(first, time_hours=first.time_hours + start_of(number)))
            late.append(
                replace(
                    other,
                    fields=(first.fields + other.fields) / math.sqrt(2),
                    time_hours=other.time_hours + start_of(number) + lag,
                )
            )
        rng = np.random.default_rng(number)
        windows, sampler = [tuple(early), tuple(late)], RandomMasking((0.5, 0.5))
        samples.append(make_views(windows, specs, sampler, rng))
    return collate_views(samples, list(numbers))


def gradients(folder: Path, rank: int, ranks: int) -> None:
    """Loss and gradients of every kind of loss, as a rank has them after their mean."""
    if ranks > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", store, rank=rank, world_size=ranks)
    share = NUM_SAMPLES // ranks
    batch, found = pairs(range(rank * share, (rank + 1) * share)), {}
    for loss in LOSSES:
        model = network()
        tested = objective(model, loss)
        total = tested(model, batch).total
        total.backward()
        named = {**dict(model.named_parameters()), **dict(tested.named_parameters())}
        values = {n: p.grad for n, p in named.items() if p.grad is not None}
        values["loss"] = total.detach().clone()
        if ranks > 1:
            for value in values.values():
                dist.all_reduce(value)
                value /= ranks
        found |= {f"{loss} {name}": value for name, value in values.items()}
    if rank == 0:
        torch.save(found, folder / f"{ranks}.pt")


def test_two_ranks_learn_what_one_learns_from_all_samples(tmp_path: Path) -> None:
    processes = [CONTEXT.Process(target=gradients, args=(tmp_path, rank, 2)) for rank in (0, 1)]
    for process in processes:
        process.start()
    gradients(tmp_path, 0, 1)
    for process in processes:
        process.join(HANGS_AFTER_SECONDS)
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2))
    assert one.keys() == two.keys() and len(one) > 100
    for loss in LOSSES:
        names = [name for name in one if name.startswith(f"{loss} ")]
        largest = max(float(one[name].abs().max()) for name in names)
        for name in names:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5 * largest)


def test_samples_that_are_close_in_time_do_not_count_as_different() -> None:
    """The loss in float64, pair by pair, without those within five days."""
    model, batch = network(), pairs(range(6))
    tested = objective(model)
    with torch.no_grad():
        loss = tested(model, batch).total.item()
        first, second = (
            tested.projector(model.pool(model.encode(view))).double() for view in batch.views
        )
    unit = torch.cat([first, second])
    unit = unit / unit.norm(dim=1, keepdim=True)
    likeness = (unit @ unit.T / 0.5).exp()
    total = 0.0
    for anchor in range(12):
        partner = (anchor + 6) % 12
        others = [n for n in range(12) if (n % 6) // 2 != (anchor % 6) // 2]
        chances = likeness[anchor, partner] + likeness[anchor, others].sum()
        total -= float((likeness[anchor, partner] / chances).log()) / 12
    assert loss == pytest.approx(total, rel=1e-5)
    close = close_in_time(batch, 24 * 28.0)  # from the later view of one pair to the next pair
    assert close.tolist() == [[n // 2 == m // 2 for n in range(6)] for m in range(6)]
    assert close_in_time(batch, 0.0).sum() == 0


def test_simsiam_gives_the_target_no_gradient() -> None:
    """A network that is only a target learns nothing."""
    model, batch = network(), pairs(range(2))
    tested = objective(model, "simsiam")
    with torch.no_grad():
        for parameter in tested.predictor.parameters():
            parameter.zero_()
        tested.predictor[-1].bias.fill_(1.0)  # whatever is to be predicted
    tested(model, batch).total.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def measured(*batches: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    sums: dict[str, torch.Tensor] = {}
    for number, pooled in enumerate(batches):
        losses = Losses((("nt_xent", torch.tensor(float(number))),), (1.0,), pooled=pooled)
        for name, value in PairMeasures().sums(pairs([0]), losses).items():
            sums[name] = sums[name] + value if name in sums else value
    return {k: float(v) for k, v in PairMeasures().values({"task": sums}).items()}


def test_measures_of_batches_are_those_of_all_their_states() -> None:
    torch.manual_seed(0)
    batches = [(5 + torch.randn(6, 4), 5 + torch.randn(6, 4)) for _ in range(3)]
    values = measured(*batches)
    first, second = (torch.cat(views) for views in zip(*batches, strict=True))
    both = torch.cat([first, second]).double()
    centred = both - both.mean(dim=0)
    assert values["rank/mean"] == pytest.approx(float(rankme(centred)), rel=1e-5)
    assert values["alignment/mean"] == pytest.approx(float(alignment(first, second)), rel=1e-5)
    spread = (both[:, None] - both[None]).pow(2).sum(dim=-1).mean()  # of any two, itself included
    apart = (first - second).double().pow(2).sum(dim=1).mean()
    assert values["pair_distance/mean"] == pytest.approx(float(apart / spread), rel=1e-5)
    closeness = [uniformity(view).exp() for view, _ in batches]
    assert values["uniformity/mean"] == pytest.approx(math.log(float(sum(closeness)) / 3), rel=1e-5)
    assert values["pair_loss/task"] == values["pair_loss/mean"] == 1.0


def test_collapsed_latents_have_no_rank() -> None:
    line = torch.linspace(0, 1, 8)[:, None] * torch.tensor([1.0, 2.0, -1.0]) + 7.0
    values = measured((line, line))
    assert values["rank/mean"] == pytest.approx(1.0, abs=1e-2) and values["pair_distance/mean"] == 0
    constant = torch.ones(8, 3)
    values = measured((constant, constant))
    assert values["uniformity/mean"] == 0 and all(map(math.isfinite, values.values()))


@pytest.mark.e2e
def test_a_lag_that_the_record_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = training(tmp_path / "run", "objective=contrastive", "objective.lag_time=[7h]")
    assert main(arguments) == 2
    assert "objective.lag_time=[7h] are no multiples of the time step of 6 h" in (
        capsys.readouterr().err
    )
