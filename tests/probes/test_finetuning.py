"""Fine-tuning starts from the features of the frozen probes, uses the labels that it says it uses,
and learns what there is to learn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax

pytest.importorskip("sklearn")

from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from atmossl.batch import collate_views
from atmossl.cli import compose_config, main
from atmossl.inference.checkpoint import load_checkpoint, open_for
from atmossl.inference.embed import EMBEDDING
from atmossl.probes.cases import SPLITS
from atmossl.probes.features import encoded, random_network, side_by_side
from atmossl.probes.finetuning import Finetuner, FinetuneSettings, dates_used
from atmossl.probes.models import PENALTIES
from atmossl.probes.run import Baselines, ProbeOptions, ProbeRun, tunings
from atmossl.probes.scoring import Question
from atmossl.probes.tuned_network import (
    LOGISTIC_STRENGTHS,
    Labelled,
    TunedNetwork,
    constant_map,
    linear_maps,
)
from atmossl.schema import ProbeConfig, StoreChoice, parse
from tests.probes.test_probes import cases

TINY = Path(__file__).parents[1] / "checkpoints" / "format_4.ckpt"
SETTINGS = FinetuneSettings((0.1, 1.0), ("latitude_belt",), 10, 2, (1e-2,))


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
    layers = encoded(run.embedders[:1], [first], (EMBEDDING, layer), run.places, "latents")
    frozen = side_by_side(layers)
    drawn = run.places.rows[:2] * len(run.places.longitude) + run.places.columns[:2]
    views = [run.embedders[0].whole_view(time) for time in first.times]
    names = [spec.name for spec in run.trained.own_specs]
    tuner = Finetuner(run.cases, run.places, views, names, SETTINGS, 0, "cpu")
    for question, expected in (
        (run.questions[0], frozen.local),
        (about_sectors(run), frozen.sectors),
    ):
        tuned = TunedNetwork(run.trained.model, question, run.places, names)
        with torch.no_grad():
            features = tuned.features(tuner._views(np.arange(2))).numpy()
        if question.local:
            features = features[np.arange(2)[:, None], drawn]
        np.testing.assert_allclose(features, expected, atol=2e-5)


def test_an_embedding_sees_what_is_near_alone(run: ProbeRun) -> None:
    """Far from a token whose values change, the last layer's latents change, embeddings do not."""
    view = run.embedders[0].whole_view(run.runs[0].times[0])
    stream, model = collate_views([(view,)], [0]).views[0].streams[0], run.trained.model
    source = stream.source.clone()
    source[:, :, :, 0, 0] += 1.0
    grids = []
    for values in (stream.source, source):
        changed = replace(stream, source=values)
        shown = replace(collate_views([(view,)], [0]).views[0], streams=(changed,))
        with torch.no_grad():
            (latents,) = model.encode(shown).values()
        assert latents.embedded is not None
        grids.append([x.unflatten(1, stream.grid.shape)
                      for x in (latents.embedded.features, latents.last)])  # fmt: skip
    embedded, last = (one != other for one, other in zip(*grids, strict=True))
    row, column = (size // 2 for size in stream.grid.shape[-2:])
    assert not embedded[:, :, :, row:, column].any() and embedded[:, :, :, 0, 0].any()
    assert last[:, :, :, 0, column].any() or last[:, :, :, row, 0].any()


def made_rows(classes: bool) -> Labelled:
    """Rows of six places with areas and climates of their own; labels follow from features."""
    rng = np.random.default_rng(3)
    place = np.tile(np.arange(6), 40)
    features = rng.standard_normal((240, 5)) * [1, 2, 3, 4, 5] + rng.standard_normal((6, 5))[place]
    answer = features @ rng.standard_normal((5, 2)) + rng.standard_normal((240, 2))
    labels = np.eye(2)[answer.argmax(axis=1)] if classes else answer
    return Labelled(features, labels, np.array([1, 2, 3, 3, 2, 1.0])[place], place)


def test_a_ridge_start_is_that_of_a_library() -> None:
    rows = made_rows(classes=False)
    centre = np.random.default_rng(4).standard_normal((6, 5))
    scaler = StandardScaler()
    departures = rows.features - centre[rows.place]
    scaled = scaler.fit_transform(departures, sample_weight=rows.area)
    weight = rows.area / rows.area.mean()
    for penalty, start in zip(PENALTIES, linear_maps(rows, centre, classes=False), strict=True):
        ridge = Ridge(alpha=penalty * 5).fit(scaled, rows.labels, weight)
        expected = ((ridge.predict(scaled) - rows.labels) ** 2).sum(axis=1)
        error = start.error(rows, classes=False)
        assert error == pytest.approx(np.average(expected, weights=rows.area), rel=1e-6)


def test_a_logistic_start_is_that_of_a_library() -> None:
    rows = made_rows(classes=True)
    scaled = StandardScaler().fit_transform(rows.features, sample_weight=rows.area)
    starts = linear_maps(rows, np.zeros((1, 5)), classes=True)
    for strength, start in zip(LOGISTIC_STRENGTHS, starts, strict=True):
        logistic = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=1000)
        logistic.fit(scaled, rows.labels.argmax(axis=1), rows.area / rows.area.mean())
        expected = ((logistic.predict_proba(scaled) - rows.labels) ** 2).sum(axis=1)
        error = start.error(rows, classes=True)
        assert error == pytest.approx(np.average(expected, weights=rows.area), rel=2e-2)


