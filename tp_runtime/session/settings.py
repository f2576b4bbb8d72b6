"""The settings of a session: the arguments of `Graph` and `PatchedModel.from_pretrained` that control how it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from ..errors import require_flag


class SessionOptions(TypedDict, total=False):
    """The keyword arguments of a session; `SessionSettings` documents their meanings and defaults."""

    threads: int | None
    spin: bool
    cuda_graphs: bool
    cuda_options: Mapping[str, str | int] | None
    huge_pages: bool


@dataclass(frozen=True)
class SessionSettings:
    """The settings of a session.

    Attributes:
        threads: the number of threads of one operator. None means one thread for each core, or the pool that
            `share_threads` set up.
        spin: whether idle threads wait actively for the next run. True is fastest if the cores have nothing else to do.
            False leaves the cores to other models and programs.
        cuda_graphs: whether to capture the decode steps of single sequences and replay them (cuda_graphs.py,
            docs/serving.md). This needs CUDA and an fp16 export, so `auto` does not fall back to the CPU. A graph that
            cannot be captured runs without capture, and the reason is logged. Not run on a GPU yet.
        cuda_options: options of ONNX Runtime's CUDA provider, such as `{"gpu_mem_limit": 2**31}`. Not run on a GPU yet.
        huge_pages: whether to move the weights that loading placed in the process's own memory to huge pages. This
            happens on the CPU, after the first run, if the system has huge pages (huge_pages.py). Decode steps are
            faster from then on. The logits of decode steps get a huge page too, if they fill half of one.

    Raises:
        RequestError: `spin`, `cuda_graphs` or `huge_pages` is not a boolean.
    """

    threads: int | None = None
    spin: bool = True
    cuda_graphs: bool = False
    cuda_options: Mapping[str, str | int] | None = None
    huge_pages: bool = True

    def __post_init__(self) -> None:
        for name in ("spin", "cuda_graphs", "huge_pages"):
            require_flag(name, getattr(self, name))
