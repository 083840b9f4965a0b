"""Call Google Cloud APIs: deadlines, retries, long-running operations, error hints.

CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM replaces the address of Vertex AI; no credentials then.
"""

# Google's packages are imported where they are used: loading them takes a second,
# and usage errors should appear first.

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from core.errors import UserError

# Seconds.
DEADLINE = 60.0  # one call
RETRY_TIMEOUT = 300.0  # one call with all its retries
WATCH = 3600.0  # the same while watching a job, which outlives an outage
OPERATION_TIMEOUT = 3600.0  # a long-running operation, such as a deployment
FIRST_WAIT, LONGEST_WAIT = 0.2, 20.0  # between retries; each wait is twice the last

LONGEST_MESSAGE = 400  # characters
LOGIN = "Run `gcloud auth application-default login`."
NO_CREDENTIALS = f"no Google Cloud credentials. {LOGIN}"

# A quota of machines; a quota of calls per minute is only a reason to retry.
QUOTA = r"(?=.*quota)(?=.*(exceed|exhaust|limit))(?!.*per (second|minute))"
STOCK_OUT = (
    r"stock.?out|resource.?pool.?exhausted|not have enough (resources|capacity)|"
    r"(resources|capacity) (is|are|currently) (insufficient|unavailable)|"
    r"insufficient (resources|capacity)"
)
# Pattern in "STATUS message" → hint; the first match counts.
HINTS = {
    QUOTA: "A quota is used up. Try another region or GPU; `make doctor LEVEL=1` names the quota.",
    STOCK_OUT: "Google has no such machine available now. Retry later, or choose another job:"
    " `make gpu-jobs` lists them.",
    r"SERVICE_DISABLED|has not been used in project|API is disabled": "An API is disabled. Run"
    " `gcloud services enable aiplatform.googleapis.com storage.googleapis.com"
    " artifactregistry.googleapis.com`.",
    r"actAs|iam\.serviceAccounts": "You may not act as that service account. Run"
    " `gcloud iam service-accounts add-iam-policy-binding ACCOUNT --member=user:YOU"
    " --role=roles/iam.serviceAccountUser`.",
    r"UNAUTHENTICATED|invalid_grant|reauth|\b401\b": f"The credentials have expired. {LOGIN}",
    r"kms|cryptoKey": "The key cannot be used; `make doctor LEVEL=2` names the account"
    " without access.",
    r"bucket does not exist|No such bucket": "`gcloud storage ls` lists the buckets;"
    " level_1_pipeline/README.md shows how to create one.",
    r"permission|PERMISSION_DENIED|\b403\b": "A permission is missing. `gcloud auth list` shows"
    " your account; ask for roles/aiplatform.user in this project and roles/storage.objectUser"
    " on its buckets.",
    r"image.*(not found|does not exist|not exist)|MANIFEST_UNKNOWN": "The image is not in the"
    " registry. Run `make containers PUSH=1`.",
    r"(location|region).*(not supported|not found|invalid|mismatch)": "Vertex AI is not available"
    " there. Choose another cloud.region in project.yaml.",
    r"checksum": "The transfer was corrupted; retry.",
    r"^400\b": "`make doctor LEVEL=1` checks the project.",
}

T = TypeVar("T")


class ApiError(UserError):
    """A failed API call.

    Attributes:
        code: HTTP status; 0 without a response.
        transient: a retry may succeed; whether this call took effect is unknown.
    """

    def __init__(self, message: str, code: int, transient: bool) -> None:
        super().__init__(message)
        self.code, self.transient = code, transient


def client(service: str, region: str) -> Any:
    """Create a Vertex AI client: client("JobService", "europe-west4")."""
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import aiplatform_v1

    create = getattr(aiplatform_v1, f"{service}Client")
    override = os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", "").rstrip("/")
    if override:
        return create(
            client_options={"api_endpoint": override},
            transport="rest",
            credentials=AnonymousCredentials(),
        )
    try:
        return create(client_options={"api_endpoint": f"{region}-aiplatform.googleapis.com"})
    except DefaultCredentialsError:
        raise UserError(NO_CREDENTIALS) from None


def retry_policy(timeout: float | None = None) -> Any:
    """Retry transient errors with exponential backoff, for RETRY_TIMEOUT by default."""
    from google.api_core import retry

    return retry.Retry(
        predicate=is_transient,
        initial=FIRST_WAIT,
        maximum=LONGEST_WAIT,
        multiplier=2.0,
        timeout=RETRY_TIMEOUT if timeout is None else timeout,
    )


def call(
    method: Callable[..., Any],
    request: Any,
    what: str,
    *,
    repeatable: bool = True,
    timeout: float | None = None,
) -> Any:
    """Call a client's method with a deadline, and retry it if it is repeatable.

    Args:
        what: the action, for the message: "starting the job".
        repeatable: False for calls that are not idempotent; see `get_or_create`.
        timeout: seconds for all attempts; RETRY_TIMEOUT by default.
    """
    timeout = RETRY_TIMEOUT if timeout is None else timeout
    retry = retry_policy(timeout) if repeatable else None
    try:
        return method(request=request, timeout=min(DEADLINE, timeout), retry=retry)
    except Exception as error:
        raise explain(error, what) from error


