"""Check that Google Cloud is ready for level 1, and print fixes: make doctor LEVEL=1.

python -m level_1_pipeline.vertex.doctor    exit code 2 if a check failed

The checks are read-only and run in parallel, PATIENCE seconds at most. A check without a result is
"not checked", which is not a failure. For LEVEL=2 see level_2_cicd.doctor.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from core.errors import UserError, run_command
from core.paths import PROJECT_FILE, project_root
from gcp.environment import Environment, resolve_environment
from level_1_pipeline.vertex import gpu_jobs
from level_1_pipeline.vertex.machines import SHARED
from level_1_pipeline.vertex.rest import (
    Missing,
    Refused,
    Rest,
    Unchecked,
    enable_command,
    load_credentials,
)
from project.doctor import START_DOCKER, version_of
from project.settings import Settings, load_settings

PATIENCE = 30.0  # seconds for all checks together

# The APIs that level 1 calls. `apis` adds Compute Engine for a bucket created manually: pipeline
# steps then run as its default service account.
APIS = ("aiplatform.googleapis.com", "storage.googleapis.com", "artifactregistry.googleapis.com")
PERMISSIONS = (  # in roles/aiplatform.user
    "aiplatform.customJobs.create",
    "aiplatform.pipelineJobs.create",
    "aiplatform.models.upload",
    "aiplatform.endpoints.deploy",
)
OBJECTS = (
    "storage.objects.create",
    "storage.objects.get",
    "storage.objects.list",
    "storage.objects.delete",
)
UPLOAD = "artifactregistry.repositories.uploadArtifacts"
ACT_AS = "iam.serviceAccounts.actAs"

# GPU → the part of its quota's name between custom_model_training_ and _gpus. Only names seen in
# Google's own messages; other names are not guessed.
QUOTAS = {
    "NVIDIA_TESLA_P4": "nvidia_p4",
    "NVIDIA_TESLA_P100": "nvidia_p100",
    "NVIDIA_TESLA_T4": "nvidia_t4",
    "NVIDIA_TESLA_V100": "nvidia_v100",
    "NVIDIA_L4": "nvidia_l4",
    "NVIDIA_TESLA_A100": "nvidia_a100",
    "NVIDIA_A100_80GB": "nvidia_a100_80gb",
    "NVIDIA_H100_80GB": "nvidia_h100",
    "NVIDIA_H100_MEGA_80GB": "nvidia_h100_mega",
}
WITH_CPUS = ("n1", "e2")  # families whose CPUs count against custom_model_training_cpus


@dataclass(frozen=True)
class Cloud:
    """The inputs of a check."""

    settings: Settings
    root: Path
    environment: Environment
    rest: Rest


# ── commands that fix a problem ───────────────────────────────────────────────────────────────────
def create_bucket(where: Environment, bucket: str) -> str:
    """Return the command that creates the bucket of level 1."""
    return (
        f"gcloud storage buckets create gs://{bucket} --project={where.project} --location={where.region} "
        "--uniform-bucket-level-access --public-access-prevention"
    )


def create_repository(where: Environment, name: str) -> str:
    """Return the command that creates the image repository of level 1."""
    return (
        f"gcloud artifacts repositories create {name} --project={where.project} --location={where.region} "
        "--repository-format=docker"
    )


# ── checks: each returns a line for the report, or raises Missing or Unchecked ────────────────────
def gcloud(cloud: Cloud) -> str:
    """Check that gcloud is installed and logged in."""
    # gcloud's login is separate from the Application Default Credentials that programs use.
    found = version_of("gcloud", "--version")()
    if not found:
        raise Missing("it is not installed", "https://cloud.google.com/sdk/docs/install")
    account = version_of(
        "gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"
    )()
    if not account or "@" not in account:
        raise Missing(f"{found}, but not logged in", "gcloud auth login")
    return f"{found}, as {account}"


def docker(cloud: Cloud) -> str:
    """Check that Docker runs and can log in to the image registry."""
    engine = version_of("docker", "version", "--format", "engine {{.Server.Version}}")()
    if not engine and shutil.which("docker"):
        raise Missing("its engine, which builds the images, does not respond", START_DOCKER)
    if not engine:
        raise Missing(
            "it is not installed, but builds the images", "https://docs.docker.com/engine/install"
        )
    host = cloud.environment.images.split("/")[0]
    if not host.endswith("-docker.pkg.dev"):
        return (
            f"{engine}; containers.registry in {PROJECT_FILE} is {host}, where nothing is looked up"
        )
    file = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = {}
    except (OSError, ValueError) as error:
        raise Missing(
            f"{file} cannot be read: {error}",
            f"fix that file, then: gcloud auth configure-docker {host}",
        ) from None
    # A login is either a credential helper or a stored password.
    known = {*config.get("credHelpers", {}), *config.get("auths", {})}
    if not known & {host, f"https://{host}"}:
        raise Missing(
            f"Docker does not know how to log in to {host}", f"gcloud auth configure-docker {host}"
        )
    return f"{engine}; knows how to log in to {host}"


def apis(cloud: Cloud) -> str:
    """Check that the required APIs are enabled."""
    required = [*APIS, *(["compute.googleapis.com"] if cloud.environment.by_hand else [])]
    off = disabled_apis(cloud, required)
    if off:
        fix = enable_command(off, cloud.environment.project)
        raise Missing(f"{', '.join(off)} {'is' if len(off) == 1 else 'are'} off", fix)
    return ", ".join(name.split(".")[0] for name in required)


def disabled_apis(cloud: Cloud, names: Sequence[str]) -> list[str]:
    """Return the APIs that are not enabled in the project."""
    project = cloud.environment.project
    try:
        response = cloud.rest.call(
            "serviceusage",
            f"/v1/projects/{project}/services:batchGet",
            {"names": [f"projects/{project}/services/{name}" for name in names]},
        )
    except Refused as refused:
        raise no_project(refused, cloud.environment) from None
    enabled = {
        service["name"].rsplit("/", 1)[1]
        for service in response.get("services", [])
        if service.get("state") == "ENABLED"
    }
    return [name for name in names if name not in enabled]


def no_project(refused: Refused, where: Environment) -> Exception:
    """Return the exception for a project that cannot be read."""
    if refused.status in (403, 404):
        key = f"cloud.environments.{where.environment}.project"
        fix = f"`gcloud projects list` shows those that you have; write the id into {PROJECT_FILE}: {key}"
        return Missing(
            f"project {where.project} is not there, or you may not look at it: {refused}", fix
        )
    return Unchecked(str(refused))


def permissions(cloud: Cloud) -> str:
    """Check the caller's permissions in the project."""
    project = cloud.environment.project
    try:
        missing = cloud.rest.missing_permissions(
            "cloudresourcemanager", f"/v1/projects/{project}:testIamPermissions", PERMISSIONS
        )
    except Refused as refused:
        raise Unchecked(str(refused)) from None
    if missing:
        fix = f"gcloud projects add-iam-policy-binding {project} --member=user:YOU --role=roles/aiplatform.user"
        raise Missing(f"you lack {', '.join(missing)}", f"ask an owner to run: {fix}")
    return "you may start jobs and pipeline runs, upload models and deploy them"


