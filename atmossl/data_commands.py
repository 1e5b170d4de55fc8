"""The commands `atmossl data ...`, once their configuration is composed."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from atmossl.at_work import keeping, owned
from atmossl.atomic_files import write_atomically
from atmossl.batch import PRIMARY
from atmossl.data.catalog import OWN_CATALOG, Gaps, catalog_entry, check_name, load_catalog
from atmossl.data.climatology import Kind, write_climatology
from atmossl.data.ingest import IngestInput, ingest, missing_shares, verify
from atmossl.data.inspect import (
    SegmentReport,
    VariableReport,
    advice,
    inspect,
    names_of,
    refusals,
    time_advice,
)
from atmossl.data.proposal import propose
from atmossl.data.segment import Segment
from atmossl.data.windows import Statistics, WindowSize
from atmossl.names import file_name
from atmossl.overrides import is_readable, key_and_value
from atmossl.progress import console_of_output
from atmossl.schema import IngestConfig, InspectConfig, StatsConfig, parse


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "hydra"}


def show_statistics(values: Mapping[str, Any]) -> None:
    """Compute or read the statistics of a training run's data, print them, and write the
    climatologies that are wanted."""
    config: StatsConfig = parse(StatsConfig, _plain(values))
    output = config.output if config.climatologies else None
    lock = nullcontext() if output is None else owned(output, "output", inside=True)
    with lock, keeping("what is done of it stays, and the same command goes on from there"):
        _show_statistics(config)


def _show_statistics(config: StatsConfig) -> None:
    from atmossl.build import (  # needs Lightning, which ingest does not
        limits_told,
        open_splits,
        statistics_of,
    )

    train, _ = open_splits(config)
    for data, segments in train.items():
        name = config.data.name if data == PRIMARY else data
        statistics = statistics_of(segments, config.data.transforms, name, force=config.force)
        _print_statistics(name, statistics, segments[0])
        mode = "off" if config.input_limits == "off" else "warn"  # to tell is all that it does
        for line in limits_told(statistics, segments[0], mode):
            console_of_output().print(f"outside of limits: {line}")
        for kind in config.climatologies:
            assert config.output is not None, "checked by the schema"
            file = f"{kind}.zarr" if data == PRIMARY else f"{file_name(data)}-{kind}.zarr"
            _write_climatology(segments, kind, config.output / file, config)


def _print_statistics(name: str, statistics: Statistics, segment: Segment) -> None:
    """Lines of at most 79 characters; a surface variable has one."""
    fields = ("mean", "std", "step_std", "minimum", "maximum", "missing")
    heads = ("level", *(field.replace("_", " ") for field in fields))
    lines = [f"{name}", f"{heads[0]:>7}{''.join(f'{head:>12}' for head in heads[1:])}"]
    for row, variable in enumerate(statistics.variables):
        lines.append(variable)
        for column, level in enumerate(segment.levels_of(variable)):
            numbers = [getattr(statistics, field) for field in fields]
            shown = ["" if x is None else f"{x[row, column]:.4g}" for x in numbers]
            lines.append(f"{level or '':>7}{''.join(f'{text:>12}' for text in shown)}")
    lines += [f"period: {statistics.period}", f"fingerprint: {statistics.fingerprint}"]
    console_of_output().print("\n".join(lines))


def _write_climatology(
    train: Sequence[Segment], kind: Kind, path: Path, config: StatsConfig
) -> None:
    with Progress() as bar:
        task = bar.add_task(kind)
        written = write_climatology(
            train,
            kind,
            path,
            memory_bytes=config.memory_mib * 2**20,
            force=config.force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    state = "written" if written else "there already, of this state of the store"
    console_of_output().print(f"climatology: {path}, {state}")


def run_ingest(values: Mapping[str, Any]) -> Path:
    """Make a training store from files that others wrote; returns its path."""
    config: IngestConfig = parse(IngestConfig, _plain(values))
    source = IngestInput(**{key.name: getattr(config, key.name) for key in fields(IngestInput)})
    on_stop = "the regions that are done stay, and the same command goes on from there"
    with owned(config.output, "output"), keeping(on_stop), Progress() as bar:
        task = bar.add_task("regions", visible=False)  # until the input is opened and checked
        ingest(
            source,
            config.output,
            config.layout,
            config.workers,
            lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            lambda line: bar.console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
    count = verify(config.output) if config.verify else 0
    checked = f", {count} regions read again and equal to their checksums" if count else ""
    console_of_output().print(f"store: {config.output}{checked}")
    for name, share in missing_shares(config.output).items():
        console_of_output().print(f"missing values: {name} {share:.2%}")
    return config.output


def check_new_entry(name: str, catalog: Path | None) -> None:
    """Raise ValueError if an entry of this name exists, or the name cannot be one.

    catalog: the file that the entry is to stand in; None: that of the working folder.
    """
    check_name(name, "name")
    if is_readable(f"name={name}") and not isinstance(key_and_value(f"name={name}")[1], str):
        raise ValueError(
            f"name={name}: the command line reads it as no text, so that data={name} would not "
            f"find the entry; valid: a name such as store_{name}"
        )
    path = catalog or OWN_CATALOG
    if name in (load_catalog(catalog) if catalog is None or path.is_file() else {}):
        raise ValueError(
            f"name={name} is an entry of the catalog already and stays as it is; give another "
            f"name, or remove it in {path}"
        )


def add_store(location: str, name: str, catalog: Path | None) -> None:
    """Write a catalog entry for a store, and tell what was guessed and which command comes next.

    Raises:
        ValueError: the name stands in the catalog, or the store does not fit.
    """
    path = catalog or OWN_CATALOG
    with owned(path, "data.catalog"):
        check_new_entry(name, catalog)
        proposal = propose(location)
        values = proposal.entry.model_dump(mode="json", exclude_defaults=True)
        text = yaml.safe_dump({name: values}, sort_keys=False, width=100, allow_unicode=True)
        before = path.read_text().rstrip("\n") + "\n\n" if path.is_file() else ""
        write_atomically(path, lambda partial: partial.write_text(before + text))
    more = f" data.catalog={catalog}" if catalog else ""
    lines = [
        f"{name}: {location}",
        *(f"  {line}" for line in proposal.lines),
        f"written to {path}: change there what was guessed wrong",
        f"to look at it: atmossl data inspect {name}{more}",
        *proposal.doubts,
        f"next:          atmossl train data={name}{more} paths.output=runs/{name}",
    ]
    console_of_output().print("\n".join(lines))


def show_inspection(values: Mapping[str, Any]) -> list[SegmentReport]:
    """Print what is in the stores of a catalog entry, and draw a map of every variable."""
    config: InspectConfig = parse(InspectConfig, _plain(values))
    if config.data.name is None:
        raise ValueError("inspect needs the name of a catalog entry; see atmossl data list")
    with owned(config.output, "output", inside=True), keeping("maps that are there stay"):
        return _show_inspection(config)


def _show_inspection(config: InspectConfig) -> list[SegmentReport]:
    from atmossl.data.field_map import map_of  # needs Cartopy, which ingest does not

    assert config.data.name is not None, "checked before"
    entry = catalog_entry(config.data.name, config.data.catalog)
    window = config.window
    reports = inspect(entry, window, config.samples)
    console = Console(markup=False, highlight=False)
    for report in reports:
        _print_segment(console, report, window, entry.gaps)
    variables = [variable for report in reports for variable in report.variables]
    for picture, variable in zip(names_of(reports), variables, strict=True):
        map_of(variable).savefig(config.output / f"{file_name(picture)}.png", dpi=110)
    console.print(f"maps: {config.output}")
    return reports


def _print_segment(
    console: Console, report: SegmentReport, window: WindowSize, choice_for_gaps: Gaps
) -> None:
    time = report.time
    console.print(f"\n{report.name}: {report.location}", style="bold")
    dates = [time.calendar.show(t) for t in (time.start, time.end)]
    notes = [] if time.calendar.plain else [f"calendar {time.calendar.name}"]
    if time.step_range_hours is not None:
        shortest, longest = time.step_range_hours
        notes.append(f"uneven, from {shortest:g} to {longest:g} h")
    elif not time.gaps and not time.duplicates:
        notes.append("no gaps or duplicates")
    notes += [] if time.ascending else ["not in ascending order"]
    console.print(
        f"{time.num_steps} steps of {time.step_hours:g} h from {dates[0]} to {dates[1]}"
        f"{''.join(f', {note}' for note in notes)}"
    )
    gaps = [f"{count} steps after {time.calendar.show(t)}" for t, count in time.gaps]
    _print_times(console, "gap", gaps)
    _print_times(console, "duplicate", [time.calendar.show(t) for t in time.duplicates])
    table = Table("variable", "units", "range in sample", "missing", "limits", box=SIMPLE_HEAD)
    table.pad_edge = False
    for column in table.columns:
        column.overflow = "fold"  # in a narrow window, rather than cut off
    for variable in report.variables:
        table.add_row(*_row(variable))
    console.print(table)
    _print_storage(console, report.variables)
    advices = time_advice(time, choice_for_gaps)
    for variable in report.variables:
        advices += [*refusals(variable, report.location), *advice(variable, window)]
    for line in advices:
        console.print(f"advice: {line}")


def _row(variable: VariableReport) -> list[str]:
    low, high = variable.limits
    verdict = "within" if variable.within_limits else f"OUTSIDE {low:g} to {high:g}"
    return [
        variable.name,
        variable.units,
        f"{variable.minimum:.4g} to {variable.maximum:.4g}",
        f"{variable.missing:.2%}",
        verdict if variable.has_values else "no values",
    ]


def _print_storage(console: Console, variables: Sequence[VariableReport]) -> None:
    """Shape, chunks and the cost of a window, once for all variables that are stored alike."""
    alike: dict[tuple, list[VariableReport]] = {}
    for variable in variables:
        key = (variable.dims, variable.shape, variable.chunks, variable.dtype, variable.levels)
        alike.setdefault(key, []).append(variable)
    for (dims, shape, chunks, dtype, levels), stored_alike in alike.items():
        first = stored_alike[0]
        ratio = float(np.prod(list(first.decoded_over_needed.values())))
        axes = ", ".join(f"{dim} {size}" for dim, size in zip(dims, shape, strict=True))
        lines = [
            f"stored: {', '.join(variable.name for variable in stored_alike)}",
            f"  axes: {axes}",
            f"  chunks: {' x '.join(map(str, chunks))} of {dtype}",
            f"  size: {first.gibibytes:.3g} GiB each, as float32",
            f"  a window touches {first.reads:.1f} chunks, decodes {ratio:.1f} times its values",
        ]
        if levels:
            lines.insert(2, f"  levels: {', '.join(f'{level:g}' for level in levels)}")
        for line in lines:
            console.print(line)


def _print_times(console: Console, noun: str, lines: Sequence[str], limit: int = 5) -> None:
    for line in lines[:limit]:
        console.print(f"{noun}: {line}")
    if len(lines) > limit:
        console.print(f"and {len(lines) - limit} more {noun}s")
