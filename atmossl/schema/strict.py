"""What every part of the configuration obeys."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """All that is wrong with a configuration, one line per fault."""


class Strict(BaseModel):
    """Settings that refuse unknown keys and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
