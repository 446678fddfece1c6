"""A night over several machines: its workers, its network and its servers fail under it."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import make_stack, require
from tests.hosts import Host, hosts, hosts_cannot_be_made
from tests.integration.test_workers import write_slow_job
from tests.servers import PostgresServer, S3Server, free_port, postgres_programs, postgres_server, wait_for

TRIALS = 60
LOOK = """
import json, os, sys
from collections import Counter
from pathlib import Path
from mlflow import MlflowClient
from infra.store import open_store
from tasks.leases import mishaps_of, workers_of
from tasks.promotions import history
from tasks.study import finished_trials, is_interrupted, last_study
from tasks.tracking import INTERRUPTIONS, TRIAL_NUMBER, nested_runs
study = last_study("cluster", os.environ["NIGHTLY_OPTUNA_URL"])
client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
parent = client.get_run(study.user_attrs["mlflow_run_id"])
runs = list(nested_runs(client, parent.info.run_id))
print(json.dumps({
    "states": Counter(trial.state.name for trial in study.trials),
    "finished": [trial.user_attrs["number"] for trial in finished_trials(study)],
    "interrupted": [trial.user_attrs.get("number") for trial in study.trials if is_interrupted(trial)],
    "tracked": [int(run.data.tags[TRIAL_NUMBER]) for run in runs],
    "resumed": [
        int(run.data.tags[TRIAL_NUMBER]) for run in runs for _ in range(int(run.data.tags.get(INTERRUPTIONS, 0)))
    ],
    "run_states": Counter(run.info.status for run in [parent, *runs]),
    "living": workers_of(study.user_attrs),
    "mishaps": mishaps_of(study.user_attrs),
    "promotions": len(history(open_store(os.environ["NIGHTLY_STORE"]), "cluster")),
}))
"""


class Cluster:
    """Servers on the first host, and the environment by which all others reach them."""

    def __init__(self, here: Host, postgres: PostgresServer, folder: Path) -> None:
        self.here, self.postgres, self._folder = here, postgres, folder
        self.ports = {name: free_port() for name in ("prefect", "mlflow", "s3")}
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
        jobs = Path(self.environment["NIGHTLY_JOBS"])
        write_slow_job(jobs, "cluster", trials=TRIALS, workers=4, epochs=30)

    def start(self) -> None:
        for name in ("prefect", "mlflow", "optuna"):
            self.postgres.ask("postgres", f"CREATE DATABASE {name}")
        self.postgres.ask("prefect", "CREATE EXTENSION pg_trgm")
        self.here.start(sys.executable, "-m", "ministack", BIND_HOST=self.here.address,
                        GATEWAY_PORT=str(self.ports["s3"]), SERVICES="s3")  # fmt: skip
        self.here.start(
            sys.executable, "-m", "mlflow", "server", "--host", self.here.address, "--port", str(self.ports["mlflow"]),
            "--workers", "1", "--allowed-hosts", f"{self.here.address}:{self.ports['mlflow']}",
            "--backend-store-uri", f"postgresql+psycopg://{self.postgres.place}/mlflow",
            "--artifacts-destination", (self._folder / "artifacts").as_uri(),
            PGPASSWORD=self.postgres.password,
        )  # fmt: skip
        self.start_prefect()
        self.tunnel(self.here)
        for name, path in (("prefect", "api/health"), ("mlflow", "health")):
            self.wait_for_page(f"http://{self.here.address}:{self.ports[name]}/{path}")
        bucket = "import boto3; boto3.client('s3').create_bucket(Bucket='cluster')"
        self.here.run(sys.executable, "-c", bucket, **self.environment)
        self.nightly("apply")

    def start_prefect(self) -> None:
        self.prefect = self.here.start(
            sys.executable, "-m", "prefect", "server", "start", "--host", self.here.address,
            "--port", str(self.ports["prefect"]),
            PREFECT_API_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://{self.postgres.place}/prefect",
            PGPASSWORD=self.postgres.password, PREFECT_HOME=str(self._folder / "prefect"),
            PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="prefect.server.concurrency.lease_storage.filesystem",
        )  # fmt: skip

    def restart_prefect(self) -> None:
        self.prefect.kill()  # with it goes its process tree
        self.prefect.wait()
        self.start_prefect()

    def tunnel(self, host: Host) -> None:
        port = self.ports["s3"]
        host.start("socat", f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", f"TCP:{self.here.address}:{port}")

    def start_worker(self, host: Host) -> None:
        self.tunnel(host)
        environment = {**self.environment, "NIGHTLY_HOME": str(self._folder / host.namespace)}
        nightly = str(Path(sys.executable).parent / "nightly")
        host.start(nightly, "workers", "start", "--devices", "cpu:1", "--foreground", **environment)

    def nightly(self, *arguments: str) -> str:
        return self.here.run(str(Path(sys.executable).parent / "nightly"), *arguments, **self.environment)

    def wait_for_page(self, url: str) -> None:
        ask = f"import urllib.request; urllib.request.urlopen({url!r}, timeout=5)"

        def answers() -> bool:
            try:
                self.here.run(sys.executable, "-c", ask)
            except AssertionError:
                return False
            return True

        wait_for(answers, 300, url)

    def finished(self) -> int:
        return int(self.postgres.ask("optuna", "SELECT count(*) FROM trials WHERE state = 'COMPLETE'")[0])

    def workers(self) -> dict[str, bool]:
        """The hosts that train, and whether the night itself is there."""
        try:
            rows = self.postgres.ask("optuna", "SELECT value_json FROM study_user_attributes WHERE key LIKE 'worker %'")
        except subprocess.CalledProcessError:  # the first night makes the tables
            return {}
        records = [json.loads(row) for row in rows]
        return {record["host"]: record["night"] for record in records if record["beats"] >= 0}

    def run_states(self) -> list[str]:
        rows = self.postgres.ask("prefect", "SELECT state_type FROM flow_run WHERE auto_scheduled = false")
        return sorted(rows)

    def night_state(self) -> str:
        rows = self.postgres.ask(
            "prefect", "SELECT state_type FROM flow_run WHERE auto_scheduled = false AND name LIKE 'cluster%'"
        )
        return rows[0] if rows else ""


@pytest.mark.timeout(1800)
def test_a_night_outlives_its_workers_its_network_and_its_servers(tmp_path: Path) -> None:
    if reason := hosts_cannot_be_made():
        require(reason)
    if postgres_programs() is None:
        require("PostgreSQL's server is not installed (Debian: postgresql)")
    with hosts(5, tmp_path) as (first, *others), postgres_server(first.address, first.command()) as postgres:
        cluster = Cluster(first, postgres, tmp_path)
        cluster.start()
        for host in others[:3]:
            cluster.start_worker(host)
        cluster.nightly("run", "cluster", "--no-follow")
        wait_for(lambda: len(cluster.workers()) == 3 and cluster.finished() >= 3, 400, "three hosts to train")
        helpers = [host for host in others[:3] if not cluster.workers()[host.namespace]]
        assert len(helpers) == 2
        lost, cut_off = helpers

        lost.lose_power()
        cut_off.cut_network(cut=True)
        back = threading.Timer(40, lambda: cut_off.cut_network(cut=False))
        back.start()
        late = others[3]
        cluster.start_worker(late)
        wait_for(lambda: late.namespace in cluster.workers(), 400, "the fourth host to train")
        cluster.postgres.stop()
        time.sleep(5)
        cluster.postgres.start()
        cluster.restart_prefect()
        back.join()
        wait_for(lambda: cluster.night_state() not in ("RUNNING", "PENDING"), 900, "the night to end")
        assert cluster.night_state() == "COMPLETED", (tmp_path / f"{first.namespace}.log").read_text()[-4000:]

        wait_for(lambda: "RUNNING" not in cluster.run_states(), 400, "no worker's run to be left RUNNING")
        found = json.loads(first.run(sys.executable, "-c", LOOK, **cluster.environment))
        assert sorted(found["finished"]) == list(range(TRIALS))
        assert set(found["states"]) <= {"COMPLETE", "FAIL"}
        assert found["states"]["FAIL"] == len(found["interrupted"]) > 0
        assert sorted(found["tracked"]) == list(range(TRIALS))
        assert found["run_states"] == {"FINISHED": TRIALS + 1}
        assert sorted(found["resumed"]) == sorted(number for number in found["interrupted"] if number is not None)
        assert found["living"] == {}
        assert any(lost.namespace in sentence for sentence in found["mishaps"])
        assert found["promotions"] == 1
        assert "cluster" in cluster.nightly("champion", "cluster")
        assert set(cluster.run_states()) <= {"COMPLETED", "CRASHED", "CANCELLED", "FAILED"}
