"""What the README shows works as it is printed."""

import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer
import yaml

from flows.cli.main import app
from tasks.data.prepare import prepare
from tasks.data.prepared import Prepared
from tasks.job import parse_job
from tasks.search.tune import tune
from tasks.study.studies import open_study
from tasks.trainer.local import LocalTrainer
from tests.commands import nightly
from tests.conftest import CPU, Stack, make_stack, require

README = (Path(__file__).parents[2] / "README.md").read_text()


def block(language: str, beginning: str) -> str:
    """The README's listing in that language whose first line begins so."""
    (found,) = (
        text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if text.startswith(beginning)
    )
    return str(found)


def test_the_job_of_ones_own_runs_and_its_champion_loads(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Path(stack.environment["NIGHTLY_JOBS"])
    (jobs / "spirals.yaml").write_text(block("yaml", "name: spirals"))
    (jobs / "spirals.py").write_text(block("python", "import numpy"))
    stack.nightly("apply")
    shown = stack.nightly("run", "spirals").stdout
    assert "\nspirals: version" in shown
    monkeypatch.setenv("NIGHTLY_HOME", str(stack.home))
    names: dict[str, object] = {}
    exec(block("python", "from tasks.registry.champion").replace("digits-mlp", "spirals"), names)  # noqa: S102 our own listing
    champion = names["champion"]
    assert champion.manifest.metrics["test"]["accuracy"] > 0.95  # type: ignore[attr-defined]
    assert champion.predict(torch.tensor([[0.5, 0.0]]))[0] in ("0", "1")  # type: ignore[attr-defined]


def test_a_model_of_ones_own_is_tuned(tmp_path: Path) -> None:
    (tmp_path / "spirals.py").write_text(block("python", "import numpy"))
    listing = block("python", "import torch\n")
    assert listing.count("\n") < 30
    (tmp_path / "net.py").write_text(listing)
    content = yaml.safe_load(block("yaml", "name: spirals")) | {"model": "net.py:Net", "budget": {"trials": 6}}
    job = parse_job(content, tmp_path / "spirals.yaml")
    snapshot = prepare(job.data, job.objective.problem, tmp_path)
    study = open_study(job, snapshot.fingerprint, tmp_path, datetime.now(UTC))
    prepared = Prepared.load(snapshot, CPU)
    tuned = tune(study, job, LocalTrainer(job, prepared), tmp_path)
    assert tuned.failed == 0
    assert {"frequencies", "units", "learning_rate"} <= tuned.best.params.keys()


def test_the_first_command_runs_a_whole_night(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = Path(sys.prefix)
    if environment.parent != root or not environment.name.startswith(".venv"):
        require("these tests don't run in an environment that `make run` uses")
    stack = make_stack(tmp_path)
    try:
        shown = subprocess.run(
            [shutil.which("make") or "make", "run", f"VENV={environment.name}"],
            cwd=root,
            env=stack.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert shown.returncode == 0, shown.stdout + shown.stderr
        assert "\ndigits-mlp: version" in shown.stdout
    finally:
        stack.nightly("down")


def test_every_command_that_the_readme_names_is_there_with_its_options() -> None:
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    named = re.findall(r"`(?:\.venv/bin/)?nightly ([a-z]+)([^`]*)`", README)
    assert {name for name, _ in named} >= commands.keys() - {"point_champion"}  # for ourselves
    for name, rest in named:
        command = commands[name]
        if hasattr(command, "commands"):
            command = command.commands[rest.split()[0]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, name
    targets = re.findall(r"^([a-z]+):", (Path(__file__).parents[2] / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^    )make ([a-z]+)", README, re.MULTILINE)) <= set(targets)


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(r"`((?:flows|tasks|models|infra)/[a-z_./]*)`", README)
    assert len(named) > 20
    root = Path(__file__).parents[2]
    assert [name for name in named if not (root / name).exists()] == []


def test_every_room_is_named_in_the_readme() -> None:
    root = Path(__file__).parents[2]
    parts = [path for folder in ("flows", "tasks", "models", "infra") for path in (root / folder).iterdir()]
    rooms = [path for path in parts if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert len(rooms) > 30
    assert [path.name for path in rooms if path.name != "__init__.py" and path.name not in README] == []


def test_the_job_on_a_table_is_checked_as_it_is_printed(tmp_path: Path) -> None:
    stack = make_stack(tmp_path)
    jobs = Path(stack.environment["NIGHTLY_JOBS"])
    (jobs / "customers.yaml").write_text(block("yaml", "name: customers"))
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "customer": np.arange(200) // 2,
            "zip_code": draw.choice([10115, 50667], 200),
            "remarks": [f"called {number} times" for number in range(200)],
            "spent": draw.normal(50, 20, 200),
            "churned": draw.choice(["Yes", "yes.", "no"], 200),
        }
    )
    frame.loc[3, "spent"] = np.nan
    frame.to_csv(jobs / "customers-1.csv", index=False)
    card = nightly(stack, "check", "customers").stdout
    rows = [" ".join(line.split()) for line in card.splitlines()]
    for beginning in (
        "zip_code categorical 0 10115, 50667",
        "remarks ignored 0",
        "spent numeric 1",
        "predicted one of 2 classes",
        "customer split by 0",
        "churned target 0 Yes, no",
    ):
        assert any(row.startswith(beginning) for row in rows), card
    assert json.loads(nightly(stack, "check", "customers", "--json").stdout)["row_counts"]["train"] > 80
    frame.rename(columns={"churned": "left"}).to_csv(jobs / "customers-1.csv", index=False)
    refused = nightly(stack, "check", "customers", ok=False)
    assert refused.returncode == 1
    assert "data.target must name a column" in refused.stderr
    assert "Traceback" not in refused.stderr
