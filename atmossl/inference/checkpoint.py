"""Loads a checkpoint for inference, which needs nothing but the file, and opens the data that it
runs on."""

import platform
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from atmossl import __version__
from atmossl.batch import PRIMARY, StreamSpec, TokenSize, levels_by_variable, shared_fields
from atmossl.checkpoint_files import (
    AVERAGED,
    FORMAT,
    SCHEME,
    commit_of,
    downloaded,
    in_one_line,
    read_contents,
    read_with_digest,
)
from atmossl.data.catalog import (
    CatalogEntry,
    Split,
    StoreChoice,
    catalog_entry,
    check_split,
    find_file,
    recalled,
)
from atmossl.data.chunks import Access
from atmossl.data.segment import Segment
from atmossl.data.store import open_records, paired
from atmossl.data.variables import InputLimits
from atmossl.data.windows import Normaliser, Statistics, WindowSize
from atmossl.masking.base import FirstGuess
from atmossl.masking.tasks import Task
from atmossl.model.kinds import NETWORKS, OF_THE_RUN, choose_network
from atmossl.model.network import Network, merged
from atmossl.settings import find_class, snake_case, target_name
from atmossl.value_faults import in_plain_words, listed

# The reference checkpoint, one with two streams, either of which can be hidden whole, and one whose
# members are draws of noise.
PACKAGED = {
    "default": "reference",
    "default_streams": "reference_streams",
    "default_joint": "reference_joint",  # in a checkout alone: a wheel would be too large with it
}
LAST = "last.ckpt"  # of a run
_NEEDED = (
    "streams", "network", "model", "objective", "statistics", "window", "first_guess", "data",
)  # fmt: skip


@dataclass(frozen=True)
class TrainedModel:
    """A model with averaged weights, and the record of its checkpoint.

    checkpoint_record: streams, model arguments, statistics, window and resolved configuration, as
        saved.
    provides: what its objective taught it, see `atmossl.objectives.base.Objective`.
    plugins: packages whose code the record may name, because the user says so.
    """

    model: Network
    specs: tuple[StreamSpec, ...]
    normaliser: Normaliser
    window: WindowSize
    first_guess: FirstGuess
    data: str
    checkpoint_record: dict[str, Any]
    digest: str
    provides: frozenset[str] = frozenset({"reconstruct", "embed"})
    plugins: tuple[str, ...] = ()

    def require(self, ability: str) -> None:
        """Raise ValueError if the objective did not teach the model this ability."""
        if ability not in self.provides:
            name = objective_name(self.checkpoint_record["objective"]["kind"])
            raise ValueError(
                f"the checkpoint was trained with objective={name}, from which it did not learn to "
                f"{ability}; it can {' and '.join(sorted(self.provides))}"
            )

    @property
    def pressure_levels(self) -> bool:
        """Whether levels are pressures in hPa; else they are numbers of model levels."""
        return self.checkpoint_record.get("levels_are", "pressure") == "pressure"

    def check_levels(self, segment: Segment) -> None:
        """Raise ValueError if a record has levels of pressure where numbers of model levels are
        needed."""
        if self.levels and segment.pressure_levels and not self.pressure_levels:
            raise ValueError(
                f"{segment.location}: the checkpoint needs model levels {listed(self.levels)}, and "
                "the levels of this store are taken for pressures; if they are numbers of model "
                "levels, say `levels_are: model` in its catalog entry"
            )

    @property
    def own_specs(self) -> tuple[StreamSpec, ...]:
        """The streams of the run's own data, on whose grid predictions lie."""
        return tuple(spec for spec in self.specs if spec.data == PRIMARY)

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(levels_by_variable(self.own_specs))

    def specs_for(self, task: Task | None = None) -> tuple[StreamSpec, ...]:
        """The streams as they are read for a task. If the task fills missing values, those of
        all predicted streams are marked, not only where training had some."""
        if task is None or not task.fills_missing:
            return self.specs
        return tuple(
            replace(spec, missing="mask") if spec.role == "predict" else spec for spec in self.specs
        )

    @property
    def level_values(self) -> dict[str, tuple[int, ...]]:
        """The levels of every predicted variable in hPa; (0,) at the surface."""
        return self.predicted_levels(PRIMARY)

    def predicted_levels(self, data: str) -> dict[str, tuple[int, ...]]:
        """Levels of every variable that the streams with that `data` predict, in hPa; (0,) at the
        surface."""
        predicted = [s for s in self.specs if s.role == "predict" and s.data == data]
        return levels_by_variable(predicted)

    @property
    def training_dates(self) -> tuple[str, str]:
        """First and last day of the training data, as far as the record tells days."""
        period = self.normaliser.statistics[PRIMARY].period
        dates = sorted(re.findall(r"\d{4}-\d\d-\d\d", period)) or [period]
        return dates[0], dates[-1]

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(sorted({level for spec in self.own_specs for level in spec.levels}))


