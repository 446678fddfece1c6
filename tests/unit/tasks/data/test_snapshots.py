"""Snapshots in the artifact store: fetched whole, refused when altered, dropped when nobody needs them."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from infra.store.opening import open_store
from infra.store.protocol import Store, StoreError
from tasks.data.prepare import prepare
from tasks.data.snapshots import (
    DESCRIPTION,
    FILES,
    FORMAT,
    Snapshot,
    drop_old_snapshots,
    fetch_snapshot,
    mark_as_used,
    publish_snapshot,
    read_snapshot,
)
from tasks.job import DataConfig
from tests.conftest import CPU

NOW = datetime.now(UTC)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def wines(folder: Path) -> Snapshot:
    return prepare(DataConfig(source="sklearn://wine"), "classification", folder)


def test_another_machine_fetches_what_one_has_published(store: Store, tmp_path: Path) -> None:
    made = wines(tmp_path / "here")
    publish_snapshot(store, made)
    publish_snapshot(store, made)
    assert sorted(store.created("snapshots/")) == sorted(
        f"snapshots/{made.fingerprint}/{name}" for name in (*FILES, DESCRIPTION)
    )
    fetched = fetch_snapshot(store, tmp_path / "there", made.fingerprint)
    assert fetched is not None
    assert (fetched.shape, fetched.classes, fetched.row_counts) == (made.shape, made.classes, made.row_counts)
    for split, (features, target) in made.load(CPU).items():
        assert torch.equal(fetched.load(CPU)[split][0], features)
        assert torch.equal(fetched.load(CPU)[split][1], target)
    assert [path.name for path in (tmp_path / "there").iterdir()] == [made.fingerprint]
    assert fetch_snapshot(store, tmp_path / "there", "0" * 32) is None


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_refused_and_nothing_is_left(store: Store, tmp_path: Path, name: str) -> None:
    made = wines(tmp_path / "here")
    publish_snapshot(store, made)
    kept = tmp_path / "store/snapshots" / made.fingerprint / name
    content = kept.read_bytes()
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match=f"is damaged: {name} was altered"):
        fetch_snapshot(store, tmp_path / "there", made.fingerprint)
    assert not list((tmp_path / "there").iterdir())


def test_a_snapshot_of_a_former_format_counts_as_gone(tmp_path: Path) -> None:
    made = wines(tmp_path)
    description = made.path / DESCRIPTION
    description.write_text(description.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    assert read_snapshot(tmp_path, made.fingerprint) is None


def test_only_old_snapshots_that_nobody_needs_are_dropped(store: Store, tmp_path: Path) -> None:
    local = tmp_path / "snapshots"
    kinds = ("promoted", "used", "old")
    made = {}
    for kind, source in zip(kinds, ("wine", "iris", "breast_cancer"), strict=True):
        made[kind] = prepare(DataConfig(source=f"sklearn://{source}"), "classification", local)
        publish_snapshot(store, made[kind])
        old = (NOW - timedelta(days=40)).timestamp()
        for path in [made[kind].path, *(tmp_path / "store/snapshots" / made[kind].fingerprint).iterdir()]:
            os.utime(path, (old, old))
    mark_as_used(made["used"], NOW)
    promoted = {made["promoted"].fingerprint}
    gone = drop_old_snapshots(store, local, promoted, NOW)
    assert {key.removeprefix("snapshots/").partition("/")[0] for key in gone} == {made["old"].fingerprint}
    assert read_snapshot(local, made["old"].fingerprint) is None
    assert not store.created(f"snapshots/{made['old'].fingerprint}")
    assert drop_old_snapshots(store, local, promoted, NOW) == []
    assert fetch_snapshot(store, tmp_path / "elsewhere", made["used"].fingerprint) is not None
