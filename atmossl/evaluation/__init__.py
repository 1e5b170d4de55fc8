"""Scores, baselines and reports. This room reads datasets, never a model.

Way of a number: `alignment` puts truth beside a prediction by labels, `scores` reduces each time
to a few means over a region, `bootstrap` recombines times, `verify` writes one tidy table, and
`report` shows it.
"""
