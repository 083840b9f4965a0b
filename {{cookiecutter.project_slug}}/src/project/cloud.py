"""Where things are in Google Cloud: every address follows from project.yaml, and is put together here.

ENVIRONMENT chooses among cloud.environments; without it, the first one is meant. Standard library only, but for settings.
"""

import os
from dataclasses import dataclass

from project.errors import UserError
from project.settings import FILE, Settings

# Who acts, each with a service account of its own: NAME-ACTOR@PROJECT.iam.gserviceaccount.com, made by Terraform.
ACTORS = ("trainer", "pipeline", "build", "infra", "function", "trigger", "deployer", "predictor", "ingestion")


@dataclass(frozen=True)
class Place:
    """One environment's addresses.

    Attributes:
        name: the project's name, of project.yaml; project: Google Cloud's id.
        pipeline_root, storage, data: gs:// addresses, without a slash at the end: what runs write, what is published and
            registered, and the rows.
        images: the repository of images; templates: the one of compiled pipelines, an https:// address.
        key: the Cloud KMS key for Vertex AI; empty where Google's own keys are used.
        by_hand: made by a person with one bucket (level 1): there are no service accounts and no keys of its own.
    """

    environment: str
    name: str
    project: str
    region: str
    pipeline_root: str
    storage: str
    data: str
    images: str
    templates: str
    key: str
    by_hand: bool

    @property
    def parent(self) -> str:
        """The project and region as Google's APIs name them."""
        return f"projects/{self.project}/locations/{self.region}"

    @property
    def registry(self) -> str:
        """The model registry's address, as `project.registry.open_registry` takes it."""
        return f"{self.storage}/registry"

    def account(self, actor: str) -> str:
        """The service account of an actor; empty by hand, where Google's default one acts.

        Raises:
            KeyError: there is no such actor.
        """
        if actor not in ACTORS:
            raise KeyError(actor)
        return "" if self.by_hand else f"{self.name}-{actor}@{self.project}.iam.gserviceaccount.com"


def names_a_project(chosen: Settings) -> bool:
    """Whether any Google Cloud project is named yet."""
    return any(where.project for where in chosen.cloud.environments.values())


def place(chosen: Settings, environment: str | None = None) -> Place:
    """The addresses of an environment.

    Raises:
        UserError: there is no such environment, or its project is not named yet.
    """
    cloud = chosen.cloud
    name = environment or os.environ.get("ENVIRONMENT") or next(iter(cloud.environments))
    if name not in cloud.environments:
        raise UserError(f"ENVIRONMENT={name}: {FILE} has {', '.join(cloud.environments)} under cloud.environments.")
    where = cloud.environments[name]
    if not where.project:
        raise UserError(
            f"cloud.environments.{name}.project in {FILE} is empty. Write the id of your Google Cloud project there; "
            "`gcloud projects list` shows those that you have."
        )
    own = f"gs://{where.project}-{chosen.name}"
    return Place(
        environment=name,
        name=chosen.name,
        project=where.project,
        region=cloud.region,
        pipeline_root=f"gs://{where.bucket}/pipeline-root" if where.bucket else f"{own}-pipeline-root",
        storage=f"gs://{where.bucket}/storage" if where.bucket else f"{own}-storage",
        data=f"gs://{where.bucket}/data" if where.bucket else f"{own}-data",
        images=chosen.containers.registry or f"{cloud.region}-docker.pkg.dev/{where.project}/{chosen.name}",
        templates=f"https://{cloud.region}-kfp.pkg.dev/{where.project}/{chosen.name}-templates",
        key=_key(where.project, chosen) if cloud.encryption == "customer-managed" and not where.bucket else "",
        by_hand=bool(where.bucket),
    )


def _key(project: str, chosen: Settings) -> str:
    return f"projects/{project}/locations/{chosen.cloud.region}/keyRings/{chosen.name}/cryptoKeys/vertex"
