"""A small world of real audio-video files, made from a seed: for the demo, for tests, and for experiments with controls."""

from vatt.engine.data.sample_world.make import make_sample_world
from vatt.engine.data.sample_world.world import Combination, combination

__all__ = ["Combination", "combination", "make_sample_world"]
