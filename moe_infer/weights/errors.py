"""The one exception of this package."""

from __future__ import annotations


class WeightFileError(ValueError):
    """A weight file is malformed or does not fit the layer.

    The message names the file, what was found, what was expected and what helps.
    """


def shown(name: str) -> str:
    """A name from an untrusted file, quoted, escaped and of bounded length, for a message."""
    return repr(name) if len(name) <= 80 else repr(name[:77]) + "..."


def listed(items: list[str], most: int = 4) -> str:
    """The first few of a list and how many more there are, for a message."""
    text = ", ".join(items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
