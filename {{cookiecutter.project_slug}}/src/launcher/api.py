"""Google Cloud's APIs as this project calls them: each call has a deadline, those that may be repeated are, and an error
says what to type.

gcloud's variable CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM names another server for Vertex AI, and STORAGE_EMULATOR_HOST
one for Cloud Storage; no credentials are looked for then. Google's packages are imported where they are used: they take a
second, and a mistake should be told sooner.
"""

import os
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from project.errors import UserError

DEADLINE = 60.0  # seconds for one call
PATIENCE = 300.0  # seconds for a call with all its repetitions
FIRST_WAIT, LONGEST_WAIT = 0.2, 20.0  # seconds between repetitions; each wait is twice the last

Found = TypeVar("Found")


class ApiError(UserError):
    """A call that Google refused, or that nobody answered.

    Attributes:
        code: the HTTP status; 0 when there was no answer.
        transient: the same call may succeed later; it is not known whether this one did.
    """

    def __init__(self, message: str, code: int, transient: bool) -> None:
        super().__init__(message)
        self.code, self.transient = code, transient


def client(service: str, region: str) -> Any:
    """A client of Vertex AI: client("JobService", "europe-west4").

    Raises:
        UserError: there are no credentials.
    """
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import aiplatform_v1

    kind = getattr(aiplatform_v1, f"{service}Client")
    override = os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", "").rstrip("/")
    if override:
        from google.auth.credentials import AnonymousCredentials

        return kind(client_options={"api_endpoint": override}, transport="rest", credentials=AnonymousCredentials())
    try:
        return kind(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})
    except DefaultCredentialsError:
        raise UserError("there are no credentials. Type: gcloud auth application-default login") from None


def call(method: Callable[..., Any], request: Any, what: str, *, repeatable: bool = True) -> Any:
    """Call a client's method with a deadline; again, with longer and longer waits, if it may be repeated.

    Args:
        what: what is attempted, for the message: "starting the job".
        repeatable: False for what must not happen twice; see `once`.

    Raises:
        ApiError: it was refused, or not answered in time.
    """
    from google.api_core import retry

    again = retry.Retry(predicate=is_transient, initial=FIRST_WAIT, maximum=LONGEST_WAIT, multiplier=2.0, timeout=PATIENCE)
    try:
        return method(request=request, timeout=DEADLINE, retry=again if repeatable else None)
    except Exception as error:
        raise explain(error, what) from error


def once(find: Callable[[], Found | None], create: Callable[[], Found]) -> Found:
    """Make something that must not be made twice: look whether it is there, make it, and after a lost answer look again.

    Raises:
        ApiError: it was refused, or PATIENCE has ended.
    """
    began, wait = time.monotonic(), FIRST_WAIT
    while True:
        found = find()
        if found is not None:
            return found
        try:
            return create()
        except ApiError as error:
            already = error.code == 409
            if not (error.transient or already) or time.monotonic() - began > PATIENCE:
                raise
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError

    kinds = (
        exceptions.TooManyRequests,
        exceptions.InternalServerError,
        exceptions.BadGateway,
        exceptions.ServiceUnavailable,
        exceptions.GatewayTimeout,
        exceptions.RetryError,
        requests.exceptions.ConnectionError,
        requests.exceptions.Timeout,
        requests.exceptions.ChunkedEncodingError,
        TransportError,
    )
    return isinstance(error, kinds) and not is_quota(str(error))


def is_quota(message: str) -> bool:
    """Whether a refusal is about a quota: waiting does not help."""
    return bool(re.search(r"quota", message, re.IGNORECASE) and re.search(r"exceed|exhaust|limit", message, re.IGNORECASE))


# What Google says → what a person can do.
CAUSES = {
    r"SERVICE_DISABLED|has not been used in project|is disabled": (
        "an API is off. Type: gcloud services enable aiplatform.googleapis.com storage.googleapis.com "
        "artifactregistry.googleapis.com"
    ),
    r"actAs|iam\.serviceAccounts": (
        "you may not act as that service account. Type: gcloud iam service-accounts add-iam-policy-binding ACCOUNT "
        "--member=user:YOU --role=roles/iam.serviceAccountUser"
    ),
    r"permission|PERMISSION_DENIED|\b403\b": (
        "you lack a right. `gcloud auth list` shows who you are; ask for roles/aiplatform.user in this project"
    ),
    r"UNAUTHENTICATED|invalid_grant|reauth|\b401\b": "your credentials have expired. Type: gcloud auth application-default login",
    r"bucket does not exist|No such bucket": "the bucket is not there. The README of level_1_pipeline says how to make one",
    r"kms|cryptoKey": "the key cannot be used. `make doctor LEVEL=2` says which account lacks it",
}


def explain(error: Exception, what: str) -> ApiError:
    """An error of Google's packages as one line: what was attempted, what they said, what to do."""
    said = " ".join(str(getattr(error, "message", None) or error).split()) or type(error).__name__
    said = said if len(said) <= 400 else f"{said[:400]} …"
    code = int(getattr(error, "code", 0) or 0)
    if is_quota(said):
        advice = "a quota is used up. Another region or GPU may have some; `gcloud compute regions describe REGION` shows it"
    elif is_transient(error):
        advice = "no good answer came. Type the same again: nothing is started twice"
    else:
        advice = next((advice for pattern, advice in CAUSES.items() if re.search(pattern, f"{code} {said}", re.IGNORECASE)), "")
    advice = f" {advice[0].upper()}{advice[1:]}." if advice else ""
    return ApiError(f"{what} failed: {said.rstrip('.')}.{advice}", code, is_transient(error))
