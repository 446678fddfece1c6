"""The loss of several models as one, each on rows of its own, and its gradient in closed form.

It is what `training.loop` has for one model; a mean over each member's rows.
"""

from torch import Tensor


class StackedLoss:
    """Mean squared error in units of the target where there is a `unit`, otherwise cross-entropy, smoothed by each
    member's own share (members, 1)."""

    def __init__(self, unit: Tensor | None, smoothing: Tensor | None, weights: Tensor) -> None:
        self._unit = unit
        self._smoothing = smoothing
        # What the class of a row takes from its probability, which is the gradient of cross-entropy.
        self._hit = weights.new_full((1, 1, 1), -1) if smoothing is None else smoothing.unsqueeze(2) - 1

    def __call__(self, outputs: Tensor, target: Tensor, *, smoothed: bool = True) -> Tensor:
        """Return the losses (members,) of outputs (members, rows, ...) and target (members, rows)."""
        if self._unit is not None:
            return ((outputs - target) / self._unit).square().mean(dim=1)
        return _cross_entropy(_logs(outputs), target, self._smoothing if smoothed else None)

    def with_gradient(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses (members,), and their gradient by the outputs."""
        rows = target.shape[1]
        if self._unit is not None:
            distances = (outputs - target) / self._unit
            return distances.square().mean(dim=1), distances.mul_(2 / rows).div_(self._unit)
        logs = _logs(outputs)
        losses = _cross_entropy(logs, target, self._smoothing)
        gradient = logs.exp_()
        if self._smoothing is not None:
            gradient -= (self._smoothing / logs.shape[1]).unsqueeze(-1)
        classes = target.unsqueeze(1)
        gradient.scatter_add_(1, classes, self._hit.expand(classes.shape))
        return losses, gradient.div_(rows).transpose(1, 2)


def _logs(outputs: Tensor) -> Tensor:
    """Return log-probabilities (members, classes, rows) of outputs (members, rows, classes): along the few classes of a
    row a CPU takes them one by one, along the rows as many at once as its registers hold."""
    return outputs.transpose(1, 2).log_softmax(dim=1)


def _cross_entropy(logs: Tensor, target: Tensor, smoothing: Tensor | None) -> Tensor:
    """Return each member's mean (members,) from `_logs`, target (members, rows) and smoothing (members, 1)."""
    losses = logs.gather(1, target.unsqueeze(1)).sum(dim=2).squeeze(1).div_(-target.shape[1])
    if smoothing is None:
        return losses
    share = smoothing.squeeze(1)
    return (1 - share) * losses - share * logs.mean(dim=(1, 2))
