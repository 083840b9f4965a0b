"""Those of Google's APIs that are asked a single question each: with the credentials of who types, over HTTP, once.

gcloud's variables CLOUDSDK_API_ENDPOINT_OVERRIDES_… (SERVICEUSAGE, ARTIFACTREGISTRY, IAM, CLOUDRESOURCEMANAGER) and
STORAGE_EMULATOR_HOST name other servers than Google's; those are asked without credentials. For Vertex AI see api.py.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

CALL = 10.0  # seconds that one answer may take

SERVICES = {
    "serviceusage": "https://serviceusage.googleapis.com",
    "artifactregistry": "https://artifactregistry.googleapis.com",
    "iam": "https://iam.googleapis.com",
    "cloudresourcemanager": "https://cloudresourcemanager.googleapis.com",
    "storage": "https://storage.googleapis.com",
}
WHO = "https://openidconnect.googleapis.com/v1/userinfo"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"

# What a failed connection says → what it means.
NETWORK = {
    "Name or service not known": "its name is not known here; is there a network?",
    "Temporary failure in name resolution": "its name is not known here; is there a network?",
    "nodename nor servname": "its name is not known here; is there a network?",
    "Connection refused": "the connection is refused",
    "ProxyError": "the proxy does not let it through",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not known; in a network with certificates of its own set REQUESTS_CA_BUNDLE",
}


class Missing(Exception):
    """Something that is needed is not there, or not right; `mend` is what to type."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(what)
        self.mend = mend


class Unchecked(Exception):
    """It could not be found out, and why."""


class Refused(Exception):
    """An API's answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def address(service: str) -> str:
    """A service's address: Google's, or the one that the environment names."""
    variable = (
        "STORAGE_EMULATOR_HOST"
        if service == "storage"
        else f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}"
    )
    return (os.environ.get(variable) or SERVICES[service]).rstrip("/")


def is_google(service: str) -> bool:
    """Whether Google is asked, who wants to know who asks."""
    return address(service) == SERVICES[service]


def enable(apis: Sequence[str], project: str) -> str:
    """The command that switches APIs on."""
    return f"gcloud services enable {' '.join(apis)} --project={project}"


# ── credentials ─────────────────────────────────────────────────────────────────────────────────────────────────────
def credentials(project: str) -> tuple[Any, str]:
    """The Application Default Credentials, made fresh, and whose they are; (None, …) where no server of Google's is asked.

    Raises:
        Missing: there are none, they have expired, or no project pays for what they ask.
        Unchecked: Google could not be reached.
    """
    if not any(map(is_google, SERVICES)):
        return None, "none are needed: the environment names other servers than Google's"
    import google.auth
    from google.auth import exceptions
    from google.auth.transport.requests import Request
    from google.oauth2.credentials import Credentials

    login = "gcloud auth application-default login"
    try:
        found, _ = google.auth.default(scopes=[SCOPE])
        found.refresh(lambda *args, **options: Request()(*args, **{**options, "timeout": CALL}))
    except exceptions.TransportError as error:
        raise Unchecked(f"Google cannot be reached: {_reason(error)}") from None
    except (
        exceptions.DefaultCredentialsError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        # The later ones are what a file of another form leads to.
        said = (
            "there are none"
            if "were not found" in str(error)
            else f"they cannot be read: {_short(error)}"
        )
        raise Missing(said, login) from None
    except exceptions.GoogleAuthError as error:
        raise Missing(f"they are refused, or have expired: {_short(error)}", login) from None
    if isinstance(found, Credentials) and not found.quota_project_id:
        mend = f"gcloud auth application-default set-quota-project {project}"
        raise Missing("no project is named that pays for what they ask", mend)
    return found, who(found)


def who(found: Any) -> str:
    """Whose credentials these are, as far as that can be told."""
    import requests
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import AuthorizedSession

    named = getattr(found, "service_account_email", "") or getattr(found, "account", "")
    if "@" not in (named or ""):
        try:
            named = AuthorizedSession(found).get(WHO, timeout=CALL).json().get("email")
        except (requests.exceptions.RequestException, GoogleAuthError, ValueError, AttributeError):
            named = ""
    return named or "there are some; whose is not told"


# ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Rest:
    """Asks with these credentials; from many threads at once, each with a session of its own."""

    def __init__(self, found: Any, project: str) -> None:
        self.credentials, self.project = found, project
        self._own = threading.local()

    def ask(
        self, service: str, path: str, query: Mapping[str, Any] | None = None, body: Any = None
    ) -> dict[str, Any]:
        """Call an API once: GET, or POST if there is a body; returns its JSON.

        Raises:
            Refused: the API said no.
            Unchecked: it is off, or gave no good answer.
        """
        import requests
        from google.auth.exceptions import GoogleAuthError

        method = "GET" if body is None else "POST"
        try:
            answer = self._session(service).request(
                method, address(service) + path, params=query, json=body, timeout=CALL
            )
        except requests.exceptions.Timeout:
            raise Unchecked(f"{service} did not answer within {CALL:.0f} s") from None
        except (requests.exceptions.RequestException, GoogleAuthError) as error:
            raise Unchecked(f"{service} cannot be reached: {_reason(error)}") from None
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.status_code == 200 and isinstance(content, dict):
            return content
        message = _message(content) or f"answer {answer.status_code}"
        if answer.status_code >= 500 or answer.status_code in (200, 429):
            raise Unchecked(f"{service} says: {message}")
        if "is disabled" in message:  # it has not been used in the project, or it is disabled
            api = f"{service}.googleapis.com"
            raise Unchecked(f"{api} is off. Type: {enable([api], self.project)}")
        raise Refused(answer.status_code, message)

    def lacking(self, service: str, path: str, wanted: Sequence[str]) -> list[str]:
        """Those of the wanted permissions that you do not have there.

        Raises:
            Refused, Unchecked: see `ask`.
        """
        question = {"permissions": list(wanted)}
        answer = (
            self.ask(service, path, question)
            if service == "storage"
            else self.ask(service, path, body=question)
        )
        return [
            permission for permission in wanted if permission not in answer.get("permissions", [])
        ]

    def _session(self, service: str) -> Any:
        import requests
        from google.auth.transport.requests import AuthorizedSession

        name = "google" if is_google(service) else "other"
        if not hasattr(self._own, name):
            setattr(
                self._own,
                name,
                AuthorizedSession(self.credentials) if name == "google" else requests.Session(),
            )
        return getattr(self._own, name)


def _message(content: Any) -> str:
    """What an error in Google's form says, in one line."""
    error = content.get("error") if isinstance(content, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return _short(said or "").rstrip(".")


def _reason(error: Exception) -> str:
    """The innermost reason of a failed connection."""
    return next((text for key, text in NETWORK.items() if key in str(error)), _short(error))


def _short(said: object) -> str:
    """In one line, which is not too long."""
    line = " ".join(str(said).split())
    return line if len(line) <= 250 else f"{line[:250]} …"
