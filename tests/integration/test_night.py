"""Whole nights against a real Prefect server, a real MLflow server and real stores."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from infra.settings import CPU_PART
from infra.store.opening import open_store
from models.evaluation.evaluate import evaluate
from tasks.data.prepare import prepare
from tasks.registry.champion import load_champion
from tasks.registry.log import history, latest_promotion
from tasks.study.studies import finished_trials
from tasks.tracking.trials import CURVE, TRIAL_NUMBER
from tests.commands import nightly
from tests.conftest import CPU, Stack, make_job
from tests.faulty_proxy import Fault, Request, faulty_proxy
from tests.nights import (
    champion_alias,
    direct_runs,
    files_with,
    first_run,
    promote_a_copy,
    reports_of,
    run_directly,
    runs_of,
    service_of,
    study_of,
)
from tests.servers import SECRET_KEY, PostgresServer, S3Server, free_port, has_ceph, wait_for

STEPS = ["reconcile", "prepare", "tune", "confirm", "gate", "promote", "report"]


@pytest.fixture(scope="module", autouse=True)
def killed_night(stack: Stack) -> str:
    """A night whose process was killed before the other tests, with no worker to see it; returns its flow run's id."""
    deployment = stack.ask_prefect("GET", "deployments/name/nightly_tuning/zombie").json()
    # Pending, so that the stack's worker leaves it alone.
    asked = {"parameters": {"job": "zombie"}, "state": {"type": "PENDING"}}
    run = str(stack.ask_prefect("POST", f"deployments/{deployment['id']}/create_flow_run", asked).json()["id"])
    environment = {**service_of(stack, "worker").environ(), "PREFECT__FLOW_RUN_ID": run, CPU_PART: "of the zombie"}
    with subprocess.Popen([sys.executable, "-m", "prefect.engine"], env=environment) as engine:
        wait_for(lambda: (stack.home / "studies/zombie").exists(), 300, "the night to begin")
        engine.kill()
    return run


@pytest.fixture(scope="module")
def night(stack: Stack) -> str:
    """One whole night of the job `quick` through its deployment; returns what the terminal showed."""
    return stack.nightly("run", "quick", "--trials", "5").stdout


def test_the_terminal_shows_each_step_the_outcome_and_three_pages(stack: Stack, night: str) -> None:
    assert [line.split()[1].rstrip(":") for line in night.splitlines() if line.startswith("✓")] == STEPS
    assert "\nquick: version" in night
    for name, page in (
        ("The night in Prefect", f"{stack.prefect_api.removesuffix('/api')}/runs/flow-run/"),
        ("The trials in MLflow", f"{stack.mlflow_url}/#/"),
        ("The report with plots", f"{stack.mlflow_url}/#/"),
    ):
        link = night[night.index(name) :].removeprefix(name).split()[0]
        assert link.startswith(page)
        answer = httpx.get(link, headers={"Accept": "text/html"}, follow_redirects=True)
        assert answer.status_code == 200, link
    assert "nightly down" in night


