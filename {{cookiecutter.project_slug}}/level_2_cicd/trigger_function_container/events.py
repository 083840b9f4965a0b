"""The trigger function: a message of Pub/Sub comes in, and a run of the published pipeline is started, once for each event.

Messages are requests (from a build, a person, the scheduler; see level_2_cicd.trigger_function_container.request) and notifications of Cloud
Storage about the rows below `incoming`. Pub/Sub delivers each at least once, in any order, and again after every answer that
is no success; so nothing is kept here. What happened is in the run's id, and Vertex AI refuses a second run of that id.

    200  a run was started, or was already; or there is nothing to start, and the log says why
    429  not yet: the window that files are gathered in is still open
    400  this can never be a run; Pub/Sub moves it to the dead-letter topic after its last attempt
    503  something else failed; the same message may succeed later

`decide` says what a message means; it asks nobody but `find`, which knows what is published. `Function` does the rest.
level_2_cicd/trigger_function_container/main.py hands it to functions-framework.
"""

import base64
import binascii
import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from core.errors import UserError
from gcp import pipeline_run, pipeline_version
from gcp.pipeline_run import Submission, Target
from gcp.pipeline_version import NotPublished, Published
from level_2_cicd.trigger_function_container import request as request_message

PATIENCE = 20.0  # seconds for a call of Vertex AI with its repetitions: after that Pub/Sub brings the message again
SCHEDULE = "schedule"  # the words of a request of Cloud Scheduler, whose messages are all the same
FINALIZE, ARCHIVE, DELETE = "OBJECT_FINALIZE", "OBJECT_ARCHIVE", "OBJECT_DELETE"
LONGEST = 500  # characters of a message's own text that are logged


class Poison(UserError):
    """A message that can never be a run."""


@dataclass(frozen=True)
class Place:
    """Where runs are started, and by what.

    Attributes:
        templates: the gs:// folder of the published versions; incoming: that of the rows whose arrival starts a run.
        batch_window_minutes: files that arrive within so many minutes start one run together; 0: one each.
        source: the rows of every run, which project.yaml names in a bucket; empty: each file that comes is trained on.
    """

    target: Target
    templates: str
    incoming: str
    batch_window_minutes: int = 0
    source: str = ""


@dataclass(frozen=True)
class Message:
    """A message, as Pub/Sub pushed it."""

    identity: str
    published: datetime
    data: bytes
    attributes: Mapping[str, str]


@dataclass(frozen=True)
class Decision:
    """What becomes of a message.

    Attributes:
        event: what happened.
        run: what is started; None: nothing, because of `why`.
        wait: not now, but later.
    """

    event: str
    run: Submission | None = None
    why: str = ""
    wait: bool = False


Find = Callable[[str], Published]


# ── what it is told by its environment ──────────────────────────────────────────────────────────────────────────────
RULES = {
    "PROJECT": (r"[a-z][a-z0-9:.-]{4,60}[a-z0-9]", "a project's id"),
    "REGION": (r"[a-z]+-[a-z]+\d+", "a region, such as europe-west4"),
    "PIPELINE_ROOT": (r"gs://[a-z0-9][^\s]+[^\s/]", "a gs:// address without a slash at the end"),
    "TEMPLATES": (r"gs://[a-z0-9][^\s]+[^\s/]", "a gs:// address without a slash at the end"),
    "SERVICE_ACCOUNT": (
        r"([^@\s]+@[^@\s]+)?",
        "an address such as NAME@PROJECT.iam.gserviceaccount.com",
    ),
    "KMS_KEY": (
        r"(projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+)?",
        "projects/…/cryptoKeys/NAME, or nothing",
    ),
    "INCOMING": (
        r"gs://[a-z0-9][^\s/]+/[^\s]*[^\s/]",
        "a folder in a bucket, without a slash at the end",
    ),
    "NETWORK_ATTACHMENT": (
        r"(projects/[^/]+/regions/[^/]+/networkAttachments/[^/]+)?",
        "projects/…/networkAttachments/NAME, or nothing",
    ),
    "DATA_SOURCE": (
        r"(gs://[a-z0-9][^\s/]+/[^\s]+)?",
        "the address of rows in a bucket, or nothing",
    ),
    "BATCH_WINDOW_MINUTES": (r"\d{1,3}", "a number of minutes; 0: none are gathered"),
}


def read_place(variables: Mapping[str, str]) -> Place:
    """The place that the environment variables name; Terraform sets them.

    Raises:
        UserError: names each that is missing or wrong.
    """
    wrong = [
        f"{name}='{variables.get(name, '')}': wants {wanted}."
        for name, (pattern, wanted) in RULES.items()
        if not re.fullmatch(pattern, variables.get(name, ""))
    ]
    if wrong:
        raise UserError("the function's environment variables are wrong:\n  " + "\n  ".join(wrong))
    names = (
        "PROJECT",
        "REGION",
        "PIPELINE_ROOT",
        "SERVICE_ACCOUNT",
        "KMS_KEY",
        "NETWORK_ATTACHMENT",
    )
    target = Target(*(variables[name] for name in names))
    folders = variables["TEMPLATES"], variables["INCOMING"]
    return Place(target, *folders, int(variables["BATCH_WINDOW_MINUTES"]), variables["DATA_SOURCE"])


