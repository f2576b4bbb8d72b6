"""Fixtures: the source models that the tests export in every precision."""

from __future__ import annotations

from runtime_tests.export.sources import smollm2, tiny_gemma, tiny_llama

__all__ = ["smollm2", "tiny_gemma", "tiny_llama"]  # pytest finds these fixtures by their names here