def bucket(cloud: Cloud) -> str:
    """Check that the bucket (at level 2: all three) exists in the region and is writable."""
    where = cloud.environment
    names = sorted(
        {
            root.removeprefix("gs://").split("/")[0]
            for root in (where.pipeline_root, where.storage, where.data)
        }
    )
    for name in names:
        try:
            found = cloud.rest.call("storage", f"/storage/v1/b/{name}")
        except Refused as refused:
            raise _no_bucket(refused, where, name) from None
        location = str(found.get("location", "")).lower()
        if location != where.region:
            raise Missing(
                f"gs://{name} is in {location}, and cloud.region in {PROJECT_FILE} is {where.region}",
                "make another one in that region, under another name: "
                + create_bucket(where, f"{where.project}-{where.name}"),
            )
        missing = cloud.rest.missing_permissions(
            "storage", f"/storage/v1/b/{name}/iam/testPermissions", OBJECTS
        )
        if missing:
            fix = f"gcloud storage buckets add-iam-policy-binding gs://{name} --member=user:YOU --role=roles/storage.objectUser"
            raise Missing(
                f"gs://{name}: you lack {', '.join(missing)}", f"ask an owner to run: {fix}"
            )
    return (
        f"{', '.join(f'gs://{name}' for name in names)} in {where.region}; you may read and write"
    )


