"""The one error that every reader and converter of this package raises for a bad file."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is damaged, unsupported, incomplete or does not fit the model."""
