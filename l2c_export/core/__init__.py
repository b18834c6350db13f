"""Data and arithmetic: models' geometry, schedules, plans, samplers, bundles (stdlib and numpy)."""
