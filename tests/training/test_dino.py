"""Self-distillation: crops of the same air, the teacher and its centre, the terms of the loss."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from atmossl.batch import Batch, collate_views
from atmossl.latent_losses import koleo
from atmossl.masking.random import RandomMasking
from atmossl.masking.views import Crop, cropped, draw_part, make_views
from atmossl.model.multiformer import Multiformer
from atmossl.objectives.dino import Centre, PrototypeMeasures, SelfDistillation, multi_crop
from tests.synthetic import spec, window

STREAMS = (spec("air"), spec("wind", variables=("u_component_of_wind",), token=(2, 2, 4)))
K = 12


def network() -> Multiformer:
    torch.manual_seed(0)
    return Multiformer(
        streams=STREAMS, dim=16, num_layers=1, num_decoder_layers=1, num_heads=2, num_members=2
    )


def arguments(**changes) -> dict:
    values = {
        "momentum": (0.9, 1.0), "momentum_steps": 10, "num_local": 1, "num_prototypes": K,
        "global_share": 0.75, "local_share": 0.5, "local_time_share": 0.5, "global_coarsen": 1,
        "num_global": 2, "patch_weight": 0.0, "patch_rate": (0.3, 0.5), "temperature_steps": 4,
        "hidden": 8, "bottleneck": 4,
    }  # fmt: skip
    return values | changes


def objective(model: Multiformer, **changes) -> Any:
    torch.manual_seed(1)
    return SelfDistillation(network=model, **arguments(**changes))


def batch(count: int = 3, **changes) -> Batch:
    specs, samples = SelfDistillation.views_of(arguments(**changes)), []
    for number in range(count):
        windows = tuple(window(s, seed=10 * number + n) for n, s in enumerate(STREAMS))
        rng = np.random.default_rng(number)
        samples.append(make_views([windows] * len(specs), specs, RandomMasking(), rng))
    return collate_views(samples, list(range(count)))


@pytest.mark.parametrize("factor", [1, 2])
def test_a_crop_shows_the_same_air_in_all_streams_and_its_own_values(factor: int) -> None:
    """Every value of a crop is that of the window at its time, latitude and longitude."""
    windows = tuple(window(s, lat=16, lon=32, seed=n) for n, s in enumerate(STREAMS))
    crop, starts = Crop(0, time_share=0.5, share=0.4, coarsen=factor), set()
    for seed in range(20):
        part = draw_part(windows, crop, np.random.default_rng(seed))
        streams = cropped(windows, crop, part)
        bounds = set()
        for whole, shown in zip(windows, streams, strict=True):
            assert shown.fields.shape[-3:] == ((4, 6, 12) if factor == 1 else (4, 4, 8))
            lat, lon = shown.lat, shown.lon
            bounds.add((float(lat[0]), float(lat[-1]), float(lon[0]), float(lon[-1])))
            rows = (whole.lat[None] - lat[:, None]).abs() < whole.lat.diff()[0] * factor / 2
            away = (whole.lon[None] - lon[:, None] + 180) % 360 - 180
            columns = away.abs() < whole.lon.diff()[0] * factor / 2
            steps = (whole.time_hours[None] - shown.time_hours[:, None]).abs() < 1e-6
            assert rows.sum(dim=1).unique().item() == columns.sum(dim=1).unique().item() == factor
            weights = rows * whole.weight[None]
            weights = weights / weights.sum(dim=1, keepdim=True)
            means = torch.einsum(
                "vltij,st,ai,bj->vlsab", whole.fields, steps.float(), weights, columns / factor
            )
            torch.testing.assert_close(shown.fields, means, rtol=1e-4, atol=1e-5)
        assert len(bounds) == 1
        starts.add(bounds.pop()[2])
    assert any(start > 250 for start in starts)  # goes on beyond the window's last longitude


def test_views_of_one_sample_share_the_place_of_equal_crops() -> None:
    given = batch(patch_weight=1.0)
    large, other, small, *shown = given.views
    for hiding, whole in zip((large, other), shown, strict=True):
        for one, two in zip(hiding.streams, whole.streams, strict=True):
            assert torch.equal(one.target, two.target) and torch.equal(one.grid.lon, two.grid.lon)
            assert one.hidden.any() and not two.hidden.any()
    assert small.streams[0].target.shape != large.streams[0].target.shape
    assert not torch.equal(large.streams[0].target, other.streams[0].target)


def test_a_student_that_prefers_nothing_costs_ln_k() -> None:
    model = network()
    tested = objective(model, patch_weight=1.0)
    with torch.no_grad():
        for name, head in tested.heads.items():
            head.prototypes.weight[:] = head.prototypes.weight[:1]
            assert name in ("pooled", "token_air", "token_wind")
        losses = tested(model, batch(patch_weight=1.0))
    assert [name for name, _ in losses.terms] == ["distillation", "patch"]
    for _, value in losses.terms:
        assert float(value) == pytest.approx(math.log(K), rel=1e-5)


def test_every_pair_of_a_large_crop_and_another_crop_counts_once() -> None:
    """Of 2 large and 3 small crops 8 pairs, in float64 by hand."""
    torch.manual_seed(0)
    targets = [torch.randn(4, K).softmax(dim=-1) for _ in range(2)]
    logits = [torch.randn(4, K) for _ in range(5)]
    costs = []
    for teacher, target in enumerate(targets):
        for student, scores in enumerate(logits):
            if student != teacher:
                chances = (scores.double() / 0.1).softmax(dim=-1)
                costs.append(float(-(target.double() * chances.log()).sum(dim=-1).mean()))
    assert len(costs) == 8
    assert float(multi_crop(logits, targets, 0.1)) == pytest.approx(sum(costs) / 8, rel=1e-5)


def test_a_student_that_agrees_costs_the_entropy_of_the_teacher() -> None:
    target = torch.randn(4, K).softmax(dim=-1)
    entropy = float(-(target * target.log()).sum(dim=-1).mean())
    same = [target.log() * 0.1] * 3
    assert float(multi_crop(same, [target] * 2, 0.1)) == pytest.approx(entropy, rel=1e-5)


def test_the_centre_after_n_batches_of_equal_mean() -> None:
    centre, mean = Centre(3, 0.9), torch.tensor([1.0, -2.0, 0.5])
    for number in range(1, 6):
        for rows in (1, 4):  # a step of two batches
            noise = torch.randn(rows, 3)
            centre.note(mean + noise - noise.mean(dim=0), torch.ones(rows))
        centre.update()
        torch.testing.assert_close(centre.value, (1 - 0.9**number) * mean)
    centre.update()  # a step in which it saw nothing
    torch.testing.assert_close(centre.value, (1 - 0.9**5) * mean)


def test_the_teacher_is_centred_and_the_surer_one() -> None:
    """Targets in float64 from the teacher's own logits."""
    model, given = network(), batch()
    tested = objective(model)
    tested.centres["pooled"].value += torch.linspace(-0.5, 0.5, K)
    losses = tested(model, given)
    with torch.no_grad():
        pooled = tested.teacher.pool(tested.teacher.encode(given.views[0]))
        logits = tested.teacher_heads["pooled"](pooled).double()
    expected = ((logits - torch.linspace(-0.5, 0.5, K)) / 0.04).softmax(dim=-1)
    torch.testing.assert_close(losses.scores.double(), expected, rtol=1e-4, atol=1e-6)
    temperatures = []
    for step in (1, 2, 4, 9):
        tested.after_step(model, step)
        temperatures.append(float(tested.teacher_temperature))
    assert temperatures == pytest.approx([0.0475, 0.055, 0.07, 0.07])