def _no_bucket(refused: Refused, where: Environment, name: str) -> Exception:
    if refused.status == 404 and where.by_hand:
        return Missing(f"gs://{name} is not there", create_bucket(where, name))
    if refused.status == 404:
        own = f"{where.project}-{where.name}"
        key = f"cloud.environments.{where.environment}.bucket"
        fix = f"{create_bucket(where, own)}, and write {own} into {PROJECT_FILE}: {key}"
        return Missing(f"gs://{name} is not there, and {key} names no bucket created manually", fix)
    if refused.status == 403:
        return Missing(
            f"gs://{name} is not yours to look at; bucket names are shared by all of Google's customers",
            f"choose another name; if you think it is yours, `gcloud storage buckets describe gs://{name}` says more",
        )
    return Unchecked(str(refused))


def repository(cloud: Cloud) -> str:
    """Check that the image repository exists, has format DOCKER and accepts pushes."""
    where = cloud.environment
    host, *path = where.images.split("/")
    if not host.endswith("-docker.pkg.dev") or len(path) < 2:
        raise Unchecked(
            f"containers.registry in {PROJECT_FILE} is {where.images}, which is not in Artifact Registry"
        )
    location, (project, name) = host.removesuffix("-docker.pkg.dev"), path[:2]
    resource = f"/v1/projects/{project}/locations/{location}/repositories/{name}"
    try:
        kind = cloud.rest.call("artifactregistry", resource).get("format")
        missing = cloud.rest.missing_permissions(
            "artifactregistry", f"{resource}:testIamPermissions", [UPLOAD]
        )
    except Refused as refused:
        if refused.status in (403, 404):
            raise Missing(
                f"{where.images} is not there, or not yours to look at",
                create_repository(where, name),
            ) from None
        raise Unchecked(str(refused)) from None
    if kind != "DOCKER":
        raise Missing(
            f"{where.images} holds {kind}, not images",
            f"make another, and write it into containers.registry in {PROJECT_FILE}",
        )
    if missing:
        fix = (
            f"gcloud artifacts repositories add-iam-policy-binding {name} --project={project} --location={location} "
            "--member=user:YOU --role=roles/artifactregistry.writer"
        )
        raise Missing(f"{where.images}: you may not push to it", f"ask an owner to run: {fix}")
    return f"{where.images}; you may push"


def act_as(cloud: Cloud) -> str:
    """Check that the service accounts of jobs and runs exist and the caller may act as them."""
    where = cloud.environment
    if where.by_hand:
        path = f"/v1/projects/{where.project}/services:batchGet"
        try:
            found = cloud.rest.call(
                "serviceusage",
                path,
                {"names": [f"projects/{where.project}/services/compute.googleapis.com"]},
            )
        except Refused as refused:
            raise Unchecked(str(refused)) from None
        # Each service's `parent` contains the project number, which the account's name needs.
        number = str(found["services"][0]["parent"]).removeprefix("projects/")
        # Pipeline runs act as this account by default.
        accounts = [f"{number}-compute@developer.gserviceaccount.com"]
    else:
        accounts = [where.account("pipeline"), where.account("trainer")]
    for account in accounts:
        try:
            missing = cloud.rest.missing_permissions(
                "iam", f"/v1/projects/-/serviceAccounts/{account}:testIamPermissions", [ACT_AS]
            )
        except Refused as refused:
            if refused.status != 404:
                raise Unchecked(str(refused)) from None
            fix = (
                enable_command(["compute.googleapis.com"], where.project)
                if where.by_hand
                else f"by hand, name your bucket in cloud.environments.{where.environment}.bucket of {PROJECT_FILE}, and "
                "Google's own account acts; at level 2 Terraform makes this one"
            )
            raise Missing(f"{account} is not there", fix) from None
        if missing:
            fix = (
                f"gcloud iam service-accounts add-iam-policy-binding {account} --project={where.project} "
                "--member=user:YOU --role=roles/iam.serviceAccountUser"
            )
            raise Missing(f"you may not act as {account}", f"ask an owner to run: {fix}")
    return f"you may act as {', '.join(accounts)}; what it may do itself is not looked up"


