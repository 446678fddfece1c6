"""What the tests of the store and of promotions share: one empty store of each kind, each a server of its own sort, and
a proxy on the way to it."""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from botocore.retries.standard import ExponentialBackoff

from infra.store.opening import open_store
from infra.store.protocol import Store
from tests.faulty_proxy import Fault, Request, faulty_proxy
from tests.servers import S3Server


def use(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["ministack", "rgw"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Each S3 server, with its environment set."""
    server: S3Server = request.getfixturevalue(request.param)
    use(monkeypatch, server.environment)
    return server


@pytest.fixture
def bucket(server: S3Server) -> str:
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    server.make_bucket(name)
    return name


@pytest.fixture(params=["directory", "ministack", "rgw"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store of each kind."""
    if request.param == "directory":
        return open_store((tmp_path / "a store").as_uri())
    server: S3Server = request.getfixturevalue(request.param)
    use(monkeypatch, server.environment)
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    server.make_bucket(name)
    return open_store(f"s3://{name}/some/prefix")


Through = Callable[[Callable[[Request], Fault | None]], Store]


@pytest.fixture
def through(server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Through]:
    """Opens the store behind a proxy whose faults a function chooses. What botocore waits for between its attempts, up
    to some seconds, is over at once here."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
    with ExitStack() as proxies:

        def open_through(choose: Callable[[Request], Fault | None]) -> Store:
            endpoint = proxies.enter_context(faulty_proxy(server.endpoint, choose))
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
            return open_store(f"s3://{bucket}")

        yield open_through
