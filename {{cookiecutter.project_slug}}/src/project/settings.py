"""project.yaml as one frozen model: every name, size and threshold of the project, checked before anything runs."""

import difflib
import os
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from project.errors import UserError
from trainer.hyperparameters import Hyperparameters, Number

FILE = "project.yaml"

Share = Annotated[Number, Field(ge=0, le=1)]
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's names for it
SAMPLES = ("digits", "wine", "breast_cancer")


class Block(BaseModel):
    """A part of project.yaml: an unknown key is a mistake, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Template(Block):
    """The template's version and commit that this project came from, and the answers to its questions."""

    version: str
    commit: str
    answers: dict[str, str] = Field(default_factory=dict)


class Data(Block):
    """Where the rows come from and which columns count."""

    source: Annotated[str, Field(strict=True, min_length=1)]
    label: Annotated[str, Field(strict=True, min_length=1)]
    ignore: tuple[Annotated[str, Field(strict=True)], ...] = ()
    categorical: tuple[Annotated[str, Field(strict=True)], ...] = ()
    test_share: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    split_seed: Annotated[int, Field(strict=True, ge=0)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        if self.source.startswith("sample:") and self.source.removeprefix("sample:") not in SAMPLES:
            raise ValueError(f"source: the samples are {', '.join('sample:' + name for name in SAMPLES)}")
        if self.label in self.ignore:
            raise ValueError(f"ignore: holds the label '{self.label}'")
        return self


class Gate(Block):
    """When a new model is good enough to replace the champion."""

    metric: Literal["accuracy", "macro_f1"]
    threshold: Share
    margin: Share


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
    terraform: Annotated[str, Field(pattern=r"^(https://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9._~-]+)*/)?$")] = ""
    certificates: str = ""


PROJECT_ID = r"[a-z][a-z0-9-]{4,28}[a-z0-9]"
BUCKET = r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"
ACCOUNT = r"[a-z0-9][a-z0-9-]*@[a-z0-9.-]+\.gserviceaccount\.com"
IN_REGION = r"projects/[^/]+/locations/[^/]+"

# Who acts, each with a service account of its own.
Actor = Literal["trainer", "pipeline", "build", "infra", "function", "trigger", "checker", "deployer", "predictor", "ingestion"]
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
    subnetwork: Annotated[str, Field(pattern=r"^(projects/[^/]+/regions/[^/]+/subnetworks/[^/]+)?$")] = ""
    build_pool: Annotated[str, Field(pattern=rf"^({IN_REGION}/workerPools/[^/]+)?$")] = ""
    key_ring: Annotated[str, Field(pattern=rf"^({IN_REGION}/keyRings/[^/]+)?$")] = ""
    keys: dict[KeyUse, Annotated[str, Field(pattern=rf"^{IN_REGION}/keyRings/[^/]+/cryptoKeys/[^/]+$")]] = Field(
        default_factory=dict
    )
    images: Annotated[str, Field(pattern=rf"^({IN_REGION}/repositories/[^/]+)?$")] = ""
    buckets: dict[Root, Annotated[str, Field(pattern=rf"^{BUCKET}$")]] = Field(default_factory=dict)
    accounts: dict[Actor, Annotated[str, Field(pattern=rf"^{ACCOUNT}$")]] = Field(default_factory=dict)
    metadata_store: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _in_one_network(self) -> "Existing":
        if self.subnetwork and not self.network:
            raise ValueError("network: is needed where a subnetwork is named")
        return self


class Environment(Block):
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
    id: Annotated[str, Field(strict=True, pattern=r"^([0-9]+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?$")] = ""
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
            raise ValueError("billing_account: is needed for a budget; `gcloud billing accounts list` shows it")
        return self


class TrainJobs(Block):
    """The GPU jobs to try, in order."""

    jobs: Annotated[tuple[str, ...], Field(min_length=1)]


class Serve(Block):
    """The endpoint's machine, its fewest and most replicas, and a new version's first share of the traffic."""

    machine: str
    replicas: tuple[Annotated[int, Field(strict=True, ge=1)], Annotated[int, Field(strict=True, ge=1)]]
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
    environments: Annotated[dict[str, Environment], Field(min_length=1)]
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
            if source and (source == name or source not in self.environments or self.environments[source].promote_from):
                builders = [other for other, found in self.environments.items() if other != name and not found.promote_from]
                raise ValueError(
                    f"environments.{name}.promote_from: '{source}' is none that builds images; "
                    f"allowed: {', '.join(builders) or 'nothing, because there is no other'}"
                )
        return self


class Settings(Block):
    """The whole of project.yaml."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,18}[a-z0-9]$")]
    description: str
    data: Data
    train: Hyperparameters
    gate: Gate
    containers: Containers = Containers()
    cloud: Cloud
    template: Template

    @model_validator(mode="after")
    def _folded(self) -> "Settings":
        if self.cloud.events.fold_minutes and not self.data.source.startswith("gs://"):
            raise ValueError(
                "cloud.events.fold_minutes: files can be gathered where each run trains on data.source in a bucket (gs://…); "
                f"it is '{self.data.source}'. Allowed here: 0"
            )
        return self


def project_root() -> Path:
    """The nearest folder upwards from the current one that holds project.yaml.

    Raises:
        UserError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / FILE).is_file():
            return folder
    raise UserError(f"no {FILE} in {here} or above it. Go to the project's folder first: cd YOUR-PROJECT.")


