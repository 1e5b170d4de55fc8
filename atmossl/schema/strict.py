"""The base class of the configuration's parts, and the error for all that is wrong with a
configuration."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration has faults; the message has one line for each."""


class Strict(BaseModel):
    """Settings that refuse unknown keys and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
