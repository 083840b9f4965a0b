"""The resource names of one environment on Google Cloud, derived from project.yaml.

ENVIRONMENT selects one of cloud.environments; the default is the first.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from core.errors import UserError
from core.paths import PROJECT_FILE
from gcp.config import Actor, CloudSettings, EnvironmentConfig, Root

# Terraform creates a service account for each: NAME-ACTOR@PROJECT.iam.gserviceaccount.com.
ACTORS: tuple[str, ...] = get_args(Actor)
# Pub/Sub topics: requests for a run, file events below `incoming`, undeliverable messages.
TOPICS = ("requests", "data", "dead-letters")
# Each root is a bucket PROJECT-NAME-SUFFIX: at most 61 characters; Google allows 63.
BUCKETS: dict[Root, str] = {"pipeline_root": "pipelines", "storage": "storage", "data": "data"}


@dataclass(frozen=True)
class Environment:
    """One environment's resource names.

    Attributes:
        name: the project's name in project.yaml; project: the Google Cloud project's id.
        pipeline_root, storage, data: gs:// URIs without a trailing slash: output of runs;
            published files and the registry; datasets.
        images: the image repository; templates: the https:// URL of compiled pipelines.
        key: the Cloud KMS key for Vertex AI; empty: Google-managed keys.
        by_hand: level 1, created manually with one bucket: no service accounts, no keys.
        promote_from: the environment whose images run here; empty: they are built here.
        accounts: existing service accounts, by actor.
        network_attachment: of Vertex AI's machines to your network; empty outside private mode.
        build_pool: the private pool of Cloud Build; empty: Google's own.
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
        """projects/PROJECT/locations/REGION."""
        return f"projects/{self.project}/locations/{self.region}"

    @property
    def registry(self) -> str:
        """The model registry's gs:// URI."""
        return f"{self.storage}/registry"

    @property
    def incoming(self) -> str:
        """The folder whose new files start a run."""
        return f"{self.data}/incoming"

    @property
    def builds(self) -> str:
        """The folder of the builds' sources and image digests."""
        return f"{self.storage}/builds"

    @property
    def terraform_state(self) -> str:
        """The bucket of Terraform's state."""
        return f"{self.project}-{self.name}-terraform"

    def topic(self, kind: str) -> str:
        """Return the name of a Pub/Sub topic, such as projects/PROJECT/topics/NAME-requests."""
        if kind not in TOPICS:
            raise KeyError(kind)
        return f"projects/{self.project}/topics/{self.name}-{kind}"

    def account(self, actor: str) -> str:
        """Return an actor's service account; empty (Google's default account) if by_hand."""
        if actor not in ACTORS:
            raise KeyError(actor)
        if self.by_hand:
            return ""
        default = f"{self.name}-{actor}@{self.project}.iam.gserviceaccount.com"
        return self.accounts.get(actor) or default


def names_a_project(settings: CloudSettings) -> bool:
    """Return whether project.yaml names a Google Cloud project."""
    return any(config.project for config in settings.cloud.environments.values())


def resolve_environment(settings: CloudSettings, environment: str | None = None) -> Environment:
    """Return the resource names of an environment."""
    cloud = settings.cloud
    name = environment or os.environ.get("ENVIRONMENT") or next(iter(cloud.environments))
    if name not in cloud.environments:
        raise UserError(
            f"ENVIRONMENT={name}: {PROJECT_FILE} has {', '.join(cloud.environments)} "
            "under cloud.environments."
        )
    config = cloud.environments[name]
    if not config.project:
        raise UserError(
            f"cloud.environments.{name}.project in {PROJECT_FILE} is empty. Write the id of your "
            "Google Cloud project there; `gcloud projects list` lists them."
        )

    existing = config.existing

    def default(area: str, kind: str) -> str:
        """Return the id of a resource that Terraform creates under the project's name."""
        return f"projects/{config.project}/{area}/{cloud.region}/{kind}/{settings.name}"

    key = ""
    if cloud.encryption == "customer-managed" and not config.bucket:
        ring = existing.key_ring or default("locations", "keyRings")
        key = existing.keys.get("vertex") or f"{ring}/cryptoKeys/vertex"
    repository = existing.images or default("locations", "repositories")
    # An existing repository may be in another project and region than the environment.
    _, owner, _, region, _, images = repository.split("/")
    templates = f"{config.project}/{settings.name}-templates"
    private = cloud.private
    return Environment(
        environment=name,
        name=settings.name,
        project=config.project,
        region=cloud.region,
        **_roots(settings.name, config),
        images=settings.containers.registry or f"{region}-docker.pkg.dev/{owner}/{images}",
        templates=f"https://{cloud.region}-kfp.pkg.dev/{templates}",
        key=key,
        by_hand=bool(config.bucket),
        promote_from=config.promote_from,
        network_attachment=default("regions", "networkAttachments") if private else "",
        build_pool=existing.build_pool or (default("locations", "workerPools") if private else ""),
        accounts={str(actor): address for actor, address in existing.accounts.items()},
    )


def _roots(name: str, config: EnvironmentConfig) -> dict[str, str]:
    """Return the roots' gs:// URIs: folders of the one bucket, or one bucket each."""
    if config.bucket:
        return {root: f"gs://{config.bucket}/{root.replace('_', '-')}" for root in BUCKETS}
    return {
        root: f"gs://{config.existing.buckets.get(root) or f'{config.project}-{name}-{suffix}'}"
        for root, suffix in BUCKETS.items()
    }