def load(overrides: str | None = None) -> Settings:
    """Read and check project.yaml.

    Args:
        overrides: changes for one run, as "train.epochs=50 train.learning_rate=0.01"; without it, the SET variable.

    Raises:
        UserError: names each wrong key, what it is and what is allowed.
    """
    path = project_root() / FILE
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{FILE} is not valid YAML: {str(error).replace('<unicode string>', FILE)}") from None
    if not isinstance(document, dict):
        raise UserError(f"{FILE} is empty, or not a mapping of keys to values.")
    _override(document, os.environ.get("SET", "") if overrides is None else overrides)
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        # Misspelt keys first: they are why others are missing.
        details = sorted(error.errors(), key=lambda detail: detail["type"] not in UNKNOWN_KEY)
        rules = "\n".join(f"  {_explain(detail)}" for detail in details)
        raise UserError(f"{FILE} (with SET=…, if given):\n{rules}") from None


class StrictLoader(yaml.SafeLoader):
    """YAML that refuses the same key twice, where PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _override(document: dict[str, Any], overrides: str) -> None:
    try:
        assignments = shlex.split(overrides)
    except ValueError as error:
        raise UserError(f"SET: {overrides!r} cannot be read: {error}.") from None
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        *parents, key = path.split(".")
        block: Any = document
        for parent in parents:
            block = block.get(parent) if isinstance(block, dict) else None
        if not equals or not isinstance(block, dict) or not key:
            near = difflib.get_close_matches(path, [f"{name}.{key}" for name in _keys(()) for key in _keys((name,))], 1, 0.7)
            hint = f"did you mean '{near[0]}'?" if equals and near else 'for example SET="train.epochs=50".'
            raise UserError(f"SET: '{assignment}' is not KEY=VALUE with a key of {FILE}; {hint}")
        try:
            block[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            hint = "Blanks separate settings: write [a,b] and not [a, b]."
            raise UserError(f"SET: the value of '{assignment}' is not valid YAML. {hint}") from None


# What a key must be, where a pattern would say it less well.
MEANT = {
    "name": "should be 3 to 20 of a-z, 0-9 and -; the first a letter, the last a letter or a digit",
    "alerts": "should be an e-mail address, such as you@example.com",
    "project": "should be a project's id, such as my-project-123: not its name, and not its number",
    "bucket": "should be a bucket's name alone, without gs://",
    "region": "should be a region, such as europe-west4",
    "id": "should be the repository's number, or the organisation's GUID; see docs/level-2.md of the template",
    "host": "should be an address such as https://gitlab.example.com",
    "ingest": "should be cron's five fields, such as '0 3 * * *'",
    "schedule": "should be cron's five fields, such as '0 4 * * 1', or empty",
    "billing_account": "should be like 01ABCD-23EF45-678901; `gcloud billing accounts list` shows it",
    "network": "should be like projects/PROJECT/global/networks/NAME",
    "subnetwork": "should be like projects/PROJECT/regions/REGION/subnetworks/NAME",
    "build_pool": "should be like projects/PROJECT/locations/REGION/workerPools/NAME",
    "key_ring": "should be like projects/PROJECT/locations/REGION/keyRings/NAME",
    "images": "should be like projects/PROJECT/locations/REGION/repositories/NAME",
    "registry": "should be an address such as localhost:5000/demo, without https://",
    "base_images": "should be an address such as mirror.example.com/docker, without https://",
    "terraform": "should be an address such as https://mirror.example.com/terraform/, with / at its end",
}
# The same for the values of a map, whose keys are many.
MEANT_IN = {
    "keys": "should be like projects/PROJECT/locations/REGION/keyRings/RING/cryptoKeys/NAME",
    "buckets": "should be a bucket's name alone, without gs://",
    "accounts": "should be like NAME@PROJECT.iam.gserviceaccount.com",
}


def _explain(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] in UNKNOWN_KEY:
        near = difflib.get_close_matches(str(detail["loc"][-1]), _keys(detail["loc"][:-1]), 1)
        return f"{path}: there is no such key" + (f"; did you mean '{near[0]}'?" if near else ".")
    if detail["type"] in ("missing", "missing_argument"):
        return f"{path}: is missing."
    rule = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if detail["type"] == "value_error":
        return f"{path}.{rule}." if path else f"{rule}."
    if detail["type"] == "string_pattern_mismatch":
        _, block, key = ["", "", *path.split(".")][-3:]
        rule = MEANT.get(key) or MEANT_IN.get(block) or rule
    if detail["type"] == "tuple_type":
        rule = "should be a list, such as [a, b]"
    quote = "; write it in quotes" if detail["type"] == "string_type" else ""
    return f"{path}: {rule} (it is {detail['input']!r}{quote})."


def _keys(location: tuple[Any, ...]) -> list[str]:
    """The keys that the block at this path may have."""
    block: Any = Settings
    for part in location:
        if get_origin(block) is dict:  # environments: the part is a name of the user's
            block = get_args(block)[1]
            continue
        field = getattr(block, "model_fields", {}).get(part)
        block = field.annotation if field else None
    return list(getattr(block, "model_fields", None) or getattr(block, "__dataclass_fields__", {}))
