"""What a trial's curve tells in one word: converged, underfit, overfit, diverged or unfinished.

Rules of thumb with their thresholds written down, so that a tag means the same in every night. Knows only the curve.
"""

from collections.abc import Sequence
from typing import Literal

from models.training.terms import Epoch

Diagnosis = Literal["converged", "underfit", "overfit", "diverged", "unfinished"]

OVERFIT_RISE = 0.1
UNLEARNED_SHARE = 0.9
STILL_FALLING = 0.02


def diagnose(epochs: Sequence[Epoch], prior_loss: float) -> Diagnosis:
    """Judge the curve of a training that came to its end; `prior_loss` is the loss of the best constant prediction
    (the entropy of the classes in nats, 1 for a regression). The first rule that holds decides:

    1. overfit: the validation loss ended more than 10 % of the prior loss above its lowest value, while the training
       loss ended no higher than it was at that epoch.
    2. underfit: the training loss ended above 90 % of the prior loss, so hardly anything was learned; or the
       validation loss still fell by more than 2 % of the prior loss an epoch over the last quarter of the epochs (two
       epochs at least), so it was stopped too early. A single epoch is judged by the first half alone.
    3. converged: neither.
    """
    last = epochs[-1]
    lowest = min(epochs, key=lambda epoch: epoch.validation_loss)
    if (
        last.validation_loss - lowest.validation_loss > OVERFIT_RISE * prior_loss
        and last.train_loss <= lowest.train_loss
    ):
        return "overfit"
    if last.train_loss > UNLEARNED_SHARE * prior_loss:
        return "underfit"
    span = min(len(epochs) - 1, max(2, len(epochs) // 4))
    if span and (epochs[-1 - span].validation_loss - last.validation_loss) / span > STILL_FALLING * prior_loss:
        return "underfit"
    return "converged"