def jobs(cloud: Cloud) -> str:
    """Check the jobs of cloud.train.jobs without API calls."""
    try:
        resolved = gpu_jobs.chosen_jobs(cloud.settings, cloud.root, cloud.environment, "")
    except UserError as error:
        raise Missing(str(error), "make gpu-jobs lists them") from None
    return f"{len(resolved)} of cloud.train.jobs, in this order: {', '.join(cloud.settings.cloud.train.jobs)}"


def quota(cloud: Cloud) -> str:
    """Check that the quotas suffice for at least one job; current usage is unknown."""
    names = cloud.settings.cloud.train.jobs
    try:
        resolved = gpu_jobs.chosen_jobs(cloud.settings, cloud.root, cloud.environment, "")
    except UserError:
        raise Unchecked("the jobs of cloud.train.jobs must be right first") from None
    failures: list[Missing] = []
    for name, job in zip(names, resolved, strict=True):
        try:
            enough = quota_of(cloud, name, needed(job))
        except Missing as missing:
            failures.append(missing)
        else:
            return "; ".join([*map(str, failures), enough])
    raise Missing("; ".join(map(str, failures)), failures[-1].fix)


def quota_of(cloud: Cloud, name: str, wanted: Mapping[str, int]) -> str:
    """Check that each quota of a job is large enough; `wanted` maps metric to amount."""
    where = cloud.environment
    page = f"https://console.cloud.google.com/iam-admin/quotas?project={where.project}"
    if not wanted:
        raise Unchecked(f"which quota '{name}' draws on is not known here. See {page}")
    for metric, amount in wanted.items():
        try:
            limit = in_region(cloud.rest.call("serviceusage", _metric(where, metric)), where.region)
        except Refused as refused:
            raise Unchecked(f"{metric}: {refused}. See {page}") from None
        if limit is None:
            raise Unchecked(
                f"{metric} has no limit for {where.region} that can be read. See {page}"
            )
        if 0 <= limit < amount:  # -1: unlimited
            fix = f"ask for more at {page}, or choose another job (make gpu-jobs) or region in {PROJECT_FILE}"
            raise Missing(
                f"{metric} in {where.region} is {limit}, and '{name}' needs {amount}", fix
            )
    return f"enough for '{name}': {', '.join(wanted)}; how much of it is in use is not looked up"


def needed(job: Mapping[str, Any]) -> dict[str, int]:
    """Return quota → amount that a resolved job needs; {} if a machine's quotas are unknown."""
    # Spot and Flex-start use separate quotas, named preemptible.
    shared = "preemptible_" if job.get("scheduling", {}).get("strategy") in SHARED else ""
    total: dict[str, int] = {}
    for pool in job["workerPoolSpecs"]:
        machine, replicas = pool["machineSpec"], int(pool.get("replicaCount", 1))
        gpu, with_cpus = (
            machine.get("acceleratorType"),
            machine["machineType"].split("-")[0] in WITH_CPUS,
        )
        counts = {}
        if with_cpus:
            counts["cpus"] = int(machine["machineType"].rsplit("-", 1)[1])
        if gpu in QUOTAS:
            counts[f"{QUOTAS[gpu]}_gpus"] = int(machine["acceleratorCount"])
        if (gpu and gpu not in QUOTAS) or not counts:
            return {}
        for name, count in counts.items():
            metric = f"custom_model_training_{shared}{name}"
            total[metric] = total.get(metric, 0) + count * replicas
    return total


def _metric(where: Environment, metric: str) -> str:
    service = "aiplatform.googleapis.com"
    return f"/v1beta1/projects/{where.project}/services/{service}/consumerQuotaMetrics/{service}%2F{metric}"


