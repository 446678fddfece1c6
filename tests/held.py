"""Trials that wait until the test lets them end: a night is then where the test wants it, however fast the machine is,
and computes next to nothing meanwhile."""

from dataclasses import dataclass
from pathlib import Path

# A whole epoch is one batch, and waits; what a rehearsal trains on is smaller, and does not.
NET = """
import socket
import time
from pathlib import Path
from torch import nn

GATE = Path({gate!r})

def wait():
    permit = GATE / socket.gethostname()
    while not (GATE / "open").exists():
        if permit.exists():
            permit.unlink()
            return
        time.sleep(0.05)

class Net(nn.Module):
    @staticmethod
    def suggest(trial):
        return {{"units": trial.suggest_int("units", 8, 12)}}

    def __init__(self, hyperparameters, shape):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, hyperparameters["units"]), nn.ReLU(),
                                    nn.Linear(hyperparameters["units"], shape.outputs))

    def forward(self, rows):
        if self.training and len(rows) > 1000:
            wait()
        return self.layers(rows)
"""
# Of samplers one that plans no waves, for which models are trained while others wait for their turn to ask.
JOB = """
name: {name}
data: {{source: 'sklearn://digits'}}
model: {net}.py:Net
search: {{sampler: qmc, pruner: none, space: {{epochs: 1, batch_size: 4096}}}}
budget: {{trials: {trials}, minutes: 20, workers: {workers}}}
confirm: {{candidates: 1, seeds: 2}}
"""


@dataclass(frozen=True)
class Gate:
    """What the trials of one job wait at, on every host that sees the folder."""

    folder: Path

    def let_one_end(self, host: str) -> None:
        """Let whatever trial that host holds end, and hold its next one."""
        (self.folder / host).touch()

    def has_let(self, host: str) -> bool:
        return not (self.folder / host).exists()

    def open(self) -> None:
        """Let every trial end, from now on."""
        (self.folder / "open").touch()


def write_held_job(jobs: Path, name: str, *, trials: int, workers: int = 1) -> Gate:
    """A job whose trials wait."""
    gate = Gate(jobs / f"gate-{name}")
    gate.folder.mkdir()
    (jobs / f"net_{name}.py").write_text(NET.format(gate=str(gate.folder)))
    (jobs / f"{name}.yaml").write_text(JOB.format(name=name, net=f"net_{name}", trials=trials, workers=workers))
    return gate
