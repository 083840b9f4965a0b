"""Sends a training job to Vertex AI, follows it, and ends as it ends.      The container vertex_train runs this.

python -m level_2_cicd.vertex_train_container.main --run projects/P/locations/R/pipelineJobs/ID --jobs jobs.json \\
    --output gs://BUCKET/…/model -- --train gs://BUCKET/…/train.parquet --hyperparameters '{…}'

A request, which is a run and the place where its model goes, has one job that lives, whatever fails when:
· its jobs bear its hash as a label. Before one is sent, and after an answer was lost, those with the label are looked for.
· should two have been sent at once, the oldest stays and the others are cancelled: it is looked at each change of state.
· SIGTERM and Ctrl-C cancel what lives. They wait while a job is being sent, or nobody would know what to cancel.
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

FIRST_WAIT, LONGEST_WAIT = (
    5.0,
    60.0,
)  # seconds between looks at a job; each wait is longer than the last
LAST_CALLS = 20.0  # seconds for each call that cancels: who sent SIGTERM does not wait for long
ALIVE = {"QUEUED", "PENDING", "RUNNING", "PAUSED", "UPDATING"}
SUCCEEDED, CANCELLING, CANCELLED = "SUCCEEDED", "CANCELLING", "CANCELLED"
OUT_OF_RESOURCES = 8  # google.rpc.Code.RESOURCE_EXHAUSTED


@dataclass(frozen=True)
class Request:
    """A training that is asked for.

    Attributes:
        run: whose training it is: projects/P/locations/R/pipelineJobs/ID, or …/runs/ID where a person asks.
        jobs: resolved jobs (level_1_pipeline.vertex.gpu_jobs), to be tried in this order until one gets a machine.
        args: what trainer.train is told.
        output: gs://…/model, where the saved model goes.
        labels: for the job, in any form; `commit` is the code's version. key: the Cloud KMS key, or nothing.

    Raises:
        UserError: one of them cannot be.
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
                f"--run {self.run!r}: should be projects/PROJECT/locations/REGION/pipelineJobs/ID, or …/runs/ID."
            )
        if not re.fullmatch(r"gs://[^/]+/(.+/)?model", self.output):
            raise UserError(
                f"--output {self.output!r}: should be gs://BUCKET/…/model. Vertex AI hands a job the folder `model` below its "
                "output address, and nothing else: in a pipeline the step's output must be named model."
            )
        if not self.jobs:
            raise UserError(
                "there is no job to try: name some under cloud.train.jobs in project.yaml."
            )

    @property
    def parent(self) -> str:
        """projects/P/locations/R."""
        return self.run.rsplit("/", 2)[0]

    @property
    def region(self) -> str:
        """Where the job runs."""
        return self.run.split("/")[3]

    @property
    def id(self) -> str:
        """The same for the same request, also after a restart."""
        return hashlib.sha256(f"{self.run} {self.output}".encode()).hexdigest()[:16]

    def custom_job(self, attempt: int) -> dict[str, Any]:
        """What is sent at the first, second, … attempt, in the API's JSON form."""
        spec = deepcopy(dict(self.jobs[attempt - 1]))
        for pool in spec.get("workerPoolSpecs", []):
            container = pool.setdefault("containerSpec", {})
            container["args"] = list(self.args)
            if "commit" in self.labels:  # the trainer notes it in the model
                container["env"] = [
                    *container.get("env", []),
                    {"name": "CODE_VERSION", "value": self.labels["commit"]},
                ]
        spec["baseOutputDirectory"] = {"outputUriPrefix": self.output.removesuffix("/model")}
        name = f"{self.run.rsplit('/', 1)[1]}-train-{machine(spec).split(' ')[0].rstrip(',')}"
        job = {
            "displayName": name[:128],
            "jobSpec": spec,
            "labels": {**api.labels(self.labels), "request": self.id, "attempt": str(attempt)},
        }
        return {**job, "encryptionSpec": {"kmsKeyName": self.key}} if self.key else job

    def messages(self) -> list[Any]:
        """Every attempt's custom job, checked against the API's own definition.

        Raises:
            UserError: a field is unknown or has a value of another kind.
        """
        from google.cloud.aiplatform_v1 import CustomJob
        from google.protobuf import json_format

        found = []
        for attempt in range(1, len(self.jobs) + 1):
            try:
                found.append(
                    CustomJob(
                        json_format.ParseDict(self.custom_job(attempt), CustomJob.pb(CustomJob()))
                    )
                )
            except json_format.ParseError as error:
                raise UserError(
                    f"job {attempt} ({machine(self.jobs[attempt - 1])}) is no custom job: {error}"
                ) from None
        return found


