"""Make single read-only REST calls with the caller's credentials, without retry.

gcloud's variables CLOUDSDK_API_ENDPOINT_OVERRIDES_… (SERVICEUSAGE, ARTIFACTREGISTRY, IAM,
CLOUDRESOURCEMANAGER) and STORAGE_EMULATOR_HOST replace Google's servers; overridden servers are
called without credentials. Calls to Vertex AI are in gcp/client.py.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

CALL = 10.0  # timeout of one call in seconds

SERVICES = {
    "serviceusage": "https://serviceusage.googleapis.com",
    "artifactregistry": "https://artifactregistry.googleapis.com",
    "iam": "https://iam.googleapis.com",
    "cloudresourcemanager": "https://cloudresourcemanager.googleapis.com",
    "storage": "https://storage.googleapis.com",
}
WHO = "https://openidconnect.googleapis.com/v1/userinfo"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"

# Part of a connection error → explanation.
NETWORK = {
    "Name or service not known": "unknown host name; is there a network?",
    "Temporary failure in name resolution": "unknown host name; is there a network?",
    "nodename nor servname": "unknown host name; is there a network?",
    "Connection refused": "the connection is refused",
    "ProxyError": "the proxy blocks it",
    "CERTIFICATE_VERIFY_FAILED": "unknown certificate; in a network with its own certificates "
    "set REQUESTS_CA_BUNDLE",
}


class Missing(Exception):
    """A requirement is missing or wrong; `fix` is what to run."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.fix = fix


class Unchecked(Exception):
    """A check that could not be completed; the message is the reason."""


class Refused(Exception):
    """An error response of an API."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def address(service: str) -> str:
    """Return the URL of a service: Google's, or the override in the environment."""
    variable = (
        "STORAGE_EMULATOR_HOST"
        if service == "storage"
        else f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}"
    )
    return (os.environ.get(variable) or SERVICES[service]).rstrip("/")


def enable_command(apis: Sequence[str], project: str) -> str:
    return f"gcloud services enable {' '.join(apis)} --project={project}"


def load_credentials(project: str) -> tuple[Any, str]:
    """Return refreshed Application Default Credentials and their account.

    Credentials are None if the environment overrides all servers.
    """
    if all(address(service) != url for service, url in SERVICES.items()):
        return None, "not needed: the environment overrides all of Google's servers"
    import google.auth
    from google.auth import exceptions
    from google.auth.transport.requests import Request
    from google.oauth2.credentials import Credentials

    login = "gcloud auth application-default login"
    try:
        credentials, _ = google.auth.default(scopes=[SCOPE])
        # Without this timeout google-auth waits two minutes.
        credentials.refresh(lambda *args, **kw: Request()(*args, **{**kw, "timeout": CALL}))
    except exceptions.TransportError as error:
        raise Unchecked(f"Google cannot be reached: {_reason(error)}") from None
    # All but DefaultCredentialsError come from a credentials file in an unknown format.
    except (
        exceptions.DefaultCredentialsError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        if "were not found" in str(error):
            raise Missing("not found", login) from None
        raise Missing(f"they cannot be read: {_one_line(error)}", login) from None
    except exceptions.GoogleAuthError as error:
        raise Missing(f"invalid or expired: {_one_line(error)}", login) from None
    if isinstance(credentials, Credentials) and not credentials.quota_project_id:
        fix = f"gcloud auth application-default set-quota-project {project}"
        raise Missing("no quota project is set", fix)
    return credentials, _account(credentials)


def _account(credentials: Any) -> str:
    import requests
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import AuthorizedSession

    name = getattr(credentials, "service_account_email", "") or getattr(credentials, "account", "")
    if "@" not in (name or ""):
        try:
            name = AuthorizedSession(credentials).get(WHO, timeout=CALL).json().get("email")
        except (requests.exceptions.RequestException, GoogleAuthError, ValueError, AttributeError):
            name = ""
    return name or "found (account unknown)"


class Rest:
    """Call Google's APIs; thread-safe, because each call has its own session."""

    def __init__(self, credentials: Any, project: str) -> None:
        self.credentials, self.project = credentials, project

    def call(
        self, service: str, path: str, query: Mapping[str, Any] | None = None, body: Any = None
    ) -> dict[str, Any]:
        """Send GET, or POST if there is a body; return the JSON object.

        An error response raises Refused; an API that is off, down or too slow raises Unchecked.
        """
        import requests
        from google.auth.exceptions import GoogleAuthError
        from google.auth.transport.requests import AuthorizedSession

        own = address(service) == SERVICES[service]
        session = AuthorizedSession(self.credentials) if own else requests.Session()
        try:
            with session:
                response = session.request(
                    "GET" if body is None else "POST",
                    address(service) + path,
                    params=query,
                    json=body,
                    timeout=CALL,
                )
        except requests.exceptions.Timeout:
            raise Unchecked(f"no response from {service} within {CALL:.0f} s") from None
        except (requests.exceptions.RequestException, GoogleAuthError) as error:
            raise Unchecked(f"{service} cannot be reached: {_reason(error)}") from None
        try:
            content = response.json()
        except ValueError:
            content = None
        if response.status_code == 200 and isinstance(content, dict):
            return content
        message = _error_message(content) or f"HTTP {response.status_code}"
        if response.status_code >= 500 or response.status_code in (200, 429):
            raise Unchecked(f"{service}: {message}")
        if "is disabled" in message:  # "… has not been used in project … or it is disabled"
            api = f"{service}.googleapis.com"
            raise Unchecked(f"{api} is off. Run `{enable_command([api], self.project)}`")
        raise Refused(response.status_code, message)

    def missing_permissions(self, service: str, path: str, permissions: Sequence[str]) -> list[str]:
        """Return the permissions that the caller lacks on a resource."""
        # Cloud Storage expects the permissions in the query, the other APIs in the body.
        option = "query" if service == "storage" else "body"
        granted = self.call(service, path, **{option: {"permissions": list(permissions)}})
        return [name for name in permissions if name not in granted.get("permissions", [])]


def _error_message(content: Any) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return _one_line(message or "").rstrip(".")


def _reason(error: Exception) -> str:
    return next((text for key, text in NETWORK.items() if key in str(error)), _one_line(error))


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 250 else f"{line[:250]} …"
