"""Google Cloud's APIs as this project calls them: each call has a deadline, those that may be repeated are, and an error
says what to type.

gcloud's variable CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM names another server for Vertex AI, and STORAGE_EMULATOR_HOST
one for Cloud Storage; no credentials are looked for then. Google's packages are imported where they are used: they take a
second, and a mistake should be told sooner.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from core.errors import UserError

DEADLINE = 60.0  # seconds for one call
PATIENCE = 300.0  # seconds for a call with all its repetitions
WATCH = 3600.0  # seconds for which what runs there is not given up while nobody answers
LONGEST_OPERATION = 3600.0  # seconds for a long operation, such as the deployment of a model
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

        return kind(
            client_options={"api_endpoint": override},
            transport="rest",
            credentials=AnonymousCredentials(),
        )
    try:
        return kind(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})
    except DefaultCredentialsError:
        raise UserError(
            "there are no credentials. Type: gcloud auth application-default login"
        ) from None


def call(
    method: Callable[..., Any],
    request: Any,
    what: str,
    *,
    repeatable: bool = True,
    patience: float | None = None,
) -> Any:
    """Call a client's method with a deadline; again, with longer and longer waits, if it may be repeated.

    Args:
        what: what is attempted, for the message: "starting the job".
        repeatable: False for what must not happen twice; see `once`.
        patience: seconds for all repetitions together; otherwise PATIENCE.

    Raises:
        ApiError: it was refused, or not answered in time.
    """
    from google.api_core import retry

    limit = PATIENCE if patience is None else patience
    again = retry.Retry(
        predicate=is_transient,
        initial=FIRST_WAIT,
        maximum=LONGEST_WAIT,
        multiplier=2.0,
        timeout=limit,
    )
    try:
        return method(
            request=request, timeout=min(DEADLINE, limit), retry=again if repeatable else None
        )
    except Exception as error:
        raise explain(error, what) from error


def cancel(method: Callable[..., Any], name: str, what: str, patience: float | None = None) -> bool:
    """Ask for the end of what runs; False if it has ended already, or there is none.

    Raises:
        ApiError: it was refused, or nobody answers.
    """
    try:
        call(method, {"name": name}, what, patience=patience)
    except ApiError as error:
        if error.code not in {400, 404, 409}:
            raise
        return False
    return True


def once(find: Callable[[], Found | None], create: Callable[[], Found]) -> Found:
    """Make something that must not be made twice: look whether it is there, make it, and after a lost answer look again.

    Raises:
        ApiError: it was refused, or PATIENCE has ended since it was first attempted; to look may take its time.
    """
    began, wait = None, FIRST_WAIT
    while True:
        found = find()
        if found is not None:
            return found
        began = began or time.monotonic()
        try:
            return create()
        except ApiError as error:
            already = error.code == 409
            if not (error.transient or already) or time.monotonic() - began > PATIENCE:
                raise
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def finish(operation: Any, what: str) -> Any:
    """Wait for a long operation, and return its result. What fails on Google's side is not tried again.

    Raises:
        ApiError: it failed, or took longer than LONGEST_OPERATION.
    """
    from google.api_core import retry

    again = retry.Retry(
        predicate=is_transient,
        initial=FIRST_WAIT,
        maximum=LONGEST_WAIT,
        multiplier=2.0,
        timeout=PATIENCE,
    )
    try:
        return operation.result(timeout=LONGEST_OPERATION, retry=again)
    except Exception as error:
        told = explain(error, what)
        raise ApiError(str(told), told.code, transient=False) from error


def going_on(service: Any, name: str) -> list[Any]:
    """The long operations on a resource that are not done, whoever began them."""
    found, request = [], {"name": name}
    while True:
        try:
            page = call(service.list_operations, request, "looking for what goes on")
        except ApiError as error:
            if error.code == 404:  # there is no such resource yet
                return []
            raise
        found += [operation for operation in page.operations if not operation.done]
        if not page.next_page_token:
            return found
        request = {"name": name, "page_token": page.next_page_token}


def outwait(service: Any, name: str, what: str) -> bool:
    """Wait until all that goes on on a resource has ended, well or not; returns whether anything did.

    What was begun before an answer was lost, or before its process died, comes about all the same.

    Raises:
        ApiError: it took longer than LONGEST_OPERATION.
    """
    operations, began, wait = going_on(service, name), time.monotonic(), FIRST_WAIT
    for operation in operations:
        while not call(service.get_operation, {"name": operation.name}, what).done:
            if time.monotonic() - began > LONGEST_OPERATION:
                raise ApiError(
                    f"{what} failed: {operation.name} does not end. Type the same again later.",
                    0,
                    transient=False,
                )
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
    return bool(operations)


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError

    kinds = (
        exceptions.TooManyRequests,
        exceptions.InternalServerError,
        exceptions.Unknown,
        exceptions.BadGateway,
        exceptions.ServiceUnavailable,
        exceptions.GatewayTimeout,
        exceptions.RetryError,
        requests.exceptions.ConnectionError,
        requests.exceptions.Timeout,
        requests.exceptions.ChunkedEncodingError,
        TransportError,
    )
    return isinstance(error, kinds) and not is_quota(str(error)) and not is_stock_out(str(error))


def is_quota(message: str) -> bool:
    """Whether a refusal is about a quota of machines: waiting a little does not help, as it does with calls per minute."""
    about_quota = re.search(r"quota", message, re.IGNORECASE) and re.search(
        r"exceed|exhaust|limit", message, re.IGNORECASE
    )
    return bool(about_quota) and not re.search(r"per (second|minute)", message, re.IGNORECASE)


def is_stock_out(message: str) -> bool:
    """Whether a refusal says that Google has no such machine to spare just now."""
    return bool(
        re.search(
            r"stock.?out|resource.?pool.?exhausted|not have enough (resources|capacity)|"
            r"(resources|capacity) (is|are|currently) (insufficient|unavailable)|insufficient (resources|capacity)",
            message,
            re.IGNORECASE,
        )
    )


# What Google says → what a person can do.
CAUSES = {
    r"SERVICE_DISABLED|has not been used in project|API is disabled": (
        "an API is off. Type: gcloud services enable aiplatform.googleapis.com storage.googleapis.com "
        "artifactregistry.googleapis.com"
    ),
    r"actAs|iam\.serviceAccounts": (
        "you may not act as that service account. Type: gcloud iam service-accounts add-iam-policy-binding ACCOUNT "
        "--member=user:YOU --role=roles/iam.serviceAccountUser"
    ),
    r"UNAUTHENTICATED|invalid_grant|reauth|\b401\b": "your credentials have expired. Type: gcloud auth application-default login",
    r"kms|cryptoKey": "the key cannot be used. `make doctor LEVEL=2` says which account lacks it",
    r"bucket does not exist|No such bucket": "the bucket is not there. The README of level_1_pipeline says how to make one",
    r"permission|PERMISSION_DENIED|\b403\b": (
        "you lack a right. `gcloud auth list` shows who you are; ask for roles/aiplatform.user in this project"
    ),
    r"image.*(not found|does not exist|not exist)|MANIFEST_UNKNOWN": (
        "the image is not in the registry. Type: make containers PUSH=1"
    ),
    r"(location|region).*(not supported|not found|invalid|mismatch)": (
        "Vertex AI is not offered there. Choose another cloud.region in project.yaml"
    ),
}
LONGEST = 400  # characters of what Google said that are shown


def explain(error: Exception, what: str) -> ApiError:
    """An error of Google's packages as one line: what was attempted, what they said, what to do."""
    error = getattr(error, "cause", None) or error  # the last of many attempts says why
    said = " ".join(str(getattr(error, "message", None) or error).split()) or type(error).__name__
    said = re.sub(r"^[A-Z]+ https?://\S+: ", "", said)  # the address tells nobody anything
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]} …"
    code = int(getattr(error, "code", None) or 0)
    if is_quota(said):
        advice = "a quota is used up. Another region or GPU may have some; `make doctor LEVEL=1` names the quota, and its page"
    elif is_stock_out(said):
        advice = "Google has no such machine to spare just now. Try later, or another job: `make gpu-jobs` lists them"
    elif is_transient(error):
        unanswered = "no good answer came" if code else "nobody answered; is there a network?"
        advice = f"{unanswered}{'.' if code else ''} Type the same again: nothing is started twice"
    else:
        advice = next(
            (
                advice
                for pattern, advice in CAUSES.items()
                if re.search(pattern, f"{code} {said}", re.IGNORECASE)
            ),
            "",
        )
    advice = f" {advice[0].upper()}{advice[1:]}." if advice else ""
    return ApiError(f"{what} failed: {said.rstrip('.')}.{advice}", code, is_transient(error))


# ── labels ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def labels(wanted: Mapping[str, str]) -> dict[str, str]:
    """Labels as Google takes them: lower case letters, digits, - and _, at most 63 characters; a key begins with a letter.

    What does not fit becomes "-"; a label without a value is left out.
    """
    fitting = {label(key).lstrip("-_0123456789"): label(value) for key, value in wanted.items()}
    return {key: value for key, value in fitting.items() if key and value}


def label(text: str) -> str:
    """A label's value, made to fit."""
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower())[:63].strip("-")
