"""Policies that lost against those of the library, for benchmarks/policy_study.py."""
