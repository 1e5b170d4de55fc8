"""atmossl from Python: a checkpoint, a task and a dataset make a dataset of predictions.

model = atmossl.load("default")
forecast = model.predict("forecast", atmossl.open_data("sample"), "1959-02-12T00")
forecast.temperature.sel(level=500).isel(lead_time=-1).mean("member").plot()
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import xarray as xr
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from atmossl.at_work import owned
from atmossl.batch import PRIMARY
from atmossl.data.backends import OpenedStore
from atmossl.data.catalog import Split, catalog_entry, find_file, yaml_fault
from atmossl.data.chunks import Access
from atmossl.data.segment import Segment
from atmossl.data.store import StoreRequest, only_segment, open_segment, open_split, paired
from atmossl.data.variables import InputLimits
from atmossl.inference.cases import predictions
from atmossl.inference.checkpoint import TrainedModel, load_checkpoint
from atmossl.inference.embed import Embedder, embeddings, write_embeddings
from atmossl.inference.out_of_training_warnings import out_of_training_warnings
from atmossl.inference.plan import Options, Plan, Times, chosen_times, plan_prediction
from atmossl.inference.writer import LayoutName, check_output, check_request, group_of, write
from atmossl.masking.tasks import Task
from atmossl.model.latent_distance import distance as distance  # offered as atmossl.distance
from atmossl.model.latent_distance import squared_difference
from atmossl.schema import ChosenMembers, trained_sampler
from atmossl.schema.config_errors import lines_of
from atmossl.schema.targets import ChosenTask
from atmossl.settings import NUM_SEEDS, check_plugins
from atmossl.value_faults import as_written, listed


@dataclass(frozen=True)
class Model:
    """A checkpoint ready to predict, on a device such as `cpu` or `cuda`."""

    trained: TrainedModel
    device: str

    def __repr__(self) -> str:
        trained = self.trained
        millions = sum(weight.numel() for weight in trained.model.parameters()) / 1e6
        first, last = trained.training_dates
        abilities = " and ".join(sorted(trained.provides))
        return (
            f"Model({len(trained.variables)} variables, {len(trained.levels)} levels, "
            f"{millions:.1f} M parameters, trained on {trained.data}, "
            f"{first} to {last};\n"
            f"      variables: {', '.join(trained.variables)};\n"
            f"      can {abilities}, on {self.device}, digest {trained.digest})"
        )

    def predict(
        self,
        task: str | Mapping[str, Any] | Task,
        dataset: xr.Dataset,
        times: Times = None,
        *,
        output: str | Path | None = None,
        layout: LayoutName = "cf",
        overlap: float = 0.5,
        tilings: int = 2,
        batch_size: int = 16,
        seed: int = 0,
        members: int | Sequence[int] | None = None,
        fill_missing: bool = False,
        input_limits: InputLimits = "refuse",
        others: Mapping[str, xr.Dataset] | None = None,
        data: str = PRIMARY,
        **choices: Any,
    ) -> xr.Dataset:
        """Predict one task at the given init or valid times; without times, at all possible ones.

        task: the name of a task or a YAML file, of which `choices` change keys (`lead_time="2d"`);
            or a mapping with the keys of such a file; or a task object. dataset: CF names, dims
            (time, level, latitude, longitude) in any order. members: numbers of the wanted members,
            as in `[1, 2]`; or, for a network of `model.ensemble=noise`, how many draws of noise,
            each a whole field; by default all members of a tail. fill_missing: predict also where
            the dataset never has a value. input_limits: whether values that no atmosphere has are
            refused, taken with a warning (`warn`), or not looked for (`off`). others: the datasets
            of streams with `data` of their own, by that name. data: which streams are returned, on
            their own cells and at their own steps. output: a file to which all is written, and
            which is opened lazily; without it the prediction is in memory.

        Warns of what the checkpoint was not trained for.

        Raises:
            ValueError: anything that does not fit, before the model runs.
        """
        counts = {"tilings": tilings, "batch_size": batch_size}
        _check_choices(dataset, layout, input_limits, **counts)
        if not hasattr(seed, "__index__") or not 0 <= seed < NUM_SEEDS:
            raise ValueError(f"seed={seed!r}; valid: a whole number from 0 to 2**63 - 1")
        sampler = _sampler(task, choices)
        settings = {"device": self.device, "seed": int(seed), "fill_missing": fill_missing}
        options = Options(overlap=overlap, members=_chosen_members(members), **counts, **settings)
        record = self._record({PRIMARY: dataset, **(others or {})}, sampler, input_limits)
        plan = plan_prediction(self.trained, sampler, [record], options)
        _check_data(plan, data)
        chosen = chosen_times(plan, times)
        if output is not None:
            check_output(Path(output))
            check_request(plan, chosen, Path(output), layout)
        sampler = trained_sampler(self.trained.checkpoint_record, self.trained.plugins)
        for caution in out_of_training_warnings(plan, chosen, sampler):
            warnings.warn(f"this checkpoint was not trained for {caution}", stacklevel=2)
        if output is not None:
            with owned(Path(output), "output"):
                write(plan, chosen, Path(output), names=layout)
            return _opened(Path(output), data)
        return _in_memory(plan, chosen, layout, data)

    def embed(
        self,
        dataset: xr.Dataset,
        times: Times = None,
        *,
        layer: int = -1,
        output: str | Path | None = None,
        overlap: float = 0.5,
        batch_size: int = 16,
        input_limits: InputLimits = "refuse",
        others: Mapping[str, xr.Dataset] | None = None,
    ) -> xr.Dataset:
        """The latents of an encoder layer (0 the first, -1 the last) at the given times; without
        times, at all possible ones.

        Each time is the last step of the window that is encoded; nothing is hidden. Dims
        (init_time, offset, level, latitude, longitude, feature) are those of the tokens, with the
        tokens' centres as coordinates. With several streams the names of variables and dims end
        with the stream's name. output: a zarr store that is written and opened lazily; without it
        the latents are in memory. Other arguments are those of `predict`.

        Raises:
            ValueError: anything that does not fit, before the model runs.
        """
        _check_choices(dataset, "cf", input_limits, batch_size=batch_size)
        embedder = Embedder(
            trained=self.trained,
            segments=(self._record({PRIMARY: dataset, **(others or {})}, None, input_limits),),
            layer=layer,
            overlap=overlap,
            batch_size=batch_size,
            device=self.device,
        )
        chosen = chosen_times(embedder, times)
        if output is not None:
            with owned(Path(output), "output"):
                write_embeddings(embedder, chosen, Path(output))
            return xr.open_zarr(output, decode_timedelta=True)
        return xr.concat(embeddings(embedder, list(chosen)), "init_time", data_vars="minimal",
                         coords="minimal", compat="override", combine_attrs="override")  # fmt: skip

    def distance(
        self,
        first: xr.Dataset,
        second: xr.Dataset,
        times: Times = None,
        other_times: Times = None,
        **choices: Any,
    ) -> xr.DataArray:
        """The distance of two datasets at each of the given times, in the latents of a model that
        learned a distance of states (`atmossl.model.latent_distance.distance`), by init_time.

        other_times: of the second dataset, as many as of the first; the same by default. choices:
            arguments of `embed`.

        Raises:
            ValueError: the model was not trained to tell a distance, or anything that does not fit.
        """
        self.trained.require("distance")
        latents_of_first = self.embed(first, times, **choices)
        init_time = latents_of_first.init_time
        second_times = init_time if other_times is None else other_times
        latents_of_second = self.embed(second, second_times, **choices)
        sizes = [dict(latents.sizes) for latents in (latents_of_first, latents_of_second)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"first has sizes {sizes[0]}, second {sizes[1]}; needed: one grid, and as many "
                "times"
            )
        squares = []
        for name, latents in latents_of_first.data_vars.items():
            pair = (torch.from_numpy(x.to_numpy()) for x in (latents, latents_of_second[name]))
            apart = xr.DataArray(squared_difference(*pair).numpy(), dims=latents.dims[:-1])
            (latitude,) = (str(d) for d in latents.dims if str(d).startswith("latitude"))
            weight = xr.DataArray(np.cos(np.deg2rad(latents[latitude].to_numpy())), dims=latitude)
            squares.append(apart.weighted(weight).mean(apart.dims[1:]))
        mean = sum(squares) / len(squares)
        assert isinstance(mean, xr.DataArray)
        named = np.sqrt(mean).assign_coords(init_time=init_time).rename("distance")
        return named.assign_attrs(long_name="distance of states in latents", units="1")

    def _record(
        self, datasets: Mapping[str, xr.Dataset], task: Task | None, input_limits: InputLimits
    ) -> Segment:
        """One record of all datasets, by the streams' `data`, as the task needs it."""
        needed = {spec.data for spec in self.trained.specs}
        if needed != set(datasets):
            raise ValueError(
                f"others={as_written(sorted(set(datasets) - {PRIMARY}))}: the checkpoint's streams "
                f"need {listed(sorted(needed - {PRIMARY}))} beside the dataset"
            )
        records, access = {}, Access(input_limits=input_limits)
        for data, dataset in datasets.items():
            needs = StoreRequest.of([s for s in self.trained.specs_for(task) if s.data == data])
            segment = open_segment(
                "dataset",
                OpenedStore(
                    dataset,
                    pressure_levels=self.trained.pressure_levels,
                    model_levels=not self.trained.pressure_levels,
                ),
                "the dataset" if data == PRIMARY else f"others[{data!r}]",
                variables=needs.variables,
                levels=needs.levels,
                access=access,
                may_miss=needs.may_miss,
            )
            records[data] = (segment,)
        (segment,) = paired(records)
        return segment


