"""Fixtures of the tests with other libraries."""

import pytest
import torch


@pytest.fixture
def float64():
    """Make float64 the default, so that equal functions agree to 1e-10."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
