"""The settings of a session: the arguments of `Graph` and `PatchedModel.from_pretrained` that control how it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from ..errors import RequestError, require_flag, shown

BOUND_PATCH_BYTES = 128 * 2**20  # about ten patches of rank 16 in every MLP matrix of a model of 135M parameters


class SessionOptions(TypedDict, total=False):
    """The keyword arguments of a session; `SessionSettings` documents their meanings and defaults."""

    threads: int | None
    spin: bool
    cuda_graphs: bool
    cuda_options: Mapping[str, str | int] | None
    huge_pages: bool
    bound_patch_bytes: int
    window_cache: bool


@dataclass(frozen=True)
class SessionSettings:
    """The settings of a session.

    Attributes:
        threads: the number of threads of one operator. None means one thread for each core, or the pool that
            `share_threads` set up.
        spin: whether idle threads wait actively for the next run. True is fastest if the cores have nothing else to do.
            False leaves the cores to other models and programs.
        cuda_graphs: whether to capture the decode steps of single sequences and replay them (cuda_graphs.py,
            docs/serving.md). This needs CUDA and an export that computes in float16, so `auto` does not fall back to
            the CPU. A graph that cannot be captured runs without capture, and the reason is logged.
        cuda_options: options of ONNX Runtime's CUDA provider, such as `{"gpu_mem_limit": 2**31}`.
        huge_pages: whether to move the weights that loading placed in the process's own memory to huge pages. This
            happens on the CPU, after the first run, if the system has huge pages (huge_pages.py). Decode steps are
            faster from then on. The logits of decode steps get a huge page too, if they fill half of one.
        bound_patch_bytes: the largest number of bytes of converted patches to keep (bound_values.py). A loaded patch
            takes the memory of its file. To run, it is converted to the dtype of the graph's slots, on its device. The
            patches that ran last stay converted up to this number, besides those that a KV cache uses.
        window_cache: whether layers with a sliding window drop the keys and values that no later id attends to
            (windows.py, docs/serving.md). They then need a fixed number of bytes, and a cache that goes back further
            than they keep is computed again. Models without such layers do not change.

    Raises:
        RequestError: `spin`, `cuda_graphs`, `huge_pages` or `window_cache` is not a boolean, or `bound_patch_bytes` is
            not a whole number of at least 0.
    """

    threads: int | None = None
    spin: bool = True
    cuda_graphs: bool = False
    cuda_options: Mapping[str, str | int] | None = None
    huge_pages: bool = True
    bound_patch_bytes: int = BOUND_PATCH_BYTES
    window_cache: bool = False

    def __post_init__(self) -> None:
        for name in ("spin", "cuda_graphs", "huge_pages", "window_cache"):
            require_flag(name, getattr(self, name))
        if type(self.bound_patch_bytes) is not int or self.bound_patch_bytes < 0:
            raise RequestError(
                "the value is not a number of bytes",
                field="bound_patch_bytes",
                got=shown(self.bound_patch_bytes),
                wanted="a whole number, 0 or more",
                fix="pass a number such as 128 * 2**20",
            )
