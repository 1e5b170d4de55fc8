"""Commands that print figures, each ending in one JSON line."""
