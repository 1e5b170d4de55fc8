"""The small models that probes are: ridge and logistic regression, nearest neighbours.

All work on features scaled by the training rows' mean and spread. Targets are columns of numbers;
of classes, one column a class that is 1 where the row is of it.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

PENALTIES = tuple(10.0 ** (half / 2) for half in range(-10, 13))  # of ridge, per feature
STRENGTHS = (1e-1, 1e1, 1e3, 1e5)  # of logistic regression, whose fits take longer
FEWEST_FOLDS = 4
NEIGHBOURS = 20
EXCLUDED_DAYS = 5.0
_ROWS_AT_ONCE = 2048

Predict = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Rows of features with their targets, and the run and time of each row."""

    features: Float[np.ndarray, "row feature"]
    targets: Float[np.ndarray, "row target"]
    run: Int[np.ndarray, "row"]
    times: np.ndarray

    def where(self, chosen: Bool[np.ndarray, "row"]) -> "Rows":
        return Rows(
            self.features[chosen], self.targets[chosen], self.run[chosen], self.times[chosen]
        )


def scaler_of(train: Rows) -> StandardScaler:
    """Mean and standard deviation of every feature over the training rows alone."""
    return StandardScaler().fit(train.features.astype(np.float64))


def fit_linear(train: Rows, strength: float, *, classes: bool) -> Predict:
    """Ridge regression, with the penalty times the number of features, so that as much is shrunk
    of few features as of many; or multinomial logistic regression: predicted numbers, or
    probabilities of every class."""
    scaler = scaler_of(train)
    scaled = np.asarray(scaler.transform(train.features.astype(np.float64)))
    if not classes:
        ridge = Ridge(alpha=strength * scaled.shape[1]).fit(scaled, train.targets)
        return lambda features: ridge.predict(scaler.transform(features)).reshape(len(features), -1)
    numbers = train.targets.argmax(axis=1)
    if (numbers == numbers[0]).all():
        return lambda features: np.tile(train.targets[:1], (len(features), 1))
    logistic = fitted_logistic(scaled, numbers, strength)

    def predict(features: np.ndarray) -> np.ndarray:
        probabilities = np.zeros((len(features), train.targets.shape[1]))
        probabilities[:, logistic.classes_] = logistic.predict_proba(scaler.transform(features))
        return probabilities

    return predict


def fitted_logistic(
    rows: Float[np.ndarray, "row feature"],
    numbers: Int[np.ndarray, "row"],
    strength: float,
    weight: Float[np.ndarray, "row"] | None = None,
) -> LogisticRegression:
    """Multinomial logistic regression of scaled features on numbers of classes. strength: of its
    penalty. weight: what a row counts; None: as much as any other."""
    logistic = LogisticRegression(C=1.0 / strength, max_iter=200, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as good as 200 steps make it
        return logistic.fit(rows, numbers, weight)


@dataclass(frozen=True)
class Chosen:
    """A linear probe whose penalty was chosen by cross-validation.

    predict: of the fit on all rows. skill: of the rows of every fold by fits without them, over the
    mean of the other folds.
    """

    strength: float
    predict: Predict
    skill: float


def chosen_linear(rows: Rows, *, classes: bool) -> Chosen:
    """Choose the penalty whose fits have the least squared error on folds that they lack, and fit
    all rows with it."""
    folds = folds_of(rows)
    strengths = STRENGTHS if classes else PENALTIES
    errors, of_mean = np.zeros(len(strengths)), 0.0
    for fold in np.unique(folds):
        rest, held_out = rows.where(folds != fold), rows.where(folds == fold)
        if classes:
            fits = (fit_linear(rest, strength, classes=True) for strength in strengths)
            predicted = np.stack([predict(held_out.features) for predict in fits])
        else:
            predicted = ridge_of_all(rest, held_out.features, strengths)
        errors += ((predicted - held_out.targets) ** 2).sum(axis=(1, 2))
        of_mean += ((rest.targets.mean(axis=0) - held_out.targets) ** 2).sum()
    best = int(errors.argmin())
    return Chosen(
        strengths[best],
        fit_linear(rows, strengths[best], classes=classes),
        float(1.0 - errors[best] / max(of_mean, np.finfo(float).tiny)),
    )


def folds_of(rows: Rows) -> Int[np.ndarray, "row"]:
    """The fold of every row: its run; of few runs, stretches of time, so that there are at least
    `FEWEST_FOLDS` in all. Rows drawn one by one would be near in time to those that are left."""
    runs, number = np.unique(rows.run, return_inverse=True)
    parts = -(-FEWEST_FOLDS // len(runs))
    stretch = np.zeros(len(number), int)
    for run in range(len(runs)):
        dates, position = np.unique(rows.times[number == run], return_inverse=True)
        stretch[number == run] = position * parts // len(dates)
    return number * parts + stretch


def ridge_of_all(
    train: Rows, features: Float[np.ndarray, "row feature"], strengths: Sequence[float]
) -> Float[np.ndarray, "strength row target"]:
    """Predictions of ridge regression with every penalty, as `fit_linear` has them one by one, from
    one decomposition of the smaller of the two products of the features with themselves."""
    scaler, of_feature = scaler_of(train), np.sqrt(train.features.shape[1])
    known, asked = (
        np.asarray(scaler.transform(part.astype(np.float64))) / of_feature
        for part in (train.features, features)
    )
    mean = train.targets.mean(axis=0)
    targets = train.targets - mean
    if known.shape[0] <= known.shape[1]:
        values, vectors = np.linalg.eigh(known @ known.T)
        left, right = (asked @ known.T) @ vectors, vectors.T @ targets
    else:
        values, vectors = np.linalg.eigh(known.T @ known)
        left, right = asked @ vectors, vectors.T @ (known.T @ targets)
    shrunk = [right / (values.clip(0.0) + strength)[:, None] for strength in strengths]
    return mean + np.stack([left @ part for part in shrunk])


def nearest_neighbours(
    train: Rows,
    test: Rows,
    *,
    neighbours: int = NEIGHBOURS,
    excluded_days: float = EXCLUDED_DAYS,
) -> Float[np.ndarray, "row target"]:
    """The mean target of the training rows whose features have the largest cosine with those of a
    test row. Training rows within some days in the same run are left out: weather lasts, so such a
    row would be the same weather again.

    A row that has fewer neighbours has the mean of those that it has; without any, that of all.
    """
    scaler = scaler_of(train)
    unit = _unit(np.asarray(scaler.transform(train.features)))
    span = np.timedelta64(round(excluded_days * 86400), "s")
    predicted = []
    for start in range(0, len(test.features), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        cosine = _unit(np.asarray(scaler.transform(test.features[part]))) @ unit.T
        near = np.abs(test.times[part, None] - train.times[None]) <= span
        cosine[near & (test.run[part, None] == train.run[None])] = -np.inf
        count = min(neighbours, len(unit))
        nearest = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
        counts = np.isfinite(np.take_along_axis(cosine, nearest, axis=1))[..., None]
        total = (train.targets[nearest] * counts).sum(axis=1)
        number = counts.sum(axis=1)
        mean = train.targets.mean(axis=0)
        predicted.append(np.where(number > 0, total / number.clip(1), mean))
    return np.concatenate(predicted)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
