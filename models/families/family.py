"""The model families that a job can name, and by what each is tuned.

MLP and CNN come with us (networks.py); any other is a class of the user's own, named by file path. Each takes
hyperparameters and the data's shape and returns a module from features to outputs. Imports torch and Optuna only where
one is built or a user's is loaded, which keeps what only reads a job quick. Knows nothing of training.
"""

import copy
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import JsonValue

from models.hyperparameters.declared import CNNHyperparameters, Hyperparameters, MLPHyperparameters, OwnHyperparameters
from models.hyperparameters.domains import Domain, Range, Searchable, Value, contains, draw, parse_domain
from models.hyperparameters.rules import Refused, unknown_name
from models.rows.shapes import DataShape

if TYPE_CHECKING:
    import optuna
    from torch import nn
from models.families.errors import ModelError


class OwnModel(Protocol):
    """What a user's class must offer, beside being an `nn.Module`. No import of ours is needed.

    `suggest` is optional: it draws the model's own hyperparameters from an Optuna trial and returns them, as values
    that JSON can hold. The constructor gets what it returned, and the data's shape. `forward` takes features
    (batch, *shape.features) and returns (batch, shape.outputs).
    """

    @staticmethod
    def suggest(trial: "optuna.Trial") -> Mapping[str, JsonValue]: ...

    def __init__(self, hyperparameters: Mapping[str, JsonValue], shape: DataShape) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model: what it is tuned by, and how it is built.

    `suggest` draws the own hyperparameters of a user's class, whose names are `own_names`; `code` is the SHA-256 of
    the file that it lies in.
    """

    name: str
    hyperparameters: type[Hyperparameters]
    build: "Callable[[Any, DataShape], nn.Module]"
    suggest: Callable[[Any], Mapping[str, JsonValue]] | None = None
    own_names: tuple[str, ...] = ()
    code: str | None = None

    @property
    def structure(self) -> tuple[str, ...]:
        """The names whose values trainings must share to be fused; of a user's class, all that it draws."""
        return self.hyperparameters.structure + self.own_names

    def search_space(self, overrides: Mapping[str, Any]) -> dict[str, Domain]:
        """Domains by name: the defaults with a job's overrides; of the own hyperparameters only what is overridden.

        Raises Refused, with every mistake: an unknown name, or a domain that cannot be.
        """
        known = (*self.hyperparameters.default_space, *self.own_names)
        mistakes = [
            unknown_name((name,), f"a hyperparameter of {self.name}", known, domain)
            for name, domain in overrides.items()
            if name not in known
        ]
        own: dict[str, Domain] = {}
        for name in self.own_names:
            try:
                own |= {name: parse_domain(name, overrides[name])} if name in overrides else {}
            except Refused as error:
                mistakes += error.mistakes
        ours = {name: domain for name, domain in overrides.items() if name in self.hyperparameters.default_space}
        try:
            space = self.hyperparameters.search_space(ours)
        except Refused as error:
            raise Refused(*mistakes, *error.mistakes) from error
        if mistakes:
            raise Refused(*mistakes)
        return space | own

    def grid_space(self, overrides: Mapping[str, Any]) -> dict[str, Domain]:
        """The space with each range cut into points. Raises Refused where ranges do not say how many."""
        space = self.search_space(overrides)
        own = {name: space[name] for name in self.own_names if name in space}
        return self.hyperparameters.grid_space(_without(space, self.own_names)) | Searchable.grid_space(own)

    def searched(self, space: Mapping[str, Domain]) -> list[str]:
        """The names that a trial may draw; of the own hyperparameters those that the space does not fix."""
        ours = self.hyperparameters.searched(_without(space, self.own_names))
        return ours + [name for name in self.own_names if isinstance(space.get(name, ()), Range | tuple)]

    def draw(self, trial: "optuna.Trial", space: Mapping[str, Domain]) -> Hyperparameters:
        """Draw a trial's hyperparameters. Raises ValueError where what was drawn is not valid, and whatever a user's
        `suggest` raises."""
        drawn: dict[str, Any] = dict(self.hyperparameters.draw(trial, _without(space, self.own_names)))
        if self.suggest is not None:
            drawn["own"] = dict(self.suggest(_Overriding(trial, space)))
        return self.hyperparameters.from_values(drawn)

    def nearest(self, wished: Mapping[str, Any], space: Mapping[str, Domain]) -> dict[str, Value]:
        """Parameters of a trial as near to the wished values as the space allows; own ones are left to the sampler."""
        return self.hyperparameters.nearest(wished, _without(space, self.own_names))


