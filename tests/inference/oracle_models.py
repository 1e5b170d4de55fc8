"""Networks whose prediction is known, and predictors that use them on travelling waves."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from atmossl.batch import PRIMARY, Prediction, StreamPrediction, StreamSpec, StreamTokens, View
from atmossl.data.segment import Segment
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.windows import Normaliser, WindowSize
from atmossl.inference.cases import predict_fields
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.plan import Options, Plan, plan_prediction
from atmossl.masking.tasks import Task
from tests.synthetic import dataset, spec

NAMES = ("temperature", "u_component_of_wind")
STORE = dataset(steps=12)


class Oracle(nn.Module):
    """What inference asks of a network beside its values."""

    any_member = False
    num_members: int | None = None


class Known(Oracle):
    """Members: a function of the tokens of a stream, plus each of `offsets` (normalised)."""

    def __init__(
        self, tokens: Callable[[StreamTokens], Tensor], offsets: tuple[float, ...] = (-1, 1)
    ) -> None:
        super().__init__()
        self.tokens, self.offsets, self.num_members = tokens, offsets, len(offsets)

    def forward(self, view: View) -> Prediction:
        streams = []
        for stream in view.streams:
            if stream.spec.role != "predict":
                continue
            flat = self.tokens(stream).flatten(1, 4)
            assert stream.queries is not None
            index = stream.queries.index[..., None].expand(-1, -1, flat.shape[-1])
            values = flat.gather(1, index)
            members = torch.stack([values + offset for offset in self.offsets], dim=2)
            streams.append(StreamPrediction(members, stream.queries))
        return Prediction(tuple(streams))


class Diffusing(Oracle):
    """The last state plus noise of normalised variance 1, new in every point, member and tile."""

    def __init__(self, num_members: int) -> None:
        super().__init__()
        self.num_members = num_members
        self.known = Known(lambda stream: stream.guess, (0.0,) * num_members)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, view):
        (still,) = self.known(view).streams
        noise = torch.randn(still.members.shape, generator=self.generator)
        return Prediction((replace(still, members=still.members + noise),))


def segment(
    store: xr.Dataset = STORE, may_miss: tuple[str, ...] = (), name: str = "waves"
) -> Segment:
    names = [str(name) for name in store.data_vars]
    return open_segment(
        name,
        store,
        "memory",
        variables=names,
        levels=store["level"].values.tolist(),
        may_miss=may_miss,
    )


def trained_on(
    records: Mapping[str, Segment],
    model: nn.Module,
    specs: tuple[StreamSpec, ...],
    window: tuple[int, int, int],
) -> TrainedModel:
    """A network as if it was trained on records, by the `data` of its streams."""
    return TrainedModel(
        model=model,
        specs=specs,
        normaliser=Normaliser({data: compute_statistics([r]) for data, r in records.items()}),
        window=WindowSize(*window),
        first_guess=True,
        data="waves",
        checkpoint_record={},
        digest="0",
    )


def predictor(
    task: Task,
    model: nn.Module,
    *,
    store: xr.Dataset = STORE,
    specs: tuple[StreamSpec, ...] = (spec(token=(1, 2, 2)),),
    window: tuple[int, int, int] = (5, 4, 8),
    statistics: xr.Dataset = STORE,
    others: tuple[Segment, ...] = (),
    **changes,
) -> Plan:
    trained = trained_on({PRIMARY: segment(statistics)}, model, specs, window)
    options = Options(**{"overlap": 0.5, "batch_size": 3, "device": "cpu"} | changes)
    missing = [spec for spec in trained.specs_for(task) if spec.missing == "mask"]
    record = segment(store, tuple(name for spec in missing for name in spec.variables))
    return plan_prediction(trained, task, (record, *others), options)


def run_at(used: Plan, step: int) -> dict[str, np.ndarray]:
    (fields,) = predict_fields(used, [used.segment.times[step]])
    return fields
