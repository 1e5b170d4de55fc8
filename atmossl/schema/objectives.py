"""The objective of the configuration: a class of `atmossl.objectives`, named by `_target_`.

A new objective is a module in that package and a file in conf/objective. The other keys of the file
are the keywords of the class; their types are those of its constructor.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model

import atmossl.objectives
from atmossl.masking.views import ViewSpec
from atmossl.objectives.base import Objective

_OF_THE_RUN = ("scales", "network")  # keywords that are no part of the configuration
_ENDS = ("tail",)  # of the network, that can be trained alone


@dataclass(frozen=True)
class ObjectiveChoice:
    """A class of objective and its keywords; `train_only` names the end of the network that alone
    is trained."""

    kind: type[Objective]
    arguments: Mapping[str, Any]
    train_only: str | None

    @property
    def target(self) -> str:
        return _target_of(self.kind)

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return self.kind.views_of(self.arguments)

    def build(self, **of_the_run: Any) -> Objective:
        """The objective. of_the_run: `scales` and `network`, for a constructor that wants them."""
        wanted = inspect.signature(self.kind).parameters
        given = {name: value for name, value in of_the_run.items() if name in wanted}
        return self.kind(**self.arguments, **given)


def objectives() -> dict[str, type[Objective]]:
    """All objectives of the package, by `_target_`."""
    for module in pkgutil.iter_modules(atmossl.objectives.__path__, "atmossl.objectives."):
        importlib.import_module(module.name)
    kinds = [kind for kind in _subclasses(Objective) if kind.__module__.startswith("atmossl.")]
    return {_target_of(kind): kind for kind in kinds}


def choose_objective(node: Any) -> ObjectiveChoice:
    """Validate the keys of an objective.

    Raises:
        ValueError: an unknown class or key, or a value that does not fit.
    """
    if isinstance(node, ObjectiveChoice):
        return node
    values, known = dict(node), objectives()
    target, train_only = values.pop("_target_", None), values.pop("train_only", None)
    if target not in known:
        raise ValueError(f"_target_={target!r}; valid: {sorted(known)}")
    if train_only not in (None, *_ENDS):
        raise ValueError(f"train_only={train_only!r}; valid: null or one of {list(_ENDS)}")
    checked = _keywords_of(known[target]).model_validate(values)
    arguments = {name: getattr(checked, name) for name in type(checked).model_fields}
    return ObjectiveChoice(known[target], arguments, train_only)


Chosen = Annotated[ObjectiveChoice, BeforeValidator(choose_objective)]


def _keywords_of(kind: type[Objective]) -> type[BaseModel]:
    """The constructor's keywords as a schema; unknown keys are errors."""
    parameters = inspect.signature(kind, eval_str=True).parameters
    fields: dict[str, Any] = {
        name: (p.annotation, ... if p.default is p.empty else p.default)
        for name, p in parameters.items()
        if name not in _OF_THE_RUN
    }
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def _subclasses(kind: type[Objective]) -> list[type[Objective]]:
    return [sub for direct in kind.__subclasses__() for sub in (direct, *_subclasses(direct))]


def _target_of(kind: type[Objective]) -> str:
    return f"{kind.__module__}.{kind.__name__}"
