"""Fixtures; and this folder on the path: attention_cases.py serves the tests in it and below."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs and workspaces start as NaN: a number that is read before it is written shows."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def poisoned_new(x, *size, **options):
        empty = new_empty(x, *size, **options)
        return empty.fill_(torch.nan) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new)
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **options: empty_like(x, **options).fill_(torch.nan)
    )
