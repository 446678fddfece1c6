"""Tell another system what became of a night: one POST of JSON to the URL that NIGHTLY_WEBHOOK holds.

The URL may carry a secret, so no error and no log line shows more of it than the host.
"""

from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

TIMEOUT_SECONDS = 10


class WebhookFailed(Exception):
    """The receiver did not take the message; the message says which host, and what it answered."""


def post(url: str, content: Mapping[str, object]) -> None:
    """Send the content as JSON. Raises WebhookFailed where it is not answered with 2xx."""
    host = urlsplit(url).hostname
    try:
        answer = httpx.post(url, json=dict(content), timeout=TIMEOUT_SECONDS)
    except httpx.HTTPError as error:
        raise WebhookFailed(f"the webhook at {host} cannot be reached ({type(error).__name__})") from None
    if not answer.is_success:
        raise WebhookFailed(f"the webhook at {host} answered {answer.status_code}")
