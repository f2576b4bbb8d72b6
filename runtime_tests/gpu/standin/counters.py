"""This module reads the counters of the stand-in, in the process that has it loaded."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, fields
from functools import cache


@dataclass(frozen=True)
class Counts:
    """What a GPU would have been asked to do; the fields are in the order of standin.c.

    Attributes:
        launches: kernels that ran, those of replayed graphs included; a product by cuBLAS counts as one.
        bytes_in: bytes that were copied from the host to the device.
        bytes_out: bytes that were copied from the device to the host.
        bytes_on_device: bytes that were copied on the device.
        copies_in: the number of copies from the host to the device.
        copies_out: the number of copies from the device to the host.
        allocations: blocks of memory that were taken from the device, or as pinned memory from the host.
        captures: CUDA graphs that were captured.
        replays: captured graphs that were launched.
        captured_allocations: those allocations that happened while a capture recorded, which ends it on a GPU.
    """

    launches: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    bytes_on_device: int = 0
    copies_in: int = 0
    copies_out: int = 0
    allocations: int = 0
    captures: int = 0
    replays: int = 0
    captured_allocations: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["TP_STANDIN"])


def counts() -> Counts:
    """Return the counts since the process began."""
    values = (ctypes.c_long * len(fields(Counts)))()
    _library().standin_counts(values)
    return Counts(*values)


def kernels() -> dict[str, int]:
    """Return the launches since the process began, by the kernel's mangled name; captured ones count once."""
    out = ctypes.create_string_buffer(1 << 22)
    _library().standin_kernels(out, len(out))
    lines = (line.partition(" ") for line in out.value.decode().splitlines())
    return {name: int(launches) for launches, _space, name in lines}
