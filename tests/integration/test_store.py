"""One contract for every artifact store: a key is created once, and of two racing writers exactly one wins."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.store.opening import check_store, open_store
from infra.store.protocol import AlreadyExists, NotFound, Store, StoreError, StoreUnavailable
from tests.integration.conftest import use
from tests.servers import ACCESS_KEY, SECRET_KEY, S3Server, free_port

WRITERS, ROUNDS = 8, 3


@pytest.fixture
def rgw_environment(rgw: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    use(monkeypatch, rgw.environment)
    return rgw


def test_a_key_is_created_once(store: Store) -> None:
    store.create("models/a/x", b"one")
    store.create("models/a/x", b"one")  # a retry after a lost answer
    with pytest.raises(AlreadyExists):
        store.create("models/a/x", b"two")
    assert store.read("models/a/x") == b"one"


def test_a_missing_key_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound):
        store.read("models/none")
    assert list(store.created("models/")) == []


def test_keys_are_listed_by_prefix(store: Store) -> None:
    for key in ("models/b/2", "models/a/10", "models/a/9", "models/ab/1"):
        store.create(key, key.encode())
    assert list(store.created("models/a/")) == ["models/a/10", "models/a/9"]
    assert list(store.created("models/a")) == ["models/a/10", "models/a/9", "models/ab/1"]
    assert len(list(store.created(""))) == 4


def test_of_writers_at_the_same_moment_exactly_one_wins(store: Store) -> None:
    """A store that looked for the key and then wrote it without a condition was seen by 200 of 200 rounds, on each kind
    of store. A round that sees it with a probability of 0.985 is the least that this allows for at 95 %, so three
    rounds miss it less often than once in 200,000 times.
    """
    start = threading.Barrier(WRITERS)

    def create(key: str, writer: int) -> bool:
        start.wait(60)
        try:
            store.create(key, b"%d" % writer)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(WRITERS) as threads:
        for round_ in range(ROUNDS):
            key = f"race/{round_}"
            wins = list(threads.map(create, [key] * WRITERS, range(WRITERS)))
            assert sum(wins) == 1
            assert store.read(key) == b"%d" % wins.index(True)


def test_the_check_passes_again_and_again_and_leaves_one_key(store: Store) -> None:
    for _ in range(3):
        check_store(store)
    assert len(list(store.created(""))) == 1


def test_a_store_that_ignores_the_condition_is_refused(rgw_environment: S3Server) -> None:
    """Ceph's gateway ignores If-None-Match in a bucket with versioning."""
    rgw_environment.make_bucket("versioned")
    rgw_environment.client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    store = open_store("s3://versioned/prefix")
    for _ in range(2):
        with pytest.raises(StoreError, match="must refuse to create a key twice"):
            check_store(store)


@pytest.mark.parametrize(
    ("variable", "says"),
    [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")],
)
def test_wrong_credentials_are_one_sentence_without_the_secret(
    rgw_environment: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str, says: str
) -> None:
    rgw_environment.make_bucket("guarded")
    monkeypatch.setenv(variable, "wrong")
    with pytest.raises(StoreError) as error:
        check_store(open_store("s3://guarded"))
    assert says in str(error.value)
    assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(error.value)
    assert SECRET_KEY not in str(error.value)
    assert ACCESS_KEY not in str(error.value)


def test_a_missing_bucket_is_one_sentence(rgw_environment: S3Server) -> None:
    with pytest.raises(StoreError, match=r"NoSuchBucket.*create the bucket"):
        check_store(open_store("s3://no-such-bucket"))


def test_a_server_that_is_away_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, S3Server(f"http://127.0.0.1:{free_port()}").environment)
    with pytest.raises(StoreUnavailable, match=r"s3://away cannot be reached"):
        check_store(open_store("s3://away"))


def test_no_credentials_is_one_sentence(ministack: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", ministack.endpoint)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match="Unable to locate credentials; check AWS_ACCESS_KEY_ID"):
        check_store(open_store("s3://any-bucket"))


@pytest.mark.parametrize("url", ["http://x/y", "s3://", "file://elsewhere/x", "/tmp/x", ""])  # noqa: S108 a bad URL
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="must be file:///folder or s3://bucket/prefix"):
        open_store(url)


def test_plain_http_to_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store.example.org")
    with pytest.raises(StoreError, match="must be https:// unless it is on this machine"):
        open_store("s3://bucket")


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        check_store(open_store((tmp_path / "file" / "store").as_uri()))


def test_a_half_written_file_is_never_a_key(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / ".killed.partial").write_bytes(b"half")
    assert list(store.created("")) == []
