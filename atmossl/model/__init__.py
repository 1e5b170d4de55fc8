"""Networks behind one contract, `atmossl.model.network.Network`. They know views and tokens,
neither stores nor objectives."""
