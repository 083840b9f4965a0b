"""Check that Google Cloud is ready for pushes: make doctor LEVEL=2.

level_1_pipeline.vertex.doctor has the checks that both levels share, and prints the report.
"""

import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from core.errors import UserError, run_command
from core.paths import PROJECT_FILE
from gcp import client as api
from gcp import pipeline_version
from gcp.config import Repository
from gcp.pipeline_version import POINTER
from level_1_pipeline.vertex import doctor as vertex_doctor
from level_1_pipeline.vertex.doctor import ACT_AS, Cloud, Level
from level_1_pipeline.vertex.rest import CALL, Missing, Refused, Unchecked, enable_command
from level_2_cicd import infra

# Terraform calls the APIs in FIRST, so they must be on before it; the foundation enables APIS.
FIRST = ("cloudresourcemanager.googleapis.com", "serviceusage.googleapis.com")
APIS = (
    "aiplatform",
    "artifactregistry",
    "cloudbuild",
    "cloudscheduler",
    "iam",
    "monitoring",
    "pubsub",
    "run",
    "storage",
    "sts",
)
PERMISSIONS = (
    "cloudbuild.builds.create",
    "cloudbuild.builds.get",
)  # roles/cloudbuild.builds.editor
USE_POOL = "cloudbuild.workerpools.use"  # roles/cloudbuild.workerPoolUser

# CI → the keys that cloud.repository needs, as alternatives of key → pattern, and where to find the
# values. Terraform checks them too.
REPOSITORY: Mapping[str, tuple[Sequence[Mapping[str, str]], str]] = {
    "github-actions": ([{"id": "[0-9]+"}], "id is what `gh api repos/OWNER/NAME --jq .id` prints"),
    "gitlab": ([{"id": "[0-9]+"}], "id is the project's number, on its page"),
    "azure-devops": (
        [
            {"name": ".+", "host": r"https://login\.microsoftonline\.com/.+"},
            {"name": ".+", "id": ".+"},
        ],
        "host is the issuer, and name what stands behind /sc/ in the subject identifier, that the service connection shows; or, "
        "where that is sc://…, id is the organisation's GUID and name is organisation/project/service-connection",
    ),
    "cloud-build": (
        [{"name": "[^/]+/[^/]+"}],
        "name is CONNECTION/NAME of the linked repository, as "
        "`gcloud builds repositories list --connection=CONNECTION --region=REGION` shows it",
    ),
}


def terraform_program(cloud: Cloud) -> str:
    """Check that Terraform is installed."""
    try:
        return infra.require()
    except UserError as error:
        what, _, fix = str(error).partition(". ")
        raise Missing(what, fix) from None


def by_terraform(cloud: Cloud) -> str:
    """Check that each environment has a project and its buckets are created by Terraform."""
    if cloud.environment.by_hand:
        key = f"cloud.environments.{cloud.environment.environment}.bucket"
        fix = f"empty it in {PROJECT_FILE}: at level 2 Terraform makes three, and what is in this one stays there"
        raise Missing(f"{key} names a bucket created manually (level 1)", fix)
    without = [
        name for name, where in cloud.settings.cloud.environments.items() if not where.project
    ]
    if without:
        fix = f"write the ids into {PROJECT_FILE}, or remove what you do not want; `gcloud projects list` shows those that you have"
        raise Missing(f"{', '.join(without)}: no project is named", fix)
    return ", ".join(
        f"{name}: {where.project}" for name, where in cloud.settings.cloud.environments.items()
    )