def objective_name(kind: str) -> str:
    """The name of an objective for users: of its file in conf/objective, or, for a plugin, of
    the class."""
    target = snake_case(target_name(kind).rpartition(".")[2])
    if not kind.startswith("atmossl."):
        return kind
    files = sorted((find_file("conf") / "objective").glob("*.yaml"))
    targets = {file.stem: yaml.safe_load(file.read_text())["_target_"] for file in files}
    names = [name for name, named in targets.items() if target_name(named) == target]
    alike = [name for name in names if target.startswith(name)]
    return (alike or names or [target])[0]


def checkpoint_path(name: str, key: str = "checkpoint") -> Path:
    """The file of a checkpoint. A name in `PACKAGED` means one of the package, `hf://OWNER/NAME`
    one of a model hub, a run's folder its last one; anything else is a path.

    key: of the configuration, for messages.

    Raises:
        ValueError: there is no such file, or it cannot be fetched.
    """
    if name.startswith(SCHEME):
        return downloaded(name)
    if name in PACKAGED:
        path = Path(str(resources.files("atmossl"))) / "assets" / PACKAGED[name]
    else:
        path = Path(name)
    names = ", ".join((*PACKAGED, "auto") if key == "resume" else PACKAGED)
    valid = f"valid: a file, the folder of a run, {names}, or hf://OWNER/NAME"
    if not path.exists() and name in PACKAGED:
        raise ValueError(
            f"{key}={name}: comes with the repository, not with an installed package; clone it and "
            f"give the path of its folder atmossl/assets/{PACKAGED[name]}"
        )
    if not path.exists():
        raise ValueError(f"{key}={name}: no such file; {valid}")
    last = [file for file in (path / "checkpoints" / LAST, path / LAST) if file.exists()]
    if not last and path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{key}={name}: the folder is empty; {valid}")
    return last[0] if last else path


def read_checkpoint(name: str) -> dict[str, Any]:
    """The raw contents of a checkpoint; ValueError if it is truncated or not one of ours."""
    return read_contents(checkpoint_path(name))


def load_checkpoint(name: str, plugins: Sequence[str] = ()) -> TrainedModel:
    """Rebuild the model with its averaged weights, in evaluation mode on the CPU.

    plugins: packages whose code the checkpoint may run; no other is imported.

    Raises:
        ValueError: no such file, truncated, foreign, code of a package that is not in `plugins`, or
            weights that do not fit the record.
    """
    path = checkpoint_path(name)
    contents, digest = read_with_digest(path)
    checkpoint_record = contents["atmossl"]
    if missing := [key for key in _NEEDED if key not in checkpoint_record]:
        raise ValueError(f"checkpoint={name} is incomplete: its record lacks {listed(missing)}")
    if name.startswith(SCHEME):
        checkpoint_record = {**checkpoint_record, "hub": name.partition("@")[0] + commit_of(path)}
    specs = _specs_of(checkpoint_record, name)
    with naming_network(name):
        model = build_network(
            checkpoint_record["network"], plugins, streams=specs, **checkpoint_record["model"]
        )
    weights = {
        key.removeprefix(AVERAGED): value
        for key, value in contents["state_dict"].items()
        if key.startswith(AVERAGED)
    }
    try:
        model.load_state_dict(merged(weights))
    except RuntimeError as error:
        words = in_one_line(error)
        raise ValueError(f"checkpoint={name}: weights do not fit its record: {words}") from error
    return TrainedModel(
        model=model.eval(),
        specs=specs,
        normaliser=Normaliser(
            {
                data: Statistics.from_dict(values)
                for data, values in checkpoint_record["statistics"].items()
            }
        ),
        window=WindowSize(**checkpoint_record["window"]),
        first_guess=checkpoint_record["first_guess"],
        data=checkpoint_record["data"],
        checkpoint_record=checkpoint_record,
        digest=digest,
        provides=frozenset(checkpoint_record["objective"]["provides"]),
        plugins=tuple(plugins),
    )


def network_class(kind: str, plugins: Sequence[str] = ()) -> type[Network]:
    """The class of the network that a checkpoint records.

    Raises:
        UntrustedError: a class of a package that is not in `plugins`; nothing was imported.
        ValueError: a kind that this version does not know.
    """
    return find_class(kind, Network, NETWORKS, plugins)


def build_network(kind: str, plugins: Sequence[str] = (), **arguments: Any) -> Network:
    """Build the network that a checkpoint records. Raises what `network_class` raises, and
    ValueError for keywords that do not fit."""
    network = network_class(kind, plugins)
    if kind in NETWORKS:
        return network(**arguments)
    of_the_run = {name: arguments.pop(name) for name in OF_THE_RUN if name in arguments}
    return choose_network({"_target_": kind, **arguments}).build(**of_the_run)


