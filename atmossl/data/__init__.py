"""Data: stores and their catalog, statistics and normalisation, windows, and the loaders of
training. Nothing here knows the network; `training` and `inference` take its windows."""