def _build_mlp(hyperparameters: MLPHyperparameters, shape: DataShape) -> "nn.Module":
    from models.families.networks import MLP

    return MLP(hyperparameters, shape)


def _build_cnn(hyperparameters: CNNHyperparameters, shape: DataShape) -> "nn.Module":
    from models.families.networks import CNN

    return CNN(hyperparameters, shape)


FAMILIES = {
    "mlp": Family(name="mlp", hyperparameters=MLPHyperparameters, build=_build_mlp),
    "cnn": Family(name="cnn", hyperparameters=CNNHyperparameters, build=_build_cnn),
}


def family_named(name: str) -> Family:
    """A family of ours, or a user's class as `path/to/net.py:Net`. Raises ModelError: it is unknown (the known ones
    are listed), or its file does not make a model."""
    if name in FAMILIES:
        return FAMILIES[name]
    path, separator, class_name = name.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise ModelError(
            f"must be a known model or path/to/net.py:Net, found {name!r}; known are {', '.join(FAMILIES)}"
        )
    try:
        code = Path(path).read_bytes()
    except OSError as error:
        raise ModelError(f"{path} is not a Python file that can be read; correct the path") from error
    return _own_family(path, class_name, hashlib.sha256(code).hexdigest())


@lru_cache(maxsize=32)
def _own_family(path: str, class_name: str, code: str) -> Family:
    """Loaded once for each content of the file; in sys.modules, where dataclasses and pickling look for it."""
    from torch import nn

    from models.families.own_module import OwnModule

    module_name = f"nightly_own_{code[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    name = f"{Path(path).name}:{class_name}"
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelError(f"{path} raised {type(error).__name__} when it was loaded: {error}; mend it") from error
    own = getattr(module, class_name, None)
    if not (isinstance(own, type) and issubclass(own, nn.Module)):
        raise ModelError(f"{path} holds no nn.Module named {class_name}; correct the name or add the class")
    suggest = getattr(own, "suggest", None)

    def build(hyperparameters: OwnHyperparameters, shape: DataShape) -> "nn.Module":
        # A copy, because a constructor may take out of it what it has read.
        return OwnModule(name, own(copy.deepcopy(hyperparameters.own), shape), shape)

    return Family(
        name=name,
        hyperparameters=OwnHyperparameters,
        build=build,
        suggest=suggest,
        own_names=() if suggest is None else _names_drawn(name, suggest),
        code=code,
    )


def _names_drawn(name: str, suggest: Callable[[Any], Mapping[str, JsonValue]]) -> tuple[str, ...]:
    """The names that a user's `suggest` draws, found by trying: some may be drawn on some paths only."""
    import optuna

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    names: dict[str, None] = {}
    for _ in range(20):
        trial = study.ask()
        try:
            drawn = suggest(trial)
        except (Exception, SystemExit) as error:
            raise ModelError(f"suggest of {name} raised {type(error).__name__}: {error}; mend it") from error
        if not isinstance(drawn, Mapping):
            raise ModelError(f"suggest of {name} must return a dict, found {type(drawn).__name__}; return what it drew")
        names |= dict.fromkeys(trial.params)
    taken = [known for known in names if known in Hyperparameters.model_fields]
    if taken:
        raise ModelError(f"suggest of {name} draws {taken[0]}, which every model is tuned by already; rename it")
    return tuple(names)


@dataclass(frozen=True)
class _Overriding:
    """The trial as a user's `suggest` sees it: a name that the job's space overrides is drawn from there."""

    trial: "optuna.Trial"
    space: Mapping[str, Domain] = field(default_factory=dict)

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> Value:
        if name in self.space:
            return draw(self.trial, name, self.space[name], whole=False)
        return self.trial.suggest_float(name, low, high, **options)

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> Value:
        if name in self.space:
            domain = self.space[name]
            if isinstance(domain, tuple):  # a grid's points of a range that was not known to be of whole numbers
                domain = tuple(dict.fromkeys(round(float(value)) for value in domain))
            return draw(self.trial, name, domain, whole=True)
        return self.trial.suggest_int(name, low, high, **options)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        if name not in self.space:
            return self.trial.suggest_categorical(name, choices)
        domain = self.space[name]
        if isinstance(domain, Range):
            raise ModelError(f"search.space.{name} must be a list of choices, found a range; list the choices")
        for value in domain if isinstance(domain, tuple) else (domain,):
            if not contains(tuple(choices), value):
                raise ModelError(f"search.space.{name} must be among {tuple(choices)}, found {value!r}")
        return draw(self.trial, name, domain, whole=False)


def _without(content: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}
