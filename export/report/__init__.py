"""The report on a patch: measured into plain dataclasses (measure.py), drawn (plots.py), set as one page (page.py)."""

from .plots import STYLE

__all__ = ["STYLE"]
