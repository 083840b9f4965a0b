"""Call Google Cloud APIs: deadlines, retries, long-running operations, error hints.

If CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM is set, Vertex AI calls go to that address without
credentials.
"""

# Google's packages are imported inside functions: loading them takes a second, and usage errors
# should appear first.

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from core.errors import UserError

# Seconds
DEADLINE = 60.0  # one call
RETRY_TIMEOUT = 300.0  # one call with all its retries
WATCH = 3600.0  # one poll of a job with its retries: the job outlives an outage
OPERATION_TIMEOUT = 3600.0  # one long-running operation, such as a deployment
FIRST_WAIT, LONGEST_WAIT = 0.2, 20.0  # between retries, doubled each time

LONGEST_MESSAGE = 400  # characters
LOGIN = "Run `gcloud auth application-default login`."
NO_CREDENTIALS = f"no Google Cloud credentials. {LOGIN}"

# Resource quotas only: a rate limit (per second or minute) is transient and retried.
QUOTA = r"(?=.*quota)(?=.*(exceed|exhaust|limit))(?!.*per (second|minute))"
STOCK_OUT = (
    r"stock.?out|resource.?pool.?exhausted|not have enough (resources|capacity)|"
    r"(resources|capacity) (is|are|currently) (insufficient|unavailable)|"
    r"insufficient (resources|capacity)"
)
# Pattern in "STATUS message" → hint. The first match wins, so the order matters.
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
        code: HTTP status, or 0 without a response.
        transient: True if a retry may succeed. The failed call may still have taken effect.
    """

    def __init__(self, message: str, code: int, transient: bool) -> None:
        super().__init__(message)
        self.code, self.transient = code, transient


def client(service: str, region: str) -> Any:
    """Create a Vertex AI client, for example client("JobService", "europe-west4")."""
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
    """Return a policy that retries transient errors with exponential backoff.

    `timeout` is in seconds, RETRY_TIMEOUT by default.
    """
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
    """Call a client method with a deadline, and retry it if it is repeatable.

    Args:
        what: the action, for error messages, such as "starting the job".
        repeatable: False for calls that are not idempotent; see `get_or_create`.
        timeout: seconds for all attempts, RETRY_TIMEOUT by default.
    """
    timeout = RETRY_TIMEOUT if timeout is None else timeout
    retry = retry_policy(timeout) if repeatable else None
    try:
        return method(request=request, timeout=min(DEADLINE, timeout), retry=retry)
    except Exception as error:
        raise explain(error, what) from error


def cancel(method: Callable[..., Any], name: str, what: str, timeout: float | None = None) -> bool:
    """Cancel a job; return False if it has already finished or does not exist."""
    try:
        call(method, {"name": name}, what, timeout=timeout)
    except ApiError as error:
        if error.code not in {400, 404, 409}:
            raise
        return False
    return True


def get_or_create(find: Callable[[], T | None], create: Callable[[], T]) -> T:
    """Return an existing resource, or create it although the create call is not idempotent."""
    # After a lost response the resource may exist, so every retry looks it up first.
    start, wait = None, FIRST_WAIT
    while True:
        resource = find()
        if resource is not None:
            return resource
        # Not from the beginning: `find` may have waited for an earlier operation.
        start = start or time.monotonic()
        try:
            return create()
        except ApiError as error:
            # 409: it may exist by now, and then the next `find` returns it.
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
        # The operation itself failed. Marked as permanent, so `get_or_create` does not repeat it.
        raise ApiError(str(failure), failure.code, transient=False) from error


def pending_operations(service: Any, name: str) -> list[Any]:
    """List the unfinished long-running operations on a resource, from all processes."""
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
    """Wait for the pending operations on a resource; return whether there were any."""
    # An operation continues after a lost response, or after the process that started it has died.
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
    """Return whether a retry of the same call may succeed."""
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
    # An exhausted quota is also reported as 429, but retries do not help.
    transient = isinstance(error, kinds) or status(error) in {429, 500, 502, 503, 504}
    return transient and not is_quota(str(error)) and not is_stock_out(str(error))


def is_quota(message: str) -> bool:
    """Return whether an error message reports an exhausted resource quota."""
    return bool(re.match(QUOTA, message, re.IGNORECASE | re.DOTALL))


def is_stock_out(message: str) -> bool:
    """Return whether an error message reports a lack of machines of this type."""
    return bool(re.search(STOCK_OUT, message, re.IGNORECASE))


def status(error: Any) -> int:
    """Return the HTTP status of an error, or 0 without a response."""
    response = getattr(error, "response", None)
    return int(getattr(error, "code", None) or getattr(response, "status_code", None) or 0)


def error_message(error: Any) -> str:
    """Extract Google's error message as one line, without the method and URL of the request."""
    try:
        text = error.response.json()["error"]["message"]
    except (AttributeError, ValueError, KeyError, TypeError):
        text = getattr(error, "message", None) or str(error) or type(error).__name__
    text = re.sub(r"^[A-Z]+ https?://\S+: ", "", " ".join(str(text).split()))
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} …"


def explain(error: Any, what: str) -> ApiError:
    """Convert a Google client error to an ApiError: what failed, Google's message, a hint."""
    error = getattr(error, "cause", None) or error  # RetryError wraps the last attempt's error
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
    """Convert to valid resource labels: keys start with a letter, empty labels are dropped."""
    fitted = {label(key).lstrip("-_0123456789"): label(value) for key, value in values.items()}
    return {key: value for key, value in fitted.items() if key and value}


def label(text: str) -> str:
    """Convert to a valid label value: at most 63 lower-case letters, digits, - and _."""
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower())[:63].strip("-")


def report(line: str) -> None:
    """Print a progress line to stderr."""
    print(line, file=sys.stderr, flush=True)
