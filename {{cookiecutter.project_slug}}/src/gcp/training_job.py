"""Submit a custom training job to Vertex AI, follow it, and return its result.

One request (a run and its output folder) has one live job, whatever fails:
· Its jobs carry the request's hash as a label. A job is submitted only if none has that label.
· If two were submitted at once, the oldest stays and the others are cancelled.
· SIGTERM and Ctrl-C cancel the job; during a submission they wait until its name is known.
"""

import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core import manifest
from core.errors import UserError
from core.signals import Stop, stoppable
from gcp import client as api
from gcp import storage
from gcp.client import ApiError

# Seconds between polls of a job; each wait is longer than the last.
FIRST_WAIT, LONGEST_WAIT = 5.0, 60.0
LAST_CALLS = 20.0  # seconds per cancelling call: the sender of SIGTERM does not wait for long
ALIVE = {"QUEUED", "PENDING", "RUNNING", "PAUSED", "UPDATING"}
SUCCEEDED, CANCELLING, CANCELLED = "SUCCEEDED", "CANCELLING", "CANCELLED"
RESOURCE_EXHAUSTED = 8  # google.rpc.Code
CONSOLE = "https://console.cloud.google.com"


@dataclass(frozen=True)
class Request:
    """A training request.

    Attributes:
        run: projects/P/locations/R/pipelineJobs/ID, or …/runs/ID outside a pipeline.
        jobs: resolved jobs of gpu_jobs/, tried in this order until one gets capacity.
        args: arguments of trainer.train.
        output: gs://…/model, the saved model's folder.
        labels: of the job, in any form; `commit` is the code's version.
        key: a Cloud KMS key, or empty.
    """

    run: str
    jobs: Sequence[Mapping[str, Any]]
    args: Sequence[str]
    output: str
    labels: Mapping[str, str] = field(default_factory=dict)
    key: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"projects/[^/]+/locations/[^/]+/(pipelineJobs|runs)/[^/]+", self.run):
            raise UserError(
                f"--run {self.run!r}: expected projects/PROJECT/locations/REGION/pipelineJobs/ID, "
                "or …/runs/ID."
            )
        # Vertex AI gives a job the folder `model` below its output address, and no other.
        if not re.fullmatch(r"gs://[^/]+/(.+/)?model", self.output):
            raise UserError(
                f"--output {self.output!r}: expected gs://BUCKET/…/model; "
                "in a pipeline the step's output must be named model."
            )
        if not self.jobs:
            raise UserError("no job to try: add one under cloud.train.jobs in project.yaml.")

    @property
    def parent(self) -> str:
        """projects/P/locations/R."""
        return self.run.rsplit("/", 2)[0]

    @property
    def region(self) -> str:
        return self.run.split("/")[3]

    @property
    def id(self) -> str:
        """The same for the same request, also after a restart."""
        return hashlib.sha256(f"{self.run} {self.output}".encode()).hexdigest()[:16]

    @property
    def list_command(self) -> str:
        """The command that lists this request's jobs."""
        return (
            f"gcloud ai custom-jobs list --project={self.run.split('/')[1]} "
            f'--region={self.region} --filter="labels.request={self.id}"'
        )

    def custom_job(self, attempt: int) -> dict[str, Any]:
        """The CustomJob of the first, second, … attempt, in the API's JSON form."""
        spec = deepcopy(dict(self.jobs[attempt - 1]))
        for pool in spec.get("workerPoolSpecs", []):
            container = pool.setdefault("containerSpec", {})
            container["args"] = list(self.args)
            if "commit" in self.labels:  # the trainer writes it into the model's manifest
                version = {"name": "CODE_VERSION", "value": self.labels["commit"]}
                container["env"] = [*container.get("env", []), version]
        spec["baseOutputDirectory"] = {"outputUriPrefix": self.output.removesuffix("/model")}
        name = f"{self.run.rsplit('/', 1)[1]}-train-{machine(spec).split(' ')[0].rstrip(',')}"
        labels = {**api.labels(self.labels), "request": self.id, "attempt": str(attempt)}
        job = {"displayName": name[:128], "jobSpec": spec, "labels": labels}
        return {**job, "encryptionSpec": {"kmsKeyName": self.key}} if self.key else job

    def messages(self) -> list[Any]:
        """Every attempt's CustomJob, validated against the API's own definition."""
        from google.cloud.aiplatform_v1 import CustomJob
        from google.protobuf import json_format

        messages = []
        for number, job in enumerate(self.jobs, 1):
            try:
                parsed = json_format.ParseDict(self.custom_job(number), CustomJob.pb(CustomJob()))
            except json_format.ParseError as error:
                raise UserError(
                    f"job {number} ({machine(job)}) is not a valid custom job: {error}"
                ) from None
            messages.append(CustomJob(parsed))
        return messages


