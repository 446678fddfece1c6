"""Promotions when everything goes wrong: either the old champion or the new one, never anything between.

Against a directory, MiniStack and Ceph's gateway; what breaks in between is a proxy's doing (tests/faulty_proxy.py).
"""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.store.protocol import Store, StoreError, StoreUnavailable
from tasks.registry.log import StaleJudgement, append_promotion, history, latest_promotion
from tasks.registry.versions import DamagedVersion, verify_version
from tests.faulty_proxy import Fault, Request
from tests.integration.conftest import Through
from tests.promoting import NOW, WRITES, be_killed_at_each_write, champion_of, promote

PROMOTERS, ROUNDS = 20, 3


@pytest.mark.parametrize("store", ["directory", "rgw"], indirect=True)
def test_of_twenty_promoters_at_the_same_moment_one_wins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_of_writers_at_the_same_moment_exactly_one_wins, which says what three rounds see."""
    start, create = threading.Barrier(PROMOTERS), store.create

    def create_with_all_others(key: str, content: bytes) -> None:
        start.wait(60)
        create(key, content)

    def try_to(judged: int, promoter: int) -> bool:
        version, run = f"{promoter}", f"run {promoter}"
        try:
            append_promotion(store, "job", version=version, judged=judged, run=run, reason="", now=NOW)
        except StaleJudgement:
            return False
        return True

    monkeypatch.setattr(store, "create", create_with_all_others)
    with ThreadPoolExecutor(PROMOTERS) as threads:
        for judged in range(ROUNDS):
            assert sum(threads.map(try_to, [judged] * PROMOTERS, range(PROMOTERS))) == 1
    assert len(history(store, "job")) == ROUNDS


def test_a_reader_that_polls_all_the_time_always_finds_a_whole_champion(store: Store, tmp_path: Path) -> None:
    stop, seen, failures = threading.Event(), set(), []

    def poll() -> None:
        while not stop.is_set():
            try:
                seen.add(champion_of(store))
            except StoreError as error:
                failures.append(error)

    with ThreadPoolExecutor(1) as thread:
        poller = thread.submit(poll)
        for number in range(5):
            promote(store, tmp_path / "v", number, judged=number, run=f"run {number}")
        stop.set()
        poller.result()
    assert failures == []
    assert seen


def test_a_promoter_killed_at_any_write_leaves_the_old_champion_or_the_new(store: Store, tmp_path: Path) -> None:
    """In one process that forks, because this one has threads and to start one for each write takes its time."""
    process = multiprocessing.get_context("spawn").Process(target=be_killed_at_each_write, args=(store.url, tmp_path))
    process.start()
    process.join(300)
    assert process.exitcode == 0


class Outage:
    """A fault that is met at the n-th request that it can befall: once, or from there on until it is over."""

    def __init__(self, fault: Fault, lasts: bool) -> None:
        self._fault, self._lasts = fault, lasts
        self.begin(0)

    def begin(self, first: int) -> None:
        self._left, self._over = first, False
        self.met: str | None = None

    def end(self) -> None:
        self._over = True

    def __call__(self, request: Request) -> Fault | None:
        if self._fault == "cut" and request.method != "GET":  # whose answer has no body
            return None
        self._left -= 1
        if self._left >= 0 or self._over:
            return None
        self.met = self.met or request.method
        self._over = not self._lasts
        return self._fault


@pytest.mark.parametrize(
    ("server", "fault", "lasts"),
    [
        ("ministack", "500", False),
        ("ministack", "503 SlowDown", False),
        ("ministack", "cut", False),
        ("ministack", "no answer", True),
        ("rgw", "no answer", False),
        ("rgw", "500", True),
        ("rgw", "cut", True),
        ("rgw", "no answer", True),
    ],
    indirect=["server"],
)
def test_a_fault_at_any_request_of_a_promotion_leaves_one_entry(
    through: Through, tmp_path: Path, fault: Fault, lasts: bool
) -> None:
    """The first promotion meets the fault at its first request, the second at its second, until one has not so many.
    One that gives up is tried again without the fault, as the promote task tries.

    A fault that is met once is got over without that: a read is repeated, an unclear answer to a write is settled by
    reading back. Only a write that was refused, of which nothing is there, must be given up.
    """
    outage = Outage(fault, lasts)
    store = through(outage)
    versions: list[str] = []
    while not versions or outage.met:
        number = len(versions)
        outage.begin(number)
        has_given_up = False
        try:
            version = promote(store, tmp_path / "v", number, judged=number, run=f"run {number}")
        except StoreUnavailable:
            has_given_up = True
            outage.end()
            version = promote(store, tmp_path / "v", number, judged=number, run=f"run {number}")
        versions.append(version)
        was_refused = fault[0].isdigit() and outage.met == "PUT"
        assert has_given_up == (outage.met is not None and (lasts or was_refused))
    outage.end()
    assert len(versions) > WRITES
    assert [entry.version for entry in reversed(history(store, "job"))] == versions
    for version in versions:
        verify_version(store, "job", version)


@pytest.mark.parametrize("server", ["ministack"], indirect=True)
@pytest.mark.parametrize("fault", ["500", "503 SlowDown", "no answer", "cut"])
def test_a_fault_at_any_request_of_a_reader_is_got_over(through: Through, tmp_path: Path, fault: Fault) -> None:
    outage = Outage(fault, lasts=False)
    outage.end()
    store = through(outage)
    version = promote(store, tmp_path / "v", 0, judged=0, run="run")
    requests = 0
    while not requests or outage.met:
        outage.begin(requests)
        assert champion_of(store) == version
        requests += 1
    assert requests > WRITES


@pytest.mark.parametrize(("fault", "error"), [("cut", StoreUnavailable), ("altered", DamagedVersion)])
def test_what_never_comes_back_whole_is_never_a_champion(
    through: Through, tmp_path: Path, fault: Fault, error: type[Exception]
) -> None:
    broken = threading.Event()

    def always(request: Request) -> Fault | None:
        served = request.method == "GET" and "model.safetensors" in request.path and broken.is_set()
        return fault if served else None

    store = through(always)
    version = promote(store, tmp_path / "v", 0, judged=0, run="run")
    broken.set()
    with pytest.raises(error):
        champion_of(store)
    broken.clear()
    assert champion_of(store) == version


def test_an_upload_that_the_server_altered_is_found_out(through: Through, tmp_path: Path) -> None:
    store = through(lambda request: "altered" if request.method == "GET" and "README" in request.path else None)
    with pytest.raises(DamagedVersion, match="exists with other content"):
        promote(store, tmp_path / "v", 0, judged=0, run="run")
    assert latest_promotion(store, "job") is None


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("403 AccessDenied", "allow these credentials to list, get and put in the bucket"),
        ("400 ExpiredToken", "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_log_that_may_not_be_written_keeps_the_old_champion(
    through: Through, tmp_path: Path, fault: Fault, says: str
) -> None:
    denied = threading.Event()

    def deny(request: Request) -> Fault | None:
        return fault if denied.is_set() and request.method == "PUT" and "/promotions/" in request.path else None

    store = through(deny)
    old = promote(store, tmp_path / "old", 0, judged=0, run="old")
    denied.set()
    with pytest.raises(StoreError, match=says):
        promote(store, tmp_path / "new", 1, judged=1, run="new")
    assert champion_of(store) == old
    denied.clear()  # new credentials, new rights: the version is there already, the entry follows
    assert promote(store, tmp_path / "new", 1, judged=1, run="new") == champion_of(store) != old
