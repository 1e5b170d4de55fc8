"""`atmossl import atmorep`: makes a checkpoint of one of AtmoRep's published models."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atmossl.atomic_files import check_room, size_on_disk
from atmossl.batch import PRIMARY, YEAR_HOURS, StreamSpec
from atmossl.checkpoint_files import write_output
from atmossl.commands.atmorep_normalisation import Months, with_atmorep_normalisation
from atmossl.data.axes import STANDARD
from atmossl.data.segment import Segment
from atmossl.data.statistics import load_or_compute, outside_limits
from atmossl.data.store import entries_of, open_records
from atmossl.data.windows import Statistics
from atmossl.inference.checkpoint import AVERAGED, spec_to_dict, written_by
from atmossl.inference.out_of_training_warnings import DAYS, Seen
from atmossl.model.atmorep import AtmoRep, AtmoRepSettings
from atmossl.model.atmorep_files import load_atmorep
from atmossl.model.atmorep_network import AtmoRepNetwork, streams_of, window_of
from atmossl.progress import console_of_output, note
from atmossl.value_faults import listed

# What AtmoRep's published models were trained on: hourly ERA5, whole years of the globe.
_STEP_HOURS = 1.0
_TOLD = {
    None: "; AtmoRep was trained with statistics of every month, of the globe or of every grid "
    "point, so that predictions are worse than published ones",
    "climatology": ", a mean over years, where AtmoRep took the target's own month",
    "own": ", as in AtmoRep's training: of the target's own month, which tell of it beforehand",
}
_SEEN = Seen(
    days=tuple(range(DAYS)),
    calendar=STANDARD.name,
    cell=(0.25, 0.25),
    latitudes=(-90.0, 90.0),
    longitudes=(0.0, 360.0),
)


def import_atmorep(
    location: Path,
    output: Path,
    data: str,
    catalog: Path | None,
    normalisation: Path | None = None,
    months: Months = "climatology",
) -> Path:
    """Write a checkpoint of a published model of AtmoRep; returns its path.

    location: the folder with `model_idX.json` and `AtmoRep_idX.mod`, or its `.tar.gz`. data: the
    catalog entry whose train split the fields are normalised by. normalisation: AtmoRep's own
    statistics instead, of `months`; see `atmossl.commands.atmorep_normalisation`.

    Raises:
        ValueError: a file, option or field that does not fit, or a store that lacks what the
            network needs.
    """
    if output.suffix != ".ckpt" or output.exists():
        raise ValueError(f"output={output} must end in .ckpt and not exist")
    core = load_atmorep(location)
    try:
        specs, window = streams_of(core.settings), window_of(core.settings)
        network = _network(core, specs)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    segments = open_records(specs, entries_of(specs, data, catalog), "train")[PRIMARY]
    _check_store(segments, specs, core.settings, data)
    check_room(output, 1)
    statistics = load_or_compute(segments)
    if lines := outside_limits(statistics, pressure_levels=False):
        raise ValueError(f"data={data}: {'; '.join(lines)}")
    by = f"mean and standard deviation of data={data} ({statistics.period})"
    if normalisation is not None:
        fields = core.settings.fields
        statistics = with_atmorep_normalisation(statistics, fields, normalisation, segments, months)
        by = f"the {'climatology' if months == 'climatology' else 'months'} of {normalisation}"
    checkpoint_record = _record(core.settings, specs, window, statistics)
    checkpoint_record |= {"data": data, "imported_from": location.name}
    weights = {f"{AVERAGED}{name}": value for name, value in network.state_dict().items()}
    write_output({"state_dict": weights, "atmossl": checkpoint_record}, output)
    note(f"values are normalised by {by}{_TOLD[None if normalisation is None else months]}")
    line = f"checkpoint: {output} ({size_on_disk(output) / 2**20:.0f} MiB)"
    console_of_output().print(line)
    return output


def _network(core: AtmoRep, specs: tuple[StreamSpec, ...]) -> AtmoRepNetwork:
    network = AtmoRepNetwork(streams=specs, **asdict(core.settings))
    network.core.load_state_dict(core.state_dict())
    return network


def _record(
    settings: AtmoRepSettings,
    specs: Sequence[StreamSpec],
    window: tuple[int, int, int],
    statistics: Statistics,
) -> dict[str, Any]:
    """The record of the checkpoint; see `atmossl.checkpoint_files`."""
    steps, rows, columns = window
    return {
        **written_by(),
        "streams": [spec_to_dict(spec) for spec in specs],
        "network": "atmorep",
        "model": json.loads(json.dumps(asdict(settings))),  # lists, as a configuration has them
        "objective": {"kind": "AtmoRep", "provides": ["embed", "reconstruct"]},
        "statistics": {PRIMARY: statistics.to_dict()},
        "window": {"time": steps, "lat": rows, "lon": columns},
        "first_guess": False,
        "step_hours": _STEP_HOURS,
        "seen": {PRIMARY: _SEEN.to_dict()},
        "step": 0,  # AtmoRep's files do not tell how many steps it was trained for
        "levels_are": "model",
        "config": {},
        "warm_start": {},
    }


def _check_store(
    segments: Sequence[Segment], specs: Sequence[StreamSpec], settings: AtmoRepSettings, data: str
) -> None:
    """Raise ValueError if a store cannot give windows of the network, or says that its levels are
    pressures."""
    _, rows, columns = window_of(settings)
    first = segments[0]
    if first.pressure_levels and any(spec.levels for spec in specs):
        raise ValueError(
            f"data={data}: AtmoRep's levels {listed(first.levels)} are numbers of model levels; if "
            "those of the store are, say `levels_are: model` in the catalog entry"
        )
    if first.grid.shape[0] < rows or first.grid.shape[1] < columns:
        raise ValueError(
            f"data={data}: its grid of {first.grid.shape[0]} x {first.grid.shape[1]} cells is "
            f"smaller than the network's window of {rows} x {columns}, which its positions are "
            "fixed to"
        )
    if first.calendar.year_hours != YEAR_HOURS:
        raise ValueError(
            f"data={data}: its calendar is {first.calendar.name}; AtmoRep knows the standard one"
        )
