"""The job: what is enough, what is refused, and how it is said."""

import math
from pathlib import Path
from typing import Any

import pytest

from models.rows.shapes import DataShape
from tasks.job import JobError, PresetName, check_shape, job_files, load_job, load_jobs, parse_job
from tests.conftest import make_job
from tests.unit.models.test_families import NET, write_net


def test_a_name_and_a_data_source_are_enough() -> None:
    job = parse_job({"name": "x", "data": {"source": "sklearn://iris"}}, Path("x.yaml"))
    assert (job.model, job.search.sampler, job.budget.trials) == ("mlp", "auto", 60)


def test_the_jobs_that_come_with_us_are_valid() -> None:
    assert {"digits-mlp", "digits-cnn"} <= {job.name for job in load_jobs(None)[0]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            {"search": {"space": {"learning_rate": {"low": 0.1, "high": 0.001}}}},
            "search.space.learning_rate: low must be below high, found low 0.1 and high 0.001; swap them",
        ),
        (
            {"search": {"space": {"learning_rate": {"low": 0, "high": 0.1, "log": True}}}},
            "a log range must begin above 0, found low 0",
        ),
        (
            {"search": {"space": {"momentun": 0.9}}},
            "momentun is not a hyperparameter of mlp, found 0.9; write momentum (known are",
        ),
        ({"search": {"space": {"optimizer": ["adam", "sdg"]}}}, "search.space.optimizer must be one of sgd, momentum"),
        (
            {"search": {"space": {"dropout": {"low": 0.5, "high": 1.0}}}},
            "dropout must be a number of at least 0 and below 1, found 1",
        ),
        (
            {"search": {"space": {"depth": {"low": 1, "high": 2.5}}}},
            "depth must be a whole number from 1 to 10, found 2.5",
        ),
        ({"search": {"space": {"width": []}}}, "width: choices must not be empty"),
        (
            {"search": {"sampler": "magic"}},
            "search.sampler must be one of auto, tpe, gp, cmaes, random, qmc or grid, found 'magic'",
        ),
        ({"budget": {"trials": 0}}, "budget.trials must be a whole number from 1 to 100000, found 0; raise it"),
        (
            {"budget": {"minutes": float("nan")}},
            "budget.minutes must be a number above 0 and at most 10080, found .nan",
        ),
        (
            {"model": "transformer"},
            "must be a known model or path/to/net.py:Net, found 'transformer'; known are mlp, cnn",
        ),
        (
            {"data": {"source": "a.csv", "raw": ["a", "b", "a"]}},
            "data.raw must name each column once, found ['a', 'b', 'a']; leave out",
        ),
        (
            {"data": {"source": "a.csv", "raw": ["shop", "day"], "split_by": "shop"}},
            "data.raw must name features, found 'shop'; leave it out",
        ),
        (
            {"data": {"source": "a.npz", "raw": ["shop"]}},
            "must be true or false where the source is a NumPy file, which has no columns, found ['shop']; set true",
        ),
        ({"data": {"source": "a.csv", "raw": 5}}, "data.raw must be true or false or a list, each text, found 5"),
        (
            {"model": "nowhere.py:Net"},
            "model: nowhere.py is not a Python file that can be read, found 'nowhere.py:Net'; correct the path",
        ),
        (
            {"search": {"sampler": "grid", "space": {"dropout": {"low": 0, "high": 0.5}}}},
            "search.space.dropout: a grid takes points of a range, found none; add for example `points: 5`",
        ),
        (
            {"search": {"space": {"optimizer": "adam", "momentum": [0.8, 0.9]}}},
            "search.space.momentum matters only where optimizer is momentum or nesterov",
        ),
        (
            {"search": {"cost": "parameters", "pruner": "median"}},
            "search.pruner must be none where cost is parameters, because Optuna prunes by a single objective, found",
        ),
        ({"search": {"cost": "latency", "pruner": "none", "sampler": "cmaes"}}, "cmaes knows a single objective"),
        ({"search": {"objective": "acuracy"}}, "search.objective must be one of accuracy, balanced_accuracy"),
        ({"search": {"max_parameters": 0}}, "search.max_parameters must be a whole number of at least 1"),
        ({"data": {}}, "data.source is missing; add it"),
        ({"budgets": {}}, "budgets is not a field of a job"),
        ({"seed": -1}, "seed must be a whole number of at least 0 and below 4294967296, found -1"),
        ({"schedule": {"cron": "0 2 * * *; touch x"}}, "schedule.cron must be five cron fields"),
        ({"schedule": {"cron": "99 2 * * *"}}, "schedule.cron must be five cron fields"),
        ({"schedule": {"cron": "@daily"}}, "schedule.cron must be five cron fields"),
        ({"schedule": {"timezone": "Mars/Olympus"}}, "schedule.timezone must be an IANA time zone"),
    ],
)
def test_a_bad_field_is_named_with_its_rule_and_value(content: dict[str, object], says: str) -> None:
    with pytest.raises(JobError) as error:
        make_job(**content)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "Big", "../escape", "a b", "-x", "a" * 65, "naïve", "x\n"])
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(JobError):
        parse_job({"name": name, "data": {"source": "sklearn://iris"}}, Path(f"{name or 'x'}.yaml"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [", "must be YAML"),
        ("- a\n- b\n", "must be a mapping"),
        (
            "name: !!python/object/apply:os.system ['true']\n",
            "must be YAML without anchors, aliases, tags and further documents, found the tag !!python",
        ),
        ("a: &a [1]\nb: *a\n", "found the alias *a in line 2; write out what it stands for"),
        ("name: other\ndata: {source: 'sklearn://iris'}\n", "name must equal the file's name 'bad', found 'other'"),
        ("#" * 70_000, "may have 65536 bytes at most"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(JobError) as error:
        load_job("bad", tmp_path)
    assert says in str(error.value)
    assert all(line.startswith(f"{tmp_path}/bad.yaml: ") for line in str(error.value).splitlines())


def test_an_unknown_job_lists_the_known_ones() -> None:
    with pytest.raises(JobError, match=r"no job is named 'digit'; write digits-mlp; known are .*digits-mlp"):
        load_job("digit", None)


def test_a_jobs_folder_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="NIGHTLY_JOBS must be a folder"):
        job_files(tmp_path / "none")


def test_overrides_are_merged_before_the_job_is_validated() -> None:
    job = load_job("digits-mlp", None, trials=7, minutes=1.5, sampler="random", promotion="never")
    assert (job.budget.trials, job.budget.minutes) == (7, 1.5)
    assert (job.search.sampler, job.promotion.mode) == ("random", "never")
    with pytest.raises(
        JobError,
        match=r"budget\.trials must be a whole number from 1 to 100000, found 0; .* overridden with budget\.trials 0",
    ):
        load_job("digits-mlp", None, trials=0)


@pytest.mark.parametrize(
    ("preset", "given", "budget", "confirm", "mode"),
    [
        ("nightly", {}, (30, 30), (3, 5), "automatic"),
        ("smoke", {}, (8, 5), (1, 2), "never"),
        ("deep", {}, (120, 120), (3, 5), "automatic"),
        # As Prefect's form sends it, with every field as it stood there, and one that was changed.
        ("deep", {"trials": 30, "minutes": 7, "promotion": "automatic"}, (120, 7), (3, 5), "automatic"),
        ("smoke", {"trials": 50, "promotion": "ask"}, (50, 5), (1, 2), "ask"),
    ],
)
def test_a_preset_decides_what_is_left_as_the_file_says(
    preset: PresetName,
    given: dict[str, Any],
    budget: tuple[int, float],
    confirm: tuple[int, int],
    mode: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "small.yaml").write_text(
        "name: small\ndata: {source: 'sklearn://digits'}\nbudget: {trials: 30, minutes: 30}\n"
    )
    job = load_job("small", tmp_path, preset=preset, **given)
    assert (job.budget.trials, job.budget.minutes) == budget
    assert (job.confirm.candidates, job.confirm.seeds) == confirm
    assert job.promotion.mode == mode


def test_money_is_spent_by_the_hour() -> None:
    assert make_job(budget={"price_per_hour": 2, "max_cost": 3}).budget.most_device_seconds == 5400
    assert make_job().budget.most_device_seconds == math.inf
    with pytest.raises(JobError, match=r"budget\.max_cost needs a price_per_hour beside it, found 3; add the price"):
        make_job(budget={"max_cost": 3})


def test_a_relative_source_is_relative_to_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ndata: {source: 'load.py:rows'}\n")
    assert load_job("mine", tmp_path).data.source == f"{tmp_path}/load.py:rows"


def test_a_model_of_ones_own_is_relative_to_the_job_file_and_its_code_is_part_of_the_search(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ndata: {source: 'sklearn://digits'}\nmodel: net.py:Net\n")
    write_net(tmp_path)
    job = load_job("mine", tmp_path)
    assert job.model == f"{tmp_path}/net.py:Net"
    assert {"slope", "learning_rate"} <= {*job.family.own_names, *job.space}
    write_net(tmp_path, NET.replace('"slope"', '"bend"'))
    assert "slope" in job.family.own_names, "a night keeps to the code it began with"
    assert load_job("mine", tmp_path).search_digest != job.search_digest


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "sci.yaml").write_text(
        "name: sci\n"
        "data: {source: 'sklearn://iris'}\n"
        "search: {space: {learning_rate: {low: 1e-4, high: 1e-2}, weight_decay: 1e-5}}\n"
    )
    assert load_job("sci", tmp_path).space["weight_decay"] == 1e-5


def test_the_search_digest_ignores_the_budget_and_nothing_that_changes_a_trial() -> None:
    base = make_job()
    assert make_job(budget={"trials": 9}).search_digest == base.search_digest
    for change in (
        {"seed": 1},
        {"search": {"sampler": "random"}},
        {"search": {"space": {"epochs": 4}}},
        {"data": {"source": "sklearn://digits", "test_fraction": 0.3}},
    ):
        assert make_job(**change).search_digest != base.search_digest


def test_mlflows_names_are_the_jobs_unless_it_says_otherwise() -> None:
    assert (make_job().experiment, make_job().registered_model) == ("small", "small")
    job = make_job(tracking={"experiment": "Vision nights", "model": "digits.v2"})
    assert (job.experiment, job.registered_model) == ("Vision nights", "digits.v2")


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "it's", 'a"b', "a`b", "a%b", "a\nb", "a ", "a" * 201])
@pytest.mark.parametrize("field", ["experiment", "model"])
def test_a_name_that_mlflow_or_its_queries_do_not_take_is_refused(field: str, name: str) -> None:
    with pytest.raises(JobError, match=f"tracking.{field} must be of letters, digits, dots"):
        make_job(tracking={field: name})


def test_a_bad_file_is_an_error_of_its_own_job_only(tmp_path: Path) -> None:
    """Whatever is wrong with it: that it is a folder, that it may not be read, that it runs code which leaves."""
    (tmp_path / "good.yaml").write_text("name: good\ndata: {source: 'sklearn://iris'}\n")
    (tmp_path / "short.yml").write_text("name: short\ndata: {source: 'sklearn://iris'}\n")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "gone.yaml").symlink_to(tmp_path / "nowhere.yaml")
    (tmp_path / "two.yaml").write_text("name: two\ndata: {source: 'sklearn://iris'}\n")
    (tmp_path / "two.yml").write_text("name: two\ndata: {source: 'sklearn://iris'}\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "leaves.yaml").write_text("name: leaves\ndata: {source: 'sklearn://iris'}\nmodel: leaves.py:Net\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    for hidden in (".good.yaml.swp", "._good.yaml", ".#good.yaml"):
        (tmp_path / hidden).write_text("\0")
    jobs, errors = load_jobs(tmp_path)
    assert {job.name for job in jobs} == {"digits-cnn", "digits-mlp", "good", "short"}
    said = sorted(str(error).removeprefix(f"{tmp_path}/") for error in errors)
    assert [sentence.partition(": ")[0] for sentence in said] == [
        "folder.yaml", "gone.yaml", "leaves.yaml", "list.yaml", "two.yaml",
    ]  # fmt: skip
    assert "must be a file, found something else; put a file there" in said[0]
    assert "must be a file, found none; put a file there" in said[1]
    assert "leaves.py raised SystemExit when it was loaded: 3, found" in said[2]
    assert "a job must have one file, found two.yml too; rename or remove one of them" in said[4]
    assert load_job("good", tmp_path).name == "good"


def test_a_tilde_is_the_home_of_whoever_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_net(tmp_path)
    data = {"source": "~/images-idx3-ubyte.gz", "labels": "~/labels-idx1-ubyte.gz"}
    job = make_job(data=data, model="~/net.py:Net", search={})
    assert (job.data.source, job.data.labels) == (
        f"{tmp_path}/images-idx3-ubyte.gz",
        f"{tmp_path}/labels-idx1-ubyte.gz",
    )
    assert job.model == f"{tmp_path}/net.py:Net"
    database = make_job(data={"source": "sqlite:///~/rows.db", "query": "SELECT 1"}).data.source
    assert database == f"sqlite:///{tmp_path}/rows.db"
    assert make_job(data={"source": "~no-such-user/rows.csv"}).data.source == "~no-such-user/rows.csv"


def test_an_override_is_refused_as_a_file_would_be_and_leaves_nothing_without_effect(tmp_path: Path) -> None:
    (tmp_path / "asks.yaml").write_text(
        "name: asks\ndata: {source: 'sklearn://iris'}\nsearch: {pruner: median}\n"
        "promotion: {mode: ask, ask_minutes: 30}\n"
    )
    assert load_job("asks", tmp_path, promotion="never").promotion.ask_minutes == 30
    assert load_job("asks", tmp_path, preset="smoke").promotion.mode == "never"
    with pytest.raises(JobError) as error:
        load_job("asks", tmp_path, sampler="gp", trials=True, minutes=float("inf"))
    after = " (the file was overridden with budget.trials True, budget.minutes inf, search.sampler gp)"
    sentences = str(error.value).splitlines()
    assert all(sentence.startswith(f"{tmp_path}/asks.yaml: ") and sentence.endswith(after) for sentence in sentences)
    assert [sentence.split(": ")[1].split()[0] for sentence in sentences] == [
        "budget.trials", "budget.minutes", "search.pruner",
    ]  # fmt: skip


def test_a_gaussian_process_prunes_nothing_unless_the_file_says_so() -> None:
    assert make_job(search={"sampler": "gp"}).search.pruner == "none"
    assert make_job(search={"cost": "parameters"}).search.pruner == "none"
    assert make_job().search.pruner == "median"


@pytest.mark.parametrize(
    ("search", "shape", "says"),
    [
        ({"max_parameters": 100}, (64,), "search.max_parameters must be at least 1210, the size of the smallest model"),
        ({"max_parameters": 1210}, (64,), None),
        ({}, (1, 8, 8), None),
    ],
)
def test_a_limit_that_no_model_of_the_space_keeps_is_refused_once_the_rows_are_known(
    search: dict[str, Any], shape: tuple[int, ...], says: str | None
) -> None:
    """The smallest reads 64 features by 16 units, and tells ten classes apart: 64 * 16 + 16 + 16 * 10 + 10."""
    job = make_job(search={"space": {"width": {"low": 16, "high": 64}}, **search})
    rows = DataShape(features=shape, outputs=10, problem="classification")
    if says is None:
        check_shape(job, rows)
        return
    with pytest.raises(JobError, match=says):
        check_shape(job, rows)


def test_rows_that_are_no_images_are_refused_for_a_cnn() -> None:
    with pytest.raises(JobError, match=r"model must be another than cnn where the rows have the shape \(4,\)"):
        check_shape(
            make_job(model="cnn", search={}, data={"source": "load.py:rows"}),
            DataShape(features=(4,), outputs=3, problem="classification"),
        )
