"""The trigger function: receives a Pub/Sub message and starts a run of the published pipeline.

Messages are requests (from a build, a person or the scheduler) and notifications of Cloud Storage
about files below `incoming`. Pub/Sub delivers at least once, in any order, and again after each
response that is not a success. The function keeps no state: the event is in the run's id, and
Vertex AI refuses a second run with the same id.

    200  a run was started, now or before; or nothing is to be started, and the log says why
    429  not yet: the batch window is still open
    400  invalid message; after its last attempt Pub/Sub moves it to the dead-letter topic
    503  another failure; the same message may succeed later

`decide` derives the run from the message; `Function` starts it.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from core.errors import UserError
from gcp import pipeline_run, pipeline_version
from gcp.pipeline_run import RunRequest, Target
from gcp.pipeline_version import NotPublished, PipelineVersion
from level_2_cicd.trigger_function_container.request import (
    DeletedObject,
    InvalidMessage,
    Notification,
    PubsubMessage,
    Push,
    RunMessage,
    is_object_address,
    merge_parameters,
    parse,
    parse_parameters,
)

TIMEOUT = 20.0  # seconds for a Vertex AI call with its retries; then Pub/Sub redelivers
SCHEDULE = "schedule"  # the event in every message of Cloud Scheduler
FINALIZE, ARCHIVE, DELETE = "OBJECT_FINALIZE", "OBJECT_ARCHIVE", "OBJECT_DELETE"
MAX_LOGGED = 500  # characters of a message's own text
MINUTE = "%Y-%m-%dT%H:%MZ"


@dataclass(frozen=True)
class TriggerConfig:
    """What Terraform sets in the environment variables.

    Attributes:
        templates: gs:// folder of the published versions.
        incoming: gs:// folder whose new files start a run.
        batch_window_minutes: files that arrive within this time start one run; 0: one run per file.
        source: data.source if it is in a bucket, used by every run; empty: train on each new file.
    """

    target: Target
    templates: str
    incoming: str
    batch_window_minutes: int = 0
    source: str = ""


@dataclass(frozen=True)
class Decision:
    """The outcome for a message.

    Attributes:
        run: the run to start; None: none, because of `why`.
        wait: redeliver later.
    """

    event: str
    run: RunRequest | None = None
    why: str = ""
    wait: bool = False


Find = Callable[[str], PipelineVersion]
FOLDER = (r"gs://[a-z0-9][^\s]+[^\s/]", "a gs:// address without a trailing slash")
RULES = {
    "PROJECT": (r"[a-z][a-z0-9:.-]{4,60}[a-z0-9]", "a project id"),
    "REGION": (r"[a-z]+-[a-z]+\d+", "a region, such as europe-west4"),
    "PIPELINE_ROOT": FOLDER,
    "TEMPLATES": FOLDER,
    "SERVICE_ACCOUNT": (r"([^@\s]+@[^@\s]+)?", "NAME@PROJECT.iam.gserviceaccount.com"),
    "KMS_KEY": (
        r"(projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+)?",
        "projects/…/cryptoKeys/NAME, or empty",
    ),
    "INCOMING": (r"gs://[a-z0-9][^\s/]+/[^\s]*[^\s/]", "a folder in a bucket"),
    "NETWORK_ATTACHMENT": (
        r"(projects/[^/]+/regions/[^/]+/networkAttachments/[^/]+)?",
        "projects/…/networkAttachments/NAME, or empty",
    ),
    "DATA_SOURCE": (r"(gs://[a-z0-9][^\s/]+/[^\s]+)?", "a gs:// address, or empty"),
    "BATCH_WINDOW_MINUTES": (r"\d{1,3}", "a number of minutes; 0: no batching"),
}


def read_config(variables: Mapping[str, str]) -> TriggerConfig:
    """Read the environment variables; the error names each invalid one."""
    values = {name: variables.get(name, "") for name in RULES}
    problems = [
        f"{name}='{values[name]}': expected {expected}."
        for name, (pattern, expected) in RULES.items()
        if not re.fullmatch(pattern, values[name])
    ]
    if problems:
        raise UserError(
            "invalid environment variables of the function:\n  " + "\n  ".join(problems)
        )
    target = Target(
        project=values["PROJECT"],
        region=values["REGION"],
        root=values["PIPELINE_ROOT"],
        service_account=values["SERVICE_ACCOUNT"],
        key=values["KMS_KEY"],
        network_attachment=values["NETWORK_ATTACHMENT"],
    )
    return TriggerConfig(
        target=target,
        templates=values["TEMPLATES"],
        incoming=values["INCOMING"],
        batch_window_minutes=int(values["BATCH_WINDOW_MINUTES"]),
        source=values["DATA_SOURCE"],
    )


def decide(message: PubsubMessage, config: TriggerConfig, now: datetime, find: Find) -> Decision:
    """Derive the run from a message.

    Args:
        find: returns a published version; "" for the current one.
    """
    if "eventType" in message.attributes:
        return decide_notification(message, config, now, find)
    request = parse(RunMessage, message.data, "request")
    changes = parse_parameters(request.parameters)
    event = request.event
    if event == SCHEDULE:
        # Scheduled messages are all the same: the minute tells them apart.
        event = f"{SCHEDULE} {message.published:{MINUTE}}"
    try:
        version = find(request.version)
    except NotPublished as error:
        if request.version:
            raise InvalidMessage(str(error)) from None
        raise
    return Decision(event, run_request(version, event, changes, request.actor, request.attempt))


def decide_notification(
    message: PubsubMessage, config: TriggerConfig, now: datetime, find: Find
) -> Decision:
    """Derive the run from a notification of Cloud Storage."""
    notification = parse(Notification, message.attributes, "notification of Cloud Storage")
    address = f"gs://{notification.bucket}/{notification.name}"
    event = f"data {address.removeprefix('gs://')}#{notification.generation} {notification.kind}"
    # Cloud Storage may notify late and twice: the time of the event counts.
    happened = notification.happened or message.published
    if why := reason_to_ignore(notification, address, config.incoming):
        return Decision(event, why=why)
    if notification.kind == DELETE and was_noncurrent(message.data, happened):
        return Decision(event, why="a noncurrent version was deleted; the dataset is unchanged")
    if config.batch_window_minutes:
        if not config.source:
            raise InvalidMessage(
                "cloud.events.batch_window_minutes needs one dataset: set data.source in project.yaml "
                "to a gs:// address, or batch_window_minutes to 0."
            )
        start, end = batch_window(happened, config.batch_window_minutes)
        event = f"data window {start:{MINUTE}}"
        if start > now + timedelta(days=1):
            raise InvalidMessage(f"eventTime is in the future: {start:{MINUTE}}.")
        if now < end:
            return Decision(event, why=f"files are batched until {end:{MINUTE}}", wait=True)
    elif not config.source and notification.kind != FINALIZE:
        return Decision(event, why=f"{address} was deleted: nothing to train on")
    return Decision(event, run_request(find(""), event, {"csv": config.source or address}, "data"))


def reason_to_ignore(notification: Notification, address: str, incoming: str) -> str:
    """Say why a notification starts nothing; empty if it may."""
    if notification.kind not in (FINALIZE, ARCHIVE, DELETE):
        return f"{notification.kind} changes no data"
    if notification.kind != FINALIZE and notification.overwritten_by:
        return "it was overwritten; the new object's own notification starts the run"
    if not address.startswith(f"{incoming}/"):
        return f"{address} is not below {incoming}"
    if not address.endswith(".csv"):
        return f"{address} does not end in .csv"
    return "" if is_object_address(address) else f"{address} is not a valid file name"


def was_noncurrent(data: bytes, happened: datetime) -> bool:
    """Whether a deleted version had been overwritten or deleted before, in a versioned bucket."""
    try:
        deleted = parse(DeletedObject, data, "object").deleted
    except UserError:
        return False
    # Both times are the same for an object that was current until now.
    return happened - deleted > timedelta(minutes=1)


def batch_window(happened: datetime, minutes: int) -> tuple[datetime, datetime]:
    """Start and end of the window that contains a time."""
    length = timedelta(minutes=minutes)
    start = happened - (happened - datetime(1970, 1, 1, tzinfo=UTC)) % length
    try:
        return start, start + length
    except OverflowError:
        raise InvalidMessage(f"eventTime is in the future: {start:{MINUTE}}.") from None


def run_request(
    version: PipelineVersion, event: str, changes: Mapping[str, Any], actor: str, attempt: int = 1
) -> RunRequest:
    """Request a run of a version with changed parameters."""
    try:
        values = merge_parameters(version, changes)
    except UserError as error:
        raise InvalidMessage(str(error)) from None
    labels = {**version.labels, "actor": actor}
    return RunRequest(version.spec, values, event, version.address, attempt, labels=labels)


@dataclass(frozen=True)
class Function:
    """Handles deliveries; see the module's text for its responses."""

    config: TriggerConfig

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> "Function":
        """Read the configuration, and import Google's packages before the first request."""
        function = cls(read_config(variables))
        import google.cloud.aiplatform_v1
        import google.cloud.storage  # noqa: F401

        from gcp import client  # noqa: F401

        return function

    def handle(self, method: str, body: bytes) -> tuple[str, int]:
        """Handle a delivery and log the outcome as one line."""
        record: dict[str, Any] = {}
        if method != "POST":
            return log("WARNING", f"{method[:10]} is not a Pub/Sub delivery", 405, record)
        try:
            return self._deliver(body, record)
        except InvalidMessage as error:
            return log("ERROR", f"invalid message: {error}", 400, record)
        except UserError as error:
            # An invalid argument stays invalid; permissions and quota may be granted meanwhile.
            invalid = getattr(error, "code", 0) == 400 and not getattr(error, "transient", False)
            severity, status = ("ERROR", 400) if invalid else ("WARNING", 503)
            return log(severity, str(error), status, record)
        except Exception as error:
            message = f"internal error: {error!r}\n{traceback.format_exc()}"
            return log("CRITICAL", message, 500, record)

    def _deliver(self, body: bytes, record: dict[str, Any]) -> tuple[str, int]:
        message = parse(Push, body, "push").message
        record["messageId"] = message.id
        decision = decide(message, self.config, datetime.now(UTC), self._find)
        record["event"] = decision.event
        if decision.run is None:
            return log("INFO", decision.why, 429 if decision.wait else 200, record)
        try:
            job = pipeline_run.request(decision.run, self.config.target)
        except UserError as error:
            raise InvalidMessage(str(error)) from None
        record["run"] = job["pipelineJobId"]
        run = pipeline_run.submit(job, TIMEOUT)
        record["run"] = run.name
        if run.new:
            return log("NOTICE", f"started {run.link}", 200, record)
        note = "" if run.same else " with another template or other parameters; a rerun: attempt 2"
        return log("INFO", f"already started{note}: {run.link}", 200, record)

    def _find(self, version: str) -> PipelineVersion:
        return pipeline_version.read(self.config.templates, version)


def log(severity: str, message: str, status: int, record: Mapping[str, Any]) -> tuple[str, int]:
    """Write one line for Cloud Logging; returns the response."""
    fields = {
        key: value[:MAX_LOGGED] if isinstance(value, str) else value
        for key, value in record.items()
    }
    line = {"severity": severity, "message": message[: 20 * MAX_LOGGED], "status": status, **fields}
    # One write call, so that lines of several threads do not mix.
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    return f"{message[:MAX_LOGGED]}\n", status
