"""An example of a plugin of atmossl: one class of each kind that a plugin can add."""
