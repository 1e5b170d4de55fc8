"""The networks of the package, and which network and keywords `model` of a configuration means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atmossl.model.atmorep_network import AtmoRepNetwork
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Network
from atmossl.settings import Part, checked_keywords, choose_part, target_name, with_defaults

NETWORKS: dict[str, type[Network]] = {"multiformer": Multiformer, "atmorep": AtmoRepNetwork}
OF_THE_RUN = ("streams", "scales")  # keywords that are no part of the configuration


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
        return choose_part(node, Network, OF_THE_RUN)
    kind = NETWORKS[name]
    if kind is Multiformer:
        values = with_defaults(kind, checked_keywords(kind, values, OF_THE_RUN), OF_THE_RUN)
    return PackagedNetwork(kind, values, name)  # others are those of a checkpoint, as it has them
