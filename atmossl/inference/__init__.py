"""Inference: a checkpoint, a store and a task become predictions, by tiles that are blended,
written as CF files."""