def pipeline_request(
    pipeline_job: str, jobs: Sequence[Mapping[str, Any]], args: Sequence[str], output: str
) -> Request:
    """The request of a pipeline's step, with the labels and the key of its pipeline run."""
    request = Request(pipeline_job, jobs, args, output)
    service = api.client("PipelineService", request.region)
    run = api.call(service.get_pipeline_job, {"name": pipeline_job}, "looking up the pipeline run")
    # Google reserves labels with its own prefix.
    labels = {key: value for key, value in run.labels.items() if not key.startswith("vertex-ai-")}
    return Request(pipeline_job, jobs, args, output, labels, run.encryption_spec.kms_key_name)


def machine(spec: Mapping[str, Any]) -> str:
    """A job's machines in words: "g2-standard-8 with 1 NVIDIA_L4, SPOT"."""
    pools = spec.get("workerPoolSpecs") or [{}]
    first = pools[0].get("machineSpec", {})
    nodes = sum(int(pool.get("replicaCount", 1)) for pool in pools)
    strategy = spec.get("scheduling", {}).get("strategy", "")
    words = first.get("machineType", "a machine")
    if "acceleratorType" in first:
        words += f" with {int(first['acceleratorCount'])} {first['acceleratorType']}"
    if nodes > 1:
        words += f", {nodes} of them"
    return f"{words}, {strategy}" if strategy else str(words)


def state(job: Any) -> str:
    """SUCCEEDED for JOB_STATE_SUCCEEDED."""
    return str(job.state.name).removeprefix("JOB_STATE_")


def attempt_of(job: Any) -> int:
    """The attempt of its request that the job was."""
    return int(job.labels.get("attempt", "1"))


def by_age(jobs: Sequence[Any]) -> list[Any]:
    """Sort jobs, the oldest first."""
    return sorted(jobs, key=lambda job: (job.create_time, job.name))


