"""The picture of the README: one zero-shot forecast beside its input, the truth and persistence.

python scripts/picture.py --variable temperature --level 500 docs/pictures/forecast.png
"""

import argparse
import tempfile
from pathlib import Path

import xarray as xr

from atmossl.cli import compose_config
from atmossl.commands.predict import predict
from atmossl.evaluation.report.content import Example, Given
from atmossl.evaluation.report.figures import png_bytes
from atmossl.evaluation.report.maps import case_map
from atmossl.inference.checkpoint import load_checkpoint, open_for
from atmossl.schema import StoreChoice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--variable", default="temperature")
    parser.add_argument("--level", type=float, default=500)
    parser.add_argument("--lead", default="12h")
    parser.add_argument("--init", default="1959-01-29T12")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "forecast.zarr"
        options = ["task=forecast", f"task.lead_time={arguments.lead}", f"output={store}"]
        options += [f"checkpoint={arguments.checkpoint}", f"init_time={arguments.init}"]
        predict(compose_config("predict", options))
        forecast = xr.open_zarr(store)[arguments.variable].isel(init_time=0, lead_time=-1).load()
    trained = load_checkpoint(arguments.checkpoint)
    record = open_for(trained, StoreChoice(), "test")[0].to_dataset()[arguments.variable]
    level = {"level": arguments.level} if "level" in forecast.dims else {}
    forecast, record = forecast.sel(level), record.sel(level)
    truth, state = (
        record.sel(time=time.values)
        for time in (forecast["init_time"] + forecast["lead_time"], forecast["init_time"])
    )
    given = Given(f"input {arguments.lead} before", state, is_predicted=True)
    example = Example(arguments.variable, level.get("level"), truth, forecast, given=given,
                      baselines={"persistence": state})  # fmt: skip
    picture = case_map("forecast", example, baseline="persistence")
    arguments.output.write_bytes(png_bytes(picture, 110))


if __name__ == "__main__":
    main()
