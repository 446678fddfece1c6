"""Promotions when everything goes wrong: either the old champion or the new one, never anything between.

Against a directory, MiniStack and Ceph's gateway; what breaks in between is a proxy's doing (tests/faulty_proxy.py).
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import botocore.auth
import pytest

import infra.s3
from infra.store import AlreadyExists, NotFound, Store, StoreError, StoreUnavailable, open_store
from tasks.promotions import StaleJudgement, append_promotion, history, latest_promotion
from tasks.versions import DamagedVersion, publish_version, verify_version
from tests.faulty_proxy import Fault, Request, faulty_proxy
from tests.promoting import NOW, promote, write_version
from tests.servers import S3Server, free_port

WRITES = 4  # two files, the manifest, the entry


@pytest.fixture(params=["ministack", "rgw"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def bucket(server: S3Server) -> str:
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    server.make_bucket(name)
    return name


@pytest.fixture
def through(server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Store]]:
    """Opens the store behind a proxy whose faults a function chooses."""
    open_proxies = []

    def open_through(choose: Callable[[Request], Fault | None]) -> Store:
        proxy = faulty_proxy(server.endpoint, choose)
        open_proxies.append(proxy)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.__enter__())
        return open_store(f"s3://{bucket}")

    yield open_through
    for proxy in open_proxies:
        proxy.__exit__(None, None, None)


def champion_of(store: Store) -> str | None:
    """The champion, every file of it verified."""
    latest = latest_promotion(store, "job")
    return None if latest is None else verify_version(store, "job", latest.version).version


def retried(act: Callable[[], str], attempts: int = 8) -> str:
    """What the night's promote task does where the store was away."""
    for _ in range(attempts - 1):
        try:
            return act()
        except StoreUnavailable:
            continue
    return act()


def test_twenty_promoters_race_a_hundred_times_and_one_wins_each(store: Store) -> None:
    def try_to(promotion: tuple[int, int]) -> bool:
        judged, promoter = promotion
        try:
            append_promotion(
                store, "job", version=f"{promoter}", judged=judged, run=f"run {promoter}", reason="", now=NOW
            )
        except StaleJudgement:
            return False
        return True

    with ThreadPoolExecutor(20) as threads:
        for judged in range(100):
            assert sum(threads.map(try_to, [(judged, promoter) for promoter in range(20)])) == 1
    assert len(history(store, "job")) == 100


def test_a_reader_that_polls_all_the_time_always_finds_a_whole_champion(store: Store, tmp_path: Path) -> None:
    stop, seen, failures = threading.Event(), set(), []

    def poll() -> None:
        while not stop.is_set():
            try:
                seen.add(champion_of(store))
            except StoreError as error:
                failures.append(error)

    with ThreadPoolExecutor(2) as threads:
        pollers = [threads.submit(poll) for _ in range(2)]
        for number in range(15):
            promote(store, tmp_path / "v", number, judged=number, run=f"run {number}")
        stop.set()
        for poller in pollers:
            poller.result()
    assert failures == []
    assert len(seen) > 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_promoter_killed_at_any_write_leaves_the_old_champion_or_the_new(
    store: Store, tmp_path: Path, when: str
) -> None:
    """A process that kills itself with SIGKILL at its n-th write, then one that goes on to the end."""
    old = promote(store, tmp_path / "old", 0, judged=0, run="old")
    for write in range(WRITES):
        judged = write + 1
        script = f"""
import os, signal
from pathlib import Path
import infra.directory, infra.s3
from infra.store import open_store
from tests.promoting import promote
count = 0
def killing(method):
    def call(*arguments, **keywords):
        global count
        here, count = count, count + 1
        if here == int(os.environ["KILL_AT"]) and {when!r} == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        method(*arguments, **keywords)
        if here == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
    return call
store = open_store({store.url!r})
# S3's upload of a small file is a create: count it once.
upload, create = type(store).upload, type(store).create
original = create
def uploading(self, *arguments):
    type(self).create = original
    try:
        upload(self, *arguments)
    finally:
        type(self).create = killing(original)
type(store).upload = killing(uploading)
type(store).create = killing(original)
promote(store, Path({str(tmp_path / f"new-{write}")!r}), {write + 1}, judged={judged}, run="new {write}")
"""
        environment = {**os.environ, "KILL_AT": str(write)}
        killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
        new = write_version(tmp_path / f"new-{write}", write + 1).version
        assert champion_of(store) == (new if write == WRITES - 1 and when == "after" else old)
        assert promote(store, tmp_path / f"new-{write}", write + 1, judged=judged, run=f"new {write}") == new
        assert champion_of(store) == new
        assert len(history(store, "job")) == judged + 1
        old = new


