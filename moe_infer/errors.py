"""Exceptions of the package that are not one of Python's own."""

from __future__ import annotations


class PluginError(RuntimeError):
    """The compiled plugin, libmoe_infer.so, cannot be used; the message says why and what helps."""
