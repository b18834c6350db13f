"""Runs engines in device memory: one copy of the weights, one stream, a trajectory in one launch."""
