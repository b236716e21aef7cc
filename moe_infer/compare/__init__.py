"""Comparing two graphs that should compute the same.

``verify`` is the entry; ``feeds`` makes inputs, ``taps`` lets inner values out of a graph,
``difference`` compares arrays, ``report`` tells the result.
"""
