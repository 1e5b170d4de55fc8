"""Checkpoint, store and task to predictions: tiles, blending, and the CF writer."""
