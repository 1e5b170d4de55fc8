"""Finds and builds networks by the name that a checkpoint records: networks of the package, and
classes of plugins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atmossl.model.atmorep_network import AtmoRepNetwork
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Network
from atmossl.settings import (
    Part,
    checked_keywords,
    choose_part,
    find_class,
    target_name,
    with_defaults,
)

NETWORKS: dict[str, type[Network]] = {
    "multiformer": Multiformer,
    "atmorep": AtmoRepNetwork,
}
_OF_THE_RUN = ("streams", "scales")  # keywords that are no part of the configuration


def network_class(kind: str, plugins: Sequence[str] = ()) -> type[Network]:
    """The class of the network that a checkpoint records.

    Raises:
        UntrustedError: a class of a package that is not in `plugins`; nothing was imported.
        ValueError: a kind that this version does not know.
    """
    return find_class(kind, Network, NETWORKS, plugins)


@dataclass(frozen=True)
class PackagedNetwork(Part):
    """A network of the package and its keywords. name: of the network in `NETWORKS`, which
    checkpoints record."""

    name: str

    @property
    def target(self) -> str:
        return self.name

    @property
    def plain_arguments(self) -> dict[str, Any]:
        return dict(self.arguments)


def choose_network(node: Any) -> Part:
    """The class of network that `model` of a configuration means, with its keywords: the package's
    own multi-stream transformer, or the class that `_target_` names.

    Raises:
        ValueError: no such class, or keywords that do not fit.
    """
    if isinstance(node, Part):
        return node
    if not isinstance(node, Mapping):
        raise ValueError("valid: keys and values, such as {KEY: VALUE}")
    values = dict(node)
    name = target_name(str(values.pop("_target_", "multiformer")))
    if name not in NETWORKS:
        return choose_part(node, Network, _OF_THE_RUN)
    kind = NETWORKS[name]
    if kind is Multiformer:
        values = with_defaults(kind, checked_keywords(kind, values, _OF_THE_RUN), _OF_THE_RUN)
    return PackagedNetwork(kind, values, name)  # others are those of a checkpoint, as it has them


def build_network(kind: str, plugins: Sequence[str] = (), **arguments: Any) -> Network:
    """Build the network that a checkpoint records. Raises what `network_class` raises, and
    ValueError for keywords that do not fit."""
    network = network_class(kind, plugins)
    if kind in NETWORKS:
        return network(**arguments)
    of_the_run = {name: arguments.pop(name) for name in _OF_THE_RUN if name in arguments}
    return choose_network({"_target_": kind, **arguments}).build(**of_the_run)