def test_a_class_that_no_date_has_begins_rare() -> None:
    rows = replace(made_rows(classes=True), labels=np.tile([1.0, 0.0], (240, 1)))
    for start in [
        *linear_maps(rows, np.zeros((1, 5)), classes=True),
        constant_map(rows, classes=True),
    ]:
        assert not start.weight.any()
        assert softmax(start.bias)[1] == pytest.approx(1e-3, rel=2e-3)


def test_training_starts_from_the_frozen_probe(run: ProbeRun) -> None:
    """Where no learning rate helps, the answers are those of a linear probe of frozen features."""
    tuner = run._finetuner(run.questions[0].blind)
    still = replace(tuner, settings=replace(SETTINGS, learning_rate=(1e-30,)))
    question, model = run.questions[0], run.trained.model
    fit = still.fitted(model, question, 1.0)
    layers = encoded(run.embedders, run.runs, run.encoded_layers, run.places, "latents")
    train = run.cases.of("train")[question.case]
    features = side_by_side(layers).local
    assert features is not None
    rows = features.reshape(len(question.targets), -1)
    scaler = StandardScaler().fit(rows[train])
    fits = [
        LogisticRegression(C=1 / strength, max_iter=500).fit(
            scaler.transform(rows[train]), question.targets[train].argmax(axis=1)
        )
        for strength in LOGISTIC_STRENGTHS
    ]
    part = run.cases.of("validation")[question.case]
    right = question.targets[part].argmax(axis=1)
    best = max(logistic.score(scaler.transform(rows[part]), right) for logistic in fits)
    ours = (fit.predicted["validation"].argmax(axis=1) == right).mean()
    assert ours > best - 0.1  # of all tokens, not of the drawn ones alone


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
    fit = tuner.fitted(model, question, 0.2)
    predicted, count = fit.predicted, fit.num_dates
    used = dates_used(run.cases, 0.2, 0)
    assert count == len(used) < run.cases.of("train").sum()
    others = run.cases.of("train") & ~np.isin(np.arange(len(run.cases.times)), used)
    assert question.of_tokens is not None
    changed = question.of_tokens.copy()
    changed[others] = 7.0
    again = tuner.fitted(model, replace(question, of_tokens=changed), 0.2).predicted
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
    assert table["start"].tolist() == ["random"] * 2 + ["trained"] * 4
    assert table["head"].tolist() == ["zeros", "probe"] * 3
    assert table["fraction"].tolist() == [1.0, 1.0, 0.1, 0.1, 1.0, 1.0]
    assert table["dates"].tolist() == [12, 12, 1, 1, 12, 12]
    losses, stronger = 1 - table["skill"], int(table["validation"][:2].to_numpy().argmax())
    np.testing.assert_allclose(table["loss_over_plain"], losses / losses[0])
    np.testing.assert_allclose(table["loss_over_scratch"], losses / losses[stronger])
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
