"""Optimizers by name, with the hyperparameters that go with them. Knows nothing of schedules or losses."""

from collections.abc import Callable, Iterable

from torch import nn, optim

from models.hyperparameters import Hyperparameters, OptimizerName

MOMENTUM = 0.9

# fused: one kernel a step over all parameters, on CPU and CUDA; RMSprop has no fused form, foreach is its next best.
_BUILDERS: dict[OptimizerName, Callable[[Iterable[nn.Parameter], float, float], optim.Optimizer]] = {
    "sgd": lambda parameters, rate, decay: optim.SGD(parameters, rate, weight_decay=decay, fused=True),
    "momentum": lambda parameters, rate, decay: optim.SGD(
        parameters, rate, momentum=MOMENTUM, weight_decay=decay, fused=True
    ),
    "adam": lambda parameters, rate, decay: optim.Adam(parameters, rate, weight_decay=decay, fused=True),
    "adamw": lambda parameters, rate, decay: optim.AdamW(parameters, rate, weight_decay=decay, fused=True),
    "rmsprop": lambda parameters, rate, decay: optim.RMSprop(parameters, rate, weight_decay=decay, foreach=True),
}


def build_optimizer(parameters: Iterable[nn.Parameter], hyperparameters: Hyperparameters) -> optim.Optimizer:
    """The trial's optimizer. Weight decay is decoupled in AdamW and an L2 term of the gradient in the others
    (Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101)."""
    return _BUILDERS[hyperparameters.optimizer](parameters, hyperparameters.learning_rate, hyperparameters.weight_decay)
