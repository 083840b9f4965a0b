"""The blocks `containers` and `cloud` of project.yaml."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.config import Block


class Containers(Block):
    """Registry for built images: an address without https://, with the repository's path."""

    registry: Annotated[str, Field(pattern=r"^([a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*)?$")] = ""


class Mirrors(Block):
    """Sources of packages and images in a closed network; empty: the usual ones.

    Attributes:
        base_images: a prefix of the base image's name.
        python_index: a Python package index, as pip takes it.
        terraform: a network mirror of Terraform's providers; ends in /.
        certificates: a PEM file of the network's own certificates.
    """

    base_images: Annotated[str, Field(pattern=r"^([a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*)?$")] = ""
    python_index: str = ""
    terraform: Annotated[
        str, Field(pattern=r"^(https://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9._~-]+)*/)?$")
    ] = ""
    certificates: str = ""


PROJECT_ID = r"[a-z][a-z0-9-]{4,28}[a-z0-9]"
BUCKET = r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"
ACCOUNT = r"[a-z0-9][a-z0-9-]*@[a-z0-9.-]+\.gserviceaccount\.com"
IN_REGION = r"projects/[^/]+/locations/[^/]+"

# Each actor has its own service account.
Actor = Literal[
    "trainer",
    "pipeline",
    "build",
    "infra",
    "function",
    "trigger",
    "checker",
    "deployer",
    "predictor",
    "ingestion",
]

# Uses of the three buckets.
Root = Literal["pipeline_root", "storage", "data"]

# Uses of customer-managed keys, one key each.
KeyUse = Literal["storage", "registry", "vertex", "pubsub", "run", "secrets", "airflow", "compute"]


class Existing(Block):
    """Existing resources that replace Terraform's own: ids as Google's APIs write them.

    Attributes:
        network, subnetwork: of the private mode; build_pool: a private pool of Cloud Build.
        key_ring, keys: of customer-managed encryption; their owner grants the permissions.
        images: an image repository; buckets: names without gs://; accounts: e-mail addresses.
        metadata_store: whether Vertex AI was used in this project before.
    """

    network: Annotated[str, Field(pattern=r"^(projects/[^/]+/global/networks/[^/]+)?$")] = ""
    subnetwork: Annotated[
        str, Field(pattern=r"^(projects/[^/]+/regions/[^/]+/subnetworks/[^/]+)?$")
    ] = ""
    build_pool: Annotated[str, Field(pattern=rf"^({IN_REGION}/workerPools/[^/]+)?$")] = ""
    key_ring: Annotated[str, Field(pattern=rf"^({IN_REGION}/keyRings/[^/]+)?$")] = ""
    keys: dict[
        KeyUse, Annotated[str, Field(pattern=rf"^{IN_REGION}/keyRings/[^/]+/cryptoKeys/[^/]+$")]
    ] = Field(default_factory=dict)
    images: Annotated[str, Field(pattern=rf"^({IN_REGION}/repositories/[^/]+)?$")] = ""
    buckets: dict[Root, Annotated[str, Field(pattern=rf"^{BUCKET}$")]] = Field(default_factory=dict)
    accounts: dict[Actor, Annotated[str, Field(pattern=rf"^{ACCOUNT}$")]] = Field(
        default_factory=dict
    )
    # strict: otherwise pydantic also accepts text such as "yes" for a boolean.
    metadata_store: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _in_one_network(self) -> "Existing":
        if self.subnetwork and not self.network:
            raise ValueError("network: required with a subnetwork")
        return self


class EnvironmentConfig(Block):
    """One Google Cloud project.

    Attributes:
        project: its id; empty until level 1 on Google Cloud.
        bucket: one bucket, created manually (level 1); empty: Terraform's buckets (level 2).
        promote_from: the environment whose images run here, after approval; empty: build here.
        existing: resources to use instead of new ones.
    """

    project: Annotated[str, Field(pattern=rf"^({PROJECT_ID})?$")]
    bucket: Annotated[str, Field(pattern=rf"^({BUCKET})?$")] = ""
    promote_from: str = ""
    existing: Existing = Existing()


