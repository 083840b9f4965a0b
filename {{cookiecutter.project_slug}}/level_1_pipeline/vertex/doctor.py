"""make doctor LEVEL=1: is the cloud ready for level 1? Looks before anything is sent, and says what to type where it is not.
LEVEL=2 asks the same for level 2: see level_2_cicd.doctor.

python -m level_1_pipeline.vertex.doctor 1        exit code 2 when something that is needed is missing

It changes nothing, asks all at once, and waits for nobody longer than PATIENCE. What cannot be found out is said to be
unchecked, and not to be missing.
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

PATIENCE = 30.0  # seconds for all of it

# What level 1 calls; by hand, the steps run as Compute Engine's default account, which comes with its API.
APIS = ("aiplatform.googleapis.com", "storage.googleapis.com", "artifactregistry.googleapis.com")
PERMISSIONS = (  # roles/aiplatform.user holds them
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

# The quota's name, between custom_model_training_ and _gpus, for a GPU; those that were seen in Google's own messages. For
# others nothing is guessed.
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
WITH_CPUS = ("n1", "e2")  # machines whose processors count too, against custom_model_training_cpus


@dataclass(frozen=True)
class Cloud:
    """What the checks look at, and whom they ask."""

    settings: Settings
    root: Path
    environment: Environment
    rest: Rest


# ── what to type ────────────────────────────────────────────────────────────────────────────────────────────────────
def create_bucket(where: Environment, bucket: str) -> str:
    """The command that makes the bucket of level 1."""
    return (
        f"gcloud storage buckets create gs://{bucket} --project={where.project} --location={where.region} "
        "--uniform-bucket-level-access --public-access-prevention"
    )


def create_repository(where: Environment, name: str) -> str:
    """The command that makes the repository of level 1."""
    return (
        f"gcloud artifacts repositories create {name} --project={where.project} --location={where.region} "
        "--repository-format=docker"
    )


# ── the checks: each returns what is there ──────────────────────────────────────────────────────────────────────────
def gcloud(cloud: Cloud) -> str:
    """The command-line program, and who is logged in there: another login than that of programs."""
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
    """Docker, and whether it may push to the registry of images."""
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
    known = {*config.get("credHelpers", {}), *config.get("auths", {})}
    if not known & {host, f"https://{host}"}:
        raise Missing(
            f"Docker does not know how to log in to {host}", f"gcloud auth configure-docker {host}"
        )
    return f"{engine}; knows how to log in to {host}"


def apis(cloud: Cloud) -> str:
    """The APIs that must be on."""
    required = [*APIS, *(["compute.googleapis.com"] if cloud.environment.by_hand else [])]
    off = disabled_apis(cloud, required)
    if off:
        fix = enable_command(off, cloud.environment.project)
        raise Missing(f"{', '.join(off)} {'is' if len(off) == 1 else 'are'} off", fix)
    return ", ".join(name.split(".")[0] for name in required)


def disabled_apis(cloud: Cloud, names: Sequence[str]) -> list[str]:
    """Those of the APIs that are not enabled in the project."""
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
    """What to say of a project that is not to be looked at."""
    if refused.status in (403, 404):
        key = f"cloud.environments.{where.environment}.project"
        fix = f"`gcloud projects list` shows those that you have; write the id into {PROJECT_FILE}: {key}"
        return Missing(
            f"project {where.project} is not there, or you may not look at it: {refused}", fix
        )
    return Unchecked(str(refused))


def permissions(cloud: Cloud) -> str:
    """What you may do in the project."""
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
    """The bucket, or at level 2 the three: there, in the region, and yours to write."""
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
    """The repository of images: there, for images, and yours to write."""
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
    """The service accounts that jobs and runs act as: there, and yours to use."""
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
        number = str(found["services"][0]["parent"]).removeprefix("projects/")
        accounts = [
            f"{number}-compute@developer.gserviceaccount.com"
        ]  # pipeline runs act as this one by default
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
    """The jobs that project.yaml names, as far as can be told without asking."""
    try:
        resolved = gpu_jobs.chosen_jobs(cloud.settings, cloud.root, cloud.environment, "")
    except UserError as error:
        raise Missing(str(error), "make gpu-jobs lists them") from None
    return f"{len(resolved)} of cloud.train.jobs, in this order: {', '.join(cloud.settings.cloud.train.jobs)}"


def quota(cloud: Cloud) -> str:
    """Whether one of the jobs has the quotas that it needs; what of them is in use is not known here."""
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
    """Whether a job has the quotas that it needs."""
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
        if 0 <= limit < amount:
            fix = f"ask for more at {page}, or choose another job (make gpu-jobs) or region in {PROJECT_FILE}"
            raise Missing(
                f"{metric} in {where.region} is {limit}, and '{name}' needs {amount}", fix
            )
    return f"enough for '{name}': {', '.join(wanted)}; how much of it is in use is not looked up"


def needed(job: Mapping[str, Any]) -> dict[str, int]:
    """The quotas that a resolved job draws on, and how much of each; {} where those of a machine are not known."""
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
    """A quota's limit in a region, where it has one of its own, or else everywhere; -1 for none, None if it is not told."""
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
    """What a level needs.

    Attributes:
        title: what it is called.
        checks: name → what looks at it; local: those that ask nobody.
        then: what to type when nothing is missing.
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


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────
def tell(name: str, find: Callable[[], str]) -> bool:
    """One line about a check; False when something that is needed is missing."""
    try:
        print(f"  ✓ {name:<12} {find()}", flush=True)
    except Unchecked as why:
        print(f"  · {name:<12} not checked: {why}", flush=True)
    except Missing as missing:
        print(f"  ✗ {name:<12} {missing}\n      fix: {missing.fix}", flush=True)
        return False
    return True


def report(settings: Settings, root: Path, level: Level = LEVEL_1) -> bool:
    """Look at everything at once, and tell it in order; False when something that is needed is missing."""
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
    pool.shutdown(
        wait=False, cancel_futures=True
    )  # what has no answer yet ends by itself, within CALL seconds
    return all(told)


def main() -> None:
    """Command line."""
    run_level(LEVEL_1)


def run_level(level: Level) -> None:
    """Print the report of a level and what to do next; exit code 2 when something is missing."""
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