def test_a_centre_is_of_training_alone_and_the_teacher_follows_network_and_head() -> None:
    model, given = network(), batch()
    tested = objective(model)
    assert not tested.teacher.training and not tested.train().teacher_heads.training
    tested.eval()(model, given)
    tested.after_step(model, 1)
    assert tested.centres["pooled"].value.abs().max() == 0
    before = [p.clone() for p in tested.teacher_heads.parameters()]
    with torch.no_grad():
        for parameter in tested.heads.parameters():
            parameter += 1.0
    tested.train()(model, given)
    tested.after_step(model, 0)  # momentum 0.9
    for old, new in zip(before, tested.teacher_heads.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)
    assert tested.centres["pooled"].value.abs().max() > 0
    assert "centres.pooled.value" in tested.state_dict()


@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_gradients_reach_encoder_and_heads_alone(centring: str) -> None:
    model, changes = network(), {"patch_weight": 0.5, "koleo_weight": 0.1, "centring": centring}
    tested, given = objective(model, **changes), batch(patch_weight=0.5)
    losses = tested(model, given)
    losses.total.backward()
    with_gradient = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"embedding", "encoder"}
    learned = {n.split(".")[0] for n, p in tested.named_parameters() if p.grad is not None}
    assert learned == {"heads"} and len(losses.terms) == len(tested.weights(given)) == 3
    if centring == "sinkhorn":
        torch.testing.assert_close(losses.scores.sum(dim=1), torch.ones(3))


