"""Typed configuration: every key, its type and bounds; unknown keys are errors.

`conf/` holds the values, this module the types, the docstrings of the classes that are built from
them the meaning.
"""

from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from torch.nn import ModuleDict

from atmossl.batch import PRIMARY, StreamSpec, shared_fields
from atmossl.data.catalog import CatalogEntry, catalog_entry
from atmossl.data.climatology import Kind
from atmossl.data.forcings import FORCINGS
from atmossl.data.variables import InputLimits
from atmossl.data.windows import WindowSize
from atmossl.evaluation.regions import boxes, find_regions
from atmossl.inference.checkpoint import objective_name
from atmossl.losses import AREAS
from atmossl.masking.random import Autoregression
from atmossl.model.multiformer import Multiformer, check_causal
from atmossl.model.network import choose_network
from atmossl.overrides import split, unquoted
from atmossl.plugins import Part, Plugins
from atmossl.schema.config_errors import lines_of, with_single_items_listed
from atmossl.schema.data import DataConfig, EncodingConfig, Times
from atmossl.schema.features import FeaturesConfig
from atmossl.schema.strict import ConfigError, Strict
from atmossl.schema.targets import ChosenMask, ChosenObjective, ChosenTask
from atmossl.schema.training import (
    Callback,
    LoggerConfig,
    Resume,
    TrainerConfig,
    WarmStartConfig,
    trainer_faults,
)
from atmossl.setting_types import NonZeroShare, NotNegative, Positive, PositiveFloat, snake_case
from atmossl.training.optimizer import OptimizerChoice

__all__ = [
    "ConfigError",
    "EmbedConfig",
    "EvaluateConfig",
    "FeaturesConfig",
    "PredictConfig",
    "ProbeConfig",
    "StatsConfig",
    "TrainConfig",
    "checked",
    "parse",
]


class PathsConfig(Strict):
    """Where a run is written, `paths`. output: folder of checkpoints, curves and logs."""

    output: Path


def _named(streams: Any) -> Any:
    """The streams, each with the name under which it stands in the configuration."""
    if not isinstance(streams, Mapping) or not streams:
        raise ValueError("needed: keys and values of at least one stream, by its name")
    for name, stream in streams.items():
        if isinstance(stream, Mapping) and "name" in stream:
            raise ValueError(f"stream.{name}.name: unknown key; {name} is the name")
    return {
        name: {**stream, "name": name} if isinstance(stream, Mapping) else stream
        for name, stream in streams.items()
    }


Streams = Annotated[dict[str, StreamSpec], BeforeValidator(_named)]


class TrainConfig(Strict):
    """All settings of `atmossl train`. seed: of first weights, masks and order of samples."""

    seed: NotNegative
    resume: Resume
    input_limits: InputLimits
    warm_start: WarmStartConfig
    data: DataConfig
    stream: Streams
    masking: ChosenMask
    tasks: tuple[ChosenTask, ...] = Field(min_length=1)
    model: Annotated[Part, BeforeValidator(choose_network)]
    objective: ChosenObjective
    optimizer: OptimizerChoice
    trainer: TrainerConfig
    callbacks: dict[str, Callback]
    logger: LoggerConfig
    paths: PathsConfig
    plugins: Plugins

    @property
    def specs(self) -> tuple[StreamSpec, ...]:
        return tuple(self.stream.values())

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        faults = [fault for check in CHECKS for fault in check(self)]
        faults += trainer_faults(self.trainer)
        if faults:
            raise ValueError(" | ".join(faults))
        return self


def _tuning_faults(config: TrainConfig) -> list[str]:
    """Faults of settings that train only parts of a network."""
    only, rank = config.objective.train_only, config.warm_start.low_rank.rank
    chosen = [] if only is None else [f"objective.train_only={only}"]
    chosen += [f"warm_start.low_rank.rank={rank}"] if rank else []
    if len(chosen) > 1:
        return [f"{' and '.join(chosen)} exclude each other; choose one"]
    if only is not None and "reconstruct" not in config.objective.provides:
        return [
            f"objective.train_only={only} with an objective that reconstructs nothing, so that the "
            f"{only} would learn nothing; choose objective=masked"
        ]
    if chosen and not config.warm_start.checkpoints:
        return [
            f"{chosen[0]} would leave the rest of a new network at random; name the trained one in "
            "warm_start.checkpoints"
        ]
    return []


