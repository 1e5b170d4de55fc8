"""The texts that `atmossl --help` and `atmossl COMMAND --help` print, in 80 columns.

The keys, their defaults and most of their meaning are those of conf/. Where a file says nothing of
a key, the docstring of the class that takes it does, and the types of the schema say what is valid.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel

from atmossl.data.catalog import find_file

_WIDTH, _LEFT = 79, 33


@dataclass(frozen=True)
class Command:
    """The help of a command: what it does, the words after its name, its file in conf/, and
    examples.

    keys: of a command without a file, with their meaning.
    """

    does: str
    words: str
    examples: tuple[str, ...]
    conf: str | None = None
    schema: str | None = None
    keys: Mapping[str, str] | None = None


_CHECKPOINT = "a file, the folder of a run, default, or hf://OWNER/NAME"
_PLUGINS = "packages whose code the checkpoint may run, such as [my_package]"
COMMANDS = {
    "train": Command(
        "Trains a model, or a sweep of models with -m.", "[KEY=VALUE ...] [-m]",
        (
            "atmossl train experiment=quickstart trainer.max_steps=500 model.dim=128",
            "atmossl train -m model.dim=64,128",
            "atmossl train paths.output=runs/mine resume=auto",
        ), "train", "TrainConfig",
    ),
    "predict": Command(
        "Writes what a checkpoint predicts for a task, such as a forecast.", "[KEY=VALUE ...]",
        (
            "atmossl predict task=forecast init_time=1959-02-01T00 output=out.zarr",
            "atmossl predict init_time=1959-02-01/1959-02-09/2d output=out.nc",
            "atmossl predict task=my_task.yaml init_time=all every=4 output=out.zarr",
        ), "predict", "PredictConfig",
    ),
    "embed": Command(
        "Writes latents of a checkpoint's encoder, with their coordinates.", "[KEY=VALUE ...]",
        (
            "atmossl embed init_time=1959-02-01T00 output=latents.zarr",
            "atmossl embed checkpoint=runs/mine layer=0 every=4 output=latents.zarr",
            "atmossl embed data=my_store split=validation output=latents.zarr",
        ), "embed", "EmbedConfig",
    ),
    "probe": Command(
        "Probes what the latents of a checkpoint hold, against baselines.", "[KEY=VALUE ...]",
        (
            "atmossl probe probes=[jet_latitude,anomaly_24h] output=report",
            "atmossl probe checkpoint=runs/mine layers=[-1] output=report",
            "atmossl probe checkpoint=[a.ckpt,b.ckpt] every=5 output=report",
        ), "probe", "ProbeConfig",
    ),
    "features": Command(
        "Shows what a checkpoint's encoder sees: attention, components, analogues.",
        "[KEY=VALUE ...]",
        (
            "atmossl features checkpoint=default output=page",
            "atmossl features checkpoint=runs/mine init_time=1959-02-12T00 output=page",
            "atmossl features places=[europe,[35,139]] layers=[0,-1] output=page",
        ), "features", "FeaturesConfig",
    ),
    "calibrate": Command(
        "Fits the spread of a checkpoint's ensemble for a task, on the validation split.",
        "[KEY=VALUE ...]",
        (
            "atmossl calibrate task=forecast output=new.ckpt",
            "atmossl calibrate checkpoint=runs/mine task.lead_time=1d output=new.ckpt",
            "atmossl calibrate task=downscaling every=8 output=new.ckpt",
        ), "calibrate", "CalibrateConfig",
    ),
    "evaluate": Command(
        "Scores tasks of a checkpoint, or forecast stores, against baselines.",
        "[KEY=VALUE ...]",
        (
            "atmossl evaluate tasks=[forecast,my_task.yaml] output=report every=4",
            "atmossl evaluate tasks=forecast tasks.forecast.lead_time=6h output=report",
            "atmossl evaluate forecasts=[ours.zarr,theirs.zarr] data=NAME output=report",
        ), "evaluate", "EvaluateConfig",
    ),
    "import": Command(
        "Makes a checkpoint of a model that AtmoRep's authors published.",
        "atmorep FOLDER KEY=VALUE ...",
        (
            "atmossl import atmorep FOLDER data=NAME output=atmorep.ckpt",
            "atmossl import atmorep FOLDER data=NAME output=a.ckpt data.catalog=my.yaml",
            "atmossl import atmorep FOLDER data=NAME output=a.ckpt normalisation=FOLDER",
        ),
        keys={
            "data": "the catalog entry that the model is run on",
            "output": "the checkpoint that is written, .ckpt",
            "data.catalog": "a YAML file; left out: the catalog of the package",
            "normalisation": "folder of AtmoRep's own normalisation; left out: that of the data",
            "normalisation.months": "climatology, or own: the date's own month, as AtmoRep trained",
        },
    ),
    "export": Command(
        "Writes a small checkpoint of weights and record alone, or a folder for a model hub.",
        "KEY=VALUE ...",
        (
            "atmossl export checkpoint=runs/mine output=small.ckpt",
            "atmossl export checkpoint=a.ckpt,b.ckpt output=mean.ckpt",
            "atmossl export checkpoint=runs/mine hub=FOLDER report=report",
        ),
        keys={
            "checkpoint": f"{_CHECKPOINT}; of several, between commas, the mean of the weights",
            "output": "the checkpoint that is written, .ckpt",
            "hub": "in place of output: the folder that is written",
            "report": "of `atmossl evaluate`, whose scores the folder for a hub shows",
            "data.catalog": "of the data, for the folder for a hub",
            "licence": "of the weights, for the folder for a hub",
            "plugins": _PLUGINS,
        },
    ),
    "data": Command(
        "Adds, lists, inspects, summarises or ingests data.",
        "add STORE | list | inspect NAME | stats | ingest  [KEY=VALUE ...]",
        (
            "atmossl data add era5.zarr name=era5",
            "atmossl data stats data=era5 climatologies=[month] output=climate --force",
            "atmossl data ingest input=era5/*.grib output=era5.zarr layout.time=24",
        ),
    ),
    "config": Command(
        "Shows or validates the configuration of a training run.",
        "show | validate  [KEY=VALUE ...]",
        (
            "atmossl config show experiment=quickstart",
            "atmossl config validate model=large trainer=fsdp",
            "atmossl config validate --config-dir my_conf masking=mine",
        ), "train", "TrainConfig",
    ),
    "info": Command(
        "Tells what is in a checkpoint, or what a training run will cost.",
        "checkpoint=PATH | [KEY=VALUE ...] [memory=GIB] [--check]",
        (
            "atmossl info checkpoint=runs/mine",
            "atmossl info model=large trainer=fsdp memory=80 --check",
            "atmossl info checkpoint=other.ckpt plugins=[my_package]",
        ),
        keys={
            "checkpoint": _CHECKPOINT,
            "plugins": _PLUGINS,
            "memory": "GiB of one device; left out: those of this machine",
            "--check": "exit code 2 if the run does not fit",
            "other keys": "those of `atmossl train --help`: the run whose cost is told",
        },
    ),
    "data add": Command(
        "Writes a catalog entry for a store, and tells what was guessed.", "STORE [KEY=VALUE ...]",
        (
            "atmossl data add era5.zarr name=era5",
            "atmossl data add 'era5/*.nc' data.catalog=my.yaml",
            "atmossl data add era5.grib name=era5 output=era5.zarr",
        ),
        keys={
            "STORE": "a zarr store, a file, a folder or a pattern in quotes",
            "name": "of the entry; left out: that of the folder or file",
            "data.catalog": "the YAML file that it is written to; left out: atmossl_catalog.yaml",
            "output": "the zarr store that ingest makes of the files first; of GRIB always",
        },
    ),
    "data stats": Command(
        "Computes the statistics of a run's training data, and climatologies.",
        "[KEY=VALUE ...] [--force]",
        (
            "atmossl data stats data=era5",
            "atmossl data stats climatologies=[month,cell_month] output=climate",
            "atmossl data stats data=era5 --force",
        ), "stats", "StatsConfig",
    ),
    "data ingest": Command(
        "Makes one training store of GRIB, NetCDF or zarr.", "[KEY=VALUE ...]",
        (
            "atmossl data ingest input=era5/*.grib output=era5.zarr layout.time=24",
            "atmossl data ingest input=in.nc output=out.zarr variables.temperature=t",
            "atmossl data ingest input=in.zarr output=out.zarr region=[35,75,-12,42]",
        ), "ingest", "IngestConfig",
    ),
    "data inspect": Command(
        "Shows what is in the stores of a catalog entry, with maps.", "NAME [KEY=VALUE ...]",
        (
            "atmossl data inspect sample",
            "atmossl data inspect era5 data.catalog=my.yaml output=maps",
            "atmossl data inspect era5 samples=8 window.time=12",
        ), "inspect", "InspectConfig",
    ),
}  # fmt: skip
_OPTIONS = """Options:
  --config-dir FOLDER  your own files of choices beside those of conf/
  --cfg job            print the configuration and do nothing; also hydra, all
  --info               print where choices come from, and do nothing
  --help               of one command: atmossl COMMAND --help
  --version
  -sc install=bash     print what completes words in a shell; also zsh, fish:
                       eval "$(atmossl -sc install=bash)" """


def overview() -> str:
    """An overview of all commands, each with a line and an example."""
    lines = ["atmossl COMMAND [KEY=VALUE ...]", ""]
    for name, command in COMMANDS.items():
        if " " not in name:
            lines += [*_two_columns(f"  {name}", command.does, 14), f"{'':4}{command.examples[0]}"]
    return "\n".join([*lines, "", "atmossl COMMAND --help shows its keys.", "", _OPTIONS.rstrip()])


def help_of(command: str, action: str = "") -> str:
    """The help of a command: what it does, its keys with meaning and default, and three
    examples."""
    name = f"{command} {action}" if f"{command} {action}" in COMMANDS else command
    entry = COMMANDS[name]
    lines = textwrap.wrap(f"atmossl {name}: {entry.does}", _WIDTH)
    lines += ["", *textwrap.wrap(f"  atmossl {name} {entry.words}", _WIDTH), "", "Examples:"]
    lines += [f"  {example}" for example in entry.examples]
    if name == "data":
        more = [part for part in COMMANDS if part.startswith("data ")]
        lines += ["", "Keys:", *(f"  atmossl {part} --help" for part in more)]
    elif entry.keys is not None:
        lines += ["", "Keys:"]
        for key, meaning in entry.keys.items():
            lines += _two_columns(f"  {key}", meaning)
    elif entry.conf is not None:
        lines += ["", "Keys and their defaults (??? must be given):"]
        lines += _keys_of(entry.conf, _schema(entry.schema))
    return "\n".join([*lines, "", _OPTIONS.rstrip()])


def _schema(name: str | None) -> Any:
    from atmossl import schema

    return getattr(schema, str(name), None)


def _keys_of(name: str, kind: Any) -> list[str]:
    """Lines for all keys of conf/NAME.yaml: first its choices of files, then its own keys."""
    conf = find_file("conf")
    values = yaml.safe_load((conf / f"{name}.yaml").read_text())
    lines, groups = list[str](), list[tuple[str, Path]]()
    for chosen in values.get("defaults", ()):
        if isinstance(chosen, str):
            parent = conf / f"{chosen}.yaml"
            if chosen == "train" != name:
                lines += _two_columns("  keys of train", "see atmossl train --help")
            elif parent.is_file():
                groups.append((chosen.replace("logging", "logger"), parent))
            continue
        ((group, choice),) = chosen.items()
        valid = f"one of {_choices(conf / group)}"
        if group == "tasks":
            valid += f"; or one or a list, such as [forecast], of {_choices(conf / 'task')}"
        lines += _two_columns(f"  {group}={'null' if choice is None else choice}", valid)
        file = conf / group / f"{choice}.yaml"
        if choice is not None and file.is_file() and group not in ("launcher", "tasks", "logger"):
            groups.append((group, file))
    meanings = _Meanings(kind)
    lines += _lines_of_file(conf / f"{name}.yaml", "", meanings)
    for group, file in groups:
        lines += ["", f" {group}={file.stem}", *_lines_of_file(file, f"{group}.", meanings)]
    return lines


def _choices(folder: Path) -> str:
    return ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))


def _lines_of_file(file: Path, before: str, meanings: "_Meanings") -> list[str]:
    shown = []
    for key, value, comment in _entries(file.read_text()):
        meaning = comment or meanings.of(f"{before}{key}", file)
        shown += _two_columns(f"  {before}{key}={value}", meaning)
    return shown


def _entries(text: str) -> Iterator[tuple[str, str, str]]:
    """The key, value and comment of every key of a conf/ file that has a value."""
    path: list[tuple[int, str]] = []
    in_list: int | None = None  # indentation of a list whose items are no keys
    for line in text.splitlines():
        indentation = len(line) - len(line.lstrip())
        if line.lstrip().startswith("- ") and in_list is None:
            in_list = indentation
        if in_list is not None and (indentation > in_list or line.lstrip().startswith("- ")):
            continue
        in_list = None
        match = re.match(r"( *)([\w.]+):(?: +([^#]*?))?(?:\s+# *(.*))?$", line)
        if match is None:
            continue
        indent, key, value, comment = match.groups()
        path = [*((size, name) for size, name in path if size < len(indent)), (len(indent), key)]
        if path[0][1] not in ("defaults", "hydra", "_target_") and value:
            yield ".".join(name for _, name in path), value, comment or ""


def _two_columns(term: str, meaning: str, width: int = _LEFT) -> list[str]:
    """The meaning to the right of the term, or below it if the term is long."""
    wrapped = textwrap.wrap(meaning, _WIDTH - width) if meaning else []
    if len(term) > width - 2 or not wrapped:
        first = textwrap.wrap(term, _WIDTH, subsequent_indent="      ")
    else:
        first = [f"{term:{width}}{wrapped.pop(0)}"]
    return [*first, *(f"{'':{width}}{line}" for line in wrapped)]


class _Meanings:
    """The meaning of keys, from the schema and the docstrings of its classes."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def of(self, key: str, file: Path) -> str:
        """The meaning of a key, and what is valid; empty where nothing is known."""
        holder, *path = key.split(".")
        kind, name = self.kind, holder
        hint = _hints(kind).get(holder)
        chosen = yaml.safe_load(file.read_text())
        target = chosen.get("_target_", _DEFAULTS.get(holder)) if path else None
        if target is not None:
            kind, hint = _class_of(holder, str(target)), None
            hint, name, path = _hints(kind).get(path[0]), path[0], path[1:]
        for part in path:
            if _values_of(hint) is not None:  # the name of a stream, say
                hint = _values_of(hint)
                continue
            kind, name = _class_in(hint), part
            hint = _hints(kind).get(part)
        meaning = _entry_of(kind, name)
        valid = _valid(hint)
        return "; ".join(filter(None, (meaning, valid)))