def pushes(cloud: Cloud) -> str:
    """Check that cloud.repository identifies the repository whose pushes may deploy."""
    repository: Repository = cloud.settings.cloud.repository
    ci = cloud.settings.cloud.ci
    ways, how = REPOSITORY[ci]
    missing = [
        key
        for way in ways
        for key, form in way.items()
        if not re.fullmatch(form, getattr(repository, key))
    ]
    if all(set(way) & set(missing) for way in ways):
        wanted = ", or ".join(" and ".join(way) for way in ways)
        said = ", ".join(f"{key} is '{getattr(repository, key)}'" for key in dict.fromkeys(missing))
        fix = f"write it into {PROJECT_FILE}: {how}"
        raise Missing(
            f"cloud.repository must say {wanted}, so that its pushes may deploy; {said}", fix
        )
    return f"{ci}: {', '.join(filter(None, [repository.name, repository.id]))}, branch {repository.branch}"


def apis(cloud: Cloud) -> str:
    """Check that the required APIs are enabled."""
    wanted = [*FIRST, *(f"{name}.googleapis.com" for name in APIS)]
    off = vertex_doctor.disabled_apis(cloud, wanted)
    # Terraform itself needs these, so the fix is gcloud; it enables the others.
    first = [name for name in FIRST if name in off]
    if first:
        raise Missing(
            f"{', '.join(first)} must be on before Terraform can run",
            enable_command(first, cloud.environment.project),
        )
    if off:
        raise Missing(
            f"{', '.join(off)}: off", f"make foundation ENVIRONMENT={cloud.environment.environment}"
        )
    return f"{len(wanted)} are on"


def foundation(cloud: Cloud) -> str:
    """Check that the foundation has been applied."""
    _require_terraforms(cloud)
    bucket = cloud.environment.terraform_state
    if not _has_state(cloud, "foundation"):
        fix = f"make foundation ENVIRONMENT={cloud.environment.environment}, by an admin who may grant IAM roles"
        raise Missing(f"gs://{bucket}/foundation is not there", fix)
    return f"its state is in gs://{bucket}"


def _has_state(cloud: Cloud, part: str) -> bool:
    """Return True if a part (foundation or stack) has a Terraform state in the bucket."""
    path = f"/storage/v1/b/{cloud.environment.terraform_state}/o/{quote(f'{part}/default.tfstate', safe='')}"
    try:
        cloud.rest.call("storage", path)
    except Refused as refused:
        if refused.status != 404:
            raise Unchecked(str(refused)) from None
        return False
    return True


def metadata(cloud: Cloud) -> str:
    """Check that the stack can create Vertex AI's metadata store, or has created it."""
    # A region has only one: the stack cannot create it if it exists from earlier use.
    _require_terraforms(cloud)
    where = cloud.environment
    if cloud.settings.cloud.environments[where.environment].existing.metadata_store:
        return f"{PROJECT_FILE} says that it is there already"
    try:
        service = api.client("MetadataService", where.region)
        request = {"name": f"{where.parent}/metadataStores/default"}
        api.call(
            service.get_metadata_store, request, "looking for it", repeatable=False, timeout=CALL
        )
    except UserError as error:
        if isinstance(error, api.ApiError) and error.code == 404:
            return "it is not there yet: the first apply makes it"
        raise Unchecked(str(error)) from None
    if not _has_state(cloud, "stack"):
        fix = f"write existing: {{metadata_store: true}} under cloud.environments.{where.environment} in {PROJECT_FILE}"
        raise Missing("Vertex AI's metadata store is there already, from earlier use", fix)
    return "it is there, and so is the stack's state"


def _require_terraforms(cloud: Cloud) -> None:
    """Skip a check of Terraform's resources while a bucket created manually is configured."""
    if cloud.environment.by_hand:
        raise Unchecked("the bucket created manually comes first")