@pytest.mark.parametrize("fault", ["no answer", "500", "503 SlowDown"])
def test_an_unclear_answer_to_a_write_is_settled_by_reading_back(
    through: Callable[..., Store], tmp_path: Path, fault: Fault
) -> None:
    """Each write meets the fault once; the second time it goes through."""
    met: set[str] = set()

    def once(request: Request) -> Fault | None:
        if request.method != "PUT" or request.path in met:
            return None
        met.add(request.path)
        return fault

    store = through(once)
    for number in range(3):
        version = retried(lambda number=number: promote(store, tmp_path / "v", number, number, f"run {number}"))  # type: ignore[misc]
        assert champion_of(store) == version
    assert len(met) == 3 * WRITES
    assert [entry.run for entry in history(store, "job")] == ["run 2", "run 1", "run 0"]


def test_a_broken_connection_in_mid_body_is_asked_again(through: Callable[..., Store], tmp_path: Path) -> None:
    cut: set[str] = set()

    def once(request: Request) -> Fault | None:
        if request.method != "GET" or "list-type" in request.path or request.path in cut:
            return None
        cut.add(request.path)
        return "cut"

    store = through(once)
    version = promote(store, tmp_path / "v", 0, judged=0, run="run")
    assert champion_of(store) == version
    assert cut


