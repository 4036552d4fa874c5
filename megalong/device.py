"""Which device a process computes on: asked in one place, so that all of it agrees."""

import os

import torch


def use_gpu() -> bool:
    """True where there is a GPU, unless DeepSpeed's variable DS_ACCELERATOR says cpu."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
