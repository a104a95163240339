"""The exceptions a user can meet, and the exit code each one ends a command with.

Every message follows one pattern: *where: what must hold, what was found. What to do.*
This module imports nothing but the standard library.
"""

from __future__ import annotations

import sys

__all__ = [
    "CacheError",
    "ConfigError",
    "DataError",
    "DependencyError",
    "DiskSpaceError",
    "NotFittedError",
    "RcnnSvmError",
    "ShapeError",
    "WeightsError",
]


class RcnnSvmError(Exception):
    """Base class of every error that this package raises on purpose.

    Attributes:
        exit_code: what a command returns when this error ends it (2 usage, 3 data).
    """

    exit_code = 3


class ConfigError(RcnnSvmError, ValueError):
    """An option, argument or configuration key has a value that cannot work."""

    exit_code = 2


class ShapeError(ConfigError):
    """An array has the wrong shape, dtype or length."""


class NotFittedError(ConfigError):
    """A head, detector or transform was used before it was fitted or loaded.

    Where scikit-learn is loaded, one that is raised is scikit-learn's error of this name as well.
    """

    def __new__(cls, *args: object) -> NotFittedError:
        """Make an error of both kinds where there are both."""
        theirs = getattr(sys.modules.get("sklearn.exceptions"), "NotFittedError", None)
        if cls is NotFittedError and theirs is not None:
            return super().__new__(type(cls.__name__, (cls, theirs), {"__module__": cls.__module__}), *args)
        return super().__new__(cls, *args)


class DependencyError(RcnnSvmError, ImportError):
    """An optional package is missing; the message says what to install."""

    exit_code = 2


class DataError(RcnnSvmError):
    """A file that the user gave is missing, broken or contradicts itself."""


class CacheError(DataError):
    """A file of our own cache does not hold what its name promises."""


class WeightsError(DataError):
    """A file of network weights is missing, damaged or of another network."""


class DiskSpaceError(DataError):
    """The disk has no room for what was asked for."""