def of_pipeline(
    pipeline_job: str, jobs: Sequence[Mapping[str, Any]], args: Sequence[str], output: str
) -> Request:
    """The request of a pipeline's step: the job bears the labels of the run that it is a part of, and uses its key.

    Raises:
        ApiError: the run cannot be looked up.
    """
    request = Request(pipeline_job, jobs, args, output)
    service = api.client("PipelineService", request.region)
    run = api.call(service.get_pipeline_job, {"name": pipeline_job}, "looking up the pipeline run")
    own = {
        key: value for key, value in run.labels.items() if not key.startswith("vertex-ai-")
    }  # Google's own
    return Request(pipeline_job, jobs, args, output, own, run.encryption_spec.kms_key_name)


def machine(spec: Mapping[str, Any]) -> str:
    """A job's machines in words: "g2-standard-8 with 1 NVIDIA_L4, SPOT"."""
    pools = spec.get("workerPoolSpecs") or [{}]
    rented = pools[0].get("machineSpec", {})
    nodes = sum(int(pool.get("replicaCount", 1)) for pool in pools)
    accelerators = (
        f" with {int(rented['acceleratorCount'])} {rented['acceleratorType']}"
        if "acceleratorType" in rented
        else ""
    )
    strategy = spec.get("scheduling", {}).get("strategy", "")
    words = f"{rented.get('machineType', 'a machine')}{accelerators}"
    return (
        f"{words}{f', {nodes} of them' if nodes > 1 else ''}{f', {strategy}' if strategy else ''}"
    )


# ── a request's jobs ────────────────────────────────────────────────────────────────────────────────────────────────
def state(job: Any) -> str:
    """SUCCEEDED for JOB_STATE_SUCCEEDED."""
    return str(job.state.name).removeprefix("JOB_STATE_")


def age(job: Any) -> tuple[Any, str]:
    """Sorts jobs, the oldest first."""
    return job.create_time, job.name


