"""Benchmarks. Importing the folder registers them. Each returns what to forget and what to keep."""

from stillknows.benchmarks import jsonl, tofu, world

__all__ = ["jsonl", "tofu", "world"]