@pytest.mark.parametrize(("fault", "error"), [("cut", StoreUnavailable), ("altered", DamagedVersion)])
def test_what_never_comes_back_whole_is_never_a_champion(
    through: Callable[..., Store], tmp_path: Path, fault: Fault, error: type[Exception]
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


def test_an_upload_that_the_server_altered_is_found_out(through: Callable[..., Store], tmp_path: Path) -> None:
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
    through: Callable[..., Store], tmp_path: Path, fault: Fault, says: str
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


@pytest.mark.parametrize("server", ["rgw"], indirect=True)
def test_a_hundred_nights_over_a_bad_network_are_consistent(through: Callable[..., Store], tmp_path: Path) -> None:
    """One call in twenty fails, in one way or another; nights are retried as the promote task retries them."""
    dice = random.Random(0)
    kinds: list[Fault] = ["500", "503 SlowDown", "no answer", "cut"]

    def sometimes(request: Request) -> Fault | None:
        return dice.choice(kinds) if dice.random() < 0.05 else None

    store = through(sometimes)
    for number in range(100):
        version = retried(lambda number=number: promote(store, tmp_path / "v", number, number, f"run {number}"))  # type: ignore[misc]
        assert retried(lambda: champion_of(store) or "") == version
    assert [entry.number for entry in history(store, "job")] == list(range(100, 0, -1))


def test_a_wrong_clock_is_one_sentence(rgw: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in rgw.environment.items():
        monkeypatch.setenv(name, value)
    rgw.make_bucket("clock")
    # The only part of the clock that a request shows.
    ahead = lambda: datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=2)  # noqa: E731
    monkeypatch.setattr(botocore.auth, "get_current_datetime", ahead)
    with pytest.raises(StoreError, match=r"RequestTimeTooSkewed.*set this machine's clock right"):
        promote(open_store("s3://clock"), tmp_path / "v", 0, judged=0, run="run")


def test_a_trainer_may_not_write_the_log(rgw: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bucket policy of infra/README.md: a trainer puts versions, a promoter the log too, a reader nothing."""
    for name, value in rgw.environment.items():
        monkeypatch.setenv(name, value)
    rgw.make_bucket("shared")
    policy = json.loads((Path(__file__).parents[2] / "infra/bucket-policy.json").read_text())
    users = {name: rgw.make_user(name) for name in ("trainer", "reader")}
    text = json.dumps(policy).replace("BUCKET/PREFIX", "shared/prefix").replace("BUCKET", "shared")
    for name in users:
        text = text.replace(f"arn:aws:iam::ACCOUNT:user/{name}", f"arn:aws:iam:::user/{name}")
    content = json.loads(text)
    # Ceph does not know the condition key of conditional writes, and the promoter owns the bucket here.
    content["Statement"] = [part for part in content["Statement"] if "promoter" not in part["Sid"].lower()]
    boto3.Session().client("s3").put_bucket_policy(Bucket="shared", Policy=json.dumps(content))
    version = promote(open_store("s3://shared/prefix"), tmp_path / "v", 0, judged=0, run="run")
    for user, environment in users.items():
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://shared/prefix")
        assert champion_of(store) == version
        with pytest.raises(StoreError, match="AccessDenied"):
            append_promotion(store, "job", version=version, judged=1, run=user, reason="", now=NOW)
        manifest = write_version(tmp_path / user, 7)
        if user == "trainer":
            publish_version(store, manifest, tmp_path / user)
        else:
            with pytest.raises(StoreError, match="AccessDenied"):
                publish_version(store, manifest, tmp_path / user)
    assert verify_version(open_store("s3://shared/prefix"), "job", version).version == version


def test_a_key_that_is_rotated_in_a_promotion_is_one_sentence_and_the_next_try_goes_on(
    rgw: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def use(environment: dict[str, str]) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    use(rgw.make_user("rotating"))
    boto3.Session().client("s3").create_bucket(Bucket="rotating")
    store = open_store("s3://rotating")
    old = promote(store, tmp_path / "old", 0, judged=0, run="old")
    manifest = write_version(tmp_path / "new", 1)
    version = publish_version(store, manifest, tmp_path / "new")
    fresh = rgw.rotate_key("rotating")
    with pytest.raises(StoreError, match=r"refused: .*check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        append_promotion(store, "job", version=version, judged=1, run="new", reason="", now=NOW)
    use(fresh)
    assert champion_of(open_store("s3://rotating")) == old
    assert promote(open_store("s3://rotating"), tmp_path / "new", 1, judged=1, run="new") == version
    assert champion_of(open_store("s3://rotating")) == version


def test_a_gateway_killed_in_a_promotion_leaves_one_entry(
    rgw: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A second gateway before the same cluster dies with SIGKILL at the n-th write, and comes back."""
    for name, value in rgw.environment.items():
        monkeypatch.setenv(name, value)
    rgw.make_bucket("dying")
    old = promote(open_store("s3://dying"), tmp_path / "old", 0, judged=0, run="old")
    port = free_port()
    for write in range(WRITES):
        gateway = [rgw.start_gateway(port)]
        kill_at = killer(gateway, write)
        judged = write + 1
        with faulty_proxy(f"http://127.0.0.1:{port}", kill_at) as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
            store = open_store("s3://dying")
            with pytest.raises(StoreUnavailable):
                promote(store, tmp_path / "new", judged, judged=judged, run=f"new {write}")
            assert champion_of(open_other(rgw, monkeypatch)) == old
            gateway[0] = rgw.start_gateway(port)
            try:
                new = promote(store, tmp_path / "new", judged, judged=judged, run=f"new {write}")
                assert champion_of(store) == new
            finally:
                gateway[0].kill()
                gateway[0].wait()
        assert len(history(open_other(rgw, monkeypatch), "job")) == judged + 1
        old = new


def killer(gateway: list[subprocess.Popen[bytes]], write: int) -> Callable[[Request], None]:
    """Chooses no fault, but kills the gateway as the write of that number comes in."""
    writes: list[str] = []

    def kill_at(request: Request) -> None:
        if request.method == "PUT":
            writes.append(request.path)
            if len(writes) == write + 1:
                gateway[0].kill()
                gateway[0].wait()

    return kill_at


def open_other(rgw: S3Server, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same bucket through the gateway that lives."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", rgw.endpoint)
    return open_store("s3://dying")


def test_a_large_file_goes_up_in_parts_and_is_verified(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infra.s3, "PART_BYTES", 5 * 1024 * 1024)
    store = open_store(f"s3://{bucket}/prefix")
    large, other = tmp_path / "large", tmp_path / "other"
    content = random.Random(0).randbytes(12 * 1024 * 1024 + 7)
    large.write_bytes(content)
    other.write_bytes(content[:-1] + b"x")
    heard: list[int] = []
    store.upload("models/large", large, heard.append)
    assert sum(heard) == len(content)
    assert store.read("models/large") == content
    store.upload("models/large", large)
    with pytest.raises(AlreadyExists):
        store.upload("models/large", other)
    store.download("models/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    head = boto3.Session().client("s3").head_object(Bucket=bucket, Key="prefix/models/large")
    assert head["ETag"].strip('"') == infra.s3._etag_of_parts(large)
    with pytest.raises(NotFound):
        store.download("models/none", tmp_path / "none")


def test_a_part_that_arrived_altered_is_found_out(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's ETag is of what arrived: here another file, of the same size, takes the place of ours."""
    monkeypatch.setattr(infra.s3, "PART_BYTES", 5 * 1024 * 1024)
    large, other = tmp_path / "large", tmp_path / "other"
    large.write_bytes(b"a" * 6 * 1024 * 1024)
    other.write_bytes(b"b" * 6 * 1024 * 1024)
    store = open_store(f"s3://{bucket}")
    upload_parts = infra.s3.S3Store._upload_parts
    monkeypatch.setattr(infra.s3.S3Store, "_upload_parts", lambda self, key, _, on: upload_parts(self, key, other, on))
    with pytest.raises(AlreadyExists):
        store.upload("models/large", large)


def test_unfinished_uploads_are_dropped_when_they_are_old(server: S3Server, bucket: str) -> None:
    client = boto3.Session().client("s3")
    client.create_multipart_upload(Bucket=bucket, Key="prefix/models/half")
    store = open_store(f"s3://{bucket}/prefix")
    assert store.drop_unfinished(datetime.now(UTC) - timedelta(days=1)) == 0
    assert store.drop_unfinished(datetime.now(UTC) + timedelta(minutes=1)) == 1
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)


def test_each_object_gets_the_tags_that_the_settings_ask_for(
    server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTLY_S3_TAGS", "team=vision&env=prod")
    open_store(f"s3://{bucket}").create("models/x", b"content")
    tags = boto3.Session().client("s3").get_object_tagging(Bucket=bucket, Key="models/x")["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "vision", "env": "prod"}


def test_encryption_and_lock_are_asked_for(ministack: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ministack.environment.items():
        monkeypatch.setenv(name, value)
    client = boto3.Session().client("s3")
    client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
    monkeypatch.setenv("NIGHTLY_S3_ENCRYPTION", "AES256")
    monkeypatch.setenv("NIGHTLY_S3_LOCK_DAYS", "30")
    open_store("s3://locked").create("models/x", b"content")
    head = client.head_object(Bucket="locked", Key="models/x")
    assert head["ServerSideEncryption"] == "AES256"
    assert head["ObjectLockMode"] == "GOVERNANCE"
    assert timedelta(days=29) < head["ObjectLockRetainUntilDate"] - datetime.now(UTC) < timedelta(days=31)
