"""The trainings of a group: who is in it, its epochs, and what becomes of a member that leaves.

How a step is computed is `steps.py`'s, and what its gradients are made by `gradients.py`'s.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from models.evaluation.evaluate import predict_outputs, score
from models.evaluation.metrics import metrics_of
from models.families.own_module import own_module_of
from models.fused.gradients import Autograd, Gradients, HandWritten, Penalised
from models.fused.losses import StackedLoss
from models.fused.optimizers import UPDATES, StackedOptimizer
from models.fused.stack import Stack, tensors_of
from models.fused.steps import ByRow, Recorded, Steps
from models.rows.batches import step_count
from models.training.checkpoints import Checkpoint, random_states
from models.training.dropout import dropout_keys
from models.training.optimizers import learning_rate_at
from models.training.terms import (
    Diverged,
    Epoch,
    Setting,
    Trained,
    Training,
    forked_random_state,
    judged_epoch,
    kept_epoch,
    loss_of,
    new_model,
    training_modes,
)

# Of all members together, at once: small models, whose launches count.
EVALUATED_ROWS = 32_768
# As far apart as rounding leaves the loss of a model in a group and on its own.
SAME_LOSS = 1e-2


class NotFusable(Exception):
    """Several trainings cannot be one computation; the message says why."""


@dataclass(kw_only=True, eq=False)
class Member:
    """One training of a group; its row is its place among the group's members."""

    key: int
    training: Training
    model: nn.Module
    order: torch.Generator
    epochs: list[Epoch] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    written_at: float = 0.0

    def __post_init__(self) -> None:
        self.chosen = self.training.hyperparameters


