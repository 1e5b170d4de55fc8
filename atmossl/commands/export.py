"""`atmossl export`: what inference needs of a checkpoint, as one file, or for a model hub with its
model card."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from atmossl.at_work import check_is_free
from atmossl.atomic_files import check_room, size_on_disk, write_atomically
from atmossl.batch import PRIMARY
from atmossl.checkpoint_files import (
    AVERAGED,
    CARD,
    read_with_digest,
    write_hub_folder,
    write_output,
)
from atmossl.data.catalog import CatalogEntry, catalog_entry
from atmossl.inference.checkpoint import (
    TrainedModel,
    checkpoint_path,
    load_checkpoint,
    naming_network,
    network_class,
)
from atmossl.inference.out_of_training_warnings import seen_in_training
from atmossl.model.network import merged
from atmossl.progress import console_of_output
from atmossl.value_faults import listed

_FENCE = "```"
_MUST_AGREE = ("streams", "network", "model", "statistics", "window")


def exported(names: Sequence[str], plugins: Sequence[str] = ()) -> dict[str, Any]:
    """What inference needs of a checkpoint: the averaged weights and the record.

    Of several checkpoints, stages of one run say, the mean of their weights and the last one's
    record (a model soup, Wortsman et al. 2022); one named twice counts twice. Weights are kept in
    the network's `exported_dtype`, half precision (11 bits of mantissa) for our own; loading makes
    them float32 again. plugins: packages whose code the checkpoints may run.

    Raises:
        ValueError: checkpoints of different models, or code of a package that is not in `plugins`.
    """
    read = {name: read_with_digest(checkpoint_path(name)) for name in dict.fromkeys(names)}
    checkpoints = {name: contents for name, (contents, _) in read.items()}
    last = checkpoints[names[-1]]
    for name, contents in checkpoints.items():
        for key in _MUST_AGREE:
            if not _same(contents["atmossl"][key], last["atmossl"][key]):
                raise ValueError(f"checkpoint={name}: its {key} is not that of {names[-1]}")
        if bool(contents["atmossl"]["first_guess"]) != bool(last["atmossl"]["first_guess"]):
            raise ValueError(f"checkpoint={name}: its first_guess is not that of {names[-1]}")
    states = [merged(checkpoints[name]["state_dict"]) for name in names]
    with naming_network(names[-1]):
        dtype = network_class(last["atmossl"]["network"], plugins).exported_dtype
    weights = {
        key: _mean([state[key] for state in states], dtype)
        for key in states[-1]
        if key.startswith(AVERAGED)
    }
    checkpoint_record = {key: value for key, value in last["atmossl"].items() if key != "rng"}
    if len(names) > 1:
        checkpoint_record["mean_of"] = [read[name][1] for name in names]
    return {"state_dict": weights, "atmossl": checkpoint_record}


def _same(first: Any, second: Any) -> bool:
    """Whether plain values, with tensors in them, are equal."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            _same(first[key], second[key]) for key in first
        )
    return first == second


def export(names: Sequence[str], output: Path, plugins: Sequence[str] = ()) -> None:
    """Write what `exported` gives as one file, atomically.

    Raises:
        ValueError: the output exists, or what `exported` raises.
    """
    if output.exists():
        raise ValueError(f"output={output} exists; choose another path or remove it")
    check_room(output, 1)
    write_output(exported(names, plugins), output)


