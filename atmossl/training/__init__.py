"""The training loop: a LightningModule that only delegates, callbacks, schedules, curves."""
