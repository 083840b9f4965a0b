"""Submit a custom training job to Vertex AI, follow it, and return its result.

A request (a run and its output folder) has at most one live job, also after failures:
- Each job has the hash of its request as a label; a job is submitted only if no job has that label.
- If two jobs were submitted concurrently, the oldest is kept and the others are cancelled.
- SIGTERM and Ctrl-C cancel the job; during a submission they are deferred until its name is known.
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

# Seconds between polls of a job, with backoff.
FIRST_WAIT, LONGEST_WAIT = 5.0, 60.0
LAST_CALLS = 20.0  # seconds per call while cancelling: the sender of SIGTERM does not wait long
ALIVE = {"QUEUED", "PENDING", "RUNNING", "PAUSED", "UPDATING"}
SUCCEEDED, CANCELLING, CANCELLED = "SUCCEEDED", "CANCELLING", "CANCELLED"
RESOURCE_EXHAUSTED = 8  # google.rpc.Code
CONSOLE = "https://console.cloud.google.com"


@dataclass(frozen=True)
class Request:
    """A training request.

    Attributes:
        run: projects/P/locations/R/pipelineJobs/ID, or …/runs/ID outside a pipeline.
        jobs: resolved jobs of gpu_jobs/, tried in order until one gets capacity.
        args: arguments of trainer.train.
        output: gs://…/model, the folder of the saved model.
        labels: job labels, converted to valid ones; `commit` is the code version.
        key: Cloud KMS key, or empty.
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
        # Vertex AI appends /model to a job's output address, so no other folder is possible.
        if not re.fullmatch(r"gs://[^/]+/(.+/)?model", self.output):
            raise UserError(
                f"--output {self.output!r}: expected gs://BUCKET/…/model; "
                "in a pipeline the step's output must be named model."
            )
        if not self.jobs:
            raise UserError("no job to try: add one under cloud.train.jobs in project.yaml.")

    @property
    def parent(self) -> str:
        """Return projects/P/locations/R."""
        return self.run.rsplit("/", 2)[0]

    @property
    def region(self) -> str:
        return self.run.split("/")[3]

    @property
    def id(self) -> str:
        """Return a hash of run and output, which is the same after a restart."""
        return hashlib.sha256(f"{self.run} {self.output}".encode()).hexdigest()[:16]

    @property
    def list_command(self) -> str:
        """Return the gcloud command that lists the jobs of this request."""
        return (
            f"gcloud ai custom-jobs list --project={self.run.split('/')[1]} "
            f'--region={self.region} --filter="labels.request={self.id}"'
        )

    def custom_job(self, attempt: int) -> dict[str, Any]:
        """Return the CustomJob of an attempt (from 1) in the JSON format of the API."""
        spec = deepcopy(dict(self.jobs[attempt - 1]))
        for pool in spec.get("workerPoolSpecs", []):
            container = pool.setdefault("containerSpec", {})
            container["args"] = list(self.args)
            if "commit" in self.labels:  # for the model's manifest
                version = {"name": "CODE_VERSION", "value": self.labels["commit"]}
                container["env"] = [*container.get("env", []), version]
        spec["baseOutputDirectory"] = {"outputUriPrefix": self.output.removesuffix("/model")}
        name = f"{self.run.rsplit('/', 1)[1]}-train-{machine(spec).split(' ')[0].rstrip(',')}"
        labels = {**api.labels(self.labels), "request": self.id, "attempt": str(attempt)}
        job = {"displayName": name[:128], "jobSpec": spec, "labels": labels}
        return {**job, "encryptionSpec": {"kmsKeyName": self.key}} if self.key else job

    def messages(self) -> list[Any]:
        """Return the CustomJob messages of all attempts, validated by the API client."""
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
    """Return the request of a pipeline step, with labels and key of its pipeline run."""
    request = Request(pipeline_job, jobs, args, output)
    service = api.client("PipelineService", request.region)
    run = api.call(service.get_pipeline_job, {"name": pipeline_job}, "looking up the pipeline run")
    # Labels with this prefix are reserved by Google.
    labels = {key: value for key, value in run.labels.items() if not key.startswith("vertex-ai-")}
    return Request(pipeline_job, jobs, args, output, labels, run.encryption_spec.kms_key_name)


def machine(spec: Mapping[str, Any]) -> str:
    """Describe the machines of a job, such as "g2-standard-8 with 1 NVIDIA_L4, SPOT"."""
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
    """Return the job state without its prefix: SUCCEEDED for JOB_STATE_SUCCEEDED."""
    return str(job.state.name).removeprefix("JOB_STATE_")


def attempt_of(job: Any) -> int:
    """Return the attempt number of a job, from 1."""
    return int(job.labels.get("attempt", "1"))


def by_age(jobs: Sequence[Any]) -> list[Any]:
    """Sort jobs by creation time, oldest first."""
    return sorted(jobs, key=lambda job: (job.create_time, job.name))


