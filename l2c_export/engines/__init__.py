"""Engines: a bundle's graphs compiled for a backend, on the machine that needs them. No torch."""
