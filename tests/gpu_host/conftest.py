"""Fixtures of a real card, where these tests compare values; the fake card's are those of all tests."""

from __future__ import annotations

import pytest
import torch

from tools import fakecard

if not fakecard.is_active():

    @pytest.fixture(autouse=True)
    def card(monkeypatch):
        """Return None, as launches are not watched; seeds are those that the CPU draws."""
        drawn = torch.randint

        def randint(*arguments, device="cpu", **options):
            return drawn(*arguments, **options).to(device)

        monkeypatch.setattr(torch, "randint", randint)