class Jobs:
    """The Vertex AI jobs of one request."""

    def __init__(
        self, request: Request, stop: Stop, waits: tuple[float, float] | None = None
    ) -> None:
        """Validate all jobs; `waits`: first and longest seconds between polls."""
        self.request, self.stop = request, stop
        self.waits = waits or (FIRST_WAIT, LONGEST_WAIT)
        self.messages = request.messages()
        self.service = api.client("JobService", request.region)
        self.sent: set[str] = set()

    def find_all(self, timeout: float | None = None) -> list[Any]:
        """List the jobs of this request that were not cancelled, oldest first."""
        query = {"parent": self.request.parent, "filter": f'labels.request="{self.request.id}"'}
        jobs = api.call(
            lambda **options: list(self.service.list_custom_jobs(**options)),
            query,
            "looking for the job",
            timeout=timeout,
        )
        return by_age([job for job in jobs if state(job) != CANCELLED])

    def find(self, attempt: int) -> Any | None:
        """Return the oldest live or succeeded job, else the last failed job from `attempt` on."""
        # A job that is being cancelled may still write to the output folder, so the next job must
        # not start before it has ended.
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
        """Submit the job of an attempt."""
        job = {"parent": self.request.parent, "custom_job": self.messages[attempt - 1]}
        # Without its name a stopped job could not be cancelled, so signals are deferred.
        with self.stop.held():
            created = api.call(
                self.service.create_custom_job, job, "starting the job", repeatable=False
            )
            self.sent.add(created.name)
        return created

    def get(self, name: str) -> Any:
        """Fetch a job; retry for up to WATCH seconds, because the job keeps running."""
        get = self.service.get_custom_job
        return api.call(get, {"name": name}, "watching the job", timeout=api.WATCH)

    def pause(self, wait: float) -> float:
        """Sleep for `wait` seconds and return the next, longer wait."""
        self.stop.check()
        time.sleep(wait)
        return min(1.5 * wait, self.waits[1])

    def keep_oldest(self, job: Any) -> Any:
        """Return a succeeded or else the oldest live job; cancel all other live jobs."""
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
        """Cancel a job; return False if it has already finished."""
        return api.cancel(self.service.cancel_custom_job, name, "cancelling the job", timeout)

    def cancel_all(self) -> None:
        """Cancel all live jobs and print the errors."""
        self.stop.holding = True  # a second signal must not interrupt this
        try:
            alive = {job.name for job in self.find_all(LAST_CALLS) if state(job) in ALIVE}
        except ApiError as error:
            print(f"error: {error}", file=sys.stderr)
            alive = set()
            if not self.sent:
                print(f"A job may run. Run `{self.request.list_command}`", file=sys.stderr)
        # The listing may have failed; jobs submitted by this process are known anyway.
        for name in sorted(alive | self.sent):
            try:
                if self.cancel(name, LAST_CALLS):
                    print(f"cancelled {name}", file=sys.stderr, flush=True)
            except ApiError as error:
                print(f"error: {error} {still_running(name)}", file=sys.stderr, flush=True)


def console(name: str) -> str:
    """Return the console URL of a job."""
    _, project, _, region, _, number = name.split("/")
    page = f"{CONSOLE}/agent-platform/locations/{region}/training/{number}"
    return f"{page}?project={project}"


def logs(name: str) -> str:
    """Return the URL of the job log."""
    _, project, *_, number = name.split("/")
    query = f"resource.type%3D%22ml_job%22%0Aresource.labels.job_id%3D%22{number}%22"
    return f"{CONSOLE}/logs/query;query={query}?project={project}"


def still_running(name: str) -> str:
    """Return a hint for a job that is no longer followed."""
    region = name.split("/")[3]
    return (
        f"The job may still run: {console(name)}. The same request finds it again; "
        f"to end it, run `gcloud ai custom-jobs cancel {name} --region={region}`"
    )


def train(request: Request, waits: tuple[float, float] | None = None) -> dict[str, str]:
    """Run a custom training job until its model is complete; return its name and console page.

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
    # The job state alone does not prove that the saved model is complete.
    try:
        with tempfile.TemporaryDirectory() as folder:
            manifest.read(storage.fetch(request.output, Path(folder)))
    except UserError as error:
        raise UserError(f"the job succeeded, but left no complete model: {error} {log}") from None
    return {"job": job.name, "page": console(job.name)}


def run_until_capacity(jobs: Jobs) -> Any:
    """Try the jobs in order; return the first one that did not fail for lack of capacity."""
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
            if error.code != 429:  # 429 counts as lack of capacity: try the next job
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
    """Return the job of this attempt, or of a later attempt by an earlier process."""
    try:
        job = api.get_or_create(lambda: jobs.find(attempt), lambda: jobs.send(attempt))
    except ApiError as error:
        if not error.transient or error.code == 429:
            raise
        raise UserError(
            f"{error} A job may have started all the same; run `{jobs.request.list_command}`"
        ) from None
    number, count = attempt_of(job), len(jobs.messages)
    # project.yaml may list fewer jobs than when this job was submitted.
    where = machine(jobs.request.jobs[number - 1]) if number <= count else "another machine"
    action = "sent" if job.name in jobs.sent else "found"
    print(f"{action}: {job.display_name} ({where}), job {number} of {count}", flush=True)
    print(f"  page  {console(job.name)}\n  log   {logs(job.name)}", flush=True)
    return job


def follow(jobs: Jobs, job: Any) -> Any:
    """Poll a job until it has ended and print each state change."""
    last, wait = None, jobs.waits[0]
    try:
        while True:
            if (job.name, state(job)) != last:
                last, wait = (job.name, state(job)), jobs.waits[0]
                seconds = max(0, int((datetime.now(UTC) - job.create_time).total_seconds()))
                elapsed = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
                print(f"  {elapsed}  {state(job).lower().replace('_', ' ')}", flush=True)
                # Another process may have submitted a job for the same request.
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
    """Return whether a job failed because no machine was available."""
    message = job.error.message
    # Out of memory has the same code, but another machine of that kind would also fail.
    if state(job) != "FAILED" or re.search(r"out.of.memory", message, re.IGNORECASE):
        return False
    exhausted = job.error.code == RESOURCE_EXHAUSTED
    return bool(exhausted or api.is_quota(message) or api.is_stock_out(message))
