"""Training: a LightningModule that only delegates, callbacks, optimisers and schedules,
checkpoints, strategies."""