class Repository(Block):
    """The repository whose pushes start builds.

    Attributes:
        name: OWNER/NAME on GitHub, GROUP/NAME on GitLab; on Azure DevOps the part after /sc/ of the
            service connection's subject identifier; on Cloud Build CONNECTION/NAME of the
            repository linked in each environment.
        id: GitHub's or GitLab's number, which a rename does not change. For an older service
            connection of Azure DevOps, whose subject is sc://NAME, the organisation's GUID.
        host: your own GitLab (empty: gitlab.com), or the issuer of Azure DevOps' connection.
        branch: a push to it trains and deploys.
    """

    name: str = ""
    id: Annotated[
        str, Field(strict=True, pattern=r"^([0-9]+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?$")
    ] = ""
    host: Annotated[str, Field(pattern=r"^(https://[a-z0-9.-]+(/[A-Za-z0-9./-]+)?)?$")] = ""
    branch: str = "main"


class Events(Block):
    """What starts a run besides a push.

    Attributes:
        schedule: cron's five fields, in UTC; empty: no schedule.
        ingest: the schedule of the data ingestion job (cloud.data_ingestion: scheduled-job).
        batch_window_minutes: batch files arriving within N minutes into one run; 0: a run per file.
    """

    schedule: Annotated[str, Field(pattern=r"^(\S+( \S+){4})?$")] = ""
    ingest: Annotated[str, Field(pattern=r"^\S+( \S+){4}$")] = "0 3 * * *"
    batch_window_minutes: Annotated[int, Field(strict=True, ge=0, le=360)] = 0


class Budget(Block):
    """A monthly budget for e-mail alerts, in the billing account's currency; 0: no budget."""

    monthly: Annotated[int, Field(strict=True, ge=0)] = 0
    billing_account: Annotated[str, Field(pattern=r"^([0-9A-F]{6}(-[0-9A-F]{6}){2})?$")] = ""

    @model_validator(mode="after")
    def _payable(self) -> "Budget":
        if self.monthly and not self.billing_account:
            raise ValueError(
                "billing_account: required for a budget; run `gcloud billing accounts list`"
            )
        return self


class TrainJobs(Block):
    """The GPU jobs to try, in order."""

    jobs: Annotated[tuple[str, ...], Field(min_length=1)]


class Serve(Block):
    """The endpoint: its machine, fewest and most replicas, a new version's first traffic share."""

    machine: str
    replicas: tuple[
        Annotated[int, Field(strict=True, ge=1)], Annotated[int, Field(strict=True, ge=1)]
    ]
    canary_percent: Annotated[int, Field(strict=True, ge=1, le=100)]

    @model_validator(mode="after")
    def _ordered(self) -> "Serve":
        if self.replicas[0] > self.replicas[1]:
            raise ValueError("replicas: the first number (fewest) is larger than the second (most)")
        return self


class Cloud(Block):
    """Google Cloud, for levels 1 and 2.

    Attributes:
        private: machines without external addresses, in your network; builds in a private pool.
        workbench: a Jupyter machine, billed while it runs.
    """

    region: Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")]
    ci: Literal["github-actions", "gitlab", "azure-devops", "cloud-build"]
    repository: Repository = Repository()
    data_ingestion: Literal["scheduled-job", "managed-airflow", "none"]
    encryption: Literal["google-managed", "customer-managed"]
    private: Annotated[bool, Field(strict=True)] = False
    environments: Annotated[dict[str, EnvironmentConfig], Field(min_length=1)]
    train: TrainJobs
    serve: Serve
    events: Events = Events()
    workbench: Annotated[bool, Field(strict=True)] = False
    budget: Budget = Budget()
    alerts: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$")]
    mirrors: Mirrors = Mirrors()

    @model_validator(mode="after")
    def _promoted(self) -> "Cloud":
        """Check that each promote_from names another environment that builds images."""
        for name, environment in self.environments.items():
            # No chains: an environment that promotes has no images of its own to pass on.
            source = environment.promote_from
            if source and (
                source == name
                or source not in self.environments
                or self.environments[source].promote_from
            ):
                builders = [
                    other
                    for other, config in self.environments.items()
                    if other != name and not config.promote_from
                ]
                raise ValueError(
                    f"environments.{name}.promote_from: '{source}' builds no images; "
                    f"expected: {', '.join(builders) or 'nothing: there is no other environment'}"
                )
        return self


class CloudSettings(Block):
    """The settings that resource names on Google Cloud depend on."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,18}[a-z0-9]$")]
    containers: Containers = Containers()
    cloud: Cloud
