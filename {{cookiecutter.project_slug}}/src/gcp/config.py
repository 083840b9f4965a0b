"""The blocks `containers` and `cloud` of project.yaml."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.config import Block


class Containers(Block):
    """Where built images are pushed: an address without https://, with the repository's path."""

    registry: Annotated[str, Field(pattern=r"^([a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*)?$")] = ""


class Mirrors(Block):
    """Where things come from in a network that is cut off from the internet; empty: from where they usually come.

    Attributes:
        base_images: an address that stands before the base image's name.
        python_index: an index of Python packages, as pip takes it.
        terraform: a network mirror of Terraform's providers, an address that ends in /.
        certificates: a file of the network's own certificates (PEM).
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


# Who acts, each with a service account of its own.
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


# What the three buckets are for.
Root = Literal["pipeline_root", "storage", "data"]


# What customer-managed keys are for, one each.
KeyUse = Literal["storage", "registry", "vertex", "pubsub", "run", "secrets", "airflow", "compute"]


class Existing(Block):
    """What is there already, and is used where Terraform would make its own: ids as Google's APIs write them.

    Attributes:
        network, subnetwork: of the private mode; build_pool: a private pool of Cloud Build.
        key_ring, keys: of customer-managed encryption; who may use such a key is its owner's business.
        images: a repository of images; buckets: names without gs://; accounts: e-mail addresses.
        metadata_store: Vertex AI was used in this project before, and has its own.
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
    metadata_store: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _in_one_network(self) -> "Existing":
        if self.subnetwork and not self.network:
            raise ValueError("network: is needed where a subnetwork is named")
        return self


class EnvironmentConfig(Block):
    """One Google Cloud project.

    Attributes:
        project: its id; empty until you go there.
        bucket: one bucket for everything, made by hand (level 1); empty: those that Terraform makes (level 2).
        promote_from: the environment whose images are run here, and approval is wanted; empty: images are built here.
        existing: what is there already, and is used instead of being made.
    """

    project: Annotated[str, Field(pattern=rf"^({PROJECT_ID})?$")]
    bucket: Annotated[str, Field(pattern=rf"^({BUCKET})?$")] = ""
    promote_from: str = ""
    existing: Existing = Existing()


class Repository(Block):
    """Where the code is kept: whose pushes may start a build.

    Attributes:
        name: OWNER/NAME on GitHub, GROUP/NAME on GitLab; on Azure DevOps what stands behind /sc/ in the service connection's
            subject identifier; for Cloud Build alone CONNECTION/NAME of the repository that is linked in each environment.
        id: what nobody else can have after a rename: GitHub's or GitLab's number. Of an older service connection of Azure
            DevOps, whose subject is sc://NAME, the organisation's GUID.
        host: a GitLab of your own (empty: gitlab.com); the issuer that Azure DevOps' service connection shows.
        branch: a push to this one trains and deploys.
    """

    name: str = ""
    id: Annotated[
        str, Field(strict=True, pattern=r"^([0-9]+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?$")
    ] = ""
    host: Annotated[str, Field(pattern=r"^(https://[a-z0-9.-]+(/[A-Za-z0-9./-]+)?)?$")] = ""
    branch: str = "main"


class Events(Block):
    """What starts a run, beside a push.

    Attributes:
        schedule: cron's five fields, in UTC; empty: never by the clock.
        ingest: the same for the container that brings new data, where cloud.data_ingestion is scheduled-job.
        fold_minutes: files that arrive within so many minutes start one run, at their end; 0: one run each.
    """

    schedule: Annotated[str, Field(pattern=r"^(\S+( \S+){4})?$")] = ""
    ingest: Annotated[str, Field(pattern=r"^\S+( \S+){4}$")] = "0 3 * * *"
    fold_minutes: Annotated[int, Field(strict=True, ge=0, le=360)] = 0


class Budget(Block):
    """An amount each month, in the billing account's currency, whose use is told by e-mail; 0: none."""

    monthly: Annotated[int, Field(strict=True, ge=0)] = 0
    billing_account: Annotated[str, Field(pattern=r"^([0-9A-F]{6}(-[0-9A-F]{6}){2})?$")] = ""

    @model_validator(mode="after")
    def _payable(self) -> "Budget":
        if self.monthly and not self.billing_account:
            raise ValueError(
                "billing_account: is needed for a budget; `gcloud billing accounts list` shows it"
            )
        return self


class TrainJobs(Block):
    """The GPU jobs to try, in order."""

    jobs: Annotated[tuple[str, ...], Field(min_length=1)]


class Serve(Block):
    """The endpoint's machine, its fewest and most replicas, and a new version's first share of the traffic."""

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
    """Google Cloud: level 1 by hand, and level 2.

    Attributes:
        private: machines without external addresses, in a network of your own; builds in a private pool.
        workbench: a machine with Jupyter in the cloud, which bills while it runs.
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
        for name, environment in self.environments.items():
            source = environment.promote_from
            if source and (
                source == name
                or source not in self.environments
                or self.environments[source].promote_from
            ):
                builders = [
                    other
                    for other, found in self.environments.items()
                    if other != name and not found.promote_from
                ]
                raise ValueError(
                    f"environments.{name}.promote_from: '{source}' is none that builds images; "
                    f"allowed: {', '.join(builders) or 'nothing, because there is no other'}"
                )
        return self


class CloudSettings(Block):
    """What the names of resources in Google Cloud follow from; `project.settings.Settings` extends it."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,18}[a-z0-9]$")]
    containers: Containers = Containers()
    cloud: Cloud