# ── what a message means ────────────────────────────────────────────────────────────────────────────────────────────
def unwrap(body: bytes) -> Message:
    """The message in the body of a push.

    Raises:
        Poison: there is none.
    """
    try:
        message = request_message.parse(body, "the push").get("message")
    except UserError as error:
        raise Poison(str(error)) from None
    if not isinstance(message, dict):
        raise Poison("the push holds no message.")
    identity, data, attributes = (
        message.get("messageId", ""),
        message.get("data", ""),
        message.get("attributes") or {},
    )
    texts = [identity, data, *attributes.values()] if isinstance(attributes, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise Poison("the push's message has fields of another kind than Pub/Sub's.")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Poison("the message's data are no base64.") from None
    return Message(
        identity, read_time(message.get("publishTime"), "publishTime"), content, attributes
    )


def read_time(text: Any, name: str) -> datetime:
    """A time as Google writes it: 2026-11-30T04:00:00.123Z.

    Raises:
        Poison: it is none.
    """
    # Google may write nine decimals; Python reads six.
    seconds = re.sub(r"\.\d{1,9}(?=Z|[+-])", "", text, count=1) if isinstance(text, str) else ""
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)", seconds, re.ASCII):
            raise ValueError
        return datetime.fromisoformat(seconds.replace("Z", "+00:00")).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Poison(f"{name} is no time: {str(text)[:40]!r}.") from None


def decide(
    message: Message, place: Place, fields: Mapping[str, type], now: datetime, find: Find
) -> Decision:
    """What a message means.

    Args:
        fields: of a request; see request_message.read_fields.
        find: a published version, by its name; "" for the current one.

    Raises:
        Poison: it can never be a run; says why.
        NotPublished: nothing is published yet.
        UserError: what is published cannot be read.
    """
    if "eventType" in message.attributes:
        return decide_data(message, place, now, find)
    return decide_request(message, fields, find)


def decide_request(message: Message, fields: Mapping[str, type], find: Find) -> Decision:
    """What a request means."""
    try:
        asked = request_message.decode(message.data, fields)
        changes = request_message.parse(asked["parameters"], "parameters")
    except UserError as error:
        raise Poison(str(error)) from None
    event = asked["event"]
    if event == SCHEDULE:
        event = f"{SCHEDULE} {message.published:%Y-%m-%dT%H:%MZ}"
    try:
        found = find(asked["version"])
    except NotPublished as error:
        if asked["version"]:
            raise Poison(str(error)) from None
        raise
    return Decision(event, submission(found, event, changes, asked["actor"], asked["attempt"]))


def decide_data(message: Message, place: Place, now: datetime, find: Find) -> Decision:
    """What a notification of Cloud Storage means."""
    kind, bucket, name, generation = (
        message.attributes.get(key, "")
        for key in ("eventType", "bucketId", "objectId", "objectGeneration")
    )
    if (
        not re.fullmatch(r"OBJECT_[A-Z_]{1,40}", kind)
        or not bucket
        or not name
        or not re.fullmatch(r"[0-9]{1,20}", generation)
    ):
        raise Poison(
            "the notification has no eventType, bucketId, objectId or objectGeneration of Cloud Storage's."
        )
    address = f"gs://{bucket}/{name}"
    event = f"data {bucket}/{name}#{generation} {kind}"
    if why := reason_to_ignore(kind, address, place, message.attributes):
        return Decision(event, why=why)
    if kind == DELETE and was_gone(message):
        return Decision(
            event, why="an old generation was cleared away, and the rows are what they were"
        )
    found = find("")
    if place.batch_window_minutes:
        return decide_window(message, place, now, found)
    if not place.source and kind != FINALIZE:
        return Decision(
            event, why=f"{address} is gone, and without it there is nothing to train on"
        )
    return Decision(event, submission(found, event, {"csv": place.source or address}, "data"))


def reason_to_ignore(kind: str, address: str, place: Place, attributes: Mapping[str, str]) -> str:
    """Why a notification starts nothing; empty if it may."""
    if kind not in (FINALIZE, ARCHIVE, DELETE):
        return f"{kind} changes no rows"
    if kind != FINALIZE and "overwrittenByGeneration" in attributes:
        return "it was overwritten, and the new object's own notification starts the run"
    if not address.startswith(f"{place.incoming}/"):
        return f"{address} is not below {place.incoming}"
    if not address.endswith(".csv"):
        return f"{address} does not end in .csv"
    try:
        request_message.check_rows(address)
    except UserError:
        return f"{address} is a name that no folder can show"
    return ""