def cancel(method: Callable[..., Any], name: str, what: str, timeout: float | None = None) -> bool:
    """Cancel; False if already finished or not found."""
    try:
        call(method, {"name": name}, what, timeout=timeout)
    except ApiError as error:
        if error.code not in {400, 404, 409}:
            raise
        return False
    return True


def get_or_create(find: Callable[[], T | None], create: Callable[[], T]) -> T:
    """Create something at most once, although its creation is not idempotent.

    After a lost response, look for it before creating it again.
    """
    start, wait = None, FIRST_WAIT
    while True:
        resource = find()
        if resource is not None:
            return resource
        # From the first attempt: `find` may have waited for an earlier operation.
        start = start or time.monotonic()
        try:
            return create()
        except ApiError as error:
            retry = error.transient or error.code == 409
            if not retry or time.monotonic() - start > RETRY_TIMEOUT:
                raise
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def wait_for_operation(operation: Any, what: str) -> Any:
    """Wait for a long-running operation and return its result."""
    try:
        return operation.result(timeout=OPERATION_TIMEOUT, retry=retry_policy())
    except Exception as error:
        failure = explain(error, what)
        # The operation itself failed, so `get_or_create` must not repeat it.
        raise ApiError(str(failure), failure.code, transient=False) from error


def pending_operations(service: Any, name: str) -> list[Any]:
    """List the unfinished long-running operations on a resource, whichever process began them."""
    operations, request = [], {"name": name}
    while True:
        try:
            page = call(service.list_operations, request, "listing operations")
        except ApiError as error:
            if error.code == 404:  # the resource does not exist yet
                return []
            raise
        operations += [operation for operation in page.operations if not operation.done]
        if not page.next_page_token:
            return operations
        request = {"name": name, "page_token": page.next_page_token}


def wait_for_pending_operations(service: Any, name: str, what: str) -> bool:
    """Wait for the pending operations on a resource; return whether there were any.

    An operation goes on after a lost response or the death of the process that began it.
    """
    operations, start, wait = pending_operations(service, name), time.monotonic(), FIRST_WAIT
    for operation in operations:
        while not call(service.get_operation, {"name": operation.name}, what).done:
            if time.monotonic() - start > OPERATION_TIMEOUT:
                message = f"{what} failed: {operation.name} is still running. Retry later."
                raise ApiError(message, 0, transient=False)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
    return bool(operations)


def is_transient(error: Exception) -> bool:
    """Return whether the same call may succeed later."""
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError

    kinds = (
        exceptions.Unknown,
        exceptions.RetryError,
        ConnectionError,
        requests.exceptions.ConnectionError,
        requests.exceptions.Timeout,
        requests.exceptions.ChunkedEncodingError,
        TransportError,
    )
    transient = isinstance(error, kinds) or status(error) in {429, 500, 502, 503, 504}
    return transient and not is_quota(str(error)) and not is_stock_out(str(error))


def is_quota(message: str) -> bool:
    """Return whether a machine quota is exhausted, which a retry does not fix."""
    return bool(re.match(QUOTA, message, re.IGNORECASE | re.DOTALL))


def is_stock_out(message: str) -> bool:
    """Return whether Google has no such machine available now."""
    return bool(re.search(STOCK_OUT, message, re.IGNORECASE))


def status(error: Any) -> int:
    """Return an error's HTTP status; 0 without a response."""
    response = getattr(error, "response", None)
    return int(getattr(error, "code", None) or getattr(response, "status_code", None) or 0)


def error_message(error: Any) -> str:
    """Extract Google's own message on one line, without the request's address."""
    try:
        text = error.response.json()["error"]["message"]
    except (AttributeError, ValueError, KeyError, TypeError):
        text = getattr(error, "message", None) or str(error) or type(error).__name__
    text = re.sub(r"^[A-Z]+ https?://\S+: ", "", " ".join(str(text).split()))
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} …"


def explain(error: Any, what: str) -> ApiError:
    """Convert an error of Google's packages: what failed, Google's message, a hint."""
    error = getattr(error, "cause", None) or error  # a RetryError has the last attempt's error
    message, transient = error_message(error), is_transient(error)
    code = status(error)
    if transient and code:
        hint = "This may be temporary; retry, nothing is started twice."
    elif transient:
        hint = "No response; check the network and the proxy, then retry: nothing is started twice."
    else:
        text = f"{code} {message}"
        matches = (HINTS[key] for key in HINTS if re.search(key, text, re.IGNORECASE))
        hint = next(matches, "")
    return ApiError(f"{what} failed: {message.rstrip('.')}. {hint}".rstrip(), code, transient)


def labels(values: Mapping[str, str]) -> dict[str, str]:
    """Make labels valid, dropping empty ones. A key begins with a letter."""
    fitted = {label(key).lstrip("-_0123456789"): label(value) for key, value in values.items()}
    return {key: value for key, value in fitted.items() if key and value}


def label(text: str) -> str:
    """Make a label's value valid: lower case, digits, - and _, at most 63 characters."""
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower())[:63].strip("-")


def report(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)
