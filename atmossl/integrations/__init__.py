"""Checkpoints behind the interfaces of other frameworks, which are not needed to import these."""