def test_measures_of_a_teacher_that_tells_all_states_apart_and_of_one_that_does_not() -> None:
    given, pooled = batch(4), (torch.randn(4, 3), torch.randn(4, 3))

    def values(chances: torch.Tensor, cross: float) -> dict[str, float]:
        losses = replace(
            objective_losses, terms=(("distillation", torch.tensor(cross)),), scores=chances
        )
        tested = PrototypeMeasures()
        return {k: float(v) for k, v in tested.values({"task": tested.sums(given, losses)}).items()}

    model = network()
    objective_losses = replace(objective(model)(model, given), pooled=pooled)
    apart = values(torch.eye(K)[:4], 0.0)
    assert apart["shared_information/mean"] == pytest.approx(math.log(4), rel=1e-6)
    assert apart["prototypes_used/mean"] == 1.0 and apart["teacher_entropy/mean"] == 0.0
    even = values(torch.full((4, K), 1 / K), math.log(K))
    assert even["shared_information/mean"] == pytest.approx(0.0, abs=1e-5)
    assert even["teacher_entropy/mean"] == pytest.approx(math.log(K), rel=1e-6)
    one = values(torch.eye(K)[:1].expand(4, K), 0.5)
    assert one["prototypes_used/mean"] == 0.25 and one["teacher_kl/mean"] == pytest.approx(0.5)


def test_koleo_of_large_crops_alone() -> None:
    model, given = network(), batch()
    losses = objective(model, koleo_weight=1.0)(model, given)
    value = dict(losses.terms)["koleo"].item()
    with torch.no_grad():
        pooled = [model.pool(model.encode(view)) for view in given.views[:2]]
    expected = sum(float(koleo(each)) for each in pooled) / 2
    assert value == pytest.approx(expected, rel=1e-5)


def test_keywords_that_do_not_fit_together_are_told_in_one_line_each() -> None:
    wanted = arguments(student_temperature=0.05, teacher_temperature=(0.04, 0.07))
    (line,) = SelfDistillation.faults_of(wanted, 4)
    assert "objective.teacher_temperature=[0.04,0.07] must be below" in line
    wanted = arguments(student_temperature=0.1, teacher_temperature=(0.04, 0.07), local_share=0.9)
    (line,) = SelfDistillation.faults_of(wanted, 4)
    assert "objective.local_share=0.9 makes the small crops larger" in line
    wanted = arguments(num_prototypes=10**10, student_temperature=0.1,
                       teacher_temperature=(0.04, 0.07))  # fmt: skip
    (line,) = SelfDistillation.faults_of(wanted, 4)
    assert "objective.num_prototypes=10000000000 needs" in line and "choose fewer" in line
