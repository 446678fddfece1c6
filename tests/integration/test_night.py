"""Whole nights against a real Prefect server, a real MLflow server and real stores."""

import json
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from infra.store import open_store
from models.evaluate import evaluate
from tasks.champion import load_champion
from tasks.prepare import prepare
from tasks.promotions import history, latest_promotion
from tasks.study import finished_trials
from tasks.tracking import CURVE, TRIAL_NUMBER
from tests.conftest import CPU, Stack, make_job
from tests.faulty_proxy import Fault, Request, faulty_proxy
from tests.nights import (
    champion_alias,
    files_with,
    first_run,
    latest_run,
    promote_a_copy,
    run_directly,
    runs_of,
    study_of,
)
from tests.servers import SECRET_KEY, PostgresServer, S3Server, wait_for

STEPS = ["reconcile", "prepare", "tune", "confirm", "gate", "promote", "report"]


@pytest.fixture(scope="module")
def night(stack: Stack) -> str:
    """One whole night of the job `quick` through its deployment; returns what the terminal showed."""
    return stack.nightly("run", "quick").stdout


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
    printed = json.loads(stack.nightly("champion", "quick", "--json").stdout)
    assert printed["version"] == champion.manifest.version
    assert printed["manifest"]["metrics"]["test"] == measured
    assert champion.manifest.version in stack.nightly("champion", "quick").stdout


def test_jobs_are_listed_with_their_nights_and_what_a_night_logged_is_shown(stack: Stack, night: str) -> None:
    rows = {row["job"]: row for row in json.loads(stack.nightly("ls", "--json").stdout)}
    champion = json.loads(stack.nightly("champion", "quick", "--json").stdout)["version"]
    assert (rows["quick"]["champion"], rows["quick"]["last night"]) == (champion, "Completed")
    assert rows["quick"]["next night"].endswith("01-01 02:00")
    assert rows["holding"]["began"] is None
    shown = stack.nightly("logs", "quick").stdout
    assert "rows of sklearn://digits: " in shown
    lines = [json.loads(line) for line in stack.nightly("logs", "quick", "--json").stdout.splitlines()]
    assert {"at", "level", "message"} == set(lines[0])
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    assert "no night of longer has begun" in stack.nightly("logs", "longer", ok=False).stderr


def test_a_night_leaves_a_page_and_its_plots_in_mlflow(stack: Stack, night: str, tmp_path: Path) -> None:
    client = MlflowClient(stack.mlflow_url)
    run_id = study_of(stack, "quick").user_attrs["mlflow_run_id"]
    names = {item.path for item in client.list_artifacts(run_id)}
    assert {"report.html", "plots", "data_card.md", "gate.json"} <= names
    pictures = {Path(item.path).stem for item in client.list_artifacts(run_id, "plots")}
    assert {"history", "curves", "intermediate", "confusion", "reliability"} <= pictures
    page = Path(client.download_artifacts(run_id, "report.html", str(tmp_path))).read_text()
    assert "<h2>What to do next</h2>" in page


def test_of_missed_nights_the_last_one_is_made_up_for(stack: Stack) -> None:
    """Prefect keeps every run that nobody took. Here its database is told that two of them were due."""

    def scheduled() -> list[dict[str, object]]:
        return [run for run in stack.flow_runs("missed") if run["auto_scheduled"]][-2:]

    wait_for(lambda: len(scheduled()) == 2, 180, "runs to be scheduled")
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
    wait_for(lambda: all(run["state_type"] == "COMPLETED" for run in scheduled()), 240, "the nights to end")
    assert [run["state_name"] for run in scheduled()] == ["Completed", "Skipped"]
    assert len(list((stack.home / "studies/missed").glob("*.journal"))) == 1


def test_the_doctor_finds_a_running_stack_well(stack: Stack) -> None:
    checks = json.loads(stack.nightly("doctor", "--json").stdout)
    assert {check["name"]: check["state"] for check in checks if check["state"] != "ok"}.keys() <= {"disk"}
    assert {"prefect", "mlflow", "worker", "deployments", "store", "clock"} <= {check["name"] for check in checks}