@contextmanager
def naming_network(name: str) -> Generator[None]:
    """A context that names the checkpoint if its record makes no network, in one line."""
    try:
        yield
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}: {in_plain_words(fault)}"
            for fault in error.errors()
        ]
        raise ValueError(
            f"checkpoint={name}: its record makes no network: {'; '.join(faults)}"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        words = str(error) if isinstance(error, ValueError) else in_one_line(error)
        raise ValueError(f"checkpoint={name}: its record makes no network: {words}") from error


def _specs_of(checkpoint_record: dict[str, Any], name: str) -> tuple[StreamSpec, ...]:
    """The streams of a record; ValueError for old checkpoints in which two streams predict a
    field."""
    try:
        specs = tuple(spec_from_dict(values) for values in checkpoint_record["streams"])
    except ValueError as error:
        raise ValueError(f"checkpoint={name}: {error}") from error
    faults = shared_fields(specs)
    if faults:
        raise ValueError(f"checkpoint={name}: {'; '.join(faults)}. Train anew with other streams")
    return specs


def written_by() -> dict[str, Any]:
    """The entries of a record that say in which format and by which versions it is written."""
    return {
        "format": FORMAT,
        "atmossl": __version__,
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
    }


def spec_to_dict(spec: StreamSpec) -> dict[str, Any]:
    """A stream as plain values, for the record of a checkpoint."""
    return to_jsonable_python(asdict(spec))


def spec_from_dict(values: dict[str, Any]) -> StreamSpec:
    """The stream that `spec_to_dict` wrote, also by older versions."""
    parts = {
        "variables": tuple(values["variables"]),
        "levels": tuple(values["levels"]),
        "token_size": TokenSize(**values["token_size"]),
    }
    return StreamSpec(**{**values, **parts})  # checkpoints of version 0.1.0 have no `missing`


class CheckpointChoice(Protocol):
    """The settings of a command that runs a checkpoint on a store."""

    @property
    def checkpoint(self) -> str: ...
    @property
    def plugins(self) -> Sequence[str]: ...
    @property
    def data(self) -> StoreChoice: ...
    @property
    def split(self) -> Split: ...
    @property
    def segment(self) -> str | None: ...
    @property
    def input_limits(self) -> InputLimits: ...


def open_checkpoint(
    config: CheckpointChoice, task: Task | None = None
) -> tuple[TrainedModel, tuple[Segment, ...]]:
    """The checkpoint that a command runs, and the segments that it runs on; see `open_for`."""
    check_split(config.data, config.split)
    trained = load_checkpoint(config.checkpoint, config.plugins)
    segments = open_for(
        trained,
        config.data,
        config.split,
        input_limits=config.input_limits,
        name=config.segment,
        task=task,
    )
    return trained, segments


def entries_for(trained: TrainedModel, data: StoreChoice) -> dict[str, CatalogEntry]:
    """The catalog entries of every source of a checkpoint, by the streams' `data`: of the chosen
    store, else those that the checkpoint remembers of its training.

    Raises:
        ValueError: an unknown entry, or a store that is not where it was.
    """
    remembered = trained.checkpoint_record.get("catalog", {}) if data.catalog is None else {}
    names = {PRIMARY: data.name or trained.data}
    names |= {spec.data: spec.data for spec in trained.specs if spec.data != PRIMARY}
    chosen = {PRIMARY} if data.name is not None else set()
    return {
        source: recalled(remembered[source])
        if source in remembered and source not in chosen
        else catalog_entry(name, data.catalog)
        for source, name in sorted(names.items(), key=lambda pair: pair[0] != PRIMARY)
    }


def open_for(
    trained: TrainedModel,
    data: StoreChoice,
    split: Any,
    *,
    input_limits: InputLimits = "refuse",
    name: str | None = None,
    task: Task | None = None,
) -> tuple[Segment, ...]:
    """The segments of a split with the variables and levels of a checkpoint.

    input_limits: what is done with values that no atmosphere has. name: of the only one that is
    wanted. task: which may fill missing values.
    Raises:
        ValueError: unknown entry or segment, or a store that lacks what the checkpoint needs.
    """
    access = Access(input_limits=input_limits)
    entries = entries_for(trained, data)
    records = open_records(trained.specs_for(task), entries, split, access=access)
    segments = paired(records)
    for segment in segments:
        trained.check_levels(segment)
    chosen = tuple(segment for segment in segments if segment.is_called(name))
    if not chosen:
        have = sorted({segment.name for segment in segments})
        raise ValueError(f"segment={name} is not in split={split}; valid: {listed(have)}")
    return chosen
