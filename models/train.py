"""The one entry to training: what can be fused is, the rest goes one by one; who asks need not know which."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache

from torch import nn

from models.families.own_module import TRIED_ROWS, own_module_of
from models.fused.fusion import Fusion, fusion_of, fusion_signature, gains_alone
from models.fused.group import NotFusable
from models.fused.train import OnEpoch, Outcome, Stopped, train_fused
from models.hyperparameters.declared import OwnHyperparameters
from models.training.checkpoints import Checkpoint
from models.training.loop import train
from models.training.terms import Epoch, Setting, Training, forked_random_state, new_model

_logger = logging.getLogger(__name__)


def train_all(
    setting: Setting, trainings: Sequence[Training], on_epoch: OnEpoch = lambda _: ()
) -> Iterator[tuple[int, Outcome]]:
    """Train each; yields its place in the sequence and what became of it, in the order in which they end.

    An outcome is what was trained, or the exception that ended it: Diverged, ModelError, Stopped, or whatever the
    user's model raised. `on_epoch` gets the epochs, by place, that several trainings finished at the same time, and
    returns which of them to stop. Raises what `on_epoch` raises.
    """
    groups: dict[tuple[object, bool], list[int]] = {}
    for place, training in enumerate(trainings):
        try:
            model = _begin(setting, training)
            group = fusion_signature(model, training), gains_alone(setting.device, model)
            groups.setdefault(group, []).append(place)
        except Exception as error:  # noqa: BLE001 a user's model may raise anything; it costs that training only
            yield place, error
    for (_, even_one_gains), places in groups.items():
        may_be_fused = len(places) > 1 or even_one_gains
        members = fusion_for(setting, trainings[places[0]]).members if may_be_fused else 1
        for begin in range(0, len(places), members):
            some = {place: trainings[place] for place in places[begin : begin + members]}
            yield from _train_group(setting, some, on_epoch, fused=members > 1)


def fusion_for(setting: Setting, training: Training) -> Fusion:
    """How many trainings of this structure can be fused. Raises ModelError where the model cannot be built."""
    fusion = fusion_of(setting, _begin(setting, training), training)
    if fusion.members == 1:
        _say_once(f"models of {setting.family.name} are trained one by one: {fusion.reason}")
    return fusion


def _train_group(
    setting: Setting, trainings: Mapping[int, Training], on_epoch: OnEpoch, *, fused: bool
) -> Iterator[tuple[int, Outcome]]:
    """Fused, if wanted, and should the model refuse that for some batch after all, from the beginning one by one;
    epochs that were reported are not reported again."""
    reported = dict.fromkeys(trainings, 0)
    waiting = dict(trainings)

    def once(epochs: Mapping[int, Epoch]) -> Collection[int]:
        new = {place: epoch for place, epoch in epochs.items() if epoch.number > reported[place]}
        reported.update({place: epoch.number for place, epoch in new.items()})
        return on_epoch(new) if new else ()

    if fused:
        try:
            for place, outcome in train_fused(setting, trainings, once):
                del waiting[place]
                yield place, outcome
        except NotFusable as error:
            _say_once(f"models of {setting.family.name} are trained one by one: {error}")
            for training in waiting.values():
                if training.resumable is not None:  # what the group left there may not be what one alone comes to
                    Checkpoint.delete(training.resumable.path)
    for place, training in waiting.items():
        yield place, _train_alone(setting, place, training, once)


def _train_alone(setting: Setting, place: int, training: Training, on_epoch: OnEpoch) -> Outcome:
    raised: list[Exception] = []

    def report(epoch: Epoch) -> None:
        try:
            stopped = on_epoch({place: epoch})
        except Exception as error:
            raised.append(error)
            raise
        if place in stopped:
            raise Stopped

    try:
        return train(setting, training, report)
    except Exception as error:
        if raised:
            raise
        return error


def _begin(setting: Setting, training: Training) -> nn.Module:
    """A training's model as it begins. Raises ModelError where it is a user's module that cannot be trained or served,
    which is found out once for whatever it is built from."""
    with forked_random_state(setting.device):
        if isinstance(training.hyperparameters, OwnHyperparameters):
            built_from = training.hyperparameters.built_from
            if built_from not in setting.tried:
                own = own_module_of(new_model(setting, training).to(setting.device))
                assert own is not None
                own.try_out(setting.validation.features[:TRIED_ROWS])
                setting.tried.add(built_from)
        return new_model(setting, training)


@cache
def _say_once(line: str) -> None:
    _logger.info(line)
