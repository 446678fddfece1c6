"""What the process imports whose forks are nights (`warm.py`), and does once: the first ONNX export of a process takes
three seconds of a core, any other less than one."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import flows.nightly  # noqa: F401 is what is imported ahead
from tasks.promotion.servable import export_onnx

tqdm.monitor_interval = 0  # which would be a thread, and no process should fork that has one
with tempfile.TemporaryDirectory() as folder:
    export_onnx(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(2, 4), Path(folder) / "model.onnx")