_DEFAULTS = {"model": "multiformer"}  # the class of a group whose files name none


def _class_of(group: str, target: str) -> Any:
    from atmossl.model.kinds import NETWORKS
    from atmossl.schema.targets import MASKS, objectives
    from atmossl.settings import target_name

    kinds = {"objective": objectives, "model": lambda: NETWORKS}.get(group, lambda: MASKS)()
    return kinds.get(target_name(target))


def _hints(kind: Any) -> dict[str, Any]:
    if kind is None:
        return {}
    try:
        made = (
            kind
            if isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, BaseModel))
            else None
        )
        return get_type_hints(made or getattr(kind, "__init__", kind), include_extras=True)
    except (NameError, TypeError):
        return {}


def _class_in(hint: Any) -> Any:
    """The class with keys of its own among the types of a value."""
    if isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, BaseModel)):
        return hint
    parts = get_args(hint) if get_origin(hint) in (Annotated, Union, UnionType) else ()
    return next((holder for part in parts if (holder := _class_in(part)) is not None), None)


def _values_of(hint: Any) -> Any:
    """The type of the values of a mapping of names that are free; None for any other type."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(hint)[1] if get_origin(hint) is dict else None


def _valid(hint: Any) -> str:
    """The choices of a value, or its bounds."""
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return ", or ".join(filter(None, (_valid(part) for part in get_args(hint))))
    if hint is bool:
        return "true or false"
    if get_origin(hint) is not Annotated:
        return {int: "a whole number", float: "a number"}.get(hint, "")
    base, *limits = get_args(hint)
    words = [_valid(base)]
    for limit in limits:
        for bound in getattr(limit, "metadata", [limit]):
            words += [
                f"{word} {getattr(bound, name):g}"
                for name, word in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "to"))
                if hasattr(bound, name)
            ]
    return " ".join(filter(None, words))


def _entry_of(kind: Any, name: str) -> str:
    """The meaning of a keyword in a class's docstring: `keyword: meaning.`"""
    bases = getattr(kind, "__mro__", (kind,))
    for base in bases:
        text = " ".join((inspect.getdoc(base) or "").split("Raises:")[0].split())
        for sentence in re.split(r"(?<=[.;])(?<!al\.) ", text):
            match = re.match(r"((?:\w+, )*\w+): (.+?)[.;]?$", sentence)
            if match is not None and name in match[1].split(", "):
                return match[2]
    return ""
