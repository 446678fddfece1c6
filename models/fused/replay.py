"""A function called again and again, on a GPU as one launch: its kernels are recorded once, and then replayed.

A small model's step is a hundred kernels of a few microseconds each, and launching them from Python takes longer than
they do (PyTorch's documentation, "CUDA graphs"). Knows nothing of what is computed.
"""

import logging
import warnings
from collections.abc import Callable

import torch

WARM_UP_CALLS = 2

_logger = logging.getLogger(__name__)


class Replay:
    """Calls a function that reads and writes the same tensors each time, and nothing on the host.

    On a CPU each call is a call. On a GPU the first calls are, too, because libraries set themselves up in them; then
    the function is recorded. What cannot be recorded, such as a copy from the host, goes on as calls, with one line in
    the log.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_recordable = device.type == "cuda"

    def __call__(self, function: Callable[[], None]) -> None:
        if self._graph is None and self._is_recordable and self._calls >= WARM_UP_CALLS:
            self._graph = self._recorded(function)
        if self._graph is None:
            self._calls += 1
            function()
        else:
            self._graph.replay()

    def _recorded(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with warnings.catch_warnings(), torch.cuda.device(self._device), torch.cuda.graph(graph):
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # as one is whose recording broke off
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._is_recordable = False
            _logger.info("steps are launched kernel by kernel: %s", str(error).partition("\n")[0])
            return None
        return graph