def _comparison_faults(config: TrainConfig) -> list[str]:
    """Faults of the objective's keywords together, and of settings with which an objective
    cannot compare the samples of a batch."""
    objective = config.objective
    faults = objective.faults(config.data.batch_size)
    if not objective.compares_samples:
        return faults
    name = f"objective={objective_name(objective.target)}"
    if config.data.batch_size < 2:
        faults.append(
            f"data.batch_size={config.data.batch_size} but {name} compares the samples of a batch; "
            "give at least 2"
        )
    if config.data.unreadable == "skip":
        faults.append(
            f"data.unreadable=skip but {name} compares the samples of all devices, which must have "
            "equally many; valid: raise"
        )
    return faults


class StatsConfig(TrainConfig):
    """All settings of `atmossl data stats`: the data of a training run, and which statistics to
    compute. See `atmossl.data.climatology.write_climatology`."""

    climatologies: tuple[Kind, ...]
    output: Path | None
    memory_mib: Positive
    force: bool

    @model_validator(mode="after")
    def _has_a_place(self) -> "StatsConfig":
        if self.climatologies and self.output is None:
            raise ValueError("climatologies need output=FOLDER")
        if self.output is not None and not self.climatologies:
            raise ValueError(
                f"output={self.output}: statistics go beside the store or into the cache; a folder "
                "is for climatologies, such as climatologies=[month]"
            )
        return self


def _stream_faults(config: TrainConfig) -> list[str]:
    """Faults of streams that fit neither catalog nor window."""
    faults = []
    for name, stream in config.stream.items():
        if "." in name or hasattr(ModuleDict, name):
            faults.append(
                f"stream.{name}: a network cannot have a part of that name; valid: letters, digits "
                f"and _, but no word of Python or torch such as {name!r}"
            )
        try:
            is_primary = stream.data == PRIMARY
            entry = catalog_entry(
                config.data.name if is_primary else stream.data, config.data.catalog
            )
        except ValueError as error:
            fault = str(error) if is_primary else f"stream.{name}.data: {error}"
            faults += [fault] if fault not in faults else []
            continue
        faults += _entry_faults(stream, entry)
        if stream.data == config.data.name:
            faults.append(f"stream.{name}.data={stream.data} is data.name; leave it out")
        # the window's points on another grid show when it is opened
        if is_primary:
            faults += _token_faults(stream, config.data.window)
    if not any(s.role == "predict" and s.data == PRIMARY for s in config.stream.values()):
        faults.append("no stream of data.name has role predict; give at least one")
    return faults + shared_fields(config.specs)


def _entry_faults(stream: StreamSpec, entry: CatalogEntry) -> list[str]:
    """Faults of a stream that does not fit its catalog entry."""
    faults, name = [], stream.name
    computed = sorted(set(stream.variables) & set(FORCINGS))
    if computed and stream.role == "predict":
        faults.append(
            f"stream.{name}.role=predict but {computed} are computed, not observed; valid: "
            "input, static, forcing"
        )
    unknown = sorted(set(stream.variables) - set(entry.variables) - set(FORCINGS))
    if unknown:
        valid = sorted({*entry.variables, *FORCINGS})
        faults.append(f"stream.{name}.variables={unknown} not in the catalog; valid: {valid}")
    levels = sorted(set(stream.levels) - set(entry.levels))
    if levels:
        valid_levels = list(entry.levels)
        faults.append(f"stream.{name}.levels={levels} not in the catalog; valid: {valid_levels}")
    return faults


def _token_faults(spec: StreamSpec, window: WindowSize) -> list[str]:
    try:
        size = spec.token_size
        spec.token_shape(window.time, window.lat or size.lat, window.lon or size.lon)
    except ValueError as error:
        return [str(error)]
    return []


def _transform_faults(config: TrainConfig) -> list[str]:
    """Transforms of variables that no stream has, such as misspelt ones."""
    have = sorted({name for stream in config.stream.values() for name in stream.variables})
    return [
        f"data.transforms.{name}: no stream has {name}; valid: {have}"
        for name in config.data.transforms
        if name not in have
    ]


