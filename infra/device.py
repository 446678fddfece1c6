"""The device that this process trains on. Knows nothing of what is trained."""

import os

import torch


def choose_device() -> torch.device:
    """The first CUDA device that is visible (CUDA_VISIBLE_DEVICES is a mask), else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """What a person reads: `cuda:0 NVIDIA H100` or `cpu, 2 threads`."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} of {os.cpu_count()} threads"