def permissions(cloud: Cloud) -> str:
    """Check that the caller may start builds and act as the build's service account."""
    _require_terraforms(cloud)
    where = cloud.environment
    account = where.account("build")
    try:
        missing = cloud.rest.missing_permissions(
            "cloudresourcemanager", f"/v1/projects/{where.project}:testIamPermissions", PERMISSIONS
        )
        missing += cloud.rest.missing_permissions(
            "iam", f"/v1/projects/-/serviceAccounts/{account}:testIamPermissions", [ACT_AS]
        )
    except Refused as refused:
        if refused.status == 404:
            raise Missing(
                f"{account} is not there", f"make foundation ENVIRONMENT={where.environment}"
            ) from None
        raise Unchecked(str(refused)) from None
    if ACT_AS in missing:
        fix = (
            f"gcloud iam service-accounts add-iam-policy-binding {account} --project={where.project} "
            "--member=user:YOU --role=roles/iam.serviceAccountUser"
        )
        raise Missing(f"you may not act as {account}", f"ask an owner to run: {fix}")
    if missing:
        fix = f"gcloud projects add-iam-policy-binding {where.project} --member=user:YOU --role=roles/cloudbuild.builds.editor"
        raise Missing(f"you lack {', '.join(missing)}", f"ask an owner to run: {fix}")
    if where.build_pool:
        _require_pool(cloud)
    return f"you may start builds as {account}; the CI may too, if the foundation is there"


def _require_pool(cloud: Cloud) -> None:
    """Check that the caller may use the private build pool."""
    # The pool may belong to another project.
    project = cloud.environment.build_pool.split("/")[1]
    try:
        missing = cloud.rest.missing_permissions(
            "cloudresourcemanager", f"/v1/projects/{project}:testIamPermissions", [USE_POOL]
        )
    except Refused as refused:
        raise Unchecked(
            f"whether you may build in {cloud.environment.build_pool}: {refused}"
        ) from None
    if missing:
        fix = f"gcloud projects add-iam-policy-binding {project} --member=user:YOU --role=roles/cloudbuild.workerPoolUser"
        raise Missing(
            f"you lack {USE_POOL} for {cloud.environment.build_pool}",
            f"ask an owner to run: {fix}",
        )


def buckets(cloud: Cloud) -> str:
    """Check the three buckets as level 1 does, with the fixes of level 2."""
    # Level 1's fix creates a bucket manually; here Terraform creates buckets, except existing ones.
    _require_terraforms(cloud)
    environment = cloud.environment.environment
    try:
        return vertex_doctor.bucket(cloud)
    except Missing as missing:
        said = str(missing)
        # Terraform does not create buckets listed as existing: there the fix is another one.
        own = [
            name
            for name in cloud.settings.cloud.environments[environment].existing.buckets.values()
            if f"gs://{name} " in said
        ]
        if "is not there" in said:
            fix = f"its name stands in {PROJECT_FILE}: cloud.environments.{environment}.existing.buckets"
            raise Missing(
                said.split(",", maxsplit=1)[0],
                fix if own else f"make foundation ENVIRONMENT={environment}",
            ) from None
        if " is in " in said:
            raise Missing(
                said,
                f"buckets cannot move: write that region into cloud.region of {PROJECT_FILE}, or remove them there",
            ) from None
        raise


def published(cloud: Cloud) -> str:
    """Check whether a push has published a pipeline; before the first push it is not checked."""
    _require_terraforms(cloud)
    pointer = f"{pipeline_version.templates_folder(cloud.environment)}/{POINTER}"
    bucket, name = pointer.removeprefix("gs://").split("/", maxsplit=1)
    try:
        cloud.rest.call("storage", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")
    except Refused as refused:
        raise Unchecked(
            "nothing is published yet: the first push does"
            if refused.status == 404
            else str(refused)
        ) from None
    return f"{pointer} names what runs"


LEVEL_2 = Level(
    2,
    "Level 2",
    {
        "gcloud": vertex_doctor.gcloud,
        "terraform": terraform_program,
        "jobs": vertex_doctor.jobs,
        "projects": by_terraform,
        "pushes": pushes,
        "APIs": apis,
        "foundation": foundation,
        "metadata": metadata,
        "buckets": buckets,
        "permissions": permissions,
        "quota": vertex_doctor.quota,
        "published": published,
    },
    local=("gcloud", "terraform", "jobs", "projects", "pushes"),
    then="git push, or make submit",
)


if __name__ == "__main__":
    run_command(lambda: vertex_doctor.run_level(LEVEL_2))
