"""Parts of a configuration that are objects of a class that the user chooses: masks, tasks,
objectives.

Such a part is a mapping with the key `_target_`, which names the class: by the name of the class in
small letters with underscores, such as `temporal_interpolation`, or with its module in front. The
other keys are the keywords of its constructor, whose annotations say what is valid. So a key stands
once, in the class that uses it. A keyword that takes a mask, a task, a region or an objective is
such a part again. A class of a plugin is named by its package, see `atmossl.plugins`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BeforeValidator

import atmossl.objectives
from atmossl.inference.regions import inpainting
from atmossl.masking.base import MaskingSampler
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.correction import Correction
from atmossl.masking.places import AllButStations, CrossVariable, HiddenCells, LatLonBox
from atmossl.masking.random import (
    Autoregression,
    BlockMasking,
    Mixture,
    RandomMasking,
    SplitBrain,
    TimeBlockMasking,
)
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, Task, TemporalInterpolation
from atmossl.masking.views import ViewSpec
from atmossl.model.kinds import NETWORKS
from atmossl.objectives.base import Ability, Objective, ObjectivePart
from atmossl.plugins import (
    Part,
    UntrustedError,
    check_listed,
    checked_keywords,
    find_class,
    with_defaults,
)
from atmossl.setting_types import snake_case
from atmossl.value_faults import as_written, listed

_OF_THE_RUN = ("scales", "network")  # keywords that are no part of the configuration
_ENDS = ("tail",)  # of the network, that can be trained alone

Kinds = Mapping[str, Callable[..., Any]]


def _by_name(*kinds: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {snake_case(kind.__name__): kind for kind in kinds}


TASKS = _by_name(
    Forecast, Hindcast, TemporalInterpolation, Downscaling, inpainting, CrossVariable, Combined,
    Counterfactual, Correction,
)  # fmt: skip
MASKS = TASKS | _by_name(
    RandomMasking, BlockMasking, TimeBlockMasking, SplitBrain, Autoregression, Mixture
)
REGIONS = _by_name(LatLonBox, AllButStations)


def choose(node: Any, kinds: Kinds, base: type) -> Any:
    """Build the object that a mapping with `_target_` describes; any other object stays as it is.

    kinds: the package's own classes by name; others are subclasses of `base` that plugins have.

    Raises:
        ValueError: an unknown class or key, or a value that does not fit.
    """
    if type(node).__module__ != "builtins":
        return node
    kind, values = _kind_of(node, kinds, base)
    return kind(**checked_keywords(kind, values, as_written=_with_parts))


def _kind_of(node: Any, kinds: Kinds, base: type) -> tuple[Any, dict[str, Any]]:
    """The class that a node names, and the other keys of the node."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ValueError(
            f"needs keys and values, with _target_ among them; valid: {listed(sorted(kinds))}"
        )
    values = dict(node)
    return find_class(values.pop("_target_"), base, kinds), values


def _with_parts(hint: Any) -> Any:
    """An annotation that accepts a mapping wherever the original takes such a part."""
    if not isinstance(hint, Hashable):  # arguments of a Callable
        return hint
    if hint in _PARTS:
        return _PARTS[hint]
    origin: Any = get_origin(hint)
    arguments = get_args(hint)
    changed = tuple(map(_with_parts, arguments))
    if changed == arguments:
        return hint
    if origin is Annotated:
        return Annotated[changed]
    return reduce(or_, changed) if origin in (Union, UnionType) else origin[changed]


def trained_sampler(
    checkpoint_record: Mapping[str, Any], plugins: Sequence[str]
) -> MaskingSampler | str | None:
    """The sampler of the masks under which a checkpoint was trained, from its record. None if
    the record has none; a text that says so if its code is of a package that is not in
    `plugins`."""
    masking = checkpoint_record.get("config", {}).get("masking")
    if masking is None:
        return None
    try:
        check_listed(masking, {*MASKS, *REGIONS}, plugins)
    except UntrustedError as error:
        return f"masks that are known here: {error}"
    return choose(masking, MASKS, MaskingSampler)


ChosenTask = Annotated[Task, BeforeValidator(partial(choose, kinds=TASKS, base=Task))]
ChosenMask = Annotated[Any, BeforeValidator(partial(choose, kinds=MASKS, base=MaskingSampler))]
_PARTS: dict[Any, Any] = {
    Task: ChosenTask,
    MaskingSampler: ChosenMask,
    ObjectivePart: Annotated[Any, BeforeValidator(lambda node: choose_objective(node))],
    HiddenCells: Annotated[Any, BeforeValidator(partial(choose, kinds=REGIONS, base=HiddenCells))],
}


@dataclass(frozen=True)
class ObjectiveChoice(Part):
    """A class of objective and its keywords; `train_only` names the end of the network that alone
    is trained."""

    kind: type[Objective]
    train_only: str | None

    @property
    def provides(self) -> frozenset[Ability]:
        return self.kind.provided_by(self.arguments)

    @property
    def compares_samples(self) -> bool:
        return self.kind.compares_by(self.arguments)

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return self.kind.views_of(self.arguments)

    def faults(self, batch_size: int) -> list[str]:
        """Keywords that do not fit together, one line each."""
        return self.kind.faults_of(self.arguments, batch_size)


@cache
def objectives() -> dict[str, Callable[..., Any]]:
    """All objectives of the package, by name."""
    for module in pkgutil.iter_modules(atmossl.objectives.__path__, "atmossl.objectives."):
        importlib.import_module(module.name)
    kinds = _subclasses(Objective)
    return _by_name(*(kind for kind in kinds if kind.__module__.startswith("atmossl.")))


def builtin_names() -> frozenset[str]:
    """Names of all classes of the package that a `_target_` can name."""
    return frozenset((*MASKS, *REGIONS, *objectives(), *NETWORKS))


def _subclasses(kind: type[Objective]) -> list[type[Objective]]:
    return [sub for direct in kind.__subclasses__() for sub in (direct, *_subclasses(direct))]


def choose_objective(node: Any) -> ObjectiveChoice:
    """Validate the keys of an objective.

    Raises:
        ValueError: an unknown class or key, or a value that does not fit.
    """
    kind, values = _kind_of(node, objectives(), Objective)
    train_only = values.pop("train_only", None)
    if train_only not in (None, *_ENDS):
        raise ValueError(
            f"train_only={as_written(train_only)}; valid: null or one of {list(_ENDS)}"
        )
    keywords = checked_keywords(kind, values, _OF_THE_RUN, as_written=_with_parts)
    return ObjectiveChoice(kind, with_defaults(kind, keywords, _OF_THE_RUN), train_only)


ChosenObjective = Annotated[ObjectiveChoice, BeforeValidator(choose_objective)]
