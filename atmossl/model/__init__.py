"""Networks behind one contract, `atmossl.model.network.Network`."""
