"""A few calls of Prefect's API over HTTP: what a listing shows, and whether a worker waits for runs.

Prefect's own client takes two seconds of a core to import, so it is used only where something is changed. Knows Prefect
by its URLs and JSON only.
"""

import os
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import quote

import httpx

from infra.settings import Settings


def read_nights(settings: Settings, flow: str) -> dict[str, dict[str, str | None]]:
    """Return each deployment's last and next run of a flow, by the deployment's name; nothing where Prefect does not
    answer."""
    named = {"flows": {"name": {"any_": [flow]}}}
    begun = {"flow_runs": {"start_time": {"is_null_": False}}, "sort": "START_TIME_DESC", "limit": 1}
    due = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 1}
    nights: dict[str, dict[str, str | None]] = {}
    try:
        with _client(settings) as client:
            for deployment in _filtered(client, "deployments", named):
                own = {**named, "deployments": {"id": {"any_": [deployment["id"]]}}}
                last, following = (_filtered(client, "flow_runs", own | wanted) for wanted in (begun, due))
                is_paused = deployment["paused"] or not any(known["active"] for known in deployment["schedules"])
                nights[deployment["name"]] = {
                    "last night": last[0]["state_name"] if last else None,
                    "began": _minute(last[0]["start_time"]) if last else None,
                    "next night": "paused"
                    if is_paused
                    else _minute(following[0]["expected_start_time"])
                    if following
                    else None,
                }
    except httpx.TransportError:
        return {}
    return nights


def is_polling(settings: Settings, pool: str, name: str, running_for: timedelta) -> bool:
    """Return whether Prefect has heard of a worker since its process started, which it does once all that it needs is
    there. By the server's clock, which may be another than this machine's."""
    try:
        with _client(settings) as client:
            answer = client.post(f"/work_pools/{quote(pool, safe='')}/workers/filter", json={}).raise_for_status()
    except httpx.HTTPError:
        return False
    began = parsedate_to_datetime(answer.headers["date"]) - running_for
    return any(
        known["name"] == name
        and known["status"] == "ONLINE"
        and datetime.fromisoformat(known["last_heartbeat_time"]) > began
        for known in answer.json()
    )


@cache
def certificates() -> ssl.SSLContext:
    """Read the certificates to be trusted, once: 20 ms of a core, which each call would take again while it waits for a
    server to start."""
    file = os.environ.get("PREFECT_API_SSL_CERT_FILE")
    return ssl.create_default_context(cafile=file) if file else httpx.create_ssl_context()


def _client(settings: Settings) -> httpx.Client:
    """Give the credentials that Prefect's own client takes from the environment."""
    headers = {}
    auth = None
    if pair := os.environ.get("PREFECT_API_AUTH_STRING"):
        auth = httpx.BasicAuth(*pair.partition(":")[::2])
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    return httpx.Client(
        base_url=settings.prefect_api_url, auth=auth, headers=headers, verify=certificates(), timeout=30
    )


def _filtered(client: httpx.Client, kind: str, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.post(f"/{kind}/filter", json=wanted).raise_for_status().json()
    return found


def _minute(moment: str) -> str:
    return f"{datetime.fromisoformat(moment).astimezone(UTC):%Y-%m-%d %H:%M}"