def _mean(values: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The mean of several values of one tensor; a tensor that is no weight is that of the last
    checkpoint."""
    if not values[-1].is_floating_point():
        return values[-1]
    return torch.stack([value.float() for value in values]).mean(dim=0).to(dtype)


def export_folder(
    names: Sequence[str],
    folder: Path,
    *,
    report: str | None = None,
    catalog: str | None = None,
    licence: str = "other",
    plugins: Sequence[str] = (),
) -> Path:
    """Write a folder for a model hub: weights, configuration and model card; see
    `atmossl.checkpoint_files`.

    names: checkpoints; of several the mean, as `exported` makes it.
    report: a folder of `atmossl evaluate` of the only checkpoint, whose scores the card shows.
    catalog: has the entry of the training data, by default the catalog of the package. licence: of
    the weights, as the hub calls it. plugins: packages whose code the checkpoints may run.

    Raises:
        ValueError: the folder exists, checkpoints of different models, or a report of another
            checkpoint.
    """
    check_is_free(folder, "hub")
    check_room(folder, 1, "hub")
    contents = exported(names, plugins)
    checkpoint_record = contents["atmossl"]
    trained = load_checkpoint(names[-1], plugins)
    entry = _entry(checkpoint_record["data"], catalog)
    scores = [] if report is None else _scores(Path(report), names, plugins)

    def fill(partial: Path) -> None:
        hashes = write_hub_folder(partial, contents)
        count = sum(value.numel() for value in contents["state_dict"].values())
        text = "\n".join(_card(trained, checkpoint_record, count, entry, scores, licence, hashes))
        (partial / CARD).write_text(f"{text}\n")

    write_atomically(folder, fill)
    line = f"hub: {folder} ({size_on_disk(folder) / 2**20:.0f} MiB)"
    console_of_output().print(line)
    return folder


def _entry(data: str, catalog: str | None) -> CatalogEntry | None:
    """The catalog entry of the training data; None if the package's catalog has no entry of that
    name. An own catalog must have one."""
    try:
        return catalog_entry(data, None if catalog is None else Path(catalog))
    except ValueError:
        if catalog is not None:
            raise
        return None


def _scores(report: Path, names: Sequence[str], plugins: Sequence[str]) -> list[str]:
    """Lines of a report's summary: ratios with their intervals, and the command that made it.

    Raises:
        ValueError: no report, or one that does not name the checkpoint's digest.
    """
    try:
        summary = (report / "summary.md").read_text()
        figures = json.loads((report / "figures.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"report={report} is no folder of `atmossl evaluate`: {error}") from error
    digests = [load_checkpoint(name, plugins).digest for name in names]
    if len(digests) > 1 or f"digest {digests[0]}" not in summary:
        raise ValueError(
            f"report={report} is of another checkpoint than {listed(names)}: {listed(digests)}"
        )
    lines = ["| score | mean | 95 % interval |", "| --- | ---: | --- |"]
    for key, value in figures.items():
        if isinstance(value, float | int):
            low_high = figures.get(f"{key}_interval")
            lines.append(f"| {key} | {value} | {low_high or ''} |")
    _, _, command = summary.partition("## How to reproduce")
    return [*lines, "", "How to reproduce:", command.rstrip()]


def _card(
    trained: TrainedModel,
    checkpoint_record: Mapping[str, Any],
    num_weights: int,
    entry: CatalogEntry | None,
    scores: Sequence[str],
    licence: str,
    hashes: Mapping[str, str],
) -> Iterator[str]:
    """The model card, line by line. trained: the only checkpoint, or the last one."""
    yield from ["---", "library_name: atmossl", f"license: {licence}"]
    yield from ["tags: [weather, climate, self-supervised-learning]", "---", ""]
    origin = checkpoint_record.get("imported_from")
    kind = (
        f"imported from {origin}"
        if origin
        else f"trained by atmossl {checkpoint_record['atmossl']}"
    )
    yield f"# A model of the atmosphere ({kind})\n"
    network, steps = checkpoint_record["network"], checkpoint_record["step"]
    yield f"{num_weights:,} weights; network `{network}`, {steps} steps.\n"
    yield f"{_FENCE}python\nimport atmossl\n"
    named = checkpoint_record.get("plugins", {}).get("model")
    plugins = f', plugins=["{named.partition(".")[0]}"]' if named else ""
    yield f'model = atmossl.load("hf://OWNER/NAME"{plugins})  # pip install "atmossl[hub]"'
    yield f"{_FENCE}\n"
    yield from _about_data(trained, entry)
    yield from ["## Training", *_about_training(checkpoint_record)]
    yield from ["", "## Scores", *(scores or ["None were given to `atmossl export report=...`."])]
    yield from ["", "## Citation", "", *_citation(checkpoint_record)]
    yield from ["", "## Files", "", "| file | sha256 |", "| --- | --- |"]
    yield from (f"| `{name}` | `{value}` |" for name, value in hashes.items())


def _about_data(trained: TrainedModel, entry: CatalogEntry | None) -> Iterator[str]:
    checkpoint_record = trained.checkpoint_record
    yield "## Data\n"
    licence, citation, description = "not in the catalog", "not in the catalog", ""
    if entry is not None:
        licence, citation = entry.licence.strip(), entry.citation.strip()
        description = f": {entry.description.strip()}"
    yield f"- Data: `{checkpoint_record['data']}`{description}"
    period = checkpoint_record["statistics"][PRIMARY]["period"]
    yield f"- Period of training and statistics: {period}"
    unit = (
        "hPa"
        if checkpoint_record.get("levels_are", "pressure") == "pressure"
        else "of the model levels"
    )
    for stream in checkpoint_record["streams"]:
        levels = f"at {listed(stream['levels'])} {unit}" if stream["levels"] else "at the surface"
        variables = ", ".join(stream["variables"])
        yield f"- Stream `{stream['name']}` ({stream['role']}): {variables}, {levels}"
    for place in seen_in_training(trained).values():
        if place.cell and place.latitudes and place.longitudes:
            size = " x ".join(f"{degrees:.6g}" for degrees in place.cell)
            south, north = place.latitudes
            west, extent = place.longitudes
            yield (
                f"- Grid: cells of {size} degrees; latitudes {south:g} to {north:g}, {extent:g} "
                f"degrees of longitude from {west:g} on"
            )
    steps = (
        f"{checkpoint_record['step_hours']:g} h"
        if checkpoint_record.get("step_hours")
        else "not recorded"
    )
    size = checkpoint_record["window"]
    rows, columns = (size[key] or "all" for key in ("lat", "lon"))
    yield f"- Time step: {steps}; window: {size['time']} steps, {rows} rows, {columns} columns"
    yield f"- Licence of the data: {licence}"
    yield f"- Citation of the data: {citation}\n"


def _about_training(checkpoint_record: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"- Objective: `{checkpoint_record['objective']['kind'].rpartition('.')[2]}`"
    config = checkpoint_record["config"]
    for key, title in (("masking", "Masks"), ("seed", "Seed"), ("trainer", "Trainer")):
        if key in config:
            yield f"- {title}: `{json.dumps(config[key], default=str)}`"
    if not config:
        yield "- Its configuration is not known."


def _citation(checkpoint_record: Mapping[str, Any]) -> Iterator[str]:
    yield "- The data as above."
    yield f"- The software: atmossl {checkpoint_record['atmossl']}, <https://github.com/atmossl/atmossl>"
    if checkpoint_record.get("imported_from"):
        yield (
            "- The network: Lessig et al. (2023), AtmoRep: A stochastic model of atmosphere "
            "dynamics using large scale representation learning, arXiv:2308.13280"
        )
