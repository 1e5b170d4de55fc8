"""Finds and builds networks by the name that a checkpoint records: networks of the package, and
classes of plugins."""

from collections.abc import Sequence
from typing import Any

from atmossl.model.atmorep_network import AtmoRepNetwork
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Network
from atmossl.plugins import Part, choose_part, find_class

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


def choose_network(node: Any) -> Part:
    """The class of a plugin that `model._target_` names, with its keywords; ValueError if they
    do not fit."""
    return choose_part(node, Network, _OF_THE_RUN)


def build_network(kind: str, plugins: Sequence[str] = (), **arguments: Any) -> Network:
    """Build the network that a checkpoint records. Raises what `network_class` raises, and
    ValueError for keywords that do not fit."""
    network = network_class(kind, plugins)
    if kind in NETWORKS:
        return network(**arguments)
    of_the_run = {name: arguments.pop(name) for name in _OF_THE_RUN if name in arguments}
    chosen = choose_network({"_target_": kind, **arguments})
    return chosen.build(**of_the_run)
