"""Every way the offline half refuses its input. One clear line each; no imports of ours."""

from __future__ import annotations


class QuantError(ValueError):
    """Base of the errors that a user of the offline tools can act on."""


class SourceError(QuantError):
    """The model to quantize cannot be read, or is of a kind that is not supported."""


class CalibrationError(QuantError):
    """The calibration text is missing, empty or too short."""


class SolverError(QuantError):
    """A layer cannot be quantized: a value is not finite, or its Hessian has no factor."""


class CheckpointError(QuantError):
    """A checkpoint cannot be read or written. One line that names the file and the reason."""


class PeerError(QuantError):
    """Another process of the same run failed; that process says why."""


class JournalError(QuantError):
    """An unfinished run's folder belongs to another run, or to one that is still working."""
