"""The settings that a patch is made with."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..compaction import Ridges
from .forms import Settings

ALL = 2**31  # more entries than any context has


@dataclass(frozen=True)
class Recipe:
    """What a patch is made of, and what it is fitted on.

    Attributes:
        method: the form of the weights: `vector`, `output`, `matrix`, `lora` or `isotropic`; or `prefix`, for entries
            without weights.
        settings: the settings of the weights: rank, ridge, first layer and bias.
        prefix: the number of key/value entries for each head of a layer, on average over the layers; 0 for a patch of
            weights alone, and `ALL` for every entry of the context.
        ridges: the ridges of the entries' fit.
        answer_weight: the weight of rows that predict an answer in the entries' fit; other rows have 1. None takes 1
            where the context is restated, and 5 where its queries are all that there is.
        dtype: the dtype that the patch is stored in: `i4`, `i8`, `f16`, `bf16` or `f32`.
        restate: whether dialogues that restate a long context are fitted too.
        stop: the texts that end an answer.
        samples: the number of answers to fit on for each query. The first is greedy and the rest are sampled.
        max_new_tokens: the length of the teacher's completions.
        refine_steps: the number of gradient descent steps from the closed form; 0 leaves it as it is.
        student_precision: the precision that the patch will run on, if the patch is also to repair the cost of that
            precision (quantise/student.py). With `fp32` the patch is fitted for every precision.
    """

    method: str = "output"
    settings: Settings = field(default_factory=Settings)
    prefix: int = 0
    ridges: Ridges = field(default_factory=Ridges)
    answer_weight: float | None = None
    dtype: str = "f16"
    restate: bool = True
    stop: tuple[str, ...] = ()
    samples: int = 2
    max_new_tokens: int = 48
    refine_steps: int = 0
    student_precision: str = "fp32"
