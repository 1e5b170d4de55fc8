"""Objectives: what training optimises. An objective maps a network and a batch to losses; it
knows neither the loop nor the data."""
