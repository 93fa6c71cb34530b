"""Errors that are also the builtin a caller with MMRazor code catches: it asserts where fastslim raises by name."""

from __future__ import annotations

from fastslim import errors


class AssertedValueError(errors.FastslimValueError, AssertionError):
    """A value that cannot work, caught as an `AssertionError` too."""


class AssertedTypeError(errors.FastslimTypeError, AssertionError):
    """An argument of the wrong type, caught as an `AssertionError` too."""


class AssertedRuntimeError(errors.FastslimRuntimeError, AssertionError):
    """A call at the wrong time, caught as an `AssertionError` too."""


class NotImportedError(errors.FastslimValueError, ImportError):
    """A path that cannot be imported."""


class UnknownNameError(errors.FastslimValueError, KeyError):
    """A name that nothing has."""

    __str__ = Exception.__str__  # a KeyError would put its message in quotes


class WrongPartError(errors.FastslimTypeError, AttributeError):
    """A part of the wrong kind; MMRazor's algorithms fail with a `TypeError` or where they miss an attribute."""


class InvalidModeError(errors.FastslimValueError, RuntimeError):
    """A mode that no model has; MMRazor raises a `RuntimeError`."""
