"""One family of exceptions; each also derives from the builtin a caller would expect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastslimError(Exception):
    """Base of every error fastslim raises on purpose; its message names the fix."""


class FastslimValueError(FastslimError, ValueError):
    """A value that cannot work: a width beyond the layer, an unknown choice, a wrong shape."""


class FastslimTypeError(FastslimError, TypeError):
    """An argument of the wrong type or dtype."""


class FastslimRuntimeError(FastslimError, RuntimeError):
    """Something failed while running: a non-finite loss, a model that cannot be traced."""


class FastslimFileError(FastslimError, OSError):
    """A file or folder that cannot be read, written, or does not hold what it should."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, else the list of all.

    Args:
        name: what was given.
        known: the names that exist.

    Returns:
        A sentence fragment such as ``"did you mean 'epochs'?"``.
    """
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
