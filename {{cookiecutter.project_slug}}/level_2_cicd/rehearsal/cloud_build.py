"""Fake of Cloud Build: parse and check builds and triggers as gcloud sends them.

CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDBUILD=`address` sends gcloud here.
"""

import re
import tarfile
import threading
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.cloud.devtools import cloudbuild_v1 as types

from level_2_cicd.rehearsal import build_steps
from level_2_cicd.rehearsal.protojson import as_json, now, parse
from level_2_cicd.rehearsal.server import ApiError, FakeServer, Json, Request, route

PARENT = "/v1/(?P<parent>projects/{project}/locations/{region})"
METADATA = "type.googleapis.com/google.devtools.cloudbuild.v1.BuildOperationMetadata"
TRIGGER_NAME = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,62}[a-zA-Z0-9])?"
Worker = Callable[[Json], dict[str, str]]


class BuildFailed(Exception):
    """A build's work failed; the message gives the reason."""


class FakeCloudBuild(FakeServer):
    """Fake of Cloud Build; builds run in threads.

    `work` runs a build (JSON, with its substitutions filled in) and returns the digests of its
    images by name, or raises BuildFailed. Without `work`, builds succeed at once.
    """

    def __init__(self, work: Worker | None = None, port: int = 0) -> None:
        super().__init__(port)
        self.work = work
        self.builds: dict[str, Any] = {}  # by id
        self.triggers: dict[str, Any] = {}  # by name
        self._threads: list[threading.Thread] = []

    def __exit__(self, *exception: object) -> None:
        # Builds use the lock and the other fakes, so wait for them before the server stops.
        for thread in self._threads:
            thread.join()
        super().__exit__(*exception)

    @route("POST", f"{PARENT}/builds", "builds.create")
    def _create(self, request: Request) -> Json:
        message = request.message = parse(types.Build, request.body)
        build = types.Build(message)  # a copy: request.message stays as it was sent
        build.id = str(uuid.uuid4())
        resolved = check_build(as_json(message), built_in_substitutions(request, build.id))
        build.name = f"{request['parent']}/builds/{build.id}"
        build.project_id = request["project"]
        build.status, build.create_time = types.Build.Status.QUEUED, now()
        page = "https://console.cloud.google.com/cloud-build/builds"
        build.log_url = f"{page};region={request['region']}/{build.id}?project=1"
        self.builds[build.id] = build
        # In a thread: gcloud polls the build, and builds run in parallel.
        thread = threading.Thread(target=self._work, args=(build, resolved))
        self._threads.append(thread)
        thread.start()
        # gcloud expects an operation and reads the build's ID from its metadata.
        metadata = {"@type": METADATA, "build": as_json(build)}
        return {"name": f"{request['parent']}/operations/{build.id}", "metadata": metadata}

    def _work(self, build: Any, resolved: Json) -> None:
        # Hold the lock for changes only: gcloud must be able to poll while the build runs.
        with self.lock:
            build.status, build.start_time = types.Build.Status.WORKING, now()
        status, detail, digests = "SUCCESS", "", {}
        try:
            digests = self.work(resolved) if self.work else {}
        except BuildFailed as error:
            status, detail = "FAILURE", str(error)
        except Exception as error:
            # A bug of the fake must end the build too; gcloud would poll it forever.
            traceback.print_exc()
            status, detail = "INTERNAL_ERROR", repr(error)
        images = [types.BuiltImage(name=name, digest=digest) for name, digest in digests.items()]
        with self.lock:
            build.status, build.status_detail = types.Build.Status[status], detail
            build.finish_time, build.results = now(), types.Results(images=images)

    @route("GET", f"{PARENT}/builds/{{id}}", "builds.get")
    def _get(self, request: Request) -> Json:
        if request["id"] not in self.builds:
            raise ApiError(404, f"Requested entity was not found: build {request['id']}")
        return as_json(self.builds[request["id"]])

    @route("POST", f"{PARENT}/triggers", "triggers.create")
    def _create_trigger(self, request: Request) -> Json:
        trigger = parse(types.BuildTrigger, request.body)
        if trigger.name in self.triggers:
            raise ApiError(409, f"trigger {trigger.name} already exists")
        return self._store_trigger(trigger, request)

    @route("PATCH", f"{PARENT}/triggers/{{id}}", "triggers.patch")
    def _patch_trigger(self, request: Request) -> Json:
        if request["id"] not in self.triggers:
            raise ApiError(404, f"Requested entity was not found: trigger {request['id']}")
        return self._store_trigger(parse(types.BuildTrigger, request.body), request)

    def _store_trigger(self, message: Any, request: Request) -> Json:
        request.message = message
        if not re.fullmatch(TRIGGER_NAME, message.name):
            raise ApiError(400, f"invalid value for 'trigger.name': {message.name!r}")
        repository = message.repository_event_config.repository
        if not repository.startswith(f"{request['parent']}/connections/"):
            raise ApiError(400, f"not a linked repository in this region: {repository!r}")
        trigger = self.triggers[message.name] = types.BuildTrigger(message)
        # The name serves as ID, so that an import of the same trigger updates it.
        trigger.id = message.name
        trigger.resource_name = f"{request['parent']}/triggers/{message.name}"
        return as_json(trigger)