class Jobs:
    """The jobs of one request, at Vertex AI."""

    def __init__(self, request: Request, stop: Stop) -> None:
        self.request, self.stop = request, stop
        self.messages = request.messages()
        self.service = api.client("JobService", request.region)
        self.sent: set[str] = set()

    def all(self, timeout: float | None = None) -> list[Any]:
        """Those that are known, the oldest first; cancelled ones do not count."""
        wanted = {"parent": self.request.parent, "filter": f'labels.request="{self.request.id}"'}
        found = api.call(
            lambda **how: list(self.service.list_custom_jobs(**how)),
            wanted,
            "looking for the job",
            timeout=timeout,
        )
        return sorted((job for job in found if state(job) != CANCELLED), key=age)

    def find(self, attempt: int, waits: tuple[float, float]) -> Any | None:
        """The job that counts: the oldest that lives or has succeeded, or else the one of this or a later attempt that failed.

        Where there is only one that is being cancelled, its end is waited for: until then it may write where the next one does.
        """
        while True:
            found = self.all()
            good = [job for job in found if state(job) in ALIVE or state(job) == SUCCEEDED]
            ending = [job for job in found if state(job) == CANCELLING]
            if good or not ending:
                failed = [job for job in found if attempt_of(job) >= attempt]
                return good[0] if good else max(failed, key=attempt_of, default=None)
            self.outlast(ending[0], waits)

    def outlast(self, job: Any, waits: tuple[float, float]) -> None:
        """Wait until a job that is being cancelled has ended."""
        print(f"waiting for the end of {job.name}, which is being cancelled", flush=True)
        wait = waits[0]
        while state(job) == CANCELLING:
            self.stop.check()
            time.sleep(wait)
            wait = min(1.5 * wait, waits[1])
            job = self.get(job.name)

    def send(self, attempt: int) -> Any:
        """Start a job."""
        wanted = {"parent": self.request.parent, "custom_job": self.messages[attempt - 1]}
        with self.stop.held():
            job = api.call(
                self.service.create_custom_job, wanted, "starting the job", repeatable=False
            )
            self.sent.add(job.name)
        return job

    def get(self, name: str) -> Any:
        """A job as it is now; waits long for an answer."""
        return api.call(
            self.service.get_custom_job, {"name": name}, "watching the job", timeout=api.WATCH
        )

    def keep_oldest(self, job: Any) -> Any:
        """The job to follow: this one, unless an older one of the request lives. All others are cancelled."""
        known = {job.name: job, **{other.name: other for other in self.all(api.WATCH)}}
        alive = sorted((other for other in known.values() if state(other) in ALIVE), key=age)
        succeeded = [other for other in known.values() if state(other) == SUCCEEDED]
        kept: Any = (succeeded or alive or [job])[0]
        for other in alive:
            if other.name != kept.name:
                print(f"cancelling {other.name}: a second job of the same request", flush=True)
                self.cancel(other.name)
        return kept

    def cancel(self, name: str, timeout: float | None = None) -> bool:
        """Ask for a job's end; False if it has ended already."""
        return api.cancel(self.service.cancel_custom_job, name, "cancelling the job", timeout)

    def cancel_all(self) -> None:
        """Cancel what lives; if that fails, say what remains."""
        self.stop.holding = True  # it is ending already
        try:
            alive = {job.name for job in self.all(LAST_CALLS) if state(job) in ALIVE}
        except ApiError as error:
            print(f"error: {error}", file=sys.stderr)
            alive = set()
            if not self.sent:
                print(f"A job may run. To see it: {listing(self.request)}", file=sys.stderr)
        for name in sorted(alive | self.sent):
            try:
                if self.cancel(name, LAST_CALLS):
                    print(f"cancelled {name}", file=sys.stderr, flush=True)
            except ApiError as error:
                print(f"error: {error} {remains(name)}", file=sys.stderr, flush=True)


def attempt_of(job: Any) -> int:
    """Which attempt of its request the job was."""
    return int(job.labels.get("attempt", "1"))


# ── what is told ────────────────────────────────────────────────────────────────────────────────────────────────────
def console(name: str) -> str:
    """The job's page."""
    _, project, _, region, _, number = name.split("/")
    return f"https://console.cloud.google.com/agent-platform/locations/{region}/training/{number}?project={project}"


def logs(name: str) -> str:
    """The job's log."""
    _, project, *_, number = name.split("/")
    query = f"resource.type%3D%22ml_job%22%0Aresource.labels.job_id%3D%22{number}%22"
    return f"https://console.cloud.google.com/logs/query;query={query}?project={project}"


def listing(request: Request) -> str:
    """The command that shows a request's jobs."""
    project = request.parent.split("/")[1]
    return f'gcloud ai custom-jobs list --project={project} --region={request.region} --filter="labels.request={request.id}"'


def remains(name: str) -> str:
    """What to do about a job that nobody watches any more."""
    region = name.split("/")[3]
    return (
        f"The job may still run: {console(name)}. The same request finds it again; "
        f"to end it: gcloud ai custom-jobs cancel {name} --region={region}"
    )


def tell(job: Any) -> None:
    """One line for a state, with the time since the job was sent."""
    seconds = max(0, int((datetime.now(UTC) - job.create_time).total_seconds()))
    minutes, hours = seconds // 60 % 60, seconds // 3600
    print(
        f"  {hours}:{minutes:02}:{seconds % 60:02}  {state(job).lower().replace('_', ' ')}",
        flush=True,
    )


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────
def train(request: Request, waits: tuple[float, float] | None = None) -> dict[str, str]:
    """Train on a rented machine; returns the job's name and page when the saved model is there and whole.

    Args:
        waits: seconds between looks at the job, the first and the longest; otherwise FIRST_WAIT and LONGEST_WAIT.

    Raises:
        UserError: no job got a machine, the job failed, or what it left is no model.
        SystemExit: it was stopped, and has cancelled the job.
    """
    with stoppable() as stop:
        jobs = Jobs(request, stop)
        try:
            job = first_with_a_machine(jobs, waits or (FIRST_WAIT, LONGEST_WAIT))
        except SystemExit:
            print("\nstopped", file=sys.stderr, flush=True)
            jobs.cancel_all()
            raise
    if state(job) != SUCCEEDED:
        problem = job.error.message or "it does not say why"
        raise UserError(
            f"the training job ended as {state(job)}: {' '.join(problem.split())} Its log: {logs(job.name)}"
        )
    verify(request.output, job.name)
    return {"job": job.name, "page": console(job.name)}


