"""Wrong settings of tasks, wrong files that tasks name, streams that predict the same thing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from benchmarks.hostile.inputs.rows import Row
from benchmarks.hostile.stores import dataset, evaluating, predicting, stream, training

FIXTURES = Path("fix")
# settings of a prediction, and what the line must name
SETTINGS = [
    ("task=forecast task.lead_time=9h", "lead_time|9"),
    ("task=forecast task.lead_time=0h", "lead_time|0"),
    ("task=forecast task.lead_time=-6h", "-6h"),
    ("task=forecast task.lead_time=12", "'?12'?"),
    ("task=forecast task.lead_time=soon", "soon"),
    ("task=forecast task.lead_time=48h task.rollout_time=48h", "window|rollout_time|48"),
    ("task=forecast task.rollout_time=7h task.lead_time=14h", "7|step"),
    ("task=hindcast task.lead_time=48h", "window|48"),
    ("task=temporal_interpolation task.hidden_time=48h", "window|48|hidden_time"),
    ("task=temporal_interpolation task.hidden_time=5h", "hidden_time|5"),
    ("task=temporal_interpolation task.steps=[9]", "steps|9"),
    ("task=temporal_interpolation task.refine=0", "refine"),
    ("task=downscaling task.factor=1", "factor"),
    ("task=downscaling task.factor=3", "factor|3"),
    ("task=downscaling task.factor=64", "factor|64"),
    ("task=downscaling task.factor=two", "factor"),
    ("task=inpainting task.boxes=[]", "boxes|missing|empty"),
    ("task=inpainting task.boxes=[[0,10,20]]", "boxes"),
    ("task=inpainting task.boxes=[[10,-10,0,90]]", "south|north|boxes"),
    ("task=inpainting task.boxes=[[95,99,0,90]]", "95|boxes|latitude"),
    ("task=inpainting task.boxes=5", "boxes"),
    ("task=inpainting task.boxes=null task.observed=0", "observed|boxes"),
    ("task=inpainting task.boxes=[] task.observed=1.5", "observed"),
    ("task=inpainting task.mask_file=none.nc", "none.nc"),
    ("task=inpainting task.stations=none.csv", "none.csv"),
    ("task=inpainting task.hidden_time=48h", "48|hidden_time|window"),
    ("task=cross_variable task.variables=[ozone]", "ozone"),
    ("task=cross_variable task.variables=[]", "variables|stream"),
    ("task=cross_variable task.levels=[700] task.variables=[temperature]", "700"),
    ("task=combined task.parts=[{_target_: forecast, lead_time: 6h}]", "parts"),
    ("task=combined task.parts=[]", "parts"),
    ("task=combined task.parts=[forecast,inpainting]", "parts"),
    ("task=counterfactual task.shift_time=long", "long|shift_time"),
    ("task=counterfactual task.shift_lat=north", "shift_lat"),
    ("task=counterfactual task.levels={low: 500}", "levels|low"),
    ("task=counterfactual task.task.lead_time=7h", "lead_time|7"),
    ("task=weather", "weather"),
    ("task=none.yaml", "none.yaml"),
    ("task._target_=weather", "weather"),
    ("task.name=weather", "task._target_"),
]
_DATES = "init_time=2001-05-03T00"


def rows() -> list[Row]:
    rows = [
        Row(f"predict {given}", "refused",
            tuple(predicting(FIXTURES, "out.zarr", _DATES, *_split(given))), (word,))
        for given, word in SETTINGS
    ]  # fmt: skip
    return [*rows, *_files(), *_streams(), *_dates()]


def _split(given: str) -> list[str]:
    """Settings divided by spaces, of which none is inside brackets."""
    parts: list[str] = []
    for word in given.split(" "):
        if parts and parts[-1].count("[") + parts[-1].count("{") > (
            parts[-1].count("]") + parts[-1].count("}")
        ):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return parts


def _files() -> list[Row]:
    def written(name: str, text: str) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_text(text)

    def mask(shift: float = 0.0, rows: int = 8) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            grid = dataset()
            cells = xr.DataArray(np.ones((8, 16), "int8"), dims=("latitude", "longitude"),
                                 coords={"latitude": grid.latitude,
                                         "longitude": grid.longitude + shift})  # fmt: skip
            cells[:rows].to_dataset(name="hidden").to_netcdf(folder / "mask.nc")

        return make

    def predict(given: str) -> tuple[str, ...]:
        return tuple(predicting(FIXTURES, "out.zarr", _DATES, *_split(given)))

    own = predict("task=own.yaml")
    masked = predict("task=inpainting task.boxes=[] task.mask_file=mask.nc")
    stations = predict("task=inpainting task.boxes=[] task.stations=places.csv")
    return [
        Row("a task file without a name", "refused", own, ("_target_",),
            written("own.yaml", "lead_time: 6h\n")),
        Row("a task file with an unknown key", "refused", own, ("lead",),
            written("own.yaml", "_target_: forecast\nlead: 6h\n")),
        Row("a task file that is a list", "refused", own, ("own.yaml",),
            written("own.yaml", "- forecast\n")),
        Row("an empty task file", "refused", own, ("own.yaml",), written("own.yaml", "")),
        Row("a task file that is no YAML", "refused", own, ("own.yaml",),
            written("own.yaml", "name: [forecast\n")),
        Row("a task file that is binary", "refused", own, ("own.yaml",),
            lambda folder: (folder / "own.yaml").write_bytes(bytes(range(256)))),
        Row("a mask of fewer rows", "refused", masked, ("mask.nc",), mask(rows=7)),
        Row("a mask of the same size elsewhere", "refused", masked, ("mask.nc",), mask(shift=7.0)),
        Row("a mask that is text", "refused", masked, ("mask.nc",), written("mask.nc", "1,0,1\n")),
        Row("stations without coordinates", "refused", stations, ("places.csv",),
            written("places.csv", "name,height\nOslo,20\n")),
        Row("stations with a word for a number", "refused", stations, ("places.csv",),
            written("places.csv", "latitude,longitude\nnorth,20\n")),
        Row("stations beyond the pole", "refused", stations, ("places.csv|latitude",),
            written("places.csv", "latitude,longitude\n120,20\n")),
        Row("stations: none", "refused", stations, ("places.csv",),
            written("places.csv", "latitude,longitude\n")),
        Row("evaluate a task without truth", "refused",
            tuple(evaluating(FIXTURES, "report", "tasks=[own.yaml]")), ("truth|refine",),
            written("own.yaml", "_target_: temporal_interpolation\nhidden_time: 6h\nrefine: 2\n")),
    ]  # fmt: skip


def _streams() -> list[Row]:
    def train(*streams: str) -> tuple[str, ...]:
        return tuple(training(FIXTURES, "run", "trainer.max_steps=2", streams=streams))

    twice = stream("air", ("temperature", "temperature"))
    one, two = stream("one", ("temperature",)), stream("two", ("temperature",))
    high, low = (stream(n, ("temperature",), (p,)) for n, p in (("high", 500), ("low", 850)))
    overlap = stream("three", ("temperature", "u_component_of_wind"), (500,))

    def predicted(folder: Path) -> str:
        """Both levels are there once, near what the store holds."""
        out = xr.open_zarr(folder / "out.zarr", consolidated=False)["temperature"]
        if sorted(out["level"].values.tolist()) != [500, 850]:
            return f"levels {out['level'].values}"
        mean = float(out.mean())
        return "" if 230 < mean < 280 else f"a mean temperature of {mean:.0f} K"

    def two_levels(place):
        first = place.run(train(high, low))
        if first.code:
            return first
        given = predicting(FIXTURES, "out.zarr", _DATES, "task.lead_time=6h")
        return place.run([*given, "checkpoint=run/checkpoints/last.ckpt"])

    return [
        Row("a variable twice in a stream", "refused", train(twice), ("temperature",)),
        Row("a variable in two predicted streams", "refused", train(one, two), ("temperature",)),
        Row("a variable and level in two streams", "refused", train(one, overlap),
            ("temperature",)),
        Row("a variable on levels of two streams", "right|refused", words=("temperature",),
            act=two_levels, check=predicted),
    ]  # fmt: skip


def _dates() -> list[Row]:
    """Dates given to Python in any unit keep their year, or are refused."""

    def late(unit: str) -> Callable:
        def program(arguments) -> int:
            import atmossl
            from benchmarks.hostile.inputs.metadata import in_python

            del arguments
            store = dataset()
            dates = np.datetime64("3000-01-01", unit) + np.arange(24) * np.timedelta64(6, "h")
            store = store.assign_coords(time=dates.astype(f"M8[{unit}]"))

            def work() -> None:
                model = atmossl.load("fix/tiny.ckpt")
                out = model.predict("forecast", store, "3000-01-03T00", lead_time="6h")
                year = str(out["init_time"].values[0])[:4]
                (Path("year")).write_text(year)

            return in_python(work)

        return program

    def year(folder: Path) -> str:
        text = (folder / "year").read_text()
        return "" if text == "3000" else f"the forecast is dated {text}"

    return [
        Row(f"Python dates in {unit} beyond nanoseconds", "right|refused",
            words=("3000|nanosecond|date|time",), program=late(unit), check=year)
        for unit in ("s", "ms", "us")
    ]  # fmt: skip
