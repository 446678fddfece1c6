"""The step: optimizers by name, the learning rate at each moment, L1. Knows nothing of data or epochs.

The learning rate is a pure function of how far the training is and of what it has reached so far, so a training that
is resumed goes on with the right one, and nothing of it needs to be saved.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn, optim

from models.hyperparameters.declared import Hyperparameters, OptimizerName

SCALING_BATCH = 256
ONE_CYCLE_START = 1 / 25
ONE_CYCLE_FINAL = ONE_CYCLE_START / 1e4

_Builder = Callable[[Iterable[nn.Parameter], Hyperparameters], optim.Optimizer]


# fused: one kernel a step over all parameters, on CPU and CUDA; RMSprop has no fused form, foreach is its next best.
def _sgd(momentum: bool, nesterov: bool) -> _Builder:
    return lambda parameters, chosen: optim.SGD(
        parameters,
        chosen.learning_rate,
        momentum=chosen.momentum if momentum else 0.0,
        nesterov=nesterov,
        weight_decay=chosen.weight_decay,
        fused=True,
    )


def _adam(kind: type[optim.Adam]) -> _Builder:
    return lambda parameters, chosen: kind(
        parameters,
        chosen.learning_rate,
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        fused=True,
    )


def _rmsprop(parameters: Iterable[nn.Parameter], chosen: Hyperparameters) -> optim.Optimizer:
    return optim.RMSprop(
        parameters,
        chosen.learning_rate,
        alpha=chosen.rmsprop_alpha,
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        foreach=True,
    )


def _adagrad(parameters: Iterable[nn.Parameter], chosen: Hyperparameters) -> optim.Optimizer:
    return optim.Adagrad(
        parameters, chosen.learning_rate, eps=chosen.eps, weight_decay=chosen.weight_decay, foreach=True
    )


_BUILDERS: dict[OptimizerName, _Builder] = {
    "sgd": _sgd(momentum=False, nesterov=False),
    "momentum": _sgd(momentum=True, nesterov=False),
    "nesterov": _sgd(momentum=True, nesterov=True),
    "adam": _adam(optim.Adam),
    "adamw": _adam(optim.AdamW),
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}


def build_optimizer(parameters: Iterable[nn.Parameter], hyperparameters: Hyperparameters) -> optim.Optimizer:
    """The trial's optimizer. Weight decay is decoupled in AdamW and an L2 term of the gradient in the others
    (Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101)."""
    return _BUILDERS[hyperparameters.optimizer](parameters, hyperparameters)


def learning_rate_at(
    hyperparameters: Hyperparameters, progress: float, losses: Sequence[float], steps_an_epoch: int
) -> float:
    """The learning rate of the step that begins when `progress` (0 to 1) of all steps are done; `losses` are the
    validation losses of the epochs so far, which only `plateau` looks at.

    The shapes are torch's: StepLR, ExponentialLR, CosineAnnealingLR, OneCycleLR (Smith and Topin, arXiv 1708.07120)
    and ReduceLROnPlateau, stretched over the whole training; warm-up rises linearly over its first share.
    """
    rate = hyperparameters.learning_rate
    if hyperparameters.learning_rate_scaling == "linear":
        rate *= hyperparameters.batch_size / SCALING_BATCH
    if progress < hyperparameters.warmup and hyperparameters.schedule != "one_cycle":
        first_step = 1 / (hyperparameters.epochs * steps_an_epoch)
        return rate * min(1.0, (progress + first_step) / hyperparameters.warmup)
    return rate * _schedule_factor(hyperparameters, progress, losses)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def l1_norm(parameters: Iterable[nn.Parameter]) -> Tensor | int:
    """Sum the absolute weights; biases and normalisation's scales are vectors and left out."""
    return sum(parameter.abs().sum() for parameter in parameters if parameter.ndim > 1)


def _schedule_factor(chosen: Hyperparameters, progress: float, losses: Sequence[float]) -> float:
    match chosen.schedule:
        case "constant":
            return 1.0
        case "step":
            return chosen.step_factor ** math.floor(progress / chosen.step_every + 1e-9)
        case "exponential":
            return math.pow(chosen.exponential_final, progress)
        case "cosine":
            return _cosine(1.0, chosen.cosine_final, progress)
        case "one_cycle":
            peak = chosen.one_cycle_peak
            if progress < peak:
                return _cosine(ONE_CYCLE_START, 1.0, progress / peak)
            return _cosine(1.0, ONE_CYCLE_FINAL, (progress - peak) / (1 - peak))
        case "plateau":
            return chosen.plateau_factor ** _plateaus(losses, chosen.plateau_patience)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _plateaus(losses: Sequence[float], patience: int) -> int:
    """How often more than `patience` epochs passed without a new best loss (by torch's relative threshold, 1e-4)."""
    best, waited, plateaus = math.inf, 0, 0
    for loss in losses:
        if loss < best * (1 - 1e-4):
            best, waited = loss, 0
        else:
            waited += 1
        if waited > patience:
            plateaus, waited = plateaus + 1, 0
    return plateaus