def first_with_a_machine(jobs: Jobs, waits: tuple[float, float]) -> Any:
    """Try one job after the other; returns the first that ended otherwise than for want of a machine.

    Raises:
        UserError: none got a machine, or the API refused; it says then what remains.
    """
    attempt, count = 1, len(jobs.messages)
    while True:
        try:
            job = find_or_send(jobs, attempt, waits)
            attempt = attempt_of(job)
            job = follow(jobs, job, waits)
            if not lacked_machine(job):
                return job
            problem = job.error.message
        except ApiError as error:
            if error.code != 429:
                raise
            problem = str(error)
        print(f"no machine: {problem}", flush=True)
        if attempt >= count:
            tried = "the only job" if count == 1 else f"the last of {count} jobs"
            raise UserError(
                f"{tried} got no machine: {problem} Try later, or put other jobs under cloud.train.jobs in project.yaml; "
                "`make gpu-jobs` lists them."
            )
        attempt += 1


def find_or_send(jobs: Jobs, attempt: int, waits: tuple[float, float]) -> Any:
    """The job of this attempt, or of a later one that an earlier process has reached; sent only if there is none."""
    try:
        job = api.get_or_create(lambda: jobs.find(attempt, waits), lambda: jobs.send(attempt))
    except ApiError as error:
        if not error.transient or error.code == 429:
            raise
        raise UserError(
            f"{error} If a job was started all the same, this shows it: {listing(jobs.request)}"
        ) from None
    number = attempt_of(job)
    kind = "sent" if job.name in jobs.sent else "found"
    rented = (
        machine(jobs.request.jobs[number - 1])
        if number <= len(jobs.messages)
        else "another machine"
    )
    print(
        f"{kind}: {job.display_name} ({rented}), job {number} of {len(jobs.messages)}", flush=True
    )
    print(f"  page  {console(job.name)}\n  log   {logs(job.name)}", flush=True)
    return job


def follow(jobs: Jobs, job: Any, waits: tuple[float, float]) -> Any:
    """Look at a job until it has ended, and tell each change of its state.

    Raises:
        UserError: the API refuses, or does not answer for long; says that the job may still run.
    """
    known, wait = None, waits[0]
    try:
        while True:
            if (job.name, state(job)) != known:
                known, wait = (job.name, state(job)), waits[0]
                tell(job)
                if (kept := jobs.keep_oldest(job)).name != job.name:
                    job = kept
                    continue
            if state(job) not in {*ALIVE, CANCELLING}:
                return job
            jobs.stop.check()
            time.sleep(wait)
            wait = min(1.5 * wait, waits[1])
            job = jobs.get(job.name)
    except ApiError as error:
        raise UserError(f"{error} {remains(job.name)}") from None


def lacked_machine(job: Any) -> bool:
    """Whether a job failed because there was no machine for it; a machine with too little memory is another matter."""
    message = job.error.message
    if state(job) != "FAILED" or re.search(r"out.of.memory", message, re.IGNORECASE):
        return False
    return bool(
        job.error.code == OUT_OF_RESOURCES or api.is_quota(message) or api.is_stock_out(message)
    )


def verify(output: str, job: str) -> None:
    """A job's success is read from what it left: a saved model whose manifest and files agree.

    Raises:
        UserError: there is none.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            manifest.read(storage.fetch(output, Path(folder)))
    except UserError as error:
        raise UserError(
            f"the job has succeeded, but left no model that is whole: {error} Its log: {logs(job)}"
        ) from None
