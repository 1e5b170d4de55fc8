"""Checkpoints as models of NVIDIA's Earth2Studio: forecasts as its `PrognosticModel`, any other
task as its `DiagnosticModel` (the protocols of its version 0.19).

    import atmossl
    from atmossl.integrations.earth2studio import Prognostic

    model = Prognostic(atmossl.load("default"), latitude, longitude, lead_time="6h")
    earth2studio.run.deterministic(["2020-01-10T00"], 20, model, data, io)

A field is a tensor with an ordered mapping of its dimensions: any number of leading ones, then
time, lead_time, variable, lat and lon. The steps that the network's window needs are the lead times
of the input, 0 the last. Variables have Earth2Studio's names, such as t500 or t2m, and `hl` behind
the number of a model level. What is returned is the mean of the members, or one of them.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from atmossl.api import Model, find_task
from atmossl.batch import PRIMARY, levels_by_variable
from atmossl.data.forcings import FORCINGS
from atmossl.masking.places import CrossVariable
from atmossl.masking.tasks import Task
from atmossl.value_faults import listed

Coords = OrderedDict[str, np.ndarray]
Hook = Callable[[Tensor, Coords], tuple[Tensor, Coords]]
_SHORT = {
    "temperature": "t", "u_component_of_wind": "u", "v_component_of_wind": "v",
    "geopotential": "z", "specific_humidity": "q", "vertical_velocity": "w",
    "relative_humidity": "r", "2m_temperature": "t2m", "10m_u_component_of_wind": "u10m",
    "10m_v_component_of_wind": "v10m", "mean_sea_level_pressure": "msl",
    "surface_pressure": "sp", "total_precipitation": "tp", "vorticity": "vo", "divergence": "d",
}  # fmt: skip
_DIMS = ("time", "lead_time", "variable", "lat", "lon")
_Name = tuple[str, int]  # of a variable, and a level or 0


class TaskModel:
    """A task of a checkpoint on one grid: what both interfaces have in common.

    latitude, longitude: of the cells in degrees, in the order of the tensors. member: the number of
    the one that is returned; None: the mean of all. choices: keys of the task, such as lead_time.

    Raises:
        ValueError: a task that changes grid or time step, several data sources, or no time step.
    """

    def __init__(
        self,
        model: Model,
        latitude: np.ndarray,
        longitude: np.ndarray,
        task: str | Mapping[str, Any],
        *,
        member: int | None = None,
        **choices: Any,
    ) -> None:
        self.model, self.member, trained = model, member, model.trained
        self.task = find_task(task, choices)
        hours = trained.checkpoint_record.get("step_hours")
        if hours is None or any(spec.data != PRIMARY for spec in trained.specs):
            raise ValueError("the checkpoint needs a known time step, and data of one source")
        plan = self.task.plan(trained.window.time, hours)
        if self.task.coarse_factor != 1 or plan.refine != 1 or plan.num_passes != 1:
            raise ValueError(f"task={task}: needed: one pass on the grid and at the steps it reads")
        self.step = np.timedelta64(round(float(hours) * 60), "m")
        self.given = (np.array(plan.read) - plan.read[-1]) * self.step
        self.reference = (plan.reference - plan.read[-1]) * self.step
        self.written = np.array(plan.offsets) * self.step + self.reference
        self.latitude, self.longitude = np.asarray(latitude), np.asarray(longitude)
        inside = [spec for spec in trained.specs if spec.variables[0] not in FORCINGS]
        hidden = _never_shown(self.task)
        levels = levels_by_variable(inside)
        self.inputs = _named(levels, set(levels) - hidden)
        self.hidden = _named(levels, hidden & set(levels))
        scored = set(self.task.scored_variables) or set(trained.level_values)
        self.outputs = _named(trained.level_values, scored & set(trained.level_values))

    def input_coords(self) -> Coords:
        leads = {"batch": np.empty(0), "time": np.empty(0), "lead_time": self.given}
        return OrderedDict({**leads, "variable": self._names(self.inputs), **self._grid})

    def output_coords(self, input_coords: Coords) -> Coords:
        """Raises ValueError for other lead times, variables or cells than `input_coords`."""
        needed, leads = self.input_coords(), np.asarray(input_coords["lead_time"])
        for key in ("lead_time", "variable", "lat", "lon"):
            asked = leads - leads[-1] if key == "lead_time" else np.asarray(input_coords[key])
            same = asked.shape == needed[key].shape and bool(
                (asked == needed[key]).all()
                if asked.dtype.kind in "mU"
                else np.allclose(asked, needed[key], atol=1e-4)
            )
            if not same:
                shown = (" ".join(str(v).split()) for v in (input_coords[key], needed[key]))
                raise ValueError(f"{key}: {'; needed: '.join(shown)}")
        output = OrderedDict((k, v) for k, v in input_coords.items() if k not in _DIMS[1:])
        output["lead_time"] = self.written + leads[-1]
        return OrderedDict({**output, "variable": self._names(self.outputs), **self._grid})

    def to(self, device: Any) -> Self:
        self.model = Model(self.model.trained, str(torch.device(device)))
        return self

    def __call__(self, x: Tensor, coords: Coords) -> tuple[Tensor, Coords]:
        """One pass of the network for every entry of the leading dimensions and every time."""
        coords_out = self.output_coords(coords)
        if tuple(coords)[-5:] != _DIMS:
            raise ValueError(
                f"dimensions {listed(coords)}; needed: the last ones are {listed(_DIMS)}"
            )
        flat = x.flatten(0, x.ndim - 5).unflatten(0, (-1, len(coords["time"])))
        last = np.asarray(coords["lead_time"])[-1]
        fields = [
            self._predicted(of_time.cpu().numpy(), np.datetime64(time, "ns") + last)
            for of_entry in flat
            for of_time, time in zip(of_entry, coords["time"], strict=True)
        ]
        values = torch.from_numpy(np.stack(fields)).to(x)
        return values.reshape(*x.shape[:-4], *values.shape[1:]), coords_out

    def _predicted(
        self, fields: Float[np.ndarray, "lead variable lat lon"], last: np.datetime64
    ) -> Float[np.ndarray, "lead variable lat lon"]:
        """last: the date of the last step that is given."""
        choices: dict[str, Any] = {} if self.member is None else {"members": [self.member]}
        reference = last + self.reference
        predicted = self.model.predict(
            self.task, self._dataset(fields, last), reference, input_limits="off", **choices
        )
        predicted = predicted.mean("member").reindex(
            latitude=self.latitude, longitude=self.longitude % 360, method="nearest", tolerance=1e-3
        )
        along = "lead_time" if "lead_time" in predicted.dims else "time"
        if along == "lead_time":
            predicted = predicted.isel(init_time=0)
        rows = [
            predicted[name] if not level else predicted[name].sel(level=level)
            for name, level in self.outputs
        ]
        ordered = (row.transpose(along, "latitude", "longitude").to_numpy() for row in rows)
        return np.stack(list(ordered), axis=1).astype(np.float32)

    def _dataset(self, fields: np.ndarray, last: np.datetime64) -> xr.Dataset:
        """The given variables; hidden ones, which the network is not shown, at their mean."""
        statistics = self.model.trained.normaliser.statistics[PRIMARY]
        dims = ("time", "latitude", "longitude")
        coords = dict(zip(dims, (last + self.given, self.latitude, self.longitude), strict=True))
        by_level: dict[str, dict[int, np.ndarray]] = {}
        for row, (name, level) in enumerate(self.inputs):
            by_level.setdefault(name, {})[level] = fields[:, row]
        for name, level in self.hidden:
            column = statistics.levels.index(level) if level else 0
            mean = statistics.mean[statistics.variables.index(name), column]
            by_level.setdefault(name, {})[level] = np.full_like(fields[:, 0], mean)
        every = sorted({level for levels in by_level.values() for level in levels if level})
        absent = np.full_like(fields[:, 0], np.nan)
        arrays = {
            name: (dims, of_levels[0])
            if 0 in of_levels
            else (("level", *dims), np.stack([of_levels.get(level, absent) for level in every]))
            for name, of_levels in by_level.items()
        }
        return xr.Dataset(arrays, {**coords, "level": every} if every else coords)

    @property
    def _grid(self) -> dict[str, np.ndarray]:
        return {"lat": self.latitude, "lon": self.longitude}

    def _names(self, names: list[_Name]) -> np.ndarray:
        end = "" if self.model.trained.pressure_levels else "hl"
        return np.array(
            [f"{_SHORT.get(name, name)}{f'{level}{end}' if level else ''}" for name, level in names]
        )


class Prognostic(TaskModel):
    """Forecasts as Earth2Studio's `PrognosticModel`; choices: those of the task `forecast`, of
    which lead_time is what one call goes ahead, by default one time step."""

    def __init__(
        self, model: Model, latitude: np.ndarray, longitude: np.ndarray, **choices: Any
    ) -> None:
        hours = model.trained.checkpoint_record.get("step_hours") or 0.0
        choices = {"lead_time": f"{hours:g}h", **choices}
        super().__init__(model, latitude, longitude, "forecast", **choices)
        self.front_hook: Hook = _as_it_is
        self.rear_hook: Hook = _as_it_is

    def create_iterator(self, x: Tensor, coords: Coords) -> Iterator[tuple[Tensor, Coords]]:
        """The initial state, then one call after the other.

        Raises:
            ValueError: the network predicts not all of what it is given.
        """
        if self.inputs != self.outputs:
            raise ValueError(
                f"variables {self._names(self.inputs)} are given and {self._names(self.outputs)} "
                "predicted: nothing to go on from"
            )
        axis = tuple(coords).index("lead_time")
        yield x.narrow(axis, -1, 1), OrderedDict({**coords, "lead_time": coords["lead_time"][-1:]})
        while True:
            x, coords = self.front_hook(x, coords)
            values, coords_out = self.rear_hook(*self(x, coords))
            yield values, coords_out
            joined = torch.cat([x, values], dim=axis)
            leads = np.concatenate([coords["lead_time"], coords_out["lead_time"]])
            count = len(self.given)
            x = joined.narrow(axis, joined.shape[axis] - count, count)
            coords = OrderedDict({**coords, "lead_time": leads[-count:]})


class Diagnostic(TaskModel):
    """Any other task as Earth2Studio's `DiagnosticModel`, such as cross_variable or inpainting."""


def _as_it_is(x: Tensor, coords: Coords) -> tuple[Tensor, Coords]:
    return x, coords


def _never_shown(task: Task) -> set[str]:
    """Variables that a task hides at all steps, levels and places."""
    if isinstance(task, CrossVariable) and not task.levels and not task.examples:
        return set(task.variables)
    return set()


def _named(levels: Mapping[str, tuple[int, ...]], names: set[str]) -> list[_Name]:
    return [(name, level) for name in sorted(names) for level in levels[name]]
