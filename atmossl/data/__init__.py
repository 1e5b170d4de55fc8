"""Stores and their catalog, statistics and normalisation, windows, the datamodule."""
