"""Exceptions that callers may want to catch by name."""

from __future__ import annotations


class FastDDPMError(Exception):
    """Base of the library's own exceptions; the command line prints them as one line and exits with 1."""


class BackendUnavailable(FastDDPMError, RuntimeError):  # noqa: N818  (the name says it)
    """The backend asked for cannot run here; the message says why and what to do about it."""


class ModelOutputError(FastDDPMError, ValueError):
    """The model returned something that is no prediction for x_t: wrong type, shape or number of channels."""


class SamplingError(FastDDPMError, RuntimeError):
    """A step failed; the message names the step, and the original exception is its cause."""
