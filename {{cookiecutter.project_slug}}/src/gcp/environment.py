"""Where things are in Google Cloud: every address follows from project.yaml, and is put together here.

ENVIRONMENT chooses among cloud.environments; without it, the first one is meant. Standard library only, but for settings.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from core.errors import UserError
from core.paths import PROJECT_FILE
from gcp.config import Actor, CloudSettings, EnvironmentConfig, Root

# Who acts, each with a service account of its own: NAME-ACTOR@PROJECT.iam.gserviceaccount.com, made by Terraform.
ACTORS: tuple[str, ...] = get_args(Actor)
# Pub/Sub's topics: requests for a run; what happens to files below `incoming`; what nobody could deliver.
TOPICS = ("requests", "data", "dead-letters")
# Three roots, each a bucket with this behind PROJECT-NAME: 61 characters at most, and Google allows 63.
BUCKETS: dict[Root, str] = {"pipeline_root": "pipelines", "storage": "storage", "data": "data"}


@dataclass(frozen=True)
class Environment:
    """One environment's addresses.

    Attributes:
        name: the project's name, of project.yaml; project: Google Cloud's id.
        pipeline_root, storage, data: gs:// addresses, without a slash at the end: what runs write, what is published and
            registered, and the rows.
        images: the repository of images; templates: the one of compiled pipelines, an https:// address.
        key: the Cloud KMS key for Vertex AI; empty where Google's own keys are used.
        by_hand: made by a person with one bucket (level 1): there are no service accounts and no keys of its own.
        promote_from: the environment whose images are run here; empty: they are built here.
        accounts: those service accounts that were there before, by actor.
        network_attachment: where Vertex AI's machines reach into a network of your own; empty but in the private mode.
        build_pool: the private pool that builds; empty: Google's own.
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
    promote_from: str = ""
    accounts: Mapping[str, str] = field(default_factory=dict)
    network_attachment: str = ""
    build_pool: str = ""

    @property
    def parent(self) -> str:
        """The project and region as Google's APIs name them."""
        return f"projects/{self.project}/locations/{self.region}"

    @property
    def registry(self) -> str:
        """The model registry's address, as `core.registry.open_registry` takes it."""
        return f"{self.storage}/registry"

    @property
    def incoming(self) -> str:
        """The folder whose new files start a run; rows that a run brings itself lie beside it."""
        return f"{self.data}/incoming"

    @property
    def builds(self) -> str:
        """The folder of what builds leave: the sources that they were sent, and the images' digests."""
        return f"{self.storage}/builds"

    @property
    def terraform_state(self) -> str:
        """The bucket of Terraform's state, one for each environment."""
        return f"{self.project}-{self.name}-terraform"

    def topic(self, kind: str) -> str:
        """A topic of Pub/Sub: projects/PROJECT/topics/NAME-requests.

        Raises:
            KeyError: there is no such topic.
        """
        if kind not in TOPICS:
            raise KeyError(kind)
        return f"projects/{self.project}/topics/{self.name}-{kind}"

    def account(self, actor: str) -> str:
        """The service account of an actor; empty by hand, where Google's default one acts.

        Raises:
            KeyError: there is no such actor.
        """
        if actor not in ACTORS:
            raise KeyError(actor)
        if self.by_hand:
            return ""
        return (
            self.accounts.get(actor)
            or f"{self.name}-{actor}@{self.project}.iam.gserviceaccount.com"
        )


def names_a_project(settings: CloudSettings) -> bool:
    """Whether any Google Cloud project is named yet."""
    return any(where.project for where in settings.cloud.environments.values())


def resolve_environment(settings: CloudSettings, environment: str | None = None) -> Environment:
    """The addresses of an environment.

    Raises:
        UserError: there is no such environment, or its project is not named yet.
    """
    cloud = settings.cloud
    name = environment or os.environ.get("ENVIRONMENT") or next(iter(cloud.environments))
    if name not in cloud.environments:
        raise UserError(
            f"ENVIRONMENT={name}: {PROJECT_FILE} has {', '.join(cloud.environments)} under cloud.environments."
        )
    where = cloud.environments[name]
    if not where.project:
        raise UserError(
            f"cloud.environments.{name}.project in {PROJECT_FILE} is empty. Write the id of your Google Cloud project there; "
            "`gcloud projects list` shows those that you have."
        )
    if where.bucket:
        roots = {str(root): f"gs://{where.bucket}/{root.replace('_', '-')}" for root in BUCKETS}
    else:
        own = f"{where.project}-{settings.name}"
        roots = {
            root: f"gs://{where.existing.buckets.get(root) or f'{own}-{suffix}'}"
            for root, suffix in BUCKETS.items()
        }
    return Environment(
        environment=name,
        name=settings.name,
        project=where.project,
        region=cloud.region,
        **roots,
        images=settings.containers.registry or _images(settings, where),
        templates=f"https://{cloud.region}-kfp.pkg.dev/{where.project}/{settings.name}-templates",
        key=_key(settings, where)
        if cloud.encryption == "customer-managed" and not where.bucket
        else "",
        by_hand=bool(where.bucket),
        promote_from=where.promote_from,
        network_attachment=_own(settings, where, "regions", "networkAttachments")
        if cloud.private
        else "",
        build_pool=where.existing.build_pool
        or (_own(settings, where, "locations", "workerPools") if cloud.private else ""),
        accounts={str(actor): address for actor, address in where.existing.accounts.items()},
    )


def _own(settings: CloudSettings, where: EnvironmentConfig, area: str, kind: str) -> str:
    """The id of something that Terraform makes, and that bears the project's name."""
    return f"projects/{where.project}/{area}/{settings.cloud.region}/{kind}/{settings.name}"


def _images(settings: CloudSettings, where: EnvironmentConfig) -> str:
    _, project, _, region, _, name = (
        where.existing.images or _own(settings, where, "locations", "repositories")
    ).split("/")
    return f"{region}-docker.pkg.dev/{project}/{name}"


def _key(settings: CloudSettings, where: EnvironmentConfig) -> str:
    ring = where.existing.key_ring or _own(settings, where, "locations", "keyRings")
    return where.existing.keys.get("vertex") or f"{ring}/cryptoKeys/vertex"