def _joint_faults(config: TrainConfig) -> list[str]:
    """Faults of losses that look at whole fields, which the window does not hold."""
    faults, window = [], config.data.window
    losses = config.objective.arguments.get("losses", ())
    smallest = min((n for n in (window.lat, window.lon) if n), default=None)  # 0: the whole grid
    for name, size in AREAS.items():
        if name in losses and smallest is not None and smallest < size:
            faults.append(
                f"objective.losses.{name} means over {size} x {size} cells, but data.window has "
                f"lat={window.lat}, lon={window.lon}; choose a smaller area or a larger window"
            )
    if "spectral_crps" in losses and window.lon:
        faults.append(
            f"objective.losses.spectral_crps needs whole circles of longitude, data.window.lon=0; "
            f"it is {window.lon}"
        )
    return faults


def _schedule_faults(config: TrainConfig) -> list[str]:
    if config.optimizer.warmup_steps < config.trainer.max_steps:
        return []
    return [
        f"optimizer.warmup_steps={config.optimizer.warmup_steps} must be below "
        f"trainer.max_steps={config.trainer.max_steps}"
    ]


def _model_faults(config: TrainConfig) -> list[str]:
    """Faults of the network's keywords together, and of an ensemble that losses do not fit."""
    model = config.model
    faults = model.kind.faults_of(model.arguments, config.specs)
    needs_ensemble = sorted(
        set(config.objective.arguments.get("losses", ())) - {"ensemble_mse", "mean_mse"}
    )
    if needs_ensemble and model.arguments.get("num_members", 2) < 2:
        faults.append(f"model.num_members=1 but objective.losses={needs_ensemble} need at least 2")
    return faults


def _causal_faults(config: TrainConfig) -> list[str]:
    """Faults of settings that predict every step from earlier ones with a network that sees
    later steps."""
    if config.model.kind is not Multiformer:  # others check their own
        return []
    causal = config.model.arguments["causal"]
    if causal:
        try:
            check_causal(config.specs, config.model.arguments["attention"])
        except ValueError as error:
            return [str(error)]
    samplers = [config.masking, *getattr(config.masking, "samplers", ())]
    if any(isinstance(sampler, Autoregression) for sampler in samplers) != causal:
        return [
            f"model.causal={str(causal).lower()} but masking is "
            f"{snake_case(type(config.masking).__name__)}: masking=autoregression needs "
            "model.causal=true, which is for it alone"
        ]
    return []


CHECKS = (
    _causal_faults,
    _stream_faults,
    _transform_faults,
    _model_faults,
    _joint_faults,
    _schedule_faults,
    _tuning_faults,
    _comparison_faults,
)


class CheckpointConfig(EncodingConfig):
    """The settings of every command that runs a checkpoint on a store.

    split: part of the catalog entry whose dates are used. every: of all possible times, each n-th.
    """

    checkpoint: str
    split: Literal["train", "validation", "test"]
    segment: str | None
    every: Positive


def _members(members: Any) -> int | tuple[int, ...] | None:
    """The number of members, or the numbers of some members."""
    if members is None:
        return None
    listed = isinstance(members, Sequence) and not isinstance(members, str)
    numbers: list[Any] = [*members] if listed else [members]
    whole = all(hasattr(number, "__index__") and number is not True for number in numbers)
    if not whole or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(_VALID_MEMBERS)
    if min(numbers) < (0 if listed else 1):
        raise ValueError(_VALID_MEMBERS)
    chosen = tuple(map(index, numbers))
    return chosen if listed else chosen[0]


_VALID_MEMBERS = "valid: null for all, a number from 1 on, or some by their numbers, such as [0,2]"
ChosenMembers = Annotated[int | tuple[int, ...] | None, BeforeValidator(_members)]


class DatedConfig(CheckpointConfig):
    """Settings of a command that runs a checkpoint at chosen times: ISO dates, or `all`."""

    init_time: Times

    @property
    def dates(self) -> str | tuple[str, ...] | None:
        """The chosen times; None for all of them."""
        return None if self.init_time == "all" else self.init_time


class PredictConfig(DatedConfig):
    """All settings of `atmossl predict`."""

    task: ChosenTask
    tilings: Positive
    members: ChosenMembers
    seed: NotNegative
    layout: Literal["cf", "weatherbench2"]
    resume: bool
    missing: Literal["keep", "fill"]