def _sampler(task: Any, choices: Mapping[str, Any]) -> Task:
    if not isinstance(task, Task):
        return find_task(task, choices)
    if choices:
        raise ValueError(
            f"{as_written(choices)} change keys of a task by name; {task} is one already"
        )
    return task


def _check_data(plan: Plan, data: str) -> None:
    if data not in plan.coverage:
        have = sorted(plan.coverage)
        raise ValueError(f"data={data!r} is predicted by no stream; valid: {listed(have)}")


def _check_choices(dataset: Any, layout: str, input_limits: str, **counts: int) -> None:
    if not isinstance(dataset, xr.Dataset):
        raise ValueError(f"dataset is a {type(dataset).__name__}; valid: an xarray.Dataset")
    if layout not in get_args(LayoutName):
        raise ValueError(f"layout={layout!r}; valid: {listed(get_args(LayoutName))}")
    if input_limits not in get_args(InputLimits):
        raise ValueError(f"input_limits={input_limits!r}; valid: {listed(get_args(InputLimits))}")
    for key, count in counts.items():
        if count < 1:
            raise ValueError(f"{key}={count}; valid: 1 or more")


def _chosen_members(members: Any) -> int | tuple[int, ...] | None:
    """The choice of members in the form that `members=` has on the command line."""
    try:
        return TypeAdapter(ChosenMembers).validate_python(members)
    except ValidationError as error:
        raise ValueError("\n".join(lines_of(error.errors(), within=("members",)))) from error


