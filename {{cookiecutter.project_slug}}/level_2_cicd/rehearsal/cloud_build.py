"""A double of Cloud Build: builds and triggers as gcloud sends them, read strictly with Google's own definitions, checked and
kept; builds are run.

`with FakeCloudBuild(work) as builds:` where `work(build)` does what the build asks for; without it, every build succeeds at once.
CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDBUILD=`address` brings gcloud here.
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

from rehearsal import build_steps
from rehearsal.protojson import now, read, written
from rehearsal.server import ApiError, FakeServer, Request, Response

Json = dict[str, Any]

PARENT = r"/v1/(?P<parent>projects/(?P<project>[^/:]+)/locations/(?P<region>[^/:]+))"
ENDED = ("SUCCESS", "FAILURE", "INTERNAL_ERROR", "TIMEOUT", "CANCELLED", "EXPIRED")
FINISHED = "type.googleapis.com/google.devtools.cloudbuild.v1.Build"
METADATA = "type.googleapis.com/google.devtools.cloudbuild.v1.BuildOperationMetadata"
# With an account of one's own, Cloud Build wants to know where logs go.
OWN_LOGS = {"CLOUD_LOGGING_ONLY", "NONE"}


class BuildFailed(Exception):
    """A build's work failed; says why."""


class FakeCloudBuild(FakeServer):
    """Cloud Build on this machine.

    Args:
        work: does a build, given as JSON with its substitutions filled in; returns the images' digests, name → sha256:…, or
            raises BuildFailed. It runs beside the server, so that builds go on in parallel.
    """

    def __init__(self, work: Callable[[Json], dict[str, str]] | None = None, port: int = 0) -> None:
        super().__init__(port)
        self.work = work
        self.builds: dict[str, Any] = {}  # id → Build
        self.triggers: dict[str, Any] = {}  # name → BuildTrigger
        self._threads: list[threading.Thread] = []
        build = rf"{PARENT}/builds/(?P<id>[^/:]+)"
        self.routes = [
            ("POST", rf"{PARENT}/builds", "builds.create", self._create),
            ("GET", rf"{PARENT}/builds", "builds.list", self._list),
            ("GET", build, "builds.get", self._get),
            ("POST", rf"{build}:cancel", "builds.cancel", self._cancel),
            ("GET", rf"{PARENT}/operations/(?P<id>[^/:]+)", "operations.get", self._operation),
            ("POST", rf"{PARENT}/triggers", "triggers.create", self._create_trigger),
            ("PATCH", rf"{PARENT}/triggers/(?P<id>[^/:]+)", "triggers.patch", self._patch_trigger),
        ]

    def __exit__(self, *exception: object) -> None:
        for thread in self._threads:
            thread.join()
        super().__exit__(*exception)

    def _create(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        build = read(types.Build, request.body)
        identity = str(uuid.uuid4())
        document = written(build)
        resolved = check(document, built_in(found, identity))
        kept = types.Build(build)
        kept.id, kept.name = identity, f"{found['parent']}/builds/{identity}"
        kept.project_id, kept.status, kept.create_time = found["project"], types.Build.Status.QUEUED, now()
        kept.log_url = f"https://console.cloud.google.com/cloud-build/builds;region={found['region']}/{identity}?project=1"
        self.builds[identity] = kept
        thread = threading.Thread(target=self._run, args=(identity, resolved))
        self._threads.append(thread)
        thread.start()
        return build, Response(self._told(kept))

    def _run(self, identity: str, resolved: Json) -> None:
        """Do the work, and keep what came of it."""
        with self.lock:
            kept = self.builds[identity]
            kept.status, kept.start_time = types.Build.Status.WORKING, now()
        status, said, digests = "SUCCESS", "", {}
        try:
            digests = self.work(resolved) if self.work else {}
        except BuildFailed as failed:
            status, said = "FAILURE", str(failed)
        except Exception as error:
            traceback.print_exc()
            status, said = "INTERNAL_ERROR", repr(error)
        with self.lock:
            if kept.status == types.Build.Status.CANCELLED:
                return
            kept.status, kept.status_detail, kept.finish_time = types.Build.Status[status], said, now()
            kept.results = types.Results(images=[types.BuiltImage(name=name, digest=digest) for name, digest in digests.items()])

    def _list(self, request: Request, _: re.Match[str]) -> tuple[Any, Response]:
        unknown = set(request.query) - {"alt", "filter", "pageSize", "pageToken"}
        if unknown or request.query.get("filter"):
            raise ApiError(400, f"this double lists all builds, and knows no {', '.join(unknown) or 'filter'}")
        return None, Response({"builds": [written(build) for build in reversed(self.builds.values())]})

    def _get(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        return None, Response(written(self._build(found["id"])))

    def _cancel(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        build = self._build(found["id"])
        if build.status.name in ENDED:
            raise ApiError(400, f"build {found['id']} has ended: it cannot be cancelled", name="FAILED_PRECONDITION")
        build.status, build.finish_time = types.Build.Status.CANCELLED, now()
        return None, Response(written(build))

    def _operation(self, _: Request, found: re.Match[str]) -> tuple[Any, Response]:
        return None, Response(self._told(self._build(found["id"])))

    def _create_trigger(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        trigger = read(types.BuildTrigger, request.body)
        if trigger.name in self.triggers:
            raise ApiError(409, f"trigger {trigger.name} already exists")
        return trigger, self._keep_trigger(trigger, found)

    def _patch_trigger(self, request: Request, found: re.Match[str]) -> tuple[Any, Response]:
        trigger = read(types.BuildTrigger, request.body)
        if found["id"] not in self.triggers:
            raise ApiError(404, f"Requested entity was not found: trigger {found['id']}")
        return trigger, self._keep_trigger(trigger, found)

    def _keep_trigger(self, trigger: Any, found: re.Match[str]) -> Response:
        if not re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,62}[a-zA-Z0-9])?", trigger.name):
            raise ApiError(400, f"invalid value for 'trigger.name': {trigger.name!r}")
        if not trigger.repository_event_config.repository.startswith(f"{found['parent']}/connections/"):
            raise ApiError(400, "this double knows triggers of a linked repository in the same region")
        self.triggers[trigger.name] = kept = types.BuildTrigger(trigger)
        kept.id, kept.resource_name = trigger.name, f"{found['parent']}/triggers/{trigger.name}"
        return Response(written(kept))

    def _build(self, identity: str) -> Any:
        if identity not in self.builds:
            raise ApiError(404, f"Requested entity was not found: build {identity}")
        return self.builds[identity]

    def _told(self, build: Any) -> Json:
        """A build as a long operation."""
        parent = build.name.partition("/builds/")[0]
        told: Json = {"name": f"{parent}/operations/{build.id}", "metadata": {"@type": METADATA, "build": written(build)}}
        if build.status.name in ENDED:
            told |= {"done": True, "response": {"@type": FINISHED, **written(build)}}
        return told


def built_in(found: re.Match[str], identity: str) -> dict[str, str]:
    """The substitutions that Cloud Build brings itself."""
    return {"PROJECT_ID": found["project"], "PROJECT_NUMBER": "1", "LOCATION": found["region"], "BUILD_ID": identity}


def check(build: Json, values: dict[str, str]) -> Json:
    """What Cloud Build looks at before a build begins; the build with its substitutions filled in.

    Raises:
        ApiError: says what is wrong.
    """
    for name in build.get("substitutions", {}):
        if not re.fullmatch(r"_[A-Z0-9_]+", name) and name not in build_steps.BUILT_IN:
            raise ApiError(400, f"invalid value for 'build.substitutions': {name} is no name of a substitution")
    try:
        resolved = build_steps.resolve(build, values)
    except build_steps.InvalidBuild as invalid:
        raise ApiError(400, f"invalid build: {invalid}") from None
    options = resolved.get("options", {})
    if resolved.get("serviceAccount") and options.get("logging") not in OWN_LOGS and not resolved.get("logsBucket"):
        raise ApiError(
            400, "if 'build.service_account' is specified, the build must specify 'build.logs_bucket' or CLOUD_LOGGING_ONLY"
        )
    if not re.fullmatch(r"(projects/[^/]+/serviceAccounts/[^/@]+@[^/@]+)?", resolved.get("serviceAccount", "")):
        raise ApiError(400, f"invalid value for 'build.service_account': {resolved['serviceAccount']}")
    limit = build_steps.seconds(resolved.get("timeout", "600s"))
    if not 0 < limit <= 86400:
        raise ApiError(400, "invalid value for 'build.timeout': from 0s to 86400s")
    for tag in resolved.get("tags", []):
        if not re.fullmatch(r"[\w][\w.-]{0,127}", tag):
            raise ApiError(400, f"invalid value for 'build.tags': {tag!r}")
    for step in resolved["steps"]:
        if not step.get("name"):
            raise ApiError(400, "invalid build: a step has no name")
        if build_steps.seconds(step.get("timeout")) > limit and step.get("timeout"):
            raise ApiError(400, f"step {step.get('id')}: its timeout is longer than the build's")
    return resolved


def unpack(build: Json, buckets: Path, workspace: Path) -> None:
    """Put a build's source into its workspace, from the double of Cloud Storage with its buckets in a folder."""
    source = build["source"]["storageSource"]
    with tarfile.open(buckets / source["bucket"] / source["object"]) as archive:
        archive.extractall(workspace, filter="data")


def build_worker(
    buckets: Path,
    folder: Path,
    command: Callable[[Path], Callable[[Json, Json], build_steps.Command]],
    push: Callable[[str], str],
    ran: Callable[[Json, build_steps.Outcome], None] = lambda *_: None,
) -> Callable[[Json], dict[str, str]]:
    """The work of a build, really done: its source is unpacked, its steps are run, its images are pushed.

    Args:
        folder: workspaces are made below it.
        command: workspace → what runs a step there; see build_steps.as_process.
        push: sends an image of this machine to its registry; returns its digest.
        ran: is told what became of each build.
    """

    def work(build: Json) -> dict[str, str]:
        workspace = folder / uuid.uuid4().hex
        workspace.mkdir(parents=True)
        unpack(build, buckets, workspace)
        outcome = build_steps.run(build, workspace, command(workspace))
        ran(build, outcome)
        if outcome.status != "SUCCESS":
            raise BuildFailed(outcome.failures())
        return {image: push(image) for image in build.get("images", [])}

    return work
