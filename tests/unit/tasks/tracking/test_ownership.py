"""What others have on an MLflow server is refused where it bears a name of ours, and stays as it is."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Experiment

from infra.errors import NotOurs
from infra.settings import MARK
from tasks.data.snapshots import Snapshot
from tasks.job import TuningJob
from tasks.registry.versions import Manifest
from tasks.study.studies import MLFLOW_EXPERIMENT
from tasks.tracking.aliases import drop_challenger, point_challenger, point_champion
from tasks.tracking.nights import begin_night
from tasks.tracking.ownership import check_tracking
from tests.conftest import make_job
from tests.strangers import mlflow_objects

Maker = Callable[[MlflowClient, str], None]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[MlflowClient]:
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(empty_mlflow, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # artifacts go to where a client is made
        yield MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def job_of(experiment: str, model: str = "unused") -> TuningJob:
    return make_job(tracking={"experiment": experiment, "model": model})


def an_empty_experiment(client: MlflowClient, name: str) -> None:
    client.create_experiment(name, tags={"team": "theirs"})


def an_experiment_with_runs(client: MlflowClient, name: str) -> None:
    client.create_run(client.create_experiment(name), tags={"job": "theirs"})


def a_deleted_experiment(client: MlflowClient, name: str) -> None:
    experiment = client.create_experiment(name)
    client.create_run(experiment)
    client.delete_experiment(experiment)


def an_experiment_that_an_earlier_version_wrote_into(client: MlflowClient, name: str) -> None:
    experiment = client.create_experiment(name)
    client.create_run(experiment, start_time=1)
    client.create_run(experiment, start_time=2, tags={"job": name, "optuna_study": f"{name} night"})


def a_night_of_another_job(client: MlflowClient, name: str) -> None:
    client.create_run(client.create_experiment(name), tags={"job": "another", "optuna_study": "another's night"})


@pytest.mark.parametrize(
    "make",
    [
        an_empty_experiment,
        an_experiment_with_runs,
        a_deleted_experiment,
        an_experiment_that_an_earlier_version_wrote_into,
        a_night_of_another_job,
    ],
)
def test_an_experiment_without_our_tag_is_refused(client: MlflowClient, make: Maker, snapshot: Snapshot) -> None:
    name = make.__name__
    make(client, name)
    before = mlflow_objects(client)
    says = f"the experiment '{name}' .* must have the tag {MARK}.* name another one by tracking.experiment in the job"
    with pytest.raises(NotOurs, match=says):
        check_tracking(client, job_of(name))
    with pytest.raises(NotOurs, match=says):
        begin_night(client, job_of(name), optuna.create_study(), snapshot, None, "page")
    assert mlflow_objects(client) == before


def test_mlflows_own_default_experiment_is_not_ours(client: MlflowClient) -> None:
    with pytest.raises(NotOurs):
        check_tracking(client, job_of("Default"))


def test_ours_that_somebody_deleted_stays_deleted(client: MlflowClient, snapshot: Snapshot) -> None:
    job = job_of("deleted")
    study = optuna.create_study()
    begin_night(client, job, study, snapshot, None, "page")
    client.delete_experiment(study.user_attrs[MLFLOW_EXPERIMENT])
    before = mlflow_objects(client)
    for night in (study, optuna.create_study()):
        with pytest.raises(NotOurs, match=r"was deleted and stays so; restore it \(mlflow experiments restore --exp"):
            begin_night(client, job, night, snapshot, None, "page")
    with pytest.raises(NotOurs, match="was deleted"):
        check_tracking(client, job)
    assert mlflow_objects(client) == before


def test_jobs_may_share_an_experiment_and_not_a_model(client: MlflowClient, snapshot: Snapshot) -> None:
    study = optuna.create_study()
    begin_night(client, job_of("one", "shared model"), study, snapshot, None, "page")
    client.set_experiment_tag(study.user_attrs[MLFLOW_EXPERIMENT], MARK, "another job")
    check_tracking(client, job_of("one", "shared model"))
    client.create_registered_model("shared model", tags={MARK: "another job"})
    with pytest.raises(NotOurs, match=r"found .another job., another job, .* tracking.model"):
        check_tracking(client, job_of("one", "shared model"))


def test_two_nights_that_make_their_experiment_at_once_share_it(client: MlflowClient, snapshot: Snapshot) -> None:
    class Late(MlflowClient):
        """Sees that there is none just before another night makes it."""

        def get_experiment_by_name(self, name: str) -> Experiment | None:
            if super().get_experiment_by_name(name) is None:
                super().create_experiment(name, tags={MARK: "another job"})
                return None
            return super().get_experiment_by_name(name)

    study = optuna.create_study()
    begin_night(Late(client.tracking_uri), job_of("at once"), study, snapshot, None, "page")
    experiment = client.get_experiment_by_name("at once")
    assert experiment is not None
    assert study.user_attrs[MLFLOW_EXPERIMENT] == experiment.experiment_id
    assert experiment.tags[MARK] == "another job"


def an_empty_model(client: MlflowClient, name: str) -> None:
    client.create_registered_model(name)


def a_model_that_is_served(client: MlflowClient, name: str) -> None:
    client.create_registered_model(name, tags={"team": "theirs"}, description="theirs")
    for _ in range(2):
        client.create_model_version(name, "file:///theirs", tags={"night": "true"}, await_creation_for=0)
    client.set_registered_model_alias(name, "champion", "1")
    client.set_registered_model_alias(name, "challenger", "2")


def a_model_that_an_earlier_version_wrote_into(client: MlflowClient, name: str) -> None:
    client.create_registered_model(name)
    client.create_model_version(name, "file:///theirs", await_creation_for=0)
    earlier_version(client, name)


def earlier_version(client: MlflowClient, name: str) -> str:
    """A version as it was made before models had our tag."""
    run = str(client.create_run("0").info.run_id)
    version = client.create_model_version(
        name, f"runs:/{run}/champion", run, tags={"store_version": "v1"}, await_creation_for=0
    )
    client.set_registered_model_alias(name, "champion", version.version)
    return run


@pytest.mark.parametrize(
    "make",
    [an_empty_model, a_model_that_is_served, a_model_that_an_earlier_version_wrote_into],
)
def test_a_model_without_our_tag_is_refused(client: MlflowClient, make: Maker) -> None:
    name = make.__name__
    make(client, name)
    before = mlflow_objects(client)
    says = f"the registered model '{name}' .* must have the tag {MARK} with the value small.* by tracking.model"
    with pytest.raises(NotOurs, match=says):
        check_tracking(client, job_of("unused", name))
    with pytest.raises(NotOurs, match=says):
        point_champion(client, name, champion_of("run"), "v2")
    with pytest.raises(NotOurs, match=says):
        point_challenger(client, name, "small", "run", "no better")
    assert mlflow_objects(client) == before


def test_a_prompt_which_is_kept_among_the_models_is_refused(client: MlflowClient) -> None:
    client.register_prompt("a-prompt", "How much is {{this}}?")
    before = mlflow_objects(client)
    with pytest.raises(NotOurs, match=r"beside the prompt of that name; name another one by tracking.model"):
        point_champion(client, "a-prompt", champion_of("run"), "v1")
    assert mlflow_objects(client) == before


def champion_of(run: str) -> Manifest:
    """The part of a manifest that the registry is told of."""
    lineage = SimpleNamespace(mlflow_run_id=run)
    return cast(Manifest, SimpleNamespace(job="small", lineage=lineage, gate={"reason": "better"}))


def test_what_an_earlier_version_made_is_ours_and_gets_the_tag(client: MlflowClient, snapshot: Snapshot) -> None:
    experiment = client.create_experiment("earlier")
    client.create_run(experiment, tags={"job": "earlier", "optuna_study": "earlier night"})
    client.create_run(experiment, tags={"note": "somebody tried something here"})
    client.create_registered_model("earlier")
    run = earlier_version(client, "earlier")
    job = job_of("earlier", "earlier")
    check_tracking(client, job)
    assert MARK not in client.get_experiment(experiment).tags
    study = optuna.create_study()
    begin_night(client, job, study, snapshot, None, "page")
    assert study.user_attrs[MLFLOW_EXPERIMENT] == experiment
    assert client.get_experiment(experiment).tags[MARK] == "small"
    assert not point_champion(client, "earlier", champion_of(run), "v1")
    assert point_champion(client, "earlier", champion_of(run), "v2")
    assert point_challenger(client, "earlier", "small", run, "no better")
    drop_challenger(client, "earlier")
    model = client.get_registered_model("earlier")
    assert (model.tags, {alias: str(number) for alias, number in model.aliases.items()}) == (
        {MARK: "small"},
        {"champion": "2"},
    )