class Jobs:
    """The jobs of one request at Vertex AI."""

    def __init__(
        self, request: Request, stop: Stop, waits: tuple[float, float] | None = None
    ) -> None:
        """waits: seconds between polls, the first and the longest."""
        self.request, self.stop = request, stop
        self.waits = waits or (FIRST_WAIT, LONGEST_WAIT)
        self.messages = request.messages()
        self.service = api.client("JobService", request.region)
        self.sent: set[str] = set()

    def find_all(self, timeout: float | None = None) -> list[Any]:
        """Jobs of this request that were not cancelled, the oldest first."""
        query = {"parent": self.request.parent, "filter": f'labels.request="{self.request.id}"'}
        jobs = api.call(
            lambda **options: list(self.service.list_custom_jobs(**options)),
            query,
            "looking for the job",
            timeout=timeout,
        )
        return by_age([job for job in jobs if state(job) != CANCELLED])

    def find(self, attempt: int) -> Any | None:
        """Return the oldest live or succeeded job; else the last failed one from this attempt on.

        If there is only one that is being cancelled, wait for its end: until then it may write to
        the folder that the next one writes to.
        """
        while True:
            jobs = self.find_all()
            good = [job for job in jobs if state(job) in {*ALIVE, SUCCEEDED}]
            ending = [job for job in jobs if state(job) == CANCELLING]
            if good or not ending:
                failed = [job for job in jobs if attempt_of(job) >= attempt]
                return good[0] if good else max(failed, key=attempt_of, default=None)
            job, wait = ending[0], self.waits[0]
            print(f"waiting for the end of {job.name}, which is being cancelled", flush=True)
            while state(job) == CANCELLING:
                wait = self.pause(wait)
                job = self.get(job.name)

    def send(self, attempt: int) -> Any:
        """Submit a job."""
        job = {"parent": self.request.parent, "custom_job": self.messages[attempt - 1]}
        with self.stop.held():
            created = api.call(
                self.service.create_custom_job, job, "starting the job", repeatable=False
            )
            self.sent.add(created.name)
        return created

    def get(self, name: str) -> Any:
        """A job's present state; retries for long, because the job runs on meanwhile."""
        get = self.service.get_custom_job
        return api.call(get, {"name": name}, "watching the job", timeout=api.WATCH)

    def pause(self, wait: float) -> float:
        """Sleep, and return the next, longer wait."""
        self.stop.check()
        time.sleep(wait)
        return min(1.5 * wait, self.waits[1])

    def keep_oldest(self, job: Any) -> Any:
        """Return the job to follow: this one, unless an older one lives; cancel all others."""
        jobs = {job.name: job, **{other.name: other for other in self.find_all(api.WATCH)}}
        alive = by_age([other for other in jobs.values() if state(other) in ALIVE])
        succeeded = [other for other in jobs.values() if state(other) == SUCCEEDED]
        oldest: Any = (succeeded or alive or [job])[0]
        for other in alive:
            if other.name != oldest.name:
                print(f"cancelling {other.name}: a second job of the same request", flush=True)
                self.cancel(other.name)
        return oldest

    def cancel(self, name: str, timeout: float | None = None) -> bool:
        """Cancel a job; False if it has already finished."""
        return api.cancel(self.service.cancel_custom_job, name, "cancelling the job", timeout)

    def cancel_all(self) -> None:
        """Cancel what lives; report what could not be cancelled."""
        self.stop.holding = True  # a second signal must not interrupt this
        try:
            alive = {job.name for job in self.find_all(LAST_CALLS) if state(job) in ALIVE}
        except ApiError as error:
            print(f"error: {error}", file=sys.stderr)
            alive = set()
            if not self.sent:
                print(f"A job may run. Run `{self.request.list_command}`", file=sys.stderr)
        for name in sorted(alive | self.sent):
            try:
                if self.cancel(name, LAST_CALLS):
                    print(f"cancelled {name}", file=sys.stderr, flush=True)
            except ApiError as error:
                print(f"error: {error} {still_running(name)}", file=sys.stderr, flush=True)


def console(name: str) -> str:
    """The URL of a job's page."""
    _, project, _, region, _, number = name.split("/")
    page = f"{CONSOLE}/agent-platform/locations/{region}/training/{number}"
    return f"{page}?project={project}"


def logs(name: str) -> str:
    """The URL of a job's log."""
    _, project, *_, number = name.split("/")
    query = f"resource.type%3D%22ml_job%22%0Aresource.labels.job_id%3D%22{number}%22"
    return f"{CONSOLE}/logs/query;query={query}?project={project}"


def still_running(name: str) -> str:
    """What to do about a job that is no longer followed."""
    region = name.split("/")[3]
    return (
        f"The job may still run: {console(name)}. The same request finds it again; "
        f"to end it, run `gcloud ai custom-jobs cancel {name} --region={region}`"
    )