def was_gone(message: Message) -> bool:
    """Whether what was deleted for good had been overwritten or deleted before, in a bucket that keeps old generations."""
    try:
        gone = read_time(
            request_message.parse(message.data, "the notification").get("timeDeleted"),
            "timeDeleted",
        )
        return happened_at(message) - gone > timedelta(
            minutes=1
        )  # of one that was there until now, both are the same moment
    except UserError:
        return False  # nobody told


def happened_at(message: Message) -> datetime:
    """When it happened, and not when it was told: Cloud Storage may tell the same twice."""
    time = message.attributes.get("eventTime")
    return message.published if time is None else read_time(time, "eventTime")


def decide_window(message: Message, place: Place, now: datetime, found: Published) -> Decision:
    """Files that arrive within one window start one run, when it is closed. It is known by its beginning."""
    if not place.source:
        raise Poison(
            "cloud.events.batch_window_minutes is for rows in one place: set data.source in project.yaml to a gs:// address, or "
            "batch_window_minutes to 0."
        )
    happened = happened_at(message)
    length = timedelta(minutes=place.batch_window_minutes)
    start = happened - (happened - datetime(1970, 1, 1, tzinfo=UTC)) % length
    event = f"data window {start:%Y-%m-%dT%H:%MZ}"
    if start > now + timedelta(days=1):
        raise Poison(
            f"the notification is about something that has not happened yet: {start:%Y-%m-%dT%H:%MZ}."
        )
    if now < start + length:
        return Decision(
            event, why=f"files are gathered until {start + length:%Y-%m-%dT%H:%MZ}", wait=True
        )
    return Decision(event, submission(found, event, {"csv": place.source}, "data"))


def submission(
    found: Published, event: str, changes: Mapping[str, Any], actor: str, attempt: int = 1
) -> Submission:
    """The run that is asked for.

    Raises:
        Poison: its parameters do not fit.
    """
    try:
        values = request_message.values(found, changes)
    except UserError as error:
        raise Poison(str(error)) from None
    labels = {**found.labels, "actor": actor}
    return Submission(
        found.spec, values, event, template=found.address, attempt=attempt, labels=labels
    )


# ── what is done about it ───────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Function:
    """What functions-framework calls; see the module's text for its answers."""

    place: Place
    fields: Mapping[str, type]

    @classmethod
    def make(cls, variables: Mapping[str, str], schema: Path) -> "Function":
        """Read the environment and the schema, and load Google's packages now, while nobody waits.

        Raises:
            UserError: a variable is missing or wrong.
        """
        function = cls(read_place(variables), request_message.read_fields(schema))
        import google.cloud.aiplatform_v1
        import google.cloud.storage  # noqa: F401

        from gcp import client as api  # noqa: F401

        return function

    def answer(self, method: str, body: bytes) -> tuple[str, int]:
        """Answer a delivery, and say in one line of the log what became of it."""
        told: dict[str, Any] = {}
        if method != "POST":
            return tell("WARNING", f"{method[:10]} is no delivery of Pub/Sub's", 405, told)
        try:
            return self._deliver(body, told)
        except Poison as error:
            return tell("ERROR", f"refused: {error}", 400, told)
        except UserError as error:
            # What Vertex AI calls an invalid argument stays one; every other refusal may be mended, and be tried again.
            invalid = getattr(error, "code", 0) == 400 and not getattr(error, "transient", False)
            return tell(
                "ERROR" if invalid else "WARNING", str(error), 400 if invalid else 503, told
            )
        except Exception as error:
            return tell(
                "CRITICAL",
                f"a mistake of the function's own: {error!r}\n{traceback.format_exc()}",
                500,
                told,
            )

    def _deliver(self, body: bytes, told: dict[str, Any]) -> tuple[str, int]:
        message = unwrap(body)
        told["messageId"] = message.identity
        decision = decide(message, self.place, self.fields, datetime.now(UTC), self._find)
        told["event"] = decision.event
        if decision.run is None:
            return tell("INFO", decision.why, 429 if decision.wait else 200, told)
        try:
            sent = pipeline_run.request(decision.run, self.place.target)
        except UserError as error:
            raise Poison(str(error)) from None
        told["run"] = sent["pipelineJobId"]
        started = pipeline_run.submit(sent, PATIENCE)
        told["run"] = started.name
        if started.new:
            return tell("NOTICE", f"started {started.link}", 200, told)
        other = (
            ""
            if started.same
            else ", with another template or other parameters; attempt 2 would be a rerun"
        )
        return tell("INFO", f"was started already{other}: {started.link}", 200, told)

    def _find(self, version: str) -> Published:
        return pipeline_version.read(self.place.templates, version)


def tell(severity: str, message: str, status: int, told: Mapping[str, Any]) -> tuple[str, int]:
    """Log one line, as Cloud Logging reads it; returns the answer."""
    limited = {
        key: value[:LONGEST] if isinstance(value, str) else value for key, value in told.items()
    }
    line = {"severity": severity, "message": message[: 20 * LONGEST], "status": status, **limited}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    return f"{message[:LONGEST]}\n", status
