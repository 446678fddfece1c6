"""A night over several machines: its workers, its network and its servers fail under it."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import optuna
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from infra.store.opening import open_store
from tasks.registry.log import history
from tasks.study.leases import mishaps_of, workers_of
from tasks.study.studies import WORKER, finished_trials, is_interrupted, last_study
from tasks.tracking.trials import INTERRUPTIONS, TRIAL_NUMBER, nested_runs
from tests.conftest import make_stack, require
from tests.held import write_held_job
from tests.hosts import Host, hosts, hosts_cannot_be_made
from tests.servers import PostgresServer, S3Server, answers, free_port, postgres_programs, postgres_server, wait_for

JOB, TRIALS = "cluster", 12
NIGHTLY = str(Path(sys.executable).parent / "nightly")


class Cluster:
    """Servers on the first host, the environment by which the others reach them, and ports by which this test does."""

    def __init__(self, here: Host, postgres: PostgresServer, folder: Path) -> None:
        self.here, self.postgres, self._folder = here, postgres, folder
        self.ports = {name: free_port() for name in ("prefect", "mlflow", "s3")} | {"optuna": postgres.port}
        self.from_outside = {name: here.lead_to(port) for name, port in self.ports.items()}
        self.s3 = S3Server(f"http://127.0.0.1:{self.from_outside['s3']}")
        self.environment = {
            **make_stack(folder / "stack").environment,
            "PREFECT_API_URL": f"http://{here.address}:{self.ports['prefect']}/api",
            "MLFLOW_TRACKING_URI": f"http://{here.address}:{self.ports['mlflow']}",
            "NIGHTLY_OPTUNA_URL": f"postgresql://{self.postgres.place}/optuna",
            "PGPASSWORD": self.postgres.password,
            # Plain HTTP is refused but to this machine: each host has a tunnel to the store.
            **S3Server(f"http://127.0.0.1:{self.ports['s3']}").environment,
            "NIGHTLY_STORE": "s3://cluster/store",
            "OMP_NUM_THREADS": "1",
        }
        self.gate = write_held_job(Path(self.environment["NIGHTLY_JOBS"]), JOB, trials=TRIALS, workers=4)

    def start(self) -> None:
        for name in ("prefect", "mlflow", "optuna"):
            self.postgres.ask("postgres", f"CREATE DATABASE {name}")
        self.postgres.ask("prefect", "CREATE EXTENSION pg_trgm")
        allowed = f"{self.here.address}:{self.ports['mlflow']},127.0.0.1:{self.from_outside['mlflow']}"
        self.start_prefect()
        self.here.start(
            sys.executable, "-m", "mlflow", "server", "--host", self.here.address, "--port", str(self.ports["mlflow"]),
            "--workers", "1", "--allowed-hosts", allowed,
            "--backend-store-uri", f"postgresql+psycopg://{self.postgres.place}/mlflow",
            "--artifacts-destination", (self._folder / "artifacts").as_uri(),
            PGPASSWORD=self.postgres.password, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        )  # fmt: skip
        self.here.start(sys.executable, "-m", "ministack", BIND_HOST=self.here.address,
                        GATEWAY_PORT=str(self.ports["s3"]), SERVICES="s3")  # fmt: skip
        self.tunnel(self.here)
        self.wait_for_page("s3", "")
        self.s3.make_bucket("cluster")
        self.wait_for_page("prefect", "api/health")
        self.here.run(NIGHTLY, "apply", **self.environment)
        self.wait_for_page("mlflow", "health")

    def start_prefect(self) -> None:
        self.prefect = self.here.start(
            sys.executable, "-m", "prefect", "server", "start", "--host", self.here.address,
            "--port", str(self.ports["prefect"]),
            PREFECT_API_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://{self.postgres.place}/prefect",
            PGPASSWORD=self.postgres.password, PREFECT_HOME=str(self._folder / "prefect"),
            PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="prefect.server.concurrency.lease_storage.filesystem",
        )  # fmt: skip

    def kill_prefect(self) -> None:
        self.prefect.kill()  # with it goes its process tree
        self.prefect.wait()

    def tunnel(self, host: Host) -> None:
        port = self.ports["s3"]
        host.start("socat", f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", f"TCP:{self.here.address}:{port}")

    def start_worker(self, host: Host) -> None:
        self.tunnel(host)
        environment = {**self.environment, "NIGHTLY_HOME": str(self._folder / host.namespace)}
        host.start(NIGHTLY, "workers", "start", "--devices", "cpu:1", "--foreground", **environment)

    def wait_for_page(self, server: str, path: str) -> None:
        wait_for(lambda: answers(f"http://127.0.0.1:{self.from_outside[server]}/{path}"), 300, server)

    def study(self) -> optuna.Study | None:
        try:  # the first night makes the tables
            is_there = self.postgres.ask("optuna", "SELECT study_name FROM studies")
        except subprocess.CalledProcessError:
            return None
        return (
            last_study(JOB, f"postgresql://nightly@127.0.0.1:{self.from_outside['optuna']}/optuna")
            if is_there
            else None
        )

    def flow_runs(self) -> list[dict[str, Any]]:
        """Those that somebody asked for; the schedule's lie ahead."""
        url = f"http://127.0.0.1:{self.from_outside['prefect']}/api/flow_runs/filter"
        runs = httpx.post(url, json={}, timeout=60).raise_for_status().json()
        return [run for run in runs if not run["auto_scheduled"]]

    def state_of_the_night(self) -> str:
        return next(str(run["state_type"]) for run in self.flow_runs() if "study" not in run["parameters"])


