"""Masks decide what is x and what is y: samplers for pretraining, and tasks as fixed masks."""