def test_a_second_night_holds_and_sets_a_moved_alias_right(stack: Stack, night: str) -> None:
    client = MlflowClient(stack.mlflow_url)
    before = champion_alias(stack, "quick")
    stray = client.create_model_version("quick", f"runs:/{before.run_id}/stray", before.run_id, await_creation_for=0)
    client.set_registered_model_alias("quick", "champion", stray.version)
    shown = stack.nightly("run", "quick").stdout
    assert "quick: champion stays (HOLD)" in shown
    assert champion_alias(stack, "quick").version == before.version
    assert [path.name for path in (stack.home / "store/models/quick/promotions").iterdir()] == ["000001.json"]


def test_a_night_with_nothing_new_reuses_the_snapshot_and_skips_itself_where_its_job_says_so(stack: Stack) -> None:
    stack.nightly("run", "unchanging")
    shown = stack.nightly("run", "unchanging").stdout
    assert "\nunchanging: skipped" in shown
    words = " ".join(shown.split())  # which are wrapped
    assert f"Nothing has changed since {study_of(stack, 'unchanging').study_name}: the same search" in words
    second = latest_run(stack, "unchanging")
    assert (second["state_name"], second["state_type"]) == ("Skipped", "COMPLETED")
    steps = stack.prefect("task_runs/filter", flow_runs={"id": {"any_": [second["id"]]}})
    assert {str(step["name"]).partition(":")[0]: step["state_name"] for step in steps} == {
        "reconcile": "Completed", "prepare": "Cached", "skip": "Completed",
    }  # fmt: skip
    more = stack.nightly("run", "unchanging", "--trials", "3").stdout
    assert "unchanging: champion stays" in more
    snapshots = {path.name for path in (stack.home / "store/snapshots").iterdir()}
    assert study_of(stack, "unchanging").user_attrs["snapshot"] in snapshots


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
    champion = json.loads(stack.nightly("champion", "towns", "--json").stdout)["version"]
    studies = sorted((stack.home / "studies/towns").iterdir())
    for spoilt, says in (
        (frame.drop(columns="town"), "town was categorical and is gone"),
        (frame.assign(town=frame["y"]), "town must not give the target away, found that it predicts 100.0%"),
    ):
        spoilt[["x", *spoilt.columns.difference(["x", "y"]), "y"]].to_csv(folder / "towns.csv", index=False)
        kind, message = run_directly(stack, "towns")
        assert kind == "FAILED"
        assert says in message
    assert json.loads(stack.nightly("champion", "towns", "--json").stdout)["version"] == champion
    assert sorted((stack.home / "studies/towns").iterdir()) == studies


def test_promotion_never_does_everything_but_that(stack: Stack) -> None:
    shown = stack.nightly("run", "shadow", "--promotion", "never", "--trials", "2").stdout
    assert "shadow: not promoted, because promotion.mode is never" in shown
    assert not (stack.home / "store/models/shadow").exists()