def in_region(answer: Mapping[str, Any], region: str) -> int | None:
    """Return a quota's limit in a region; -1: unlimited, None: not in the response."""
    # A limit of the region takes precedence over the global one, which has no dimensions.
    buckets = [
        bucket
        for limit in answer.get("consumerQuotaLimits", [])
        for bucket in limit.get("quotaBuckets", [])
    ]
    for dimensions in ({"region": region}, {}):
        for bucket in buckets:
            if bucket.get("dimensions", {}) == dimensions and "effectiveLimit" in bucket:
                return int(bucket["effectiveLimit"])
    return None


Check = Callable[[Cloud], str]


@dataclass(frozen=True)
class Level:
    """The checks of a level.

    `local` names the checks that call no API; `then` is the next command after success.
    """

    number: int
    title: str
    checks: Mapping[str, Check]
    local: tuple[str, ...]
    then: str


LEVEL_1 = Level(
    1,
    "Level 1 in the cloud",
    {
        "gcloud": gcloud,
        "docker": docker,
        "jobs": jobs,
        "APIs": apis,
        "permissions": permissions,
        "bucket": bucket,
        "repository": repository,
        "actAs": act_as,
        "quota": quota,
    },
    local=("gcloud", "docker", "jobs"),
    then="make gpu-jobs · make train · make level1 RUNNER=vertex",
)


# ── report ────────────────────────────────────────────────────────────────────────────────────────
def tell(name: str, find: Callable[[], str]) -> bool:
    """Run a check and print its line; return False if it failed."""
    try:
        print(f"  ✓ {name:<12} {find()}", flush=True)
    except Unchecked as why:
        print(f"  · {name:<12} not checked: {why}", flush=True)
    except Missing as missing:
        print(f"  ✗ {name:<12} {missing}\n      fix: {missing.fix}", flush=True)
        return False
    return True


def report(settings: Settings, root: Path, level: Level = LEVEL_1) -> bool:
    """Run all checks in parallel and print them in order; return False if any failed."""
    where = resolve_environment(settings)
    ends = time.monotonic() + PATIENCE
    print(
        f"{level.title}: environment {where.environment}, project {where.project}, {where.region}"
    )
    problem: Missing | Unchecked | None = None
    found, whose = None, ""
    try:
        found, whose = load_credentials(where.project)
    except (Missing, Unchecked) as error:
        problem = error
    cloud = Cloud(settings, root, where, Rest(found, where.project))

    def identity() -> str:
        if problem:
            raise problem
        return whose

    pool = ThreadPoolExecutor(max_workers=len(level.checks))
    # Without credentials only the local checks can run.
    running = {
        name: pool.submit(check, cloud)
        for name, check in level.checks.items()
        if name in level.local or not problem
    }

    def result(name: str) -> str:
        future: Future[str] | None = running.get(name)
        if future is None:
            raise Unchecked(
                "credentials come first"
                if isinstance(problem, Missing)
                else "Google cannot be reached"
            )
        # All checks share one deadline.
        try:
            return future.result(timeout=max(0.0, ends - time.monotonic()))
        except Late:
            raise Unchecked(f"no answer within {PATIENCE:.0f} s") from None
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise Unchecked(f"unexpected response: {type(error).__name__}: {error}") from None

    told = [
        tell("credentials", identity),
        *(tell(name, partial(result, name)) for name in level.checks),
    ]
    # Do not wait: calls without a response time out within CALL seconds.
    pool.shutdown(wait=False, cancel_futures=True)
    return all(told)


def main() -> None:
    """Run the command line."""
    run_level(LEVEL_1)


def run_level(level: Level) -> None:
    """Print a level's report and the next command; exit with 2 if a check failed."""
    ready = report(load_settings(), project_root(), level)
    print(f"\nLevel {level.number}: {'all checks passed.' if ready else 'some checks failed (✗).'}")
    environment = os.environ.get("ENVIRONMENT")
    again = f"make doctor LEVEL={level.number}" + (
        f" ENVIRONMENT={environment}" if environment else ""
    )
    print(f"Next: {level.then}" if ready else f"Fix them, then: {again}")
    if not ready:
        sys.exit(2)


if __name__ == "__main__":
    run_command(main)