def _in_memory(plan: Plan, times: np.ndarray, layout: LayoutName, data: str) -> xr.Dataset:
    parts = list(predictions(plan, times, layout, data))
    if not parts:
        raise ValueError(f"data={data!r} has no step at what is predicted")
    along = next(name for name in ("init_time", "time") if name in parts[0].dims)
    return xr.concat(parts, along, combine_attrs="override", data_vars="minimal", join="outer")


def _opened(output: Path, data: str) -> xr.Dataset:
    """The written prediction, opened lazily: a group of it if the streams have data of their
    own."""
    if output.suffix == ".grib2":
        return xr.open_dataset(output, engine="cfgrib", decode_timedelta=True)
    engine = "zarr" if output.suffix == ".zarr" else "netcdf4"
    return xr.open_dataset(
        output, decode_timedelta=True, engine=engine, group=group_of(data) or None, chunks={}
    )


def load(
    checkpoint: str | Path = "default", *, device: str | None = None, plugins: Sequence[str] = ()
) -> Model:
    """Load a checkpoint, by default the package's reference one, onto the GPU if there is one.

    plugins: packages whose code the checkpoint may run, such as `["my_package"]`; no other is
        imported.

    Raises:
        ValueError: no such checkpoint, device or package, or a network of a package that is not in
            `plugins`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"device={device!r}: {why}; valid: cpu, cuda") from error
    return Model(load_checkpoint(str(checkpoint), check_plugins(plugins)), device)


def open_data(
    name: str = "sample",
    split: Split = "test",
    catalog: str | None = None,
    *,
    segment: str | None = None,
) -> xr.Dataset:
    """A split of a catalog entry, lazily where its store is lazy; of several records, `segment`.

    Raises:
        ValueError: no such entry, split or segment, or several segments and none is named.
    """
    entry = catalog_entry(name, None if catalog is None else Path(catalog))
    segments = open_split(
        entry, split, variables=sorted(entry.variables), levels=sorted(entry.levels)
    )
    return only_segment(segments, segment, split).dataset


def read_task(task: str) -> Any:
    """The content of a task's file, by the name in conf/task or the path.

    Raises:
        ValueError: no such file, or no YAML.
    """
    folder = find_file("conf") / "task"
    path = Path(task) if task.endswith((".yaml", ".yml")) else folder / f"{task}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        raise ValueError(f"task={task}: no file {path}; valid: {listed(names)}, or a YAML file")
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"task={path} is no YAML: {yaml_fault(error)}") from error


def find_task(task: str | Mapping[str, Any], choices: Mapping[str, Any]) -> Task:
    """A task by name, by YAML file or by its keys, with some keys changed.

    Raises:
        ValueError: no such task or file, an unknown key, or a value that does not fit.
    """
    if isinstance(task, str):
        task = read_task(task)
    if not isinstance(task, Mapping):
        raise ValueError(f"task={task!r} has no keys; valid: _target_ and the choices of a task")
    try:
        config = ConfigDict(arbitrary_types_allowed=True)
        return TypeAdapter(ChosenTask, config=config).validate_python({**task, **choices})
    except ValidationError as error:
        lines = lines_of(error.errors(), within=("task",))
        raise ValueError("\n".join(lines)) from error
