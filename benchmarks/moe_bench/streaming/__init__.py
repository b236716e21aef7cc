"""Layers whose experts do not all fit: what streaming.py measures."""