@pytest.mark.parametrize("server", ["ministack", "rgw"])
def test_a_night_promotes_to_s3(
    stack: Stack, server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ceph's gateway is away for a minute from the promotion's first write on, behind a proxy that says so."""
    s3: S3Server = request.getfixturevalue(server)
    bucket = f"night-{uuid.uuid4().hex[:8]}"
    s3.make_bucket(bucket)
    url = f"s3://{bucket}/models-of-ours"
    away_until: list[float] = []

    def away(asked: Request) -> Fault | None:
        if server == "rgw" and asked.method == "PUT" and "/versions/" in asked.path and not away_until:
            away_until.append(time.monotonic() + 60)
        return "500" if away_until and time.monotonic() < away_until[0] else None

    with faulty_proxy(s3.endpoint, away) as endpoint:
        environment = s3.environment | {"AWS_ENDPOINT_URL_S3": endpoint}
        kind, message = run_directly(stack, "quick-s3", NIGHTLY_STORE=url, **environment)
    assert kind == "COMPLETED", message
    assert bool(away_until) == (server == "rgw")
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
        "job": None, "preset": "nightly", "trials": 5, "minutes": 10.0, "sampler": "auto", "promotion": "automatic",
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
    assert "is paused" in stack.nightly("pause", "quick").stdout
    stack.nightly("apply")
    after = schedule()
    assert after == {**before, "active": False, "updated": after["updated"]}
    stack.nightly("resume", "quick")
    assert schedule()["active"] is True
    assert "no job is named 'nobody'" in stack.nightly("pause", "nobody", ok=False).stderr


def test_schedules_lay_runs_ahead_and_one_starts_by_itself(stack: Stack) -> None:
    def ahead() -> list[dict[str, object]]:
        return [run for run in stack.flow_runs("digits-mlp") if run["auto_scheduled"]]

    wait_for(ahead, 180, "runs to be scheduled")

    def done() -> list[dict[str, object]]:
        runs = stack.flow_runs("scheduled")
        return [run for run in runs if run["auto_scheduled"] and run["state_type"] == "COMPLETED"]

    wait_for(done, 300, "a night to start by itself")
    assert len(finished_trials(study_of(stack, "scheduled"))) == 2


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
    stack.nightly("run", job, "--no-follow")
    if answer is not None:
        wait_for(lambda: latest_run(stack, job)["state_type"] == "PAUSED", 240, "the night to pause")
        run = latest_run(stack, job)["id"]
        assert not (stack.home / "store/models" / job).exists()
        inputs = stack.prefect(f"flow_runs/{run}/input/filter", prefix="paused", limit=10)
        (described,) = (str(each["value"]) for each in inputs if str(each["key"]).endswith("-description"))
        assert f"Promote tonight's winner of {job}?" in described
        assert "| accuracy |" in described
        taken = stack.ask_prefect("POST", f"flow_runs/{run}/resume", {"run_input": answer}).json()
        assert taken["status"] == "ACCEPT", taken
    wait_for(lambda: latest_run(stack, job)["state_type"] == "COMPLETED", 240, "the night to go on")
    (report,) = stack.prefect("artifacts/filter", artifacts={"key": {"any_": [f"nightly-tuner-report-{job}"]}})
    assert state in str(report["data"]).splitlines()[0]
    assert reason[:1].upper() + reason[1:] in str(report["data"])
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
    rows = json.loads(stack.nightly("history", "quick", "--json").stdout)
    assert [(row["kind"], row["version"]) for row in rows] == [
        ("rollback", first.version), ("promotion", second), ("promotion", first.version),
    ]  # fmt: skip
    assert rows[0]["reason"] == "it disappoints"
    back = stack.nightly("rollback", "quick", "--to", second, "--reason", "after all", "--json")
    assert json.loads(back.stdout)["number"] == 4
    wait_for(lambda: champion_alias(stack, "quick").tags["store_version"] == second, 180, "the alias")
    assert "it disappoints" in " ".join(stack.nightly("history", "quick").stdout.split())
    again = json.loads(stack.nightly("reproduce", "quick", first.version, "--json").stdout)
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


def test_a_webhook_hears_of_promotions_and_failures(
    stack: Stack, receiver: tuple[str, list[dict[str, str]]], tmp_path: Path
) -> None:
    url, messages = receiver
    environment = {"NIGHTLY_WEBHOOK": url, "NIGHTLY_STORE": tmp_path.as_uri()}
    kind, message = run_directly(stack, "shadow", **environment)
    assert kind == "COMPLETED", message
    kind, _ = run_directly(stack, "no-such-job", **environment)
    assert kind == "FAILED"
    promoted, failed = messages
    assert (promoted["event"], promoted["job"]) == ("promoted", "shadow")
    assert (tmp_path / "models/shadow/versions" / promoted["version"]).is_dir()
    assert "/runs/flow-run/" in promoted["night"]
    assert (failed["event"], failed["job"]) == ("failed", "no-such-job")
    assert failed["reason"].startswith("no job is named 'no-such-job'")
    assert files_with(stack.home, "a-token-of-the-webhook") == []


def test_a_night_whose_database_starts_late_says_so_at_once_and_goes_on(
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
