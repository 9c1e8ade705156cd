"""Noise on a card: independent, quasi-Monte-Carlo and shared by all rows, equal to the definition."""

from __future__ import annotations

import pytest
import torch

import fastvae
from fastvae import random


@pytest.mark.parametrize("row_offset", [0, 5, -1])
@pytest.mark.parametrize("qmc", [False, True])
@pytest.mark.parametrize("columns", [1, 6, 130])
def test_normals_are_those_of_the_definition(qmc, columns, row_offset):
    """Samples are more than a cycle of the randomisations, and columns more than a point has."""
    seed = torch.arange(3, device="cuda") if qmc else torch.tensor(5, device="cuda")
    place = {"sample_offset": 2, "row_offset": row_offset}
    for _ in range(2):  # planned, then replayed
        got = random.normal(seed, 7, 4, columns, **place)
    with fastvae.use_backend("reference"):
        expected = random.normal(seed, 7, 4, columns, **place)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
