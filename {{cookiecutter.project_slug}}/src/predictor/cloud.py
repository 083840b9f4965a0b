"""An endpoint of Vertex AI: its URL, the caller's credentials, and Google's errors.

An endpoint passes only requests for predictions on to the container: no GET, and no other path.
CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM names another server; it gets no credentials.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import requests

from core.errors import UserError

NAME = r"projects/[^/]+/locations/(?P<region>[a-z0-9-]+)/endpoints/[^/:?#]+"
# Only these servers get credentials: Google's API, and the endpoints that have their own.
TRUSTED = (
    r"https://([a-z0-9-]+-aiplatform\.googleapis\.com|[a-z0-9.-]+\.prediction\.vertexai\.goog)"
)
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
OVERRIDE = "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"
LOGIN = "Run `gcloud auth application-default login`."
# HTTP status of Google's errors → hint.
HINTS = {
    401: LOGIN,
    403: "`gcloud auth list` shows your account; it needs roles/aiplatform.user in that project.",
    404: "`gcloud ai endpoints list --region=REGION` lists the endpoints.",
}


def parse(text: str) -> tuple[str, str] | None:
    """Return an endpoint's server and the path of its predictions; None if `text` is not its name.

    A server may precede the name, because a dedicated endpoint has its own.
    """
    match = re.fullmatch(rf"(?:(?P<server>https?://[^/]+)/v1/)?(?P<name>{NAME})", text.strip("/"))
    if not match:
        return None
    override = os.environ.get(OVERRIDE, "").rstrip("/")
    server = match["server"] or override or f"https://{match['region']}-aiplatform.googleapis.com"
    if not override and not re.fullmatch(TRUSTED, server):
        raise UserError(
            f"--endpoint names the server {server}, which must not get your credentials. Expected "
            "REGION-aiplatform.googleapis.com or ….prediction.vertexai.goog, over https."
        )
    return server, f"/v1/{match['name']}:rawPredict"


def open_session() -> requests.Session:
    """Open a session with the caller's credentials."""
    if os.environ.get(OVERRIDE):
        return requests.Session()
    # google-auth is not needed to ask a local server.
    from google.auth import default
    from google.auth.exceptions import DefaultCredentialsError
    from google.auth.transport.requests import AuthorizedSession

    try:
        return AuthorizedSession(default(scopes=[SCOPE])[0])
    except DefaultCredentialsError:
        raise UserError(f"no credentials for the endpoint. {LOGIN}") from None


def explain(status: int, error: Mapping[str, Any]) -> str:
    """Return the container's message if Google's error contains it, otherwise Google's and a hint."""
    message = str(error.get("message", ""))
    try:
        return str(json.loads(message)["error"])
    except (ValueError, KeyError, TypeError):
        return f"{message.rstrip('.')}. {HINTS.get(status, '')}".strip()