def built_in_substitutions(request: Request, build: str) -> dict[str, str]:
    """Return the substitutions that Cloud Build defines."""
    project = {"PROJECT_ID": request["project"], "PROJECT_NUMBER": "1"}
    return {**project, "LOCATION": request["region"], "BUILD_ID": build}


def check_build(build: Json, values: dict[str, str]) -> Json:
    """Check a build as Cloud Build does; return it with its substitutions filled in."""
    for name in build.get("substitutions", {}):
        if not re.fullmatch(r"_[A-Z0-9_]+", name) and name not in build_steps.BUILT_IN:
            raise ApiError(400, f"invalid value for 'build.substitutions': {name}")
    try:
        resolved = build_steps.resolve(build, values)
    except build_steps.InvalidBuild as error:
        raise ApiError(400, f"invalid build: {error}") from None
    check_service_account(resolved)
    limit = build_steps.seconds(resolved.get("timeout", "600s"))
    if not 0 < limit <= 86400:
        raise ApiError(400, "invalid value for 'build.timeout': expected 0s to 86400s")
    # gcloud prints these errors unchanged, so they use Cloud Build's wording.
    for tag in resolved.get("tags", []):
        if not re.fullmatch(r"[\w][\w.-]{0,127}", tag):
            raise ApiError(400, f"invalid value for 'build.tags': {tag!r}")
    for step in resolved["steps"]:
        if not step.get("name"):
            raise ApiError(400, "invalid build: a step has no name")
        if step.get("timeout") and build_steps.seconds(step["timeout"]) > limit:
            raise ApiError(400, f"step {step.get('id')}: its timeout is longer than the build's")
    return resolved


def check_service_account(build: Json) -> None:
    """Reject an invalid service account, or one without a destination for logs."""
    # With a service account of the user's, Cloud Build has no default bucket for logs.
    account, logging = build.get("serviceAccount", ""), build.get("options", {}).get("logging")
    if not re.fullmatch(r"(projects/[^/]+/serviceAccounts/[^/@]+@[^/@]+)?", account):
        raise ApiError(400, f"invalid value for 'build.service_account': {account}")
    if account and logging not in {"CLOUD_LOGGING_ONLY", "NONE"} and not build.get("logsBucket"):
        rule = "the build must specify 'build.logs_bucket' or CLOUD_LOGGING_ONLY"
        raise ApiError(400, f"if 'build.service_account' is specified, {rule}")


def build_worker(
    buckets: Path,
    folder: Path,
    command: Callable[[Path], build_steps.StepCommand],
    push: Callable[[str], str],
    report: Callable[[Json, build_steps.Outcome], None] = lambda *_: None,
) -> Worker:
    """Return a function that unpacks a build's source, runs its steps and pushes its images.

    Args:
        buckets: the folder of FakeStorage, which has the source.
        folder: parent folder of the workspaces.
        command: returns what runs a step in a workspace; see build_steps.as_process.
        push: pushes a local image to its registry; returns its digest.
        report: receives each build and its outcome.
    """

    def work(build: Json) -> dict[str, str]:
        # A workspace per build, because builds run in parallel.
        workspace = folder / uuid.uuid4().hex
        workspace.mkdir(parents=True)
        source = build["source"]["storageSource"]
        with tarfile.open(buckets / source["bucket"] / source["object"]) as archive:
            archive.extractall(workspace, filter="data")
        outcome = build_steps.run(build, workspace, command(workspace))
        # Report before a failure raises, so that failed builds are reported too.
        report(build, outcome)
        if outcome.status != "SUCCESS":
            raise BuildFailed(outcome.failures())
        return {image: push(image) for image in build.get("images", [])}

    return work
