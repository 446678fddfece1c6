"""What only S3 has: clocks, rights and keys, gateways that die, uploads in parts, tags, encryption and locks."""

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import botocore.auth
import pytest

import infra.store.s3
from infra.store.opening import open_store
from infra.store.protocol import AlreadyExists, NotFound, StoreError, StoreUnavailable
from tasks.registry.log import append_promotion, history
from tasks.registry.versions import publish_version, verify_version
from tests.faulty_proxy import Request, faulty_proxy
from tests.integration.conftest import use
from tests.promoting import NOW, WRITES, champion_of, promote, write_version
from tests.servers import S3Server, free_port


def test_a_wrong_clock_is_one_sentence(rgw: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, rgw.environment)
    rgw.make_bucket("clock")
    # The only part of the clock that a request shows.
    ahead = lambda: datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=2)  # noqa: E731
    monkeypatch.setattr(botocore.auth, "get_current_datetime", ahead)
    with pytest.raises(StoreError, match=r"RequestTimeTooSkewed.*set this machine's clock right"):
        promote(open_store("s3://clock"), tmp_path / "v", 0, judged=0, run="run")


def test_a_trainer_may_not_write_the_log(rgw: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bucket policy of infra/README.md: a trainer puts versions, a promoter the log too, a reader nothing."""
    use(monkeypatch, rgw.environment)
    rgw.make_bucket("shared")
    policy = json.loads((Path(__file__).parents[2] / "infra/bucket-policy.json").read_text())
    users = {name: rgw.make_user(name) for name in ("trainer", "reader")}
    text = json.dumps(policy).replace("BUCKET/PREFIX", "shared/prefix").replace("BUCKET", "shared")
    for name in users:
        text = text.replace(f"arn:aws:iam::ACCOUNT:user/{name}", f"arn:aws:iam:::user/{name}")
    content = json.loads(text)
    # Ceph does not know the condition key of conditional writes, and the promoter owns the bucket here.
    content["Statement"] = [part for part in content["Statement"] if "promoter" not in part["Sid"].lower()]
    rgw.client.put_bucket_policy(Bucket="shared", Policy=json.dumps(content))
    version = promote(open_store("s3://shared/prefix"), tmp_path / "v", 0, judged=0, run="run")
    for user, environment in users.items():
        use(monkeypatch, environment)
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
    use(monkeypatch, rgw.make_user("rotating"))
    boto3.Session().client("s3").create_bucket(Bucket="rotating")
    store = open_store("s3://rotating")
    old = promote(store, tmp_path / "old", 0, judged=0, run="old")
    manifest = write_version(tmp_path / "new", 1)
    version = publish_version(store, manifest, tmp_path / "new")
    fresh = rgw.rotate_key("rotating")
    with pytest.raises(StoreError, match=r"refused: .*check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        append_promotion(store, "job", version=version, judged=1, run="new", reason="", now=NOW)
    use(monkeypatch, fresh)
    assert champion_of(open_store("s3://rotating")) == old
    assert promote(open_store("s3://rotating"), tmp_path / "new", 1, judged=1, run="new") == version
    assert champion_of(open_store("s3://rotating")) == version


def test_a_gateway_killed_in_a_promotion_leaves_one_entry(
    rgw: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A second gateway before the same cluster dies with SIGKILL as the n-th write comes in, and is started again."""
    use(monkeypatch, rgw.environment)
    rgw.make_bucket("dying")
    through_the_other = open_store("s3://dying")
    old = promote(through_the_other, tmp_path / "old", 0, judged=0, run="old")
    port = free_port()
    gateway = rgw.start_gateway(port)
    before_its_death = WRITES

    def kill(request: Request) -> None:
        nonlocal before_its_death
        if request.method == "PUT":
            if before_its_death == 0:
                gateway.kill()
                gateway.wait()
            before_its_death -= 1

    with faulty_proxy(f"http://127.0.0.1:{port}", kill) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = open_store("s3://dying")
        try:
            for writes in range(WRITES):
                judged, before_its_death = writes + 1, writes
                folder, run = tmp_path / f"new-{judged}", f"new {judged}"
                with pytest.raises(StoreUnavailable):
                    promote(store, folder, judged, judged=judged, run=run)
                assert champion_of(through_the_other) == old
                gateway = rgw.start_gateway(port)
                old = promote(store, folder, judged, judged=judged, run=run)
                assert champion_of(store) == old
                assert len(history(through_the_other, "job")) == judged + 1
        finally:
            gateway.kill()
            gateway.wait()


def test_a_large_file_goes_up_in_parts_and_is_verified(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infra.store.s3, "PART_BYTES", 5 * 1024 * 1024)
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
    head = server.client.head_object(Bucket=bucket, Key="prefix/models/large")
    assert head["ETag"].strip('"') == infra.store.s3._etag_of_parts(large)
    with pytest.raises(NotFound):
        store.download("models/none", tmp_path / "none")


def test_a_part_that_arrived_altered_is_found_out(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's ETag is of what arrived: here another file, of the same size, takes the place of ours."""
    monkeypatch.setattr(infra.store.s3, "PART_BYTES", 5 * 1024 * 1024)
    large, other = tmp_path / "large", tmp_path / "other"
    large.write_bytes(b"a" * 6 * 1024 * 1024)
    other.write_bytes(b"b" * 6 * 1024 * 1024)
    store = open_store(f"s3://{bucket}")
    upload_parts = infra.store.s3.S3Store._upload_parts
    monkeypatch.setattr(
        infra.store.s3.S3Store, "_upload_parts", lambda self, key, _, on: upload_parts(self, key, other, on)
    )
    with pytest.raises(AlreadyExists):
        store.upload("models/large", large)


def test_unfinished_uploads_are_dropped_when_they_are_old(server: S3Server, bucket: str) -> None:
    client = server.client
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
    tags = server.client.get_object_tagging(Bucket=bucket, Key="models/x")["TagSet"]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "vision", "env": "prod"}


def test_encryption_and_lock_are_asked_for(ministack: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, ministack.environment)
    client = ministack.client
    client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
    monkeypatch.setenv("NIGHTLY_S3_ENCRYPTION", "AES256")
    monkeypatch.setenv("NIGHTLY_S3_LOCK_DAYS", "30")
    open_store("s3://locked").create("models/x", b"content")
    head = client.head_object(Bucket="locked", Key="models/x")
    assert head["ServerSideEncryption"] == "AES256"
    assert head["ObjectLockMode"] == "GOVERNANCE"
    assert timedelta(days=29) < head["ObjectLockRetainUntilDate"] - datetime.now(UTC) < timedelta(days=31)