def training(study: optuna.Study) -> set[str]:
    """The hosts that have a trial."""
    living = workers_of(study.user_attrs)
    workers = (trial.user_attrs.get(WORKER) for trial in study.get_trials(states=(TrialState.RUNNING,)))
    return {str(living[worker]["host"]) for worker in workers if worker in living}


def is_lost(study: optuna.Study, host: Host) -> bool:
    return any(host.namespace in sentence for sentence in mishaps_of(study.user_attrs))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, list[Host]]]:
    """Servers on a host of their own, and three hosts where nothing runs yet."""
    if reason := hosts_cannot_be_made():
        require(reason)
    if postgres_programs() is None:
        require("PostgreSQL's server is not installed (Debian: postgresql)")
    with hosts(4, tmp_path) as (first, *others), postgres_server(first.address, first.command()) as postgres:
        cluster = Cluster(first, postgres, tmp_path)
        monkeypatch.setenv("PGPASSWORD", postgres.password)
        for name, value in cluster.s3.environment.items():
            monkeypatch.setenv(name, value)
        cluster.start()
        yield cluster, others


@pytest.mark.timeout(1800)
def test_a_night_outlives_its_workers_its_network_and_its_servers(cluster: tuple[Cluster, list[Host]]) -> None:
    """Each trial waits until it is let end, so that every fault meets trials that are under way."""
    servers, (first, lost, cut_off) = cluster
    servers.start_worker(first)
    servers.here.run(NIGHTLY, "run", JOB, "--no-follow", **servers.environment)
    wait_for(servers.study, 300, "the night to begin")
    study = servers.study()
    assert study is not None
    for late in (lost, cut_off):
        servers.start_worker(late)
    everyone = {host.namespace for host in (first, lost, cut_off)}
    wait_for(lambda: training(study) == everyone, 300, "three hosts to train")

    # A trial ends while the studies cannot be written, and Prefect is gone as well.
    servers.postgres.stop()
    servers.kill_prefect()
    servers.gate.let_one_end(first.namespace)
    wait_for(lambda: "the studies cannot be used" in first.log.read_text(), 300, "the outage to be seen")
    wait_for(lambda: servers.gate.has_let(first.namespace), 300, "a trial to end")
    servers.postgres.start()
    servers.start_prefect()
    wait_for(lambda: finished_trials(study), 300, "the trial's end to be written")

    lost.lose_power()
    cut_off.cut_network(cut=True)
    wait_for(lambda: is_lost(study, lost) and is_lost(study, cut_off), 300, "both hosts to be given up")
    servers.gate.let_one_end(cut_off.namespace)  # which its worker has given up by itself where it noticed before
    cut_off.cut_network(cut=False)
    wait_for(lambda: cut_off.namespace in training(study), 300, "the host to train again, as another worker")

    servers.wait_for_page("prefect", "api/health")
    servers.gate.open()
    wait_for(lambda: servers.state_of_the_night() not in ("RUNNING", "PENDING"), 600, "the night to end")
    assert servers.state_of_the_night() == "COMPLETED", first.log.read_text()[-4000:]
    wait_for(
        lambda: not {"RUNNING", "PENDING", "SCHEDULED"} & {run["state_type"] for run in servers.flow_runs()},
        300,
        "no worker's run to be left open",
    )
    assert_the_ledgers_agree(servers, study)
    states = Counter(run["state_type"] for run in servers.flow_runs())
    assert states["CANCELLED"] > 0  # a fourth worker was asked for
    assert states.keys() <= {"COMPLETED", "CRASHED", "CANCELLED"}
    assert len(history(open_store("s3://cluster/store"), JOB)) == 1
    assert JOB in servers.here.run(NIGHTLY, "champion", JOB, **servers.environment)


def assert_the_ledgers_agree(servers: Cluster, study: optuna.Study) -> None:
    """Each trial was finished once, and tracked once, with each of its interruptions."""
    numbers = list(range(TRIALS))
    assert sorted(trial.user_attrs["number"] for trial in finished_trials(study)) == numbers
    states = Counter(trial.state for trial in study.trials)
    assert states.keys() == {TrialState.COMPLETE, TrialState.FAIL}
    interrupted = [trial.user_attrs.get("number") for trial in study.trials if is_interrupted(trial)]
    assert len(interrupted) == states[TrialState.FAIL]
    client = MlflowClient(f"http://127.0.0.1:{servers.from_outside['mlflow']}")
    parent = client.get_run(study.user_attrs["mlflow_run_id"])
    runs = list(nested_runs(client, parent.info.run_id))
    assert sorted(int(run.data.tags[TRIAL_NUMBER]) for run in runs) == numbers
    assert {run.info.status for run in (parent, *runs)} == {"FINISHED"}
    told = {int(run.data.tags[TRIAL_NUMBER]): int(run.data.tags.get(INTERRUPTIONS, 0)) for run in runs}
    assert Counter(number for number in interrupted if number is not None) == Counter(
        {number: times for number, times in told.items() if times}
    )
    assert workers_of(study.user_attrs) == {}
