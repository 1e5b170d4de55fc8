"""Networks by the name that a checkpoint records."""

from typing import Any

from atmossl.model.atmorep_network import AtmoRepNetwork
from atmossl.model.multiformer import Multiformer
from atmossl.model.network import Network

NETWORKS: dict[str, type[Network]] = {
    "multiformer": Multiformer,
    "atmorep": AtmoRepNetwork,
}


def network_class(kind: str) -> type[Network]:
    """Raises ValueError for a kind that this version does not know."""
    if kind not in NETWORKS:
        raise ValueError(f"the network {kind!r} is unknown here; known: {sorted(NETWORKS)}")
    return NETWORKS[kind]


def build_network(kind: str, **arguments: Any) -> Network:
    """Raises ValueError for a kind that this version does not know."""
    return network_class(kind)(**arguments)
