"""Parts of a configuration that are objects of a class that the user chooses: masks, tasks,
objectives.

Such a part is a mapping with the key `_target_`, which names the class: by the name of the class in
small letters with underscores, such as `temporal_interpolation`, or with its module in front. The
other keys are the keywords of its constructor, whose annotations say what is valid. So a key stands
once, in the class that uses it. A keyword that takes a mask, a task, a region or an objective is
such a part again. A class of a plugin is named by its package, see `atmossl.settings`.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any

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
from atmossl.objectives.base import Ability, Objective, ObjectivePart, check_class
from atmossl.settings import (
    Part,
    checked_keywords,
    choose,
    named_class,
    snake_case,
    with_defaults,
    with_parts,
)
from atmossl.value_faults import as_written, listed

_OF_THE_RUN = ("scales", "network")  # keywords that are no part of the configuration
_ENDS = ("tail",)  # of the network, that can be trained alone


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


_PARTS: dict[Any, Any] = {}  # filled below: the types of such parts, and how they are chosen
_as_written = partial(with_parts, parts=_PARTS)


def _choose_task(node: Any) -> Any:
    task = choose(node, TASKS, Task, _as_written)
    missing = [name for name in ("plan", "__call__")
               if getattr(type(task), name, None) is getattr(Task, name)]  # fmt: skip
    if missing:
        raise ValueError(
            f"the task {type(task).__qualname__} has no method {listed(missing)}, which "
            "atmossl.masking.tasks.Task asks for"
        )
    return task


choose_mask = partial(choose, kinds=MASKS, base=MaskingSampler, as_written=_as_written)
_choose_region = partial(choose, kinds=REGIONS, base=HiddenCells, as_written=_as_written)

ChosenTask = Annotated[Task, BeforeValidator(_choose_task)]
ChosenMask = Annotated[Any, BeforeValidator(choose_mask)]
_PARTS |= {
    Task: ChosenTask,
    MaskingSampler: ChosenMask,
    ObjectivePart: Annotated[Any, BeforeValidator(lambda node: choose_objective(node))],
    HiddenCells: Annotated[Any, BeforeValidator(_choose_region)],
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
    kind, values = named_class(node, Objective, objectives())
    check_class(kind)
    train_only = values.pop("train_only", None)
    if train_only not in (None, *_ENDS):
        raise ValueError(
            f"train_only={as_written(train_only)}; valid: null or one of {listed(_ENDS)}"
        )
    keywords = checked_keywords(kind, values, _OF_THE_RUN, as_written=_as_written)
    return ObjectiveChoice(kind, with_defaults(kind, keywords, _OF_THE_RUN), train_only)


ChosenObjective = Annotated[ObjectiveChoice, BeforeValidator(choose_objective)]
