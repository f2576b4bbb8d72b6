"""The report on a patch: measure.py fills plain dataclasses, plots.py draws them, page.py writes one HTML page.

This room knows nothing of how the patch was made; it makes fits of its own only to compare the patch with them.
"""

from .about import describe_report
from .compare import METHODS, fitted_queries
from .measure import measure_composition, measure_patch
from .page import PAGE, write_page
from .plots import STYLE
from .setup import Setup, Subject, check_long
from .store import store_summary

__all__ = [
    "METHODS",
    "PAGE",
    "STYLE",
    "Setup",
    "Subject",
    "check_long",
    "describe_report",
    "fitted_queries",
    "measure_composition",
    "measure_patch",
    "store_summary",
    "write_page",
]
