"""What comes of a sweep: read, averaged, exported and reported, without torch."""

from .run import Run, SampleMap, load_run

__all__ = ["Run", "SampleMap", "load_run"]
