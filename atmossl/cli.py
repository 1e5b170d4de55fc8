"""The command line: a function for every command, which composes and checks its configuration."""

import logging
import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from rich.console import Console

from atmossl import __version__
from atmossl.at_work import TERMINAL, Stopped, answering, keeping, owned
from atmossl.composition import (
    MAPPINGS,
    as_entry,
    compose_config,
    compose_training,
    compose_with_task_file,
    compose_with_tasks,
    in_one_line,
    open_ended,
    register_run_name,
    tasks_apart,
    to_plain,
    valid,
    with_fitting_store,
)
from atmossl.data.catalog import find_file, is_location
from atmossl.data.variables import OneLineNotes
from atmossl.extras import naming_extras
from atmossl.overrides import (
    Word,
    as_searchpath,
    as_values_of,
    first_of_sweep,
    for_hydra,
    is_readable,
    joined,
    keywords,
    sets,
    split,
    unquoted,
    value_of,
)
from atmossl.plugin_code import place_in_plugin
from atmossl.process_lifetime import (
    end_with_parent,
    is_first_rank,
    is_started_by_first_rank,
    lost_another_process,
)
from atmossl.settings import check_plugins
from atmossl.value_faults import listed


def _compose_training(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of a training run. Settings from a checkpoint, or from the folder of a
    run that continues, are filled in."""
    values, note = compose_training(overrides)
    if note and is_first_rank(os.environ):
        Console(stderr=True).print(note, markup=False, highlight=False, soft_wrap=True)
    if values["warm_start"]["network"] is not True:
        return values
    from atmossl.commands.common import plain

    return plain(values)


def _train(arguments: Sequence[str]) -> None:
    if is_started_by_first_rank(os.environ):
        end_with_parent()
    if not {"-m", "--multirun"} & set(arguments):
        if "launcher=slurm" in arguments:
            raise ValueError("launcher=slurm starts the runs of a sweep: add -m")
        values = valid("TrainConfig", _compose_training(arguments))
        from atmossl.commands.train import train

        train(values)
        return
    import hydra

    tasks = _check_first_of_sweep(arguments)["tasks"]
    of_tasks, arguments = tasks_apart(arguments)
    register_run_name()
    arguments = [open_ended(as_entry(item, "train"), MAPPINGS["train"]) for item in arguments]
    arguments = with_fitting_store(arguments, "train")
    arguments = as_searchpath(arguments, find_file("conf"))
    arguments = [for_hydra(item, sweep=True) for item in arguments]
    sys.argv = ["atmossl train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise what is wrong; else Hydra prints and exits
    decorate = hydra.main(
        version_base="1.3", config_path=str(find_file("conf")), config_name="train"
    )

    def train_one(config: Any) -> float | None:  # a launcher pickles it for other machines
        return _train_one_of_many(config, {"tasks": tasks} if of_tasks else {})

    with in_one_line(arguments):
        decorate(train_one)()


def _check_first_of_sweep(arguments: Sequence[str]) -> dict[str, Any]:
    """Refuse what does not fit the first run of a sweep before any run is launched; returns that
    run's values."""
    if "launcher=slurm" in arguments and shutil.which("srun") is None:
        raise ValueError("launcher=slurm: this machine has no `srun`; start the sweep on a cluster")
    words = [word for word in arguments if not word.startswith(_OF_SWEEPS)]
    firsts = [first_of_sweep(word) if is_readable(word) else word for word in words]
    values = _compose_training([word for word in firsts if word is not None])
    return valid("TrainConfig", values)


_OF_SWEEPS = ("-m", "--multirun", "hydra.", "launcher=", "hparams_search=")


def _train_one_of_many(config: Any, same_in_all: Mapping[str, Any]) -> float | None:
    """Train one run of a sweep, in the folder that Hydra chose for it; returns its score, for
    the sweeper. same_in_all: values that Hydra was not told."""
    from hydra.core.hydra_config import HydraConfig

    from atmossl.commands.train import train
    from atmossl.training.preemption import Interrupted

    values = to_plain(config) | dict(same_in_all)
    values["paths"]["output"] = HydraConfig.get().runtime.output_dir
    try:
        return train(values).score
    except Interrupted as end:  # Hydra would start the next run after an exception
        if end.number in TERMINAL:
            raise Stopped(end.number, str(end)) from end
        raise


def _predict(arguments: Sequence[str]) -> None:
    values = valid("PredictConfig", compose_with_task_file("predict", arguments))
    from atmossl.commands.predict import predict

    predict(values)


def _embed(arguments: Sequence[str]) -> None:
    values = valid("EmbedConfig", compose_config("embed", arguments))
    from atmossl.commands.embed import embed

    embed(values)


def _probe(arguments: Sequence[str]) -> None:
    values = valid("ProbeConfig", compose_config("probe", arguments))
    from atmossl.commands.probe import probe

    probe(values)


def _features(arguments: Sequence[str]) -> None:
    values = valid("FeaturesConfig", compose_config("features", arguments))
    from atmossl.commands.features import features

    features(values, shlex.join(["atmossl", "features", *arguments]))


def _calibrate(arguments: Sequence[str]) -> None:
    values = valid("CalibrateConfig", compose_with_task_file("calibrate", arguments))
    from atmossl.commands.calibrate import calibrate

    calibrate(values)


def _evaluate(arguments: Sequence[str]) -> None:
    values = valid("EvaluateConfig", compose_with_tasks("evaluate", arguments))
    from atmossl.commands.evaluate import evaluate

    evaluate(values, shlex.join(["atmossl", "evaluate", *arguments]))


def _named_catalog(arguments: Sequence[str]) -> Path | None:
    """The file of `data.catalog=PATH`, the only key of `atmossl data list`."""
    unknown = [word for word in arguments if not sets(word, "data.catalog")]
    if unknown:
        raise ValueError(f"data list: {unknown[0]} is unknown; valid: data.catalog=PATH")
    (path,) = keywords(arguments[-1:], ["data.catalog"]) if arguments else (None,)
    return Path(path) if path else None


_OF_ADD = ("name", "data.catalog", "output")


def _check_is_one_store(places: Sequence[str]) -> None:
    """Raise ValueError for several zarr stores, or a folder or pattern of them, of which a record
    is not put together."""
    from atmossl.data.backends import zarr_stores_at

    stores = [store for place in places for store in zarr_stores_at(place)]
    if len(stores) > 1:
        raise ValueError(
            f"data add: {listed(stores[:3])}: {len(stores)} zarr stores; needed: one. Variables or "
            "periods in stores of their own become one in Python: import xarray as xr; "
            "xr.open_mfdataset(STORES, engine='zarr').to_zarr('all.zarr')"
        )


def _add(arguments: Sequence[str]) -> None:
    """`atmossl data add STORE`: files of GRIB, and others where an output is named, become one
    zarr store first."""
    stores = [word for word in arguments if not sets(word, *_OF_ADD)]
    unknown = [word for word in stores if Word.of(word).value is not None and not is_location(word)]
    if not unknown:
        _check_is_one_store(stores)
    if unknown or len(stores) != 1:
        fault = f"{unknown[0]} is unknown" if unknown else f"got {len(stores)} stores"
        raise ValueError(
            f"data add: {fault}; needed: one STORE, a folder or a pattern in quotes ('era5/*.nc'); "
            "and if you like name=NAME data.catalog=FILE.yaml output=STORE.zarr"
        )
    name, catalog, output = (value_of(key, arguments) for key in _OF_ADD)
    for key, value in zip(_OF_ADD, (name, catalog, output), strict=True):
        if value == "":
            raise ValueError(f"data add: {key}= is empty; give {key}=VALUE, or leave it out")
    place = Path(stores[0])
    stem = (place.parent if "*" in place.name else place).absolute().name.partition(".")[0]
    name = name or re.sub(r"\W+", "_", stem) or "mine"
    from atmossl.data.backends import holds_grib
    from atmossl.data_commands import add_store, check_new_entry, run_ingest

    file = Path(catalog) if catalog else None
    check_new_entry(name, file)
    if output or holds_grib(stores[0]):
        output = output or f"{name}.zarr"
        run_ingest(compose_config("ingest", [f"input={stores[0]}", f"output={output}"]))
    add_store(output or stores[0], name, file)


def _data(arguments: Sequence[str]) -> None:
    action, *overrides = arguments or [""]
    if action == "add":
        _add(overrides)
        return
    if action == "list":
        from atmossl.commands.catalog import list_catalog

        list_catalog(_named_catalog(overrides))
    elif action == "stats":
        keys = [item for item in overrides if item != "--force"]
        forced = ["force=true"] if len(keys) < len(overrides) else []
        values = valid("StatsConfig", compose_with_tasks("stats", [*keys, *forced]))
        from atmossl.data_commands import show_statistics

        show_statistics(values)
    elif action == "ingest":
        values = compose_config("ingest", overrides)
        from atmossl.data_commands import run_ingest

        run_ingest(values)
    elif action == "inspect":
        stores = [text for text in overrides if Word.of(text).value is None]
        if len(stores) > 1:
            raise ValueError(f"inspect {' '.join(stores)}: one store at a time")
        values = compose_config("inspect", as_values_of("data.name", overrides))
        from atmossl.data_commands import show_inspection

        show_inspection(values)
    else:
        raise ValueError(_no_action(action, ("add", "list", "inspect", "ingest", "stats")))


def _no_action(word: str, valid: Sequence[str]) -> str:
    close = get_close_matches(word, valid, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    start = f"{word}: no such action; {meant}" if word else "an action is missing; "
    return f"{start}valid: {', '.join(valid)}"


def _config(arguments: Sequence[str]) -> None:
    action, *overrides = arguments or [""]
    if action not in ("show", "validate"):
        raise ValueError(_no_action(action, ("show", "validate")))
    values = _compose_training(overrides)
    if action == "show":
        Console().print(OmegaConf.to_yaml(OmegaConf.create(values)), markup=False)
    values = valid("TrainConfig", values)
    if action == "validate":
        _check_checkpoints(values)
        Console().print("the configuration is valid")


def _check_checkpoints(values: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint of a training run is not there; a hub is not asked."""
    from atmossl.inference.checkpoint import SCHEME, checkpoint_path

    faults, resume = list[str](), values["resume"]
    named = {
        f"warm_start.checkpoints.{n}": f for n, f in enumerate(values["warm_start"]["checkpoints"])
    }
    named |= {} if resume in (None, "auto") else {"resume": resume}
    for key, file in named.items():
        try:
            checkpoint_path(file, key=key) if not str(file).startswith(SCHEME) else None
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))


def _without_plugins(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The packages of `plugins=[...]`, and all other words."""
    named = [word for word in arguments if sets(word, "plugins")]
    rest = [word for word in arguments if word not in named]
    packages = str(Word.of(named[-1]).value).strip("[]") if named else ""
    return [*map(unquoted, split(packages))] if packages else [], rest


def _info(arguments: Sequence[str]) -> None:
    if any(sets(word, "checkpoint") for word in arguments):
        from atmossl.commands.info import show_checkpoint

        for word in arguments:
            if word == "--check" or sets(word, "memory"):
                raise ValueError(
                    f"{word} is of the estimate of a training run, not of a checkpoint; leave out "
                    "checkpoint=..., or this word"
                )
        plugins, arguments = _without_plugins(arguments)
        (checkpoint,) = keywords(arguments, ["checkpoint"])
        show_checkpoint(checkpoint, plugins)
        return
    memory_words = [word for word in arguments if sets(word, "memory")]
    overrides = [word for word in arguments if word != "--check" and word not in memory_words]
    memory = _gib(str(Word.of(memory_words[-1]).value)) if memory_words else None
    values = valid("TrainConfig", _compose_training(overrides))
    from atmossl.commands.cost import show_estimate

    show_estimate(values, memory, check="--check" in arguments)


def _gib(text: str) -> float:
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0.0 < gib < float("inf"):
        raise ValueError(f"memory={text}: valid: a number of GiB above 0, such as 80")
    return gib


def _export(arguments: Sequence[str]) -> None:
    from atmossl.commands.export import export, export_folder

    named, arguments = _without_plugins(arguments)
    plugins = check_plugins(named)
    optional = ("report", "data.catalog", "licence")
    more = {Word.of(word).key: word for word in arguments if sets(word, *optional)}
    rest = [word for word in arguments if word not in more.values()]
    key = "hub" if any(sets(word, "hub") for word in rest) else "output"
    if more and key == "output":
        raise ValueError(
            f"{' '.join(more.values())}: belongs to hub=FOLDER; leave it out without hub"
        )
    checkpoint, output = keywords(rest, ["checkpoint", key])
    alone = Path(checkpoint).exists()  # commas in it are its own
    checkpoints = [checkpoint] if alone else [*map(unquoted, split(checkpoint))]
    with owned(Path(output), key), keeping("nothing is kept"):
        if key == "output":
            export(checkpoints, Path(output), plugins)
            _print(f"checkpoint: {output}")
        else:
            settings = {
                name.removeprefix("data."): keywords([item], [name])[0]
                for name, item in more.items()
            }
            export_folder(checkpoints, Path(output), plugins=plugins, **settings)


def _import(arguments: Sequence[str]) -> None:
    from atmossl.commands.atmorep_normalisation import Months
    from atmossl.commands.import_atmorep import import_atmorep

    kind, folder, *overrides = [*arguments, "", ""][: max(2, len(arguments))]
    if kind and kind != "atmorep" and Word.of(kind).value is None:
        raise ValueError(f"{kind}: no such kind of model; valid: atmossl import atmorep FOLDER")
    if kind != "atmorep" or not folder or Word.of(folder).value is not None:
        raise ValueError(
            f"got {' '.join(arguments) or 'nothing'}; needed: atmorep FOLDER output=PATH data=NAME "
            "[data.catalog=PATH] [normalisation=FOLDER [normalisation.months=own]]"
        )
    more: dict[str, str] = {}
    for key in ("data.catalog", "normalisation", "normalisation.months"):
        for word in [word for word in overrides if sets(word, key)]:
            (more[key],) = keywords([word], [key])
            overrides.remove(word)
    output, data = keywords(overrides, ["output", "data"])
    months: Any = more.get("normalisation.months", "climatology")
    alone = "normalisation.months" in more and "normalisation" not in more
    if months not in get_args(Months) or alone:
        raise ValueError(
            f"normalisation.months={months}: valid: {' or '.join(get_args(Months))}, beside "
            "normalisation=FOLDER"
        )
    catalog, statistics = (
        Path(more[key]) if key in more else None for key in ("data.catalog", "normalisation")
    )
    with owned(Path(output), "output"), keeping("nothing is kept"):
        import_atmorep(Path(folder), Path(output), data, catalog, statistics, months)


COMPLETION = ("-sc", "--shell-completion")  # options in the place of a command
_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "predict": _predict,
    "embed": _embed,
    "probe": _probe,
    "features": _features,
    "evaluate": _evaluate,
    "calibrate": _calibrate,
    "export": _export,
    "import": _import,
    "data": _data,
    "config": _config,
    "info": _info,
}


def _help(arguments: Sequence[str]) -> str:
    """Print the help of the command that stands first, with its action; without a command, the
    overview."""
    from atmossl.help import help_of, overview

    words = [word for word in arguments if not word.startswith("-") and word != "help"]
    if not words or words[0] not in _COMMANDS:
        return overview()
    return help_of(words[0], "".join(words[1:2]))


def _print(text: str) -> None:
    Console(markup=False).print(text, markup=False, highlight=False, soft_wrap=True)


def _run(command: str, words: Sequence[str]) -> None:
    """Run a command, or print what an option of Hydra asks for."""
    if command not in COMPLETION and not {"--cfg", "-c", "--info"} & set(words):
        _COMMANDS[command](words)
        return
    from atmossl.hydra_options import completion, explained, option

    if command in COMPLETION:
        _print(completion(words))
        return
    package_part, rest = option(words)
    _print(explained(command, rest, str(package_part)))


def _quieten() -> None:
    """Silence advertisements and warnings of libraries about each other; our own warnings are
    errors anyway."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for text in (
        ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 on torch 2.13
        "Consolidated metadata is currently not part.*",  # xarray on zarr format 3
        "Duplicate name.*",  # zarr in a zip file keeps both versions of its metadata
        "FSDP2-wrapped module .* returned a view tensor.*",  # blocks add out of place
        "Experiment logs directory.*",  # `keep_metrics` has set the earlier log aside
        "The number of training batches .* is smaller than the logging interval.*",  # few are left
        "Found .* module.s. in eval mode.*",  # teachers are, always
        "You're resuming from a checkpoint that ended before the epoch.*",  # SampleOrder does it
    ):
        warnings.filterwarnings("ignore", message=text)


def _came_from_printing(error: OSError) -> bool:
    """Whether an error came from standard output, as on a full disk."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        trace, module = trace.tb_next, trace.tb_frame.f_globals.get("__name__", "")
    return module.startswith("rich.")


def _system_words(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    if _came_from_printing(error):
        with suppress(OSError):  # what is left of it would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"standard output: {error.strerror}"
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


_TRACEBACK = "ATMOSSL_TRACEBACK"  # shows where an error comes from that is told in one line


def _answer_to(error: ValueError | FloatingPointError | OSError) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    if isinstance(error, OSError):
        text, code = _system_words(error), getattr(error, "exit_code", 1)
    else:
        text, code = str(error), 2 if isinstance(error, ValueError) else 1
    place = place_in_plugin(error)
    if place is None:
        return text, code
    where = f"raised at {place}; {_TRACEBACK}=1 shows the traceback"
    return f"{type(error).__name__}: {text} ({where})", code if place.is_constructor else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when done, 2 with one line for bad input, 1 for a fault."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _quieten()
    console = Console(stderr=True)
    if not arguments or "help" in arguments[:2] or {"-h", "--help", "--version"} & set(arguments):
        _print(__version__ if "--version" in arguments else _help(arguments))
        return 0
    command, *rest = joined(arguments)
    if command not in (*_COMMANDS, *COMPLETION):
        close = get_close_matches(command, _COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(_COMMANDS)}"
        console.print(f"atmossl: no command {command!r}{meant}", highlight=False, soft_wrap=True)
        return 2
    try:
        with OneLineNotes(), answering(command), naming_extras():
            _run(command, rest)
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get(_TRACEBACK):
            traceback.print_exception(error)
        text, code = _answer_to(error)
    except Stopped as stop:
        text, code = str(stop), 128 + stop.number
    except RuntimeError as error:
        if not lost_another_process(error):
            raise
        text, code = "another process of this run has ended; its own line says why", 1
    else:
        return 0
    console.print(f"atmossl {command}: {text}", markup=False, highlight=False, soft_wrap=True)
    return code
