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

STRENGTHS = (1e-1, 1e1, 1e3, 1e5)  # of the penalty on coefficients of scaled features
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
    """Ridge regression, or multinomial logistic regression with the same penalty: predicted
    numbers, or probabilities of every class."""
    scaler = scaler_of(train)
    scaled = scaler.transform(train.features.astype(np.float64))
    if not classes:
        ridge = Ridge(alpha=strength).fit(scaled, train.targets)
        return lambda features: ridge.predict(scaler.transform(features)).reshape(len(features), -1)
    numbers = train.targets.argmax(axis=1)
    logistic = LogisticRegression(C=1.0 / strength, max_iter=200, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as good as 200 steps make it
        logistic.fit(scaled, numbers)

    def predict(features: np.ndarray) -> np.ndarray:
        probabilities = np.zeros((len(features), train.targets.shape[1]))
        probabilities[:, logistic.classes_] = logistic.predict_proba(scaler.transform(features))
        return probabilities

    return predict


def chosen_strength(
    train: Rows, validation: Rows, *, classes: bool, strengths: Sequence[float] = STRENGTHS
) -> tuple[float, Predict]:
    """The penalty with the least squared error on the validation rows, and the model with it."""

    def error(predict: Predict) -> float:
        return float(((predict(validation.features) - validation.targets) ** 2).mean())

    fitted = {strength: fit_linear(train, strength, classes=classes) for strength in strengths}
    best = min(fitted, key=lambda strength: error(fitted[strength]))
    return best, fitted[best]


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
