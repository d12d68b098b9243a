"""Losses over the rows of many processes."""

from .collectives import ProcessGroup, all_to_all, gather, gather_rows
from .ranks import EXCHANGES, Ranks, join, rows_of, total

__all__ = [
    "EXCHANGES",
    "ProcessGroup",
    "Ranks",
    "all_to_all",
    "gather",
    "gather_rows",
    "join",
    "rows_of",
    "total",
]