def train(request: Request, waits: tuple[float, float] | None = None) -> dict[str, str]:
    """Train in a custom training job; return the job's name and page once the model is complete.

    SIGTERM and Ctrl-C cancel the job and raise SystemExit.
    """
    with stoppable() as stop:
        jobs = Jobs(request, stop, waits)
        try:
            job = run_until_capacity(jobs)
        except SystemExit:
            print("\nstopped", file=sys.stderr, flush=True)
            jobs.cancel_all()
            raise
    log = f"Its log: {logs(job.name)}"
    if state(job) != SUCCEEDED:
        reason = " ".join((job.error.message or "no reason given").split())
        raise UserError(f"the training job ended as {state(job)}: {reason} {log}")
    # Success is read from the saved model, not from the job's state.
    try:
        with tempfile.TemporaryDirectory() as folder:
            manifest.read(storage.fetch(request.output, Path(folder)))
    except UserError as error:
        raise UserError(f"the job succeeded, but left no complete model: {error} {log}") from None
    return {"job": job.name, "page": console(job.name)}


def run_until_capacity(jobs: Jobs) -> Any:
    """Try the jobs in order; return the first that did not fail for lack of capacity."""
    attempt, count = 1, len(jobs.messages)
    while True:
        try:
            job = find_or_send(jobs, attempt)
            attempt = attempt_of(job)
            job = follow(jobs, job)
            if not is_capacity_error(job):
                return job
            problem = job.error.message
        except ApiError as error:
            if error.code != 429:
                raise
            problem = str(error)
        print(f"no capacity: {problem}", flush=True)
        if attempt >= count:
            which = "the only job" if count == 1 else f"the last of {count} jobs"
            raise UserError(
                f"{which} got no capacity: {problem} Try later, or add other jobs under "
                "cloud.train.jobs in project.yaml; `make gpu-jobs` lists them."
            )
        attempt += 1


def find_or_send(jobs: Jobs, attempt: int) -> Any:
    """Return the job of this attempt, or of a later one that an earlier process reached."""
    try:
        job = api.get_or_create(lambda: jobs.find(attempt), lambda: jobs.send(attempt))
    except ApiError as error:
        if not error.transient or error.code == 429:
            raise
        raise UserError(
            f"{error} A job may have started all the same; run `{jobs.request.list_command}`"
        ) from None
    number, count = attempt_of(job), len(jobs.messages)
    # project.yaml may name fewer jobs now than when the job was submitted.
    where = machine(jobs.request.jobs[number - 1]) if number <= count else "another machine"
    action = "sent" if job.name in jobs.sent else "found"
    print(f"{action}: {job.display_name} ({where}), job {number} of {count}", flush=True)
    print(f"  page  {console(job.name)}\n  log   {logs(job.name)}", flush=True)
    return job


def follow(jobs: Jobs, job: Any) -> Any:
    """Poll a job until it has ended, and print each change of its state."""
    last, wait = None, jobs.waits[0]
    try:
        while True:
            if (job.name, state(job)) != last:
                last, wait = (job.name, state(job)), jobs.waits[0]
                seconds = max(0, int((datetime.now(UTC) - job.create_time).total_seconds()))
                elapsed = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
                print(f"  {elapsed}  {state(job).lower().replace('_', ' ')}", flush=True)
                oldest = jobs.keep_oldest(job)
                if oldest.name != job.name:
                    job = oldest
                    continue
            if state(job) not in {*ALIVE, CANCELLING}:
                return job
            wait = jobs.pause(wait)
            job = jobs.get(job.name)
    except ApiError as error:
        raise UserError(f"{error} {still_running(job.name)}") from None


def is_capacity_error(job: Any) -> bool:
    """Whether a job failed because no machine was available."""
    message = job.error.message
    # Too little memory has the same code, and another machine of the kind would fail as well.
    if state(job) != "FAILED" or re.search(r"out.of.memory", message, re.IGNORECASE):
        return False
    exhausted = job.error.code == RESOURCE_EXHAUSTED
    return bool(exhausted or api.is_quota(message) or api.is_stock_out(message))
