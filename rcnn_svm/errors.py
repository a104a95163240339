"""The exceptions a user can meet, and the exit code each one ends a command with.

Every message follows one pattern: *where: what must hold, what was found. What to do.*
This module imports nothing but the standard library.
"""

from __future__ import annotations

import re
import sys

__all__ = [
    "CacheError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "DependencyError",
    "DiskSpaceError",
    "NotFittedError",
    "RcnnSvmError",
    "ShapeError",
    "WeightsError",
    "printable",
]

_LONGEST = 4000
"""Characters of a message: more is never read."""


def printable(text: str) -> str:
    r"""Return a text for a terminal: control characters, and marks that turn its direction, are spelled out.

    What is longer than 4000 characters is cut in the middle.

    Example:
        >>> printable("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} ... ({len(text) - _LONGEST} characters) ... {text[-half:]}"
    spelled = "".join(
        c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
    # What is spelled out takes up to ten characters instead of one.
    return spelled if len(spelled) <= _LONGEST + 100 else f"{spelled[:_LONGEST]} ..."


class RcnnSvmError(Exception):
    """Base class of every error that this package raises on purpose.

    Its text is one printable line, whatever of a broken file it quotes.

    Attributes:
        exit_code: what a command returns when this error ends it (2 usage, 3 data).
    """

    exit_code = 3

    def __str__(self) -> str:
        return printable(re.sub(r"\s*[\n\r\t\v\f]\s*", " ", super().__str__()))


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


class ClusterError(RcnnSvmError):
    """Machines that were to share the work are not there, are lost, or would compute other bytes."""


class DataError(RcnnSvmError):
    """A file that the user gave is missing, broken or contradicts itself."""


class CacheError(DataError):
    """A file of our own cache does not hold what its name promises."""


class WeightsError(DataError):
    """A file of network weights is missing, damaged or of another network."""


class DiskSpaceError(DataError):
    """The disk has no room for what was asked for."""
