"""Several trainings as one computation: their weights are stacked, and one vmapped model reads all their batches.

A small model leaves a device idle: what a step costs is launching its operations, not doing them (HFTA, Wang et al.,
MLSys 2021, arXiv 2102.02344). Trainings whose models have one structure and whose batches have one size share every
launch; learning rate and schedule, optimizer, penalties, dropout, loss and seed are each one's own. What comes out is
what `training.loop` makes of each, within the rounding of another order of sums. Knows nothing of studies.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch

from models.families.own_module import in_a_line
from models.fused.group import Group, NotFusable
from models.training.terms import Epoch, Setting, Trained, Training, is_over

_logger = logging.getLogger(__name__)

Outcome = Trained | Exception
OnEpoch = Callable[[Mapping[int, Epoch]], Collection[int]]


class Stopped(Exception):
    """Whoever follows the training had seen enough of it."""


def train_fused(
    setting: Setting, trainings: Mapping[int, Training], on_epoch: OnEpoch
) -> Iterator[tuple[int, Outcome]]:
    """Train all of them as one, by their keys; each outcome is yielded as soon as it is there.

    Where memory does not suffice, the group is halved and each half begins again. Raises NotFusable, with the rest
    still untrained, and whatever `on_epoch` raises.
    """
    waiting = [dict(trainings)]
    while waiting:
        members = waiting.pop(0)
        try:
            for key, outcome in _outcomes(setting, members, on_epoch):
                del members[key]
                yield key, outcome
        except torch.OutOfMemoryError as error:
            keys = list(members)
            if len(keys) == 1:
                yield keys[0], error
                continue
            half = len(keys) // 2
            waiting[:0] = [{key: members[key] for key in some} for some in (keys[:half], keys[half:])]
            _logger.warning("%d trainings as one do not fit into memory; going on with halves", len(keys))


def _outcomes(setting: Setting, members: Mapping[int, Training], on_epoch: OnEpoch) -> Iterator[tuple[int, Outcome]]:
    with _only_not_fusable():
        group = Group(setting, members)
    for number in range(group.epochs_done):
        stopped = on_epoch({member.key: member.epochs[number] for member in group.members})
        yield from ((key, Stopped()) for key in stopped)
        group.leave(stopped)
    while True:
        finished = [member for member in group.members if is_over(member.epochs, member.chosen, setting.objective)]
        for member in finished:
            yield member.key, group.result(member)
        group.leave([member.key for member in finished])
        if not group.members:
            return
        with _only_not_fusable():
            diverged = group.train_epoch()
        yield from diverged.items()
        group.leave(diverged)
        stopped = on_epoch({member.key: member.epochs[-1] for member in group.members})
        yield from ((key, Stopped()) for key in stopped)
        group.leave(stopped)
        unwritten = group.checkpoint()
        yield from unwritten.items()
        group.leave(unwritten)


@contextmanager
def _only_not_fusable() -> Iterator[None]:
    """A user's forward, and vmap itself, may raise anything."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise NotFusable(in_a_line(error)) from error
