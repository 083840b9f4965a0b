"""An endpoint of Vertex AI as the client asks it: by its name, with the credentials of who asks.

It passes requests on to the predictor's container, and nothing but predictions: no GET, and no other path.
gcloud's variable CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM names another server; no credentials are looked for then.
"""

import json
import os
import re
import threading
from collections.abc import Mapping
from typing import Any
from urllib.request import getproxies, proxy_bypass

import urllib3

from core.errors import UserError

NAME = r"projects/[^/]+/locations/(?P<region>[a-z0-9-]+)/endpoints/[^/:?#]+"
# Whom the credentials are shown: Google's API, and the servers that endpoints have of their own.
TRUSTED = (
    r"https://([a-z0-9-]+-aiplatform\.googleapis\.com|[a-z0-9.-]+\.prediction\.vertexai\.goog)"
)
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
LOGIN = "Type: gcloud auth application-default login"
# The HTTP status of Google's own refusals → what a person can do.
ADVICE = {
    401: LOGIN,
    403: "`gcloud auth list` shows who you are; ask for roles/aiplatform.user in that project.",
    404: "`gcloud ai endpoints list --region=REGION` shows the endpoints that there are.",
}


def parse(text: str) -> tuple[str, str] | None:
    """The server's address and the path of an endpoint's predictions; None where it is no endpoint's name.

    It may stand after an address, because an endpoint may have a server of its own ("dedicated").

    Raises:
        UserError: the server is not Google's.
    """
    found = re.fullmatch(rf"(?:(?P<server>https?://[^/]+)/v1/)?(?P<name>{NAME})", text.strip("/"))
    if not found:
        return None
    override = os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", "").rstrip("/")
    server = found["server"] or override or f"https://{found['region']}-aiplatform.googleapis.com"
    if not override and not re.fullmatch(TRUSTED, server):
        raise UserError(
            f"--endpoint names the server {server}, and your credentials are for Google's alone: "
            "REGION-aiplatform.googleapis.com, or ….prediction.vertexai.goog, over https."
        )
    return server, f"/v1/{found['name']}:rawPredict"


def pool(server: str, **options: Any) -> urllib3.PoolManager:
    """Connections to a server, through the proxy that the environment names, with the certificates that it names."""
    certificates = os.environ.get("REQUESTS_CA_BUNDLE")
    if certificates:
        options["ca_certs"] = certificates
    url = urllib3.util.parse_url(server)
    proxy = getproxies().get(url.scheme or "")
    if proxy and not proxy_bypass(url.host or ""):
        return urllib3.ProxyManager(proxy, **options)
    return urllib3.PoolManager(**options)


class Bearer:
    """The header that says who asks; its token is made when it is first wanted, and anew before it expires."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._credentials: Any = None

    def __call__(self) -> Mapping[str, str]:
        """The header.

        Raises:
            UserError: there are no credentials, or Google does not take them.
        """
        if os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"):
            return {}
        from google.auth import default
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
        from google.auth.transport.requests import Request

        headers: dict[str, str] = {}
        try:
            with self._lock:
                self._credentials = self._credentials or default(scopes=[SCOPE])[0]
                self._credentials.before_request(Request(), "POST", "", headers)
        except DefaultCredentialsError:
            raise UserError(f"there are no credentials to ask the endpoint with. {LOGIN}") from None
        except TransportError:
            raise UserError(
                "Google's sign-in does not answer. Is there a network? Then type it again."
            ) from None
        except GoogleAuthError:
            raise UserError(
                f"the credentials to ask the endpoint with have expired. {LOGIN}"
            ) from None
        return headers


def refusal(status: int, error: Mapping[str, Any]) -> str:
    """What an error in Google's form says: the container's own words where it passes them on, otherwise with advice."""
    message = str(error.get("message", ""))
    try:
        return str(json.loads(message)["error"])
    except (ValueError, KeyError, TypeError):
        return f"{message.rstrip('.')}. {ADVICE.get(status, '')}".strip()
