"""The benchmark's change of basis: the model computes the same, and its weights are on no grid of few levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.off_grid import move_off_grid
from runtime_tests.export.tiny import tiny_model
from runtime_tests.logits import token_ids
from tp_export.quantise import BLOCK, log_probabilities, quantised
from tp_export.source import load_model, open_source


@pytest.mark.parametrize("design", ["llama", "gemma3_text"])
def test_the_model_computes_the_same_with_weights_off_any_grid(design: str, tmp_path: Path) -> None:
    model = load_model(open_source(tiny_model(tmp_path, design)))
    quantiser = quantised("int4-rtn").linear
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for linear in linears:  # as the weights of a four-bit file
        linear.weight.data = torch.from_numpy(quantiser(linear.weight.detach().numpy().T.copy()).dequantised().T.copy())
    ids = torch.tensor([token_ids(40)])
    before = log_probabilities(model, ids)
    move_off_grid(model)
    assert (log_probabilities(model, ids) - before).abs().max() < 1e-3
    for linear in linears:
        if linear is not model.get_output_embeddings():
            levels = {len(np.unique(block)) for block in linear.weight.detach().numpy()[:, :BLOCK].round(6)}
            assert min(levels) > 20
