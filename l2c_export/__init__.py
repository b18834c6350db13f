"""Compile a learned caching schedule of a diffusion transformer into deployable graphs."""

__version__ = "0.1.0"
