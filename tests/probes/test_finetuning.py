"""Fine-tuning starts from the features of the frozen probes, uses the labels that it says it uses,
and learns what there is to learn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from atmossl.cli import compose_config, main
from atmossl.inference.checkpoint import load_checkpoint, open_for
from atmossl.probes.cases import SPLITS
from atmossl.probes.features import encoded, random_network
from atmossl.probes.finetuning import Finetuner, FinetuneSettings, TunedNetwork, dates_used
from atmossl.probes.run import Baselines, ProbeOptions, ProbeRun, tunings
from atmossl.probes.scoring import Question
from atmossl.schema import ProbeConfig, StoreChoice, parse
from tests.probes.test_probes import cases

TINY = Path(__file__).parents[1] / "checkpoints" / "format_4.ckpt"
SETTINGS = FinetuneSettings((0.1, 1.0), ("latitude_belt",), 10, 2, 1e-2)


@pytest.fixture(scope="module")
def run() -> ProbeRun:
    """A tiny trained network, whose window is the whole globe, on a few dates of the sample."""
    values = compose_config("probe", [f"checkpoint={TINY}", "output=_"])
    config = parse(ProbeConfig, {k: v for k, v in values.items() if k != "hydra"})
    trained = load_checkpoint(str(TINY))
    trained = replace(trained, window=replace(trained.window, lat=0, lon=0))
    records = {split: open_for(trained, config.data, split) for split in SPLITS}
    options = ProbeOptions(("latitude_belt",), every=51, places=8, resamples=50, finetune=SETTINGS)
    return ProbeRun.prepare(trained, records, options)


def test_layers_may_be_named_in_any_order() -> None:
    """Tokens, which principal components are as wide as, are kept of the deepest layer."""
    trained, options = (
        load_checkpoint("default"),
        ProbeOptions(("latitude_belt",), layers=(1, 0), every=51, places=8, resamples=50),
    )
    records = {split: open_for(trained, StoreChoice(name="sample"), split) for split in SPLITS}
    run = ProbeRun.prepare(trained, records, options)
    assert run.layers == (0, 1)


def about_sectors(run: ProbeRun) -> Question:
    """A number for every sector of every date."""
    case = np.repeat(np.arange(len(run.cases.times)), run.places.sectors)
    targets = np.random.default_rng(0).standard_normal((len(case), 1))
    return Question("made", False, False, targets, case)


def test_features_are_those_of_the_frozen_probes(run: ProbeRun) -> None:
    first = replace(run.runs[0], steps=run.runs[0].steps[:2])
    layer = run.trained.model.num_encoder_layers - 1
    (frozen,) = encoded(run.embedders[:1], [first], (layer,), run.places, "latents")
    views = [run.embedders[0].whole_view(time) for time in first.times]
    names = [spec.name for spec in run.trained.own_specs]
    tuner = Finetuner(run.cases, run.places, views, names, SETTINGS, 0, "cpu")
    for question, expected in (
        (run.questions[0], frozen.local),
        (about_sectors(run), frozen.sectors),
    ):
        tuned = TunedNetwork(run.trained.model, question, run.places, names)
        with torch.no_grad():
            found = tuned.features(tuner._views(np.arange(2)), np.arange(2)).numpy()
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_labels_of_a_fraction_are_of_training_dates_in_blocks() -> None:
    made = cases(40)
    for fraction, count in ((0.0001, 1), (0.1, 8), (0.75, 60), (1.0, 80)):
        used = dates_used(made, fraction, seed=1)
        assert len(used) == count and set(used) <= set(np.flatnonzero(made.of("train")))
        breaks = (np.diff(used) > 1) | (np.diff(made.run[used]) > 0)
        assert breaks.sum() <= 1  # from one run into the next


def test_only_the_chosen_labels_have_an_effect_and_training_lowers_the_error(
    run: ProbeRun,
) -> None:
    names = [spec.name for spec in run.trained.own_specs]
    views = [
        embedder.whole_view(time)
        for embedder, part in zip(run.embedders, run.runs, strict=True)
        for time in part.times
    ]
    tuner = Finetuner(run.cases, run.places, views, names, SETTINGS, 0, "cpu")
    question, model = run.questions[0], run.trained.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predicted, count = tuner.fitted(model, question, 0.2)
    used = dates_used(run.cases, 0.2, 0)
    assert count == len(used) < run.cases.of("train").sum()
    others = run.cases.of("train") & ~np.isin(np.arange(len(run.cases.times)), used)
    changed = question.targets.copy()
    changed[np.isin(question.case, np.flatnonzero(others))] = 7.0
    again, _ = tuner.fitted(model, replace(question, targets=changed), 0.2)
    for split in ("validation", "test"):
        np.testing.assert_array_equal(predicted[split], again[split])
    np.testing.assert_allclose(predicted["test"].sum(axis=1), 1.0, atol=1e-5)  # probabilities
    test = run.cases.of("test")[question.case]
    frequencies = question.targets[~test].mean(axis=0)
    losses = [
        ((guess - question.targets[test]) ** 2).sum(axis=1).mean()
        for guess in (predicted["test"], frequencies)
    ]
    assert losses[0] < 0.9 * losses[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_table_compares_with_a_random_start_that_has_all_labels(run: ProbeRun) -> None:
    short = replace(run, options=replace(run.options, finetune=replace(SETTINGS, steps=1)))
    advanced: list[float] = []
    found = short.run(advanced.append)
    assert sum(advanced) == short.num_windows
    table = tunings(found, "tiny")
    assert table["start"].tolist() == ["random", "trained", "trained"]
    assert table["fraction"].tolist() == [1.0, 0.1, 1.0]
    assert table["dates"].tolist() == [12, 1, 12]
    ratio = (1 - table["skill"]) / (1 - table["skill"][0])
    np.testing.assert_allclose(table["loss_over_scratch"], ratio)
    assert (table["ratio_low"] <= table["loss_over_scratch"] + 1e-9).to_numpy().all()


def test_a_probe_that_is_not_asked_is_refused(tmp_path: Path, capsys) -> None:
    words = ["probe", f"checkpoint={TINY}", "every=51", "probes=[local_hour]", "accelerator=cpu",
             "finetune.fractions=[1.0]", f"output={tmp_path / 'none'}"]  # fmt: skip
    assert main(words) == 2
    refused = "finetune.probes=[anomaly_24h,vorticity_extreme]; valid: of the probes of this"
    assert refused in capsys.readouterr().err
    assert main([*words, "finetune.fractions=[0]"]) == 2
    assert "finetune.fractions.0=0" in capsys.readouterr().err


def test_baselines_are_fitted_once_for_checkpoints_that_differ_in_weights(run: ProbeRun) -> None:
    frozen = replace(run, options=replace(run.options, finetune=FinetuneSettings()))
    other = replace(frozen, trained=random_network(run.trained, seed=5))
    shared: dict[str, Baselines] = {}
    first, second = frozen.run(shared=shared), other.run(shared=shared)
    assert len(shared) == 1
    for found, alone in ((first, frozen.run()), (second, other.run())):
        for one, same in zip(found.outcomes, alone.outcomes, strict=True):
            assert (one.source, one.layer, one.method) == (same.source, same.layer, same.method)
            np.testing.assert_array_equal(one.samples, same.samples)
    assert first.outcomes[0].skill != second.outcomes[0].skill