def test_prefect_shows_the_night(stack: Stack, night: str) -> None:
    run = first_run(stack, "quick")
    assert run["state_type"] == "COMPLETED"
    assert re.fullmatch(r"quick · \d{4}-\d\d-\d\d · 5 trials", str(run["name"]))
    steps = stack.prefect("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}}, sort="EXPECTED_START_TIME_ASC")
    assert [str(step["name"]).partition(":")[0] for step in steps] == STEPS
    assert "tune: 5 trials of mlp, auto" in {step["name"] for step in steps}
    artifacts = stack.prefect("artifacts/filter", flow_runs={"id": {"any_": [run["id"]]}})
    kept = {str(artifact["key"]).removeprefix("nightly-tuner-"): artifact for artifact in artifacts}
    assert kept["progress-quick"]["data"] == 100.0
    assert str(kept["progress-quick"]["description"]).startswith("5 of 5 trials, best 0.")
    assert str(kept["report-quick"]["data"]).startswith("# quick: version")
    study = study_of(stack, "quick")
    parent, nested = runs_of(stack, study)
    assert str(kept["mlflow-quick"]["data"]).startswith("[This night in MLflow](http")
    assert parent.info.run_id in str(kept["mlflow-quick"]["data"])
    linked = set(re.findall(r"/runs/(\w+)\?", str(kept["trials-quick"]["data"])))
    assert linked == {nested_run.info.run_id for nested_run in nested}
    assert f"/runs/flow-run/{run['id']}" in parent.data.tags["mlflow.note.content"]
    logs = stack.prefect("logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}})
    assert any("rows of sklearn://digits" in str(log["message"]) for log in logs)


def test_optuna_holds_every_trial(stack: Stack, night: str) -> None:
    study = study_of(stack, "quick")
    assert len(study.trials) == len(finished_trials(study)) == 5
    assert all(len(trial.user_attrs[CURVE]) == 2 for trial in study.trials)


def test_mlflow_holds_every_trial_with_its_curve(stack: Stack, night: str) -> None:
    study = study_of(stack, "quick")
    parent, nested = runs_of(stack, study)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["verdict"] == "PROMOTE"
    assert parent.data.tags["mlflow.note.content"].startswith("# quick: version")
    assert parent.data.params["budget.trials"] == "5"
    (dataset,) = parent.inputs.dataset_inputs
    assert dataset.dataset.digest == study.user_attrs["snapshot"]
    assert sorted(int(run.data.tags[TRIAL_NUMBER]) for run in nested) == [0, 1, 2, 3, 4]
    client = MlflowClient(stack.mlflow_url)
    flow_run_id = first_run(stack, "quick")["id"]
    for run in nested:
        trial = study.trials[int(run.data.tags[TRIAL_NUMBER])]
        assert run.info.status == "FINISHED"
        assert trial.duration is not None
        assert run.info.end_time - run.info.start_time == pytest.approx(trial.duration.total_seconds() * 1000, abs=2)
        assert run.data.params == {name: str(value) for name, value in trial.params.items()}
        curve = client.get_metric_history(run.info.run_id, "val_accuracy")
        kept = {number: objective for number, _, _, objective in trial.user_attrs[CURVE]}
        assert {point.step: point.value for point in curve} == kept
        assert run.data.tags["prefect_flow_run_id"] == flow_run_id
        assert run.data.tags["trial_state"] == trial.state.name
        assert run.data.tags["device"].startswith("cpu")
        assert {"train_loss", "val_loss", "seconds"} <= set(run.data.metrics)


def test_the_champion_is_what_the_manifest_says(stack: Stack, night: str, tmp_path: Path) -> None:
    champion = load_champion("quick", (stack.home / "store").as_uri())
    study = study_of(stack, "quick")
    snapshot = prepare(make_job().data, "classification", tmp_path)
    features, target = snapshot.load(CPU)["test"]
    measured = evaluate(torch.nn.Sequential(champion.preprocessing, champion.model), features, target)
    assert measured == champion.manifest.metrics["test"]
    lineage = champion.manifest.lineage
    assert (lineage.snapshot, lineage.study) == (snapshot.fingerprint, study.study_name)
    assert lineage.mlflow_run_id == study.user_attrs["mlflow_run_id"]
    assert lineage.prefect_flow_run_id == first_run(stack, "quick")["id"]
    assert lineage.packages["torch"]
    registered = champion_alias(stack, "quick")
    assert registered.tags["store_version"] == champion.manifest.version
    assert registered.run_id == lineage.mlflow_run_id
    printed = json.loads(nightly(stack, "champion", "quick", "--json").stdout)
    assert printed["version"] == champion.manifest.version
    assert printed["manifest"]["metrics"]["test"] == measured
    assert champion.manifest.version in nightly(stack, "champion", "quick").stdout


def test_jobs_are_listed_with_their_nights_and_what_a_night_logged_is_shown(stack: Stack, night: str) -> None:
    rows = {row["job"]: row for row in json.loads(nightly(stack, "ls", "--json").stdout)}
    champion = json.loads(nightly(stack, "champion", "quick", "--json").stdout)["version"]
    assert (rows["quick"]["champion"], rows["quick"]["last night"]) == (champion, "Completed")
    assert rows["quick"]["next night"].endswith("01-01 02:00")
    assert rows["refusing"]["began"] is None
    shown = nightly(stack, "logs", "quick").stdout
    assert "rows of sklearn://digits: " in shown
    lines = [json.loads(line) for line in nightly(stack, "logs", "quick", "--json").stdout.splitlines()]
    assert {"at", "level", "message"} == set(lines[0])
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    assert "no night of refusing has begun" in nightly(stack, "logs", "refusing", ok=False).stderr


def test_a_night_leaves_a_page_and_its_plots_in_mlflow(stack: Stack, night: str, tmp_path: Path) -> None:
    client = MlflowClient(stack.mlflow_url)
    run_id = study_of(stack, "quick").user_attrs["mlflow_run_id"]
    names = {item.path for item in client.list_artifacts(run_id)}
    assert {"report.html", "plots", "data_card.md", "gate.json"} <= names
    pictures = {Path(item.path).stem for item in client.list_artifacts(run_id, "plots")}
    assert {"history", "curves", "intermediate", "confusion", "reliability"} <= pictures
    page = Path(client.download_artifacts(run_id, "report.html", str(tmp_path))).read_text()
    assert "<h2>What to do next</h2>" in page


def test_schedules_lay_runs_ahead_and_of_missed_ones_the_last_one_starts_by_itself(stack: Stack) -> None:
    """Prefect keeps every run that nobody took. Here its database is told that two of them were due."""

    def scheduled() -> list[dict[str, object]]:
        return [run for run in stack.flow_runs("missed") if run["auto_scheduled"]][-2:]

    wait_for(lambda: len(scheduled()) == 2, 300, "runs to be scheduled")
    now = datetime.now(UTC)
    for days, run in enumerate(scheduled()):
        due = now - timedelta(days=days, minutes=5)
        with sqlite3.connect(stack.home / "prefect/prefect.db", timeout=60) as database:
            database.execute(
                "UPDATE flow_run SET expected_start_time = ? WHERE id = ?",
                (due.strftime("%Y-%m-%d %H:%M:%S.%f"), str(run["id"])),
            )
        database.close()
    for run in reversed(scheduled()):
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": run["expected_start_time"]}}
        stack.ask_prefect("POST", f"flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    wait_for(lambda: all(run["state_type"] == "COMPLETED" for run in scheduled()), 300, "the nights to end")
    assert [run["state_name"] for run in scheduled()] == ["Completed", "Skipped"]
    assert len(list((stack.home / "studies/missed").glob("*.journal"))) == 1
    assert len(finished_trials(study_of(stack, "missed"))) == 2


def test_the_doctor_finds_a_running_stack_well(stack: Stack, tmp_path: Path) -> None:
    """For a job that is deployed; some tests' jobs are not."""
    job = Path(stack.environment["NIGHTLY_JOBS"]) / "quick.yaml"
    (tmp_path / job.name).write_text(job.read_text())
    checks = json.loads(nightly(stack, "doctor", "--json", NIGHTLY_JOBS=str(tmp_path)).stdout)
    assert {check["name"]: check["state"] for check in checks if check["state"] != "ok"}.keys() <= {"disk"}
    assert {"prefect", "mlflow", "worker", "deployments", "store", "clock"} <= {check["name"] for check in checks}


def test_a_second_night_holds_and_sets_a_moved_alias_right(stack: Stack, night: str) -> None:
    client = MlflowClient(stack.mlflow_url)
    before = champion_alias(stack, "quick")
    stray = client.create_model_version("quick", f"runs:/{before.run_id}/stray", before.run_id, await_creation_for=0)
    client.set_registered_model_alias("quick", "champion", stray.version)
    # That it names the trials keeps it from skipping itself, though nothing is new.
    assert run_directly(stack, "quick", {"trials": 5})[0] == "COMPLETED"
    assert any(report.startswith("# quick: champion stays (HOLD)") for report in reports_of(stack, "quick"))
    assert champion_alias(stack, "quick").version == before.version
    assert [path.name for path in (stack.home / "store/models/quick/promotions").iterdir()] == ["000001.json"]


def test_a_night_with_nothing_new_reuses_the_snapshot_and_skips_itself_where_its_job_says_so(
    stack: Stack, night: str
) -> None:
    kind, message = run_directly(stack, "quick")
    assert kind == "COMPLETED"
    assert f"nothing has changed since {study_of(stack, 'quick').study_name}: the same search" in message
    skipped = direct_runs(stack, "quick")[0]
    assert skipped["state_name"] == "Skipped"
    steps = stack.prefect("task_runs/filter", flow_runs={"id": {"any_": [skipped["id"]]}})
    assert {str(step["name"]).partition(":")[0]: step["state_name"] for step in steps} == {
        "reconcile": "Completed", "prepare": "Cached", "skip": "Completed",
    }  # fmt: skip
    snapshots = {path.name for path in (stack.home / "store/snapshots").iterdir()}
    assert study_of(stack, "quick").user_attrs["snapshot"] in snapshots


@pytest.mark.parametrize("reason", ["unreachable", "damaged"])
def test_a_store_that_cannot_be_used_is_found_before_the_first_trial(
    stack: Stack, night: str, reason: str, tmp_path: Path
) -> None:
    if reason == "unreachable":
        environment = S3Server(f"http://127.0.0.1:{free_port()}").environment | {"NIGHTLY_STORE": "s3://away"}
        says = "the artifact store s3://away cannot be reached"
    else:
        store = tmp_path / "store"
        shutil.copytree(stack.home / "store/models/quick", store / "models/quick")
        champion = latest_promotion(open_store(store.as_uri()), "quick")
        assert champion is not None
        (manifest,) = store.rglob(f"{champion.version}/manifest.json")
        manifest.write_bytes(manifest.read_bytes().replace(b"accuracy", b"accuracx"))
        environment = {"NIGHTLY_STORE": store.as_uri()}
        says = "is damaged: manifest.json was altered; restore the store from a backup, nothing was changed"
    studies = sorted((stack.home / "studies/quick").glob("*.journal"))
    kind, message = run_directly(stack, "quick", {"trials": 5}, **environment)
    assert kind == "FAILED"
    assert says in message
    assert sorted((stack.home / "studies/quick").glob("*.journal")) == studies


def test_a_source_that_was_spoilt_fails_the_night_before_anything_trains(stack: Stack) -> None:
    folder = Path(stack.environment["NIGHTLY_JOBS"])
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"x": draw.normal(size=600), "town": draw.choice(["Bonn", "Ulm"], 600)})
    frame["y"] = np.where(frame["x"] + draw.normal(size=600) > 0, "high", "low")
    frame.to_csv(folder / "towns.csv", index=False)
    space = "{epochs: 2, batch_size: 64, width: 16, depth: 1}"
    (folder / "towns.yaml").write_text(
        f"name: towns\ndata: {{source: towns.csv}}\nsearch: {{space: {space}}}\nbudget: {{trials: 2}}\n"
        "confirm: {candidates: 1, seeds: 2}\n"
    )
    assert run_directly(stack, "towns")[0] == "COMPLETED"
    store = open_store((stack.home / "store").as_uri())
    champion = latest_promotion(store, "towns")
    studies = sorted((stack.home / "studies/towns").iterdir())
    for spoilt, says in (
        (frame.drop(columns="town"), "town was categorical and is gone"),
        (frame.assign(town=frame["y"]), "town must not give the target away, found that it predicts 100.0%"),
    ):
        spoilt[["x", *spoilt.columns.difference(["x", "y"]), "y"]].to_csv(folder / "towns.csv", index=False)
        kind, message = run_directly(stack, "towns")
        assert kind == "FAILED"
        assert says in message
    assert champion is not None
    assert latest_promotion(store, "towns") == champion
    assert sorted((stack.home / "studies/towns").iterdir()) == studies


def test_promotion_never_does_everything_but_that(stack: Stack) -> None:
    assert run_directly(stack, "shadow", {"promotion": "never", "trials": 2})[0] == "COMPLETED"
    (report,) = reports_of(stack, "shadow")
    assert "# shadow: not promoted, because promotion.mode is never" in report
    assert not (stack.home / "store/models/shadow").exists()


def test_a_night_promotes_to_s3(stack: Stack, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is away from the promotion's first write on, for longer than its client tries again, behind a proxy
    that says so: Ceph's gateway, or an emulator where that is not installed."""
    s3: S3Server = request.getfixturevalue("rgw" if has_ceph() else "ministack")
    bucket = f"night-{uuid.uuid4().hex[:8]}"
    s3.make_bucket(bucket)
    url = f"s3://{bucket}/models-of-ours"
    away_until: list[float] = []

    def away(asked: Request) -> Fault | None:
        if asked.method == "PUT" and "/versions/" in asked.path and not away_until:
            away_until.append(time.monotonic() + 20)
        return "500" if away_until and time.monotonic() < away_until[0] else None

    with faulty_proxy(s3.endpoint, away) as endpoint:
        environment = s3.environment | {"AWS_ENDPOINT_URL_S3": endpoint}
        kind, message = run_directly(stack, "quick-s3", NIGHTLY_STORE=url, **environment)
    assert kind == "COMPLETED", message
    assert away_until
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    champion = load_champion("quick-s3", url)
    assert champion.promotion.number == 1
    assert len(history(open_store(url), "quick-s3")) == 1
    assert champion_alias(stack, "quick-s3").tags["store_version"] == champion.manifest.version
    assert files_with(stack.home, SECRET_KEY) == [], "a database, log or study holds the store's secret"


def test_a_refused_parameter_starts_nothing(stack: Stack) -> None:
    deployment = stack.ask_prefect("GET", "deployments/name/nightly_tuning/quick").json()
    for parameters in ({"trials": 0}, {"sampler": "magic"}, {"trails": 5}):
        answer = httpx.post(
            f"{stack.prefect_api}/deployments/{deployment['id']}/create_flow_run",
            json={"parameters": {"job": "quick", **parameters}},
        )
        assert answer.status_code == 409, answer.text


def test_the_run_form_is_flat_and_shows_what_the_job_says(stack: Stack) -> None:
    deployment = stack.ask_prefect("GET", "deployments/name/nightly_tuning/quick").json()
    fields = deployment["parameter_openapi_schema"]["properties"]
    assert {name: field.get("default") for name, field in fields.items()} == {
        "job": None, "preset": "nightly", "trials": 6, "minutes": 10.0, "sampler": "auto", "promotion": "automatic",
    }  # fmt: skip
    assert all(field["description"] and "anyOf" not in field for field in fields.values())
    assert fields["sampler"]["enum"] == ["auto", "tpe", "gp", "cmaes", "random", "qmc", "grid"]
    assert deployment["parameters"] == {"job": "quick"}
    assert deployment["global_concurrency_limit"]["limit"] == 1


def test_a_schedule_is_paused_stays_so_and_goes_on(stack: Stack) -> None:
    def schedule() -> dict[str, object]:
        (found,) = stack.ask_prefect("GET", "deployments/name/nightly_tuning/quick").json()["schedules"]
        return dict(found)

    before = schedule()
    assert "is paused" in nightly(stack, "pause", "quick").stdout
    nightly(stack, "apply")
    after = schedule()
    assert after == {**before, "active": False, "updated": after["updated"]}
    nightly(stack, "resume", "quick")
    assert schedule()["active"] is True
    assert "no job is named 'nobody'" in nightly(stack, "pause", "nobody", ok=False).stderr


@pytest.mark.parametrize(
    ("job", "answer", "reason", "state"),
    [
        ("asked-yes", {"promote": True, "note": "tried it"}, "a person said yes (tried it): ", "promoted"),
        ("asked-no", {"promote": False, "note": ""}, "a person said no, though ", "HOLD"),
        ("asked-nobody", None, "nobody answered within 0.1 minutes, though ", "HOLD"),
    ],
)
def test_a_person_decides_where_the_job_asks(
    stack: Stack, job: str, answer: dict[str, object] | None, reason: str, state: str
) -> None:
    with ThreadPoolExecutor(1) as other_thread:
        night = other_thread.submit(run_directly, stack, job)
        if answer is not None:
            wait_for(lambda: [run["state_type"] for run in direct_runs(stack, job)] == ["PAUSED"], 300, "the question")
            run = direct_runs(stack, job)[0]["id"]
            assert not (stack.home / "store/models" / job).exists()
            inputs = stack.prefect(f"flow_runs/{run}/input/filter", prefix="paused", limit=10)
            (described,) = (str(each["value"]) for each in inputs if str(each["key"]).endswith("-description"))
            assert f"Promote tonight's winner of {job}?" in described
            assert "| accuracy |" in described
            taken = stack.ask_prefect("POST", f"flow_runs/{run}/resume", {"run_input": answer}).json()
            assert taken["status"] == "ACCEPT", taken
        assert night.result()[0] == "COMPLETED"
    (report,) = reports_of(stack, job)
    assert state in report.splitlines()[0]
    assert reason[:1].upper() + reason[1:] in report
    promotion = latest_promotion(open_store((stack.home / "store").as_uri()), job)
    assert (promotion is not None) == (state == "promoted")
    assert promotion is None or promotion.reason.startswith(reason)


def test_a_rollback_from_the_prefect_ui_and_the_alias_follows(stack: Stack, night: str) -> None:
    """Two versions of `quick` in the log; the second is a copy under another manifest, as a later night would make."""
    store = open_store((stack.home / "store").as_uri())
    first = latest_promotion(store, "quick")
    assert first is not None
    second = promote_a_copy(store, "quick")
    deployment = stack.ask_prefect("GET", "deployments/name/nightly_rollback/rollback").json()
    parameters = {"job": "quick", "reason": "it disappoints"}
    created = stack.ask_prefect("POST", f"deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
    run = created.json()["id"]

    def state() -> str:
        return str(stack.ask_prefect("GET", f"flow_runs/{run}").json()["state_type"])

    wait_for(lambda: state() in ("COMPLETED", "FAILED"), 180, "the rollback")
    assert state() == "COMPLETED"
    assert champion_alias(stack, "quick").tags["store_version"] == first.version
    rows = json.loads(nightly(stack, "history", "quick", "--json").stdout)
    assert [(row["kind"], row["version"]) for row in rows] == [
        ("rollback", first.version), ("promotion", second), ("promotion", first.version),
    ]  # fmt: skip
    assert rows[0]["reason"] == "it disappoints"
    back = stack.nightly("rollback", "quick", "--to", second, "--reason", "after all", "--json")
    assert json.loads(back.stdout)["number"] == 4
    wait_for(lambda: champion_alias(stack, "quick").tags["store_version"] == second, 180, "the alias")
    assert "it disappoints" in " ".join(nightly(stack, "history", "quick").stdout.split())
    again = json.loads(nightly(stack, "reproduce", "quick", first.version, "--json").stdout)
    assert again["within_tolerance"]


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An HTTP endpoint that keeps what it is sent; the first message meets an error, which must be tried again."""
    messages: list[dict[str, str]] = []
    refused: list[bool] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if refused:
                messages.append(json.loads(content))
            self.send_response(200 if refused else 503)
            self.end_headers()
            refused.append(True)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/hook?token=a-token-of-the-webhook", messages
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_webhook_hears_of_failures(stack: Stack, receiver: tuple[str, list[dict[str, str]]]) -> None:
    url, messages = receiver
    assert run_directly(stack, "no-such-job", NIGHTLY_WEBHOOK=url)[0] == "FAILED"
    (failed,) = messages
    assert (failed["event"], failed["job"]) == ("failed", "no-such-job")
    assert failed["reason"].startswith("no job is named 'no-such-job'")


def test_a_night_whose_database_starts_late_says_so_at_once_goes_on_and_says_that_it_promoted(
    stack: Stack, postgres: PostgresServer, receiver: tuple[str, list[dict[str, str]]], tmp_path: Path
) -> None:
    url, messages = receiver
    postgres.stop()

    def start_once_it_is_said() -> None:
        wait_for(lambda: messages, 200, "the night to say that it waits")
        postgres.start()

    starting = threading.Thread(target=start_once_it_is_said)
    starting.start()
    environment = {"NIGHTLY_OPTUNA_URL": postgres.url, "PGPASSWORD": postgres.password, "NIGHTLY_WEBHOOK": url}
    kind, message = run_directly(stack, "shadow", **environment, NIGHTLY_STORE=tmp_path.as_uri())
    starting.join()
    assert kind == "COMPLETED", message
    assert [(one["event"], one["job"]) for one in messages] == [("waiting", "shadow"), ("promoted", "shadow")]
    assert "the database of the studies does not answer" in messages[0]["reason"]
    assert postgres.password not in str(messages)
    promoted = messages[1]
    assert (tmp_path / "models/shadow/versions" / promoted["version"]).is_dir()
    assert "/runs/flow-run/" in promoted["night"]
    assert files_with(stack.home, "a-token-of-the-webhook") == []


def test_a_night_that_dies_without_a_worker_to_see_it_is_marked_crashed(stack: Stack, killed_night: str) -> None:
    """The automation on missing heartbeats does it, 90 s later; nothing else is left alive that could."""

    def state() -> object:
        return stack.ask_prefect("GET", f"flow_runs/{killed_night}").json()["state_type"]

    wait_for(lambda: state() == "CRASHED", 400, "the automation")