class Group:
    """The trainings of a group from their first epoch, or from their checkpoints, on."""

    def __init__(self, setting: Setting, trainings: Mapping[int, Training]) -> None:
        self._setting = setting
        by_update = sorted(trainings.items(), key=lambda item: UPDATES[item[1].hyperparameters.optimizer])
        self.members = []
        for key, training in by_update:
            with forked_random_state(setting.device):
                model = new_model(setting, training)
            order = torch.Generator().manual_seed(training.seed)
            self.members.append(Member(key=key, training=training, model=model, order=order))
        self._arrange(Stack.of([member.model for member in self.members], setting.device))
        self._resume()

    @property
    def _by_row(self) -> bool:
        return self._setting.device.type == "cpu"

    @property
    def _steps_an_epoch(self) -> int:
        return step_count(len(self._setting.training), self.members[0].chosen.batch_size)

    @property
    def epochs_done(self) -> int:
        return len(self.members[0].epochs)

    def leave(self, keys: Collection[int]) -> None:
        """Go on without some of the members, whose memory is given back."""
        if not keys:
            return
        rows = [row for row, member in enumerate(self.members) if member.key not in keys]
        self.members = [self.members[row] for row in rows]
        if not rows:
            return
        state = self._optimizer.state
        self._arrange(self._stack.only(rows))
        for name, tensor in self._optimizer.state.items():
            tensor.copy_(state[name][rows])

    def train_epoch(self) -> dict[int, Diverged]:
        """Train each member once over its own order of the rows; returns those that are not finite after it."""
        number, steps = self.epochs_done + 1, self._steps_an_epoch
        done = (number - 1) * steps
        rows = torch.stack(
            [torch.randperm(len(self._setting.training), generator=member.order) for member in self.members]
        )
        seeds = [member.training.seed for member in self.members]
        keys = dropout_keys(seeds, len(self._stack.structure.dropouts), done, steps)
        with training_modes():
            total = self._steps.epoch(rows, keys, self._rates(number, steps), done)
            return self._evaluate(number, (total / len(self._setting.training)).tolist())

    def result(self, member: Member) -> Trained:
        """Return what became of a member. Raises NotFusable where its model gives something else alone."""
        row = self.members.index(member)
        tensors = member.best or self._stack.tensors_of(row)
        model = member.model.to(self._setting.device)
        with torch.no_grad():
            for name, tensor in tensors_of(model).items():
                tensor.copy_(tensors[name])
        outputs = predict_outputs(model, self._setting.validation.features)
        kept = kept_epoch(member.epochs, member.chosen, self._setting.objective)
        if own_module_of(model) is not None:
            loss = loss_of(model)(outputs, self._setting.validation.target, 0.0).item()
            if not math.isclose(loss, kept.validation_loss, rel_tol=SAME_LOSS, abs_tol=SAME_LOSS):
                raise NotFusable("one alone does not give what it gave among others, so it keeps a state that is lost")
        return Trained(
            model=model.eval(),
            epochs=tuple(member.epochs),
            kept=kept,
            validation=score(outputs, self._setting.validation.target, metrics_of(self._setting.shape.problem)),
        )

    def checkpoint(self) -> dict[int, OSError]:
        """Write a checkpoint of each member whose last one is old enough; returns those that the disk did not take."""
        unwritten = {}
        for row, member in enumerate(self.members):
            resumable = member.training.resumable
            if resumable is None or resumable.clock() - member.written_at < resumable.interval_seconds:
                continue
            persistent = self._stack.structure.template.state_dict().keys()
            checkpoint = Checkpoint(
                key=resumable.key,
                curve=[asdict(epoch) for epoch in member.epochs],
                weights={name: tensor for name, tensor in self._stack.tensors_of(row).items() if name in persistent},
                best={name: tensor for name, tensor in member.best.items() if name in persistent},
                optimizer=self._optimizer_state(row),
                generators=random_states(member.order, self._setting.device),
            )
            try:
                checkpoint.write(resumable.path)
            except OSError as error:
                unwritten[member.key] = error
            member.written_at = resumable.clock()
        return unwritten

    def _arrange(self, stack: Stack) -> None:
        """Make ready for the members' next step, with an optimizer that begins."""
        self._stack = stack
        chosen = [member.chosen for member in self.members]
        self._optimizer = StackedOptimizer(chosen, stack.weights)
        smoothing = self._column([one.label_smoothing for one in chosen])
        self._loss = StackedLoss(stack.structure.unit, smoothing, stack.weights)
        chain = stack.structure.chain
        gradients: Gradients = Autograd(stack, self._loss)
        if self._by_row and chain is not None:
            gradients = HandWritten(stack, chain, self._loss)
        l1 = self._column([one.l1 for one in chosen])
        clip = self._column([one.gradient_clip_norm for one in chosen])
        steps = ByRow if self._by_row else Recorded
        self._steps: Steps = steps(
            stack, Penalised(gradients, stack, l1, clip), self._optimizer, self._setting.training, chosen[0].batch_size
        )

    def _column(self, values: Sequence[float]) -> Tensor | None:
        """(members, 1); None where all are zero."""
        return torch.tensor(values, device=self._setting.device).unsqueeze(1) if any(values) else None

    def _rates(self, number: int, steps: int) -> Tensor:
        """Learning rates (steps, members) of an epoch, on the CPU in float64."""
        rates = []
        for member in self.members:
            losses = [epoch.validation_loss for epoch in member.epochs]
            progress = [(number - 1 + step / steps) / member.chosen.epochs for step in range(steps)]
            rates.append([learning_rate_at(member.chosen, share, losses, steps) for share in progress])
        return torch.tensor(rates, dtype=torch.float64).T

    @torch.no_grad()
    def _evaluate(self, number: int, train_losses: list[float]) -> dict[int, Diverged]:
        validation = self._setting.validation
        self._stack.structure.template.eval()
        rows = max(1, EVALUATED_ROWS // len(self.members))
        outputs = torch.cat(
            [self._stack.forward(some, shared=True) for some in torch.split(validation.all_features, rows)], dim=1
        )
        self._stack.structure.template.train()
        losses = self._loss(outputs, validation.target.expand(len(self.members), -1), smoothed=False).tolist()
        # Off the device at once, not member by member, each of whom would wait for it several times.
        outputs, target = outputs.cpu(), validation.target.cpu()
        diverged = {}
        for row, (member, train_loss, loss) in enumerate(zip(self.members, train_losses, losses, strict=True)):
            try:
                epoch = judged_epoch(number, train_loss, loss, outputs[row], target, self._setting.objective)
            except Diverged as error:
                diverged[member.key] = error
                continue
            member.epochs.append(epoch)
            patience = member.chosen.early_stopping_patience
            if patience and kept_epoch(member.epochs, member.chosen, self._setting.objective) is epoch:
                member.best = {name: tensor.clone() for name, tensor in self._stack.tensors_of(row).items()}
        return diverged

    def _optimizer_state(self, row: int) -> dict[str, Tensor]:
        """As torch.optim keeps it: by the parameter's number and the name."""
        state = {}
        for name, tensor in self._optimizer.state.items():
            for number, view in enumerate(self._stack.structure.views(tensor).values()):
                state[f"{number}.{name}"] = view[row]
        for number in range(len(self._stack.structure.shapes)):
            state[f"{number}.step"] = torch.tensor(float(self.epochs_done * self._steps_an_epoch))
        return state

    def _resume(self) -> None:
        for row, member in enumerate(self.members):
            resumable = member.training.resumable
            if resumable is None:
                continue
            member.written_at = resumable.clock()
            checkpoint = Checkpoint.read(resumable.path, resumable.key)
            if checkpoint is None:
                continue
            member.epochs = [Epoch(**epoch) for epoch in checkpoint.curve]
            member.order.set_state(checkpoint.generators["order"])
            own = self._stack.tensors_of(row)
            for name, tensor in checkpoint.weights.items():
                own[name].copy_(tensor)
            if checkpoint.best:
                member.best = own | {name: tensor.to(self._setting.device) for name, tensor in checkpoint.best.items()}
            for name, tensor in self._optimizer.state.items():
                for number, view in enumerate(self._stack.structure.views(tensor).values()):
                    if (kept := checkpoint.optimizer.get(f"{number}.{name}")) is not None:
                        view[row].copy_(kept)