class EmbedConfig(DatedConfig):
    """All settings of `atmossl embed`."""

    layer: int


def _as_list(names: Any) -> Any:
    """One path, or several as `[a.ckpt,b.ckpt]` or `a.ckpt,b.ckpt`, which the command line passes
    as one text."""
    if not isinstance(names, str):
        return names
    in_brackets = names.startswith("[") and names.endswith("]")
    if Path(names).exists() or not (in_brackets or "," in names):
        return [names]
    return [unquoted(name.strip()) for name in split(names[1:-1] if in_brackets else names)]


class FinetuneConfig(Strict):
    """How `atmossl probe` fine-tunes; see `atmossl.probes.finetuning.FinetuneSettings`."""

    fractions: tuple[NonZeroShare, ...]
    probes: tuple[str, ...]
    steps: Positive
    batch_size: Positive
    learning_rate: PositiveFloat


class ProbeConfig(EncodingConfig):
    """All settings of `atmossl probe`.

    checkpoint: one or several. probes: names, empty for all that the checkpoint's fields allow.
        layers: of the encoder, empty for all. every: of all dates, each n-th. places: per date, for
        labels of a place. withheld: streams that the encoder is not shown. block_days, bootstrap:
        length of a block and number of draws.
    """

    checkpoint: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
    probes: tuple[str, ...]
    layers: tuple[int, ...]
    every: Positive
    places: Positive
    withheld: tuple[str, ...]
    finetune: FinetuneConfig
    block_days: Annotated[float, Field(gt=0.0)]
    bootstrap: Positive
    seed: NotNegative


def _is_box(limits: Any) -> Any:
    if not isinstance(limits, Sequence) or isinstance(limits, str) or len(limits) != 4:
        raise ValueError("needed: south, north, west, east in degrees")
    return limits


Limits = Annotated[tuple[float, float, float, float], BeforeValidator(_is_box)]


def _is_tails(tails: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 < tails[0] < tails[1] < 1.0:
        raise ValueError("needed: 0 < low < high < 1")
    return tails


class EvaluateConfig(CheckpointConfig):
    """All settings of `atmossl evaluate`.

    forecasts: stores to score instead of the checkpoint's tasks; the first is compared with the
        others. boxes: name -> south, north, west, east in degrees. tails: quantiles of the
        training record below and above which events and extremes are scored. climatology: by cell
        and month, that `data stats` left of the same training data; worked out anew without.
    """

    split: Literal["validation", "test"]
    tasks: tuple[ChosenTask, ...] = Field(min_length=1)
    forecasts: tuple[str, ...]
    regions: tuple[str, ...]
    boxes: dict[str, Limits] | None
    tails: Annotated[tuple[float, float], AfterValidator(_is_tails)]
    climatology: Path | None
    ridge: bool
    bootstrap: Positive
    tilings: Positive
    members: Positive | None
    seed: NotNegative

    @model_validator(mode="after")
    def _climatology_is_of_the_training(self) -> "EvaluateConfig":
        if self.climatology is not None and self.forecasts:
            raise ValueError(
                f"climatology={self.climatology} is of the checkpoint's own variables and grid; "
                "with forecasts=[...] leave it out"
            )
        return self

    @model_validator(mode="after")
    def _regions_exist(self) -> "EvaluateConfig":
        find_regions(self.regions)
        boxes(self.boxes or {})
        return self


def checked(kind: type, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Validate a composed configuration. Returns it, and its values with a list of one in place of
    each single word or number where a list is needed.

    Raises:
        ConfigError: one line per fault, each with the key, the value and what would be valid.
    """
    adapter, values = TypeAdapter(kind), dict(values)
    try:
        return adapter.validate_python(values), values
    except ValidationError as error:
        listed = with_single_items_listed(error.errors(), values)
    try:
        return adapter.validate_python(listed), listed
    except ValidationError as error:
        raise ConfigError("\n".join(lines_of(error.errors(), values=listed))) from error


def parse(kind: type, values: Mapping[str, Any]) -> Any:
    """The configuration alone; see `checked`."""
    return checked(kind, values)[0]
