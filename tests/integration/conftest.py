"""What the tests of the store and of promotions share: one empty store of each kind, each a server of its own sort."""

import uuid
from pathlib import Path

import pytest

from infra.store import Store, open_store
from tests.servers import S3Server


@pytest.fixture(params=["directory", "ministack", "rgw"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store of each kind."""
    if request.param == "directory":
        return open_store((tmp_path / "a store").as_uri())
    found: S3Server = request.getfixturevalue(request.param)
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    found.make_bucket(name)
    return open_store(f"s3://{name}/some/prefix")
