"""Rows from real servers: S3 with and without faults on the way, and PostgreSQL."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psycopg
import pytest
from PIL import Image

import tasks.data.table_queries
from infra.store.downloads import download, object_tags
from infra.store.protocol import StoreError
from tasks.data.prepare import prepare
from tasks.data.rows import DataError
from tasks.data.snapshots import Snapshot
from tasks.data.sources import source_stamp
from tasks.job import DataConfig
from tests.faulty_proxy import Fault, Request, faulty_proxy
from tests.integration.conftest import use
from tests.servers import PostgresServer, S3Server

BUCKET = "rows"


def day(number: int, rows: int = 300) -> pd.DataFrame:
    draw = np.random.default_rng(number)
    frame = pd.DataFrame({"x": draw.normal(size=rows).round(6), "town": draw.choice(["Bonn", "Ulm"], rows)})
    return frame.assign(y=draw.choice(["a", "b"], rows))


@pytest.fixture
def s3(server: S3Server) -> Any:
    """A client of the server, and a bucket that is empty."""
    names = [bucket["Name"] for bucket in server.client.list_buckets()["Buckets"]]
    if BUCKET not in names:
        server.make_bucket(BUCKET)
    for item in server.client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        server.client.delete_object(Bucket=BUCKET, Key=item["Key"])
    return server.client


def put(s3: Any, key: str, content: bytes | str) -> None:
    s3.put_object(Bucket=BUCKET, Key=key, Body=content)


def snapshot_of(source: str, folder: Path, **data: Any) -> Snapshot:
    return prepare(DataConfig(source=source, **data), "classification", folder / "snapshots")


def test_a_pattern_in_s3_is_copied_and_again_what_changed(s3: Any, tmp_path: Path) -> None:
    def copied(pattern: str) -> dict[str, bytes]:
        here = Path(download(f"s3://{BUCKET}/{pattern}", tmp_path))
        return {path.name: path.read_bytes() for path in here.parent.iterdir()}

    for name in ("sales/day-1.csv", "sales/day-2.csv", "sales/readme.txt", "sales/old/day-0.csv"):
        put(s3, name, name)
    days, fourth = "sales/day-*.csv", "sales/day-[4].csv"
    tags = object_tags(f"s3://{BUCKET}/{days}")
    assert copied(days) == {"day-1.csv": b"sales/day-1.csv", "day-2.csv": b"sales/day-2.csv"}
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.csv")}
    assert object_tags(f"s3://{BUCKET}/{days}") == tags
    put(s3, "sales/day-2.csv", "changed")
    put(s3, "sales/day-4.csv", "new")
    assert object_tags(f"s3://{BUCKET}/{days}") != tags
    assert copied(days) == {"day-1.csv": b"sales/day-1.csv", "day-2.csv": b"changed", "day-4.csv": b"new"}
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.csv")}
    assert (after["day-1.csv"], after["day-2.csv"] > before["day-2.csv"]) == (before["day-1.csv"], True)
    put(s3, fourth, "a name before it is a pattern")
    assert copied(fourth) == {"day-[4].csv": b"a name before it is a pattern"}
    s3.delete_object(Bucket=BUCKET, Key=fourth)
    assert copied(fourth) == {"day-4.csv": b"new"}
    s3.delete_object(Bucket=BUCKET, Key="sales/day-1.csv")
    assert copied(days) == {"day-2.csv": b"changed", "day-4.csv": b"new"}


@pytest.mark.parametrize("server", ["ministack"], indirect=True)
def test_a_pattern_in_s3_is_the_table_that_the_files_are_here(s3: Any, tmp_path: Path) -> None:
    for number in (1, 2):
        day(number).to_csv(tmp_path / f"day-{number}.csv", index=False)
        put(s3, f"sales/day-{number}.csv", (tmp_path / f"day-{number}.csv").read_bytes())
    url = f"s3://{BUCKET}/sales/day-*.csv"
    there, here = snapshot_of(url, tmp_path), snapshot_of(str(tmp_path / "day-*.csv"), tmp_path)
    assert (there.fingerprint, there.source) == (here.fingerprint, url)
    stamp = source_stamp(DataConfig(source=url))
    assert stamp == source_stamp(DataConfig(source=url))
    put(s3, "sales/day-2.csv", day(3).to_csv(index=False))
    put(s3, "sales/day-4.csv", day(4).to_csv(index=False))
    assert source_stamp(DataConfig(source=url)) != stamp
    assert snapshot_of(url, tmp_path).rows > there.rows


@pytest.mark.parametrize("server", ["ministack"], indirect=True)
def test_other_kinds_of_files_come_from_s3_too(s3: Any, tmp_path: Path) -> None:
    day(1).to_parquet(tmp_path / "rows.parquet")
    put(s3, "rows.parquet", (tmp_path / "rows.parquet").read_bytes())
    assert snapshot_of(f"s3://{BUCKET}/rows.parquet", tmp_path).rows == 300
    for number in range(40):
        Image.fromarray(np.full((4, 6), number, dtype=np.uint8)).save(tmp_path / "one.png")
        put(s3, f"pictures/{'cat' if number % 2 else 'dog'}/{number}.png", (tmp_path / "one.png").read_bytes())
    pictures = snapshot_of(f"s3://{BUCKET}/pictures", tmp_path)
    assert (pictures.shape.features, pictures.classes, pictures.rows) == ((1, 4, 6), ("cat", "dog"), 40)


def test_what_s3_does_not_have_is_one_sentence(s3: Any, tmp_path: Path) -> None:
    put(s3, "pictures/../../evil.png", b"x")
    for key, says in (
        ("gone.csv", "must name an object, a pattern or a folder of objects, found none"),
        ("day-*.csv", "must name an object, a pattern or a folder of objects, found none"),
        ("pictures", "an object's name must lead to a file below it, found '../../evil.png'"),
    ):
        with pytest.raises(StoreError) as error:
            snapshot_of(f"s3://{BUCKET}/{key}", tmp_path)
        assert says in str(error.value)
    assert not (tmp_path / "snapshots").exists()


FAULTS: dict[str, tuple[Callable[[Request], Fault | None], str | None]] = {
    "a broken connection": (lambda request: "cut" if "day-1" in request.path and request.number == 1 else None, None),
    "an answer of 500": (lambda request: "500" if request.number < 2 else None, None),
    "always cut": (lambda request: "cut" if "day-1" in request.path else None, "cannot be reached"),
    "altered on the way": (
        lambda request: "altered" if "day-1" in request.path and request.method == "GET" else None,
        "",
    ),
    "refused": (lambda _: "403 AccessDenied", "refused: AccessDenied"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_that_breaks_goes_on_or_is_refused(
    ministack: S3Server, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, says = FAULTS[fault]
    use(monkeypatch, ministack.environment)
    bucket = f"faults-{list(FAULTS).index(fault)}"
    ministack.make_bucket(bucket)
    day(1).to_csv(tmp_path / "day-1.csv", index=False)
    ministack.client.upload_file(str(tmp_path / "day-1.csv"), bucket, "day-1.csv")
    with faulty_proxy(ministack.endpoint, choose) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        if says is None:
            found = snapshot_of(f"s3://{bucket}/day-*.csv", tmp_path)
            assert found.fingerprint == snapshot_of(str(tmp_path / "day-1.csv"), tmp_path).fingerprint
            return
        with pytest.raises(StoreError) as error:
            snapshot_of(f"s3://{bucket}/day-*.csv", tmp_path)
    assert says in str(error.value)
    assert not (tmp_path / "snapshots").exists()
    assert not list((tmp_path / "downloads").rglob("*.csv"))


def test_a_query_is_read_from_postgresql(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    monkeypatch.setattr(tasks.data.table_queries, "QUERY_ROWS", 300)
    with psycopg.connect(postgres.url) as connection:
        connection.execute(
            "CREATE TABLE sales AS SELECT n AS id, md5(n::text)::uuid AS code, (n % 7)::numeric(8, 2) / 3 AS price, "
            "CASE WHEN n % 11 = 0 THEN NULL ELSE n % 5 END AS age, n % 3 = 0 AS member, "
            "date '2026-01-01' + n % 300 AS day, timestamptz '2026-01-01' + n * interval '1 hour' AS moment, "
            "CASE WHEN n % 2 = 0 THEN 'Köln' ELSE 'Ulm' END AS town, "
            "CASE WHEN (n * 7919) % 10 < 3 THEN 'yes' ELSE 'no' END AS bought FROM generate_series(1, 1000) AS n"
        )
    data = {"query": "SELECT * FROM sales", "target": "bought", "checks": {"leaking_column": "warn"}}
    found = snapshot_of(postgres.url, tmp_path, **data)
    assert found.rows == 1000
    assert {described.name: described.role for described in found.described} == {
        "id": "identifier", "code": "identifier", "price": "numeric", "age": "numeric", "member": "boolean",
        "day": "datetime", "moment": "datetime", "town": "categorical", "bought": "target",
    }  # fmt: skip
    assert next(described.missing for described in found.described if described.name == "age") == 1000 // 11
    again = snapshot_of(postgres.url, tmp_path, **data | {"query": "SELECT * FROM sales ORDER BY code"})
    assert again.fingerprint == found.fingerprint
    with pytest.raises(DataError, match='relation "nowhere" does not exist'):
        snapshot_of(postgres.url, tmp_path, query="SELECT * FROM nowhere")
    monkeypatch.setenv("PGPASSWORD", "wrong")
    with pytest.raises(DataError, match=r"password authentication failed.*or the password") as error:
        snapshot_of(postgres.url, tmp_path, **data)
    assert postgres.password not in str(error.value)
    monkeypatch.setenv("PGPASSWORD", postgres.password)
    gone = postgres.url.replace(str(postgres.port), "1")
    with pytest.raises(DataError, match="refused"):
        snapshot_of(gone, tmp_path, **data)
