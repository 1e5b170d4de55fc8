"""Parts of a configuration that are objects of a class of one's choice: masks, tasks, objectives.

Such a part is a mapping with the key `_target_`, which names the class: by the name of the class in
small letters with underscores, such as `temporal_interpolation`, or with its module in front. The
other keys are the keywords of its constructor, whose annotations say what is valid. So a key stands
once, in the class that uses it. A keyword that takes a mask, a task, a region or an objective is
such a part again.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial, reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError

import atmossl.objectives
from atmossl.inference.regions import inpainting
from atmossl.masking.base import MaskingSampler
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.places import AllButStations, CrossVariable, HiddenCells, LatLonBox
from atmossl.masking.random import BlockMasking, Mixture, RandomMasking, TimeBlockMasking
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, Task, TemporalInterpolation
from atmossl.masking.views import ViewSpec
from atmossl.names import snake_case, target_name
from atmossl.objectives.base import Ability, Objective, ObjectivePart

_OF_THE_RUN = ("scales", "network")  # keywords that are no part of the configuration
_ENDS = ("tail",)  # of the network, that can be trained alone

Kinds = Mapping[str, Callable[..., Any]]


def _by_name(*kinds: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {snake_case(kind.__name__): kind for kind in kinds}


TASKS = _by_name(
    Forecast, Hindcast, TemporalInterpolation, Downscaling, inpainting, CrossVariable, Combined,
    Counterfactual,
)  # fmt: skip
MASKS = _by_name(RandomMasking, BlockMasking, TimeBlockMasking, Mixture) | TASKS
REGIONS = _by_name(LatLonBox, AllButStations)


def choose(node: Any, kinds: Kinds) -> Any:
    """Build the object that a mapping with `_target_` describes; any other object stays as it is.

    Raises:
        ValueError: an unknown class or key, or a value that does not fit.
    """
    if type(node).__module__ != "builtins":
        return node
    kind, values = _kind_of(node, kinds)
    checked = _checked(kind, values)
    return kind(**{name: getattr(checked, name) for name in checked.model_fields_set})


def _kind_of(node: Any, kinds: Kinds) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class that a node names, and the node's other keys."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ValueError(f"needs keys and values, with _target_ among them; valid: {sorted(kinds)}")
    values = dict(node)
    target = values.pop("_target_")
    kind = kinds.get(target_name(str(target)))
    if kind is None:
        fault = _fault("unknown_target", f"valid: {sorted(kinds)}")
        raise ValidationError.from_exception_data(
            "_target_", [{"type": fault, "loc": ("_target_",), "input": target}]
        )
    return kind, values


def _checked(kind: Callable[..., Any], values: Mapping[str, Any]) -> BaseModel:
    """The keywords of a constructor, checked and converted as its annotations say."""
    keywords = _keywords_of(kind)
    valid = sorted(field.alias or name for name, field in keywords.model_fields.items())
    unknown = _fault("unknown_key", f"unknown key; valid: {valid}")
    faults = [
        InitErrorDetails(type=unknown, loc=(key,), input=value)
        for key, value in values.items()
        if key not in valid
    ]
    try:
        checked = keywords.model_validate(values)
    except ValidationError as error:
        faults += [
            InitErrorDetails(type=_fault(e["type"], e["msg"]), loc=e["loc"], input=e["input"])
            for e in error.errors()
        ]
    else:
        if not faults:
            return checked
    raise ValidationError.from_exception_data(kind.__name__, faults)


def _fault(kind: Any, message: str) -> PydanticCustomError:
    return PydanticCustomError(kind, message)  # pyright: ignore[reportArgumentType]


@cache
def _keywords_of(kind: Callable[..., Any]) -> type[BaseModel]:
    """The constructor's keywords as a schema."""
    parameters = inspect.signature(kind, eval_str=True).parameters
    fields: dict[str, Any] = {
        name: (_with_parts(p.annotation), ... if p.default is p.empty else p.default)
        for name, p in parameters.items()
        if name not in _OF_THE_RUN
    }
    config = ConfigDict(arbitrary_types_allowed=True)
    return create_model(kind.__name__, __config__=config, **fields)


def _with_parts(hint: Any) -> Any:
    """An annotation, in which what takes such a part takes its mapping as well."""
    if hint in _PARTS:
        return _PARTS[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    changed = tuple(map(_with_parts, arguments))
    if changed == arguments:
        return hint
    if origin is Annotated:
        return Annotated[changed]
    return reduce(or_, changed) if origin in (Union, UnionType) else origin[changed]


ChosenTask = Annotated[Task, BeforeValidator(partial(choose, kinds=TASKS))]
ChosenMask = Annotated[Any, BeforeValidator(partial(choose, kinds=MASKS))]
_PARTS: dict[Any, Any] = {
    Task: ChosenTask,
    MaskingSampler: ChosenMask,
    ObjectivePart: Annotated[Any, BeforeValidator(lambda node: choose_objective(node))],
    HiddenCells: Annotated[Any, BeforeValidator(partial(choose, kinds=REGIONS))],
}


@dataclass(frozen=True)
class ObjectiveChoice:
    """A class of objective and its keywords; `train_only` names the end of the network that alone
    is trained."""

    kind: type[Objective]
    arguments: Mapping[str, Any]
    train_only: str | None

    @property
    def target(self) -> str:
        return f"{self.kind.__module__}.{self.kind.__name__}"

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

    def build(self, **of_the_run: Any) -> Objective:
        """The objective. of_the_run: `scales` and `network`, for a constructor that wants them."""
        wanted = inspect.signature(self.kind).parameters
        given = {name: value for name, value in of_the_run.items() if name in wanted}
        return self.kind(**self.arguments, **given)


@cache
def objectives() -> dict[str, Callable[..., Any]]:
    """All objectives of the package, by name."""
    for module in pkgutil.iter_modules(atmossl.objectives.__path__, "atmossl.objectives."):
        importlib.import_module(module.name)
    kinds = _subclasses(Objective)
    return _by_name(*(kind for kind in kinds if kind.__module__.startswith("atmossl.")))


def _subclasses(kind: type[Objective]) -> list[type[Objective]]:
    return [sub for direct in kind.__subclasses__() for sub in (direct, *_subclasses(direct))]


def choose_objective(node: Any) -> ObjectiveChoice:
    """Validate the keys of an objective.

    Raises:
        ValueError: an unknown class or key, or a value that does not fit.
    """
    kind, values = _kind_of(node, objectives())
    train_only = values.pop("train_only", None)
    if train_only not in (None, *_ENDS):
        raise ValueError(f"train_only={train_only!r}; valid: null or one of {list(_ENDS)}")
    checked = _checked(kind, values)
    arguments = {name: getattr(checked, name) for name in type(checked).model_fields}
    return ObjectiveChoice(kind, arguments, train_only)  # pyright: ignore[reportArgumentType]


ChosenObjective = Annotated[ObjectiveChoice, BeforeValidator(choose_objective)]
