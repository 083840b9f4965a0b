"""Properties of Terraform's plans of level 2, for combinations of settings in project.yaml."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from core.errors import UserError
from gcp import environment as environments
from gcp import pipeline_version, storage
from gcp.environment import Environment, resolve_environment
from level_1_pipeline import compile as pipeline_compiler
from level_2_cicd import infra
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.trigger_function_container import events
from level_2_cicd.trigger_function_container.request import RunMessage, parse
from project.settings import load_settings

from tests.terraform import (
    EXISTING,
    FACTORS,
    IMAGES,
    PROJECTS,
    Configuration,
    Plan,
    pairwise,
    read_settings,
    settings_of,
)
from tests.test_cloudbuild import used

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[1]
CASES = pairwise(FACTORS)
PARTS = ["", "foundation"]


@dataclass(frozen=True)
class Planned:
    """A combination of settings, its project.yaml, and the plans of both configurations."""

    case: dict[str, Any]
    document: dict[str, Any]
    foundation: Plan
    stack: Plan

    @property
    def project(self) -> str:
        return PROJECTS[self.case["environment"]]

    @property
    def customer_managed(self) -> bool:
        return bool(self.case["encryption"] == "customer-managed")

    def email(self, actor: str) -> str:
        return f"digit-reader-{actor}@{self.project}.iam.gserviceaccount.com"


@pytest.fixture(scope="module")
def terraform() -> None:
    """Skip without Terraform; fail if REQUIRE_DOCKER is set."""
    if not shutil.which("terraform"):
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)("needs Terraform")


@pytest.fixture(scope="module")
def copies(
    terraform: None, default_project: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Configuration]:
    """Both configurations, initialised."""
    return {
        part: Configuration.of(default_project, tmp_path_factory.mktemp("terraform") / "copy", part)
        for part in PARTS
    }


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "+".join(map(str, case.values())))
def planned(
    request: pytest.FixtureRequest, copies: dict[str, Configuration], default_project: Path
) -> Planned:
    case = request.param
    document = settings_of(read_settings(default_project), case)
    foundation = copies["foundation"].plan(case["environment"], document)
    return Planned(
        case, document, foundation, copies[""].plan(case["environment"], document, IMAGES)
    )


def addresses(plan: Plan, pattern: str) -> list[str]:
    return [each["address"] for each in plan.resources if re.search(pattern, each["type"])]


# ── permissions ────────────────────────────────────────────────────────────────────────────────
def test_stack_contains_no_iam_and_no_keys(planned: Planned) -> None:
    """So a push cannot extend its own permissions."""
    forbidden = r"_iam_|_kms_|google_service_account|workload_identity|organization_policy"
    assert addresses(planned.stack, forbidden) == []
    assert addresses(planned.foundation, r"_iam_")


def iam_members(plan: Plan) -> list[tuple[str, str, str]]:
    """Resource type, role, member."""
    return [
        (each["type"], each["values"]["role"], each["values"]["member"])
        for each in plan.resources
        if each["type"].endswith("_iam_member")
    ]


# The admin roles in use: schedules; two optional services; a service agent's in private mode.
ADMIN_ROLES = {
    "roles/cloudscheduler.admin",
    "roles/composer.admin",
    "roles/notebooks.admin",
    "roles/compute.networkAdmin",
}
WIDE_ROLES = re.compile(r"roles/(editor|owner|viewer|resourcemanager\..+|.*\.\w*[aA]dmin)")
NEVER_ON_PROJECT = {
    "roles/iam.serviceAccountUser",
    "roles/iam.serviceAccountTokenCreator",
    "roles/storage.objectUser",
}


def test_no_role_is_too_wide(planned: Planned) -> None:
    members = iam_members(planned.foundation)
    assert {role for _, role, _ in members if WIDE_ROLES.fullmatch(role)} <= ADMIN_ROLES
    for kind, role, member in members:
        assert member not in ("allUsers", "allAuthenticatedUsers")
        assert role != "roles/compute.networkAdmin" or "@gcp-sa-aiplatform.iam" in member
        assert kind != "google_project_iam_member" or role not in NEVER_ON_PROJECT, (role, member)
    # Bindings and policies would remove other members.
    assert addresses(planned.foundation, r"_iam_(binding|policy)|google_service_account_key") == []


def test_infra_cannot_write_the_state_of_the_foundation(planned: Planned) -> None:
    grants = [
        (grant["role"], [block["expression"] for block in grant["condition"]])
        for grant in planned.foundation.of("google_storage_bucket_iam_member")
        if grant["bucket"].endswith("-terraform") and "-infra@" in grant["member"]
    ]
    folder = f"projects/_/buckets/{planned.project}-digit-reader-terraform/objects/stack/"
    assert sorted(grants) == [
        ("roles/storage.objectUser", [f'resource.name.startsWith("{folder}")']),
        ("roles/storage.objectViewer", []),
    ]


def test_custom_roles_cannot_grant(planned: Planned) -> None:
    roles = planned.foundation.of("google_project_iam_custom_role")
    permissions = {name for role in roles for name in role["permissions"]}
    assert permissions == {"storage.buckets.get", "storage.buckets.update"}


def test_each_actor_has_one_account_and_every_grant_a_reason(planned: Planned) -> None:
    cloud_settings = planned.document["cloud"]
    actors = {"trainer", "pipeline", "build", "infra", "function", "trigger", "predictor"}
    actors |= {"checker" if cloud_settings["ci"] == "cloud-build" else "deployer"}
    actors |= {"ingestion"} if cloud_settings["data_ingestion"] != "none" else set()
    accounts = {each["account_id"] for each in planned.foundation.of("google_service_account")}
    existing = {"trainer"} if planned.case["existing"] else set()
    assert accounts == {f"digit-reader-{actor}" for actor in actors - existing}
    grants = planned.foundation.output("grants")
    agents = {"pubsub agent", "storage agent"}
    agents |= {"vertex agent"} if cloud_settings["private"] else set()
    assert {grant["who"] for grant in grants} == actors | agents
    assert all(grant["why"] for grant in grants)


def pool_users(foundation: Plan) -> set[str]:
    """The actors that may build in the project's private pool."""
    users = [
        each for each in iam_members(foundation) if each[1] == "roles/cloudbuild.workerPoolUser"
    ]
    assert all(kind == "google_project_iam_member" for kind, _, _ in users)
    return {
        re.sub(r"serviceAccount:digit-reader-(\w+)@.*", r"\1", member) for _, _, member in users
    }


def test_accounts_that_start_builds_may_use_the_own_private_pool(planned: Planned) -> None:
    """The existing pool is in another project, whose owner grants its use."""
    own = planned.case["private"] and not planned.case["existing"]
    starters = {"build", "checker" if planned.case["ci"] == "cloud-build" else "deployer"}
    assert pool_users(planned.foundation) == (starters if own else set())


@pytest.mark.parametrize(
    ("project", "users"), [("my-project-dev", {"build", "deployer"}), ("my-project", set())]
)
def test_existing_pool_is_used_without_private_mode(
    copies: dict[str, Configuration], default_project: Path, project: str, users: set[str]
) -> None:
    case = next(
        case
        for case in CASES
        if not case["private"] and not case["existing"] and case["ci"] == "gitlab"
    )
    document = settings_of(read_settings(default_project), {**case, "environment": "dev"})
    pool = f"projects/{project}/locations/europe-west4/workerPools/theirs"
    document["cloud"]["environments"]["dev"]["existing"] = {"build_pool": pool}
    assert pool_users(copies["foundation"].plan("dev", document)) == users


def test_prod_reads_the_images_of_dev_and_cannot_write_them(planned: Planned) -> None:
    on_dev = [
        (grant["role"], grant["member"])
        for grant in planned.foundation.of("google_artifact_registry_repository_iam_member")
        if grant["project"] == PROJECTS["dev"]
    ]
    if planned.case["environment"] == "dev":
        assert all(PROJECTS["dev"] in member for _, member in on_dev)
        return
    build = f"serviceAccount:{planned.email('build')}"
    assert ("roles/artifactregistry.reader", build) in on_dev
    [passed] = [
        grant
        for grant in planned.foundation.of("google_storage_bucket_iam_member")
        if grant["bucket"] == "my-project-dev-digit-reader-storage"
    ]
    assert (passed["role"], passed["member"]) == ("roles/storage.objectViewer", build)
    assert "/objects/builds/passed/" in passed["condition"][0]["expression"]
    if not planned.case["existing"]:  # the existing repository is in dev's project too
        assert {role for role, _ in on_dev} == {"roles/artifactregistry.reader"}


# ── keys ───────────────────────────────────────────────────────────────────────────────────────
AGENTS = {  # from Google's documentation: the service agents that encrypt with each key
    "storage": {"gs-project-accounts"},
    "registry": {"gcp-sa-artifactregistry"},
    "vertex": {"gcp-sa-aiplatform", "gcp-sa-aiplatform-cc"},
    "pubsub": {"gcp-sa-pubsub"},
    "run": {"serverless-robot-prod"},
    "secrets": {"gcp-sa-secretmanager"},
    "airflow": {"cloudcomposer-accounts", "gs-project-accounts"},
    "compute": {"compute-system", "gcp-sa-notebooks"},
}
# Resource type → its key, and where the resource names it.
KEYS: dict[str, tuple[str, Any]] = {
    "google_storage_bucket": (
        "storage",
        lambda values: [each["default_kms_key_name"] for each in values["encryption"]],
    ),
    "google_artifact_registry_repository": ("registry", lambda values: [values["kms_key_name"]]),
    "google_pubsub_topic": ("pubsub", lambda values: [values["kms_key_name"]]),
    "google_vertex_ai_metadata_store": (
        "vertex",
        lambda values: [each["kms_key_name"] for each in values["encryption_spec"]],
    ),
    "google_vertex_ai_endpoint": (
        "vertex",
        lambda values: [each["kms_key_name"] for each in values["encryption_spec"]],
    ),
    "google_cloud_run_v2_service": (
        "run",
        lambda values: [values["template"][0]["encryption_key"]],
    ),
    "google_cloud_run_v2_job": (
        "run",
        lambda values: [values["template"][0]["template"][0]["encryption_key"]],
    ),
    "google_composer_environment": (
        "airflow",
        lambda values: [
            each["kms_key_name"] for each in values["config"][0].get("encryption_config") or []
        ],
    ),
    "google_workbench_instance": (
        "compute",
        lambda values: [
            disk["kms_key"]
            for disks in ("boot_disk", "data_disks")
            for disk in values["gce_setup"][0][disks]
        ],
    ),
}
KEY_ATTRIBUTE = re.compile(r"kms_key|encryption_key$|crypto_key(?!_id)|kms_key_name")


def test_resources_use_their_customer_managed_key(planned: Planned) -> None:
    existing = planned.case["existing"]
    own_ring = f"projects/{planned.project}/locations/europe-west4/keyRings/digit-reader"
    ring = EXISTING["key_ring"] if existing else own_ring
    for resource in planned.foundation.resources + planned.stack.resources:
        if resource["type"] in KEYS:
            use, read_keys = KEYS[resource["type"]]
            keys = read_keys(resource["values"])
            name = "buckets" if existing and use == "storage" else use  # the existing key's name
            expected = {f"{ring}/cryptoKeys/{name}"} if planned.customer_managed else set()
            assert set(keys) - {None, ""} == expected, resource["address"]
            assert not planned.customer_managed or all(keys), resource["address"]


def test_every_resource_that_supports_a_key_is_listed(
    copies: dict[str, Configuration], planned: Planned
) -> None:
    """Checks the providers' schemas of all planned resource types."""
    for part, plan in (("", planned.stack), ("foundation", planned.foundation)):
        schemas = _schemas(copies[part])
        supporting = {
            kind
            for kind in plan.types()
            if KEY_ATTRIBUTE.search(" ".join(_attributes(schemas[kind]["block"])))
        }
        # The key itself; and a trigger's key for secrets in an inline build, which we do not have.
        assert supporting - KEYS.keys() <= {"google_kms_crypto_key", "google_cloudbuild_trigger"}


_schema_cache: dict[Path, dict[str, Any]] = {}


def _schemas(configuration: Configuration) -> dict[str, Any]:
    if configuration.folder not in _schema_cache:
        document = json.loads(configuration.run("providers", "schema", "-json"))
        _schema_cache[configuration.folder] = {
            kind: schema
            for provider in reversed(list(document["provider_schemas"].values()))
            for kind, schema in provider["resource_schemas"].items()
        }
    return _schema_cache[configuration.folder]


def _attributes(block: dict[str, Any]) -> Iterator[str]:
    """Names of the settable attributes of a block and its nested blocks."""
    for name, attribute in block.get("attributes", {}).items():
        if attribute.get("optional") or attribute.get("required"):
            yield name
    for inner in block.get("block_types", {}).values():
        yield from _attributes(inner["block"])


def test_each_key_is_only_for_its_agents(planned: Planned) -> None:
    existing = planned.case["existing"]
    uses = {"storage", "registry", "vertex", "pubsub", "run", "secrets"}
    uses |= {"airflow"} if planned.case["data_ingestion"] == "managed-airflow" else set()
    uses |= {"compute"} if planned.case["more"] else set()
    uses -= set(EXISTING["keys"]) if existing else set()
    uses = uses if planned.customer_managed else set()
    keys = {key["name"]: key for key in planned.foundation.of("google_kms_crypto_key")}
    assert keys.keys() == uses
    assert all(key["rotation_period"] == "7776000s" for key in keys.values())
    users: dict[str, set[str]] = {use: set() for use in uses}
    agent = r"serviceAccount:service-\d+@([a-z-]+)\.iam\.gserviceaccount\.com"
    for resource in planned.foundation.resources:
        if resource["type"] == "google_kms_crypto_key_iam_member":
            values = resource["values"]
            assert values["crypto_key_id"].startswith(f"projects/{planned.project}/")
            assert values["role"] == "roles/cloudkms.cryptoKeyEncrypterDecrypter"
            match = re.fullmatch(agent, values["member"])
            assert match, values["member"]
            users[resource["index"].split(" ")[0]].add(match[1])
    # The owner of another project's key ring grants the use of its keys.
    assert users == {use: (set() if existing else AGENTS[use]) for use in uses}
    rings = planned.foundation.of("google_kms_key_ring")
    assert len(rings) == (planned.customer_managed and not existing)
    if existing:
        assert {key["key_ring"] for key in keys.values()} <= {EXISTING["key_ring"]}


# ── access ─────────────────────────────────────────────────────────────────────────────────────
def test_no_bucket_is_public(planned: Planned) -> None:
    buckets = planned.foundation.of("google_storage_bucket")
    assert len(buckets) == (3 if planned.case["existing"] else 4)
    for bucket in buckets:
        assert bucket["uniform_bucket_level_access"] is True
        assert bucket["public_access_prevention"] == "enforced"
        assert bucket["versioning"][0]["enabled"] is True
        assert bucket["location"].lower() == "europe-west4"
    assert planned.stack.of("google_storage_bucket") == []


def test_function_accepts_only_pubsub(planned: Planned) -> None:
    [function] = planned.stack.of("google_cloud_run_v2_service")
    assert function["ingress"] == "INGRESS_TRAFFIC_INTERNAL_ONLY"
    assert function["template"][0]["service_account"] == planned.email("function")
    assert function["template"][0]["containers"][0]["image"] == IMAGES["trigger_function"]
    subscriptions = planned.stack.of("google_pubsub_subscription")
    pushes = {each["name"]: each for each in subscriptions if each["push_config"]}
    assert pushes.keys() == {"digit-reader-requests", "digit-reader-data"}
    for push in pushes.values():
        [token] = push["push_config"][0]["oidc_token"]
        assert token["service_account_email"] == planned.email("trigger")
        dead_letters = push["dead_letter_policy"][0]["dead_letter_topic"]
        assert dead_letters.endswith("/topics/digit-reader-dead-letters")


def test_private_mode_has_no_external_address(planned: Planned) -> None:
    private, foundation, stack = planned.case["private"], planned.foundation, planned.stack
    own_network = private and not planned.case["existing"]
    pools = foundation.of("google_cloudbuild_worker_pool")
    assert len(pools) == own_network
    assert all(pool["worker_config"][0]["no_external_ip"] is True for pool in pools)
    assert len(foundation.of("google_compute_network")) == own_network
    assert len(foundation.of("google_compute_network_attachment")) == private
    global_addresses = foundation.of("google_compute_global_address")
    assert all(each["address_type"] == "INTERNAL" for each in global_addresses)
    assert addresses(foundation, "google_compute_(address|router_nat|instance)$") == []
    [function] = stack.of("google_cloud_run_v2_service")
    assert bool(function["template"][0]["vpc_access"]) == private
    for job in stack.of("google_cloud_run_v2_job"):
        assert bool(job["template"][0]["template"][0]["vpc_access"]) == private
    for airflow in stack.of("google_composer_environment"):
        assert airflow["config"][0]["enable_private_environment"] is private
    for workbench in stack.of("google_workbench_instance"):
        assert workbench["gce_setup"][0]["disable_public_ip"] is private


def test_only_the_repository_can_deploy(planned: Planned) -> None:
    """Workload identity of an external CI, with the repository's number; or Cloud Build triggers."""
    ci, prod = planned.case["ci"], planned.case["environment"] == "prod"
    providers = planned.foundation.of("google_iam_workload_identity_pool_provider")
    triggers = planned.foundation.of("google_cloudbuild_trigger")
    if ci == "cloud-build":
        assert providers == []
        check_triggers(planned, {each["name"]: each for each in triggers}, prod)
        return
    assert triggers == []
    [provider] = providers
    condition = provider["attribute_condition"]
    [member] = [
        grant["member"]
        for grant in planned.foundation.of("google_service_account_iam_member")
        if grant["role"] == "roles/iam.workloadIdentityUser"
    ]
    connection = "sc://organisation/project/connection"
    identity = {"github-actions": "12345", "gitlab": "67890", "azure-devops": connection}[ci]
    assert identity in condition
    pool = "/workloadIdentityPools/digit-reader-ci"
    assert member.endswith(f"{pool}/attribute.repository/{identity}")
    if ci != "azure-devops":
        assert "main" in condition
        assert ("assertion.environment == 'prod'" in condition) == prod


def check_triggers(planned: Planned, triggers: dict[str, Any], prod: bool) -> None:
    pull_request = set() if prod else {"digit-reader-pull-request"}
    assert triggers.keys() == {"digit-reader-push"} | pull_request
    push = triggers["digit-reader-push"]
    assert push["approval_config"][0]["approval_required"] is prod
    assert push["filename"] == "level_2_cicd/cloudbuild.yaml"
    assert push["repository_event_config"][0]["push"][0]["branch"] == "^main$"
    assert push["service_account"].endswith(f"/{planned.email('build')}")
    assert push["substitutions"].keys() == used("cloudbuild.yaml")
    for name in pull_request:  # it runs unreviewed code, hence as a read-only account
        assert triggers[name]["substitutions"].keys() == used("cloudbuild.pr.yaml")
        assert triggers[name]["service_account"].endswith(f"/{planned.email('checker')}")
        grants = planned.foundation.output("grants")
        roles = {grant["role"] for grant in grants if grant["who"] == "checker"}
        read_only = (
            r"\w+\.(viewer|reader|objectViewer)|composer\.user|browser|own\.stager|"
            r"logging\.logWriter|cloudbuild\.workerPoolUser"
        )
        assert all(re.fullmatch(read_only, role) for role in roles), roles


# ── existing resources, and options ────────────────────────────────────────────────────────────
def test_existing_resources_are_used_and_not_created(planned: Planned) -> None:
    if not planned.case["existing"]:
        return
    resources = planned.foundation.resources + planned.stack.resources
    text = json.dumps([resource["values"] for resource in resources])
    assert "my-project-dev-digit-reader-data" not in text
    assert "digit-reader-trainer@" not in text
    repositories = planned.foundation.of("google_artifact_registry_repository")
    assert all(each["format"] != "DOCKER" for each in repositories)
    notifications = planned.stack.of("google_storage_notification")
    assert [each["bucket"] for each in notifications] == ["their-data"]
    own = r"google_(compute_network|compute_subnetwork|kms_key_ring)$"
    assert addresses(planned.foundation, own) == []


def test_options_create_their_resources(planned: Planned) -> None:
    stack, case = planned.stack, planned.case
    job = case["data_ingestion"] == "scheduled-job"
    airflow = case["data_ingestion"] == "managed-airflow"
    assert len(stack.of("google_composer_environment")) == airflow
    assert len(stack.of("google_cloud_run_v2_job")) == job
    assert len(stack.of("google_workbench_instance")) == case["more"]
    assert len(planned.foundation.of("google_billing_budget")) == case["more"]
    schedules = {each["name"] for each in stack.of("google_cloud_scheduler_job")}
    assert ("digit-reader-schedule" in schedules) == case["more"]
    assert ("digit-reader-ingestion" in schedules) == job
    policies = stack.of("google_monitoring_alert_policy")
    alerts = {policy["display_name"].split(": ")[1] for policy in policies}
    assert alerts == {"run failed", "error rate", "latency", "dead letters", "function"}
    assert all(policy["notification_channels"] for policy in policies)
    [dashboard] = stack.of("google_monitoring_dashboard")
    assert len(json.loads(dashboard["dashboard_json"])["mosaicLayout"]["tiles"]) == 6


# ── names ──────────────────────────────────────────────────────────────────────────────────────
def place_of(planned: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Environment:
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(planned.document), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return resolve_environment(load_settings(""), planned.case["environment"])


def test_terraform_and_python_derive_the_same_names(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = place_of(planned, monkeypatch, tmp_path)
    foundation, stack = planned.foundation, planned.stack
    made = {bucket["name"] for bucket in foundation.of("google_storage_bucket")}
    named = {
        address.removeprefix("gs://")
        for address in (place.pipeline_root, place.storage, place.data)
    }
    assert made == named - ({"their-data"} if planned.case["existing"] else set()) | {
        place.terraform_state
    }
    accounts = {
        account["account_id"]: account for account in foundation.of("google_service_account")
    }
    for actor in environments.ACTORS:
        if f"digit-reader-{actor}" in accounts:
            assert (
                place.account(actor)
                == f"digit-reader-{actor}@{planned.project}.iam.gserviceaccount.com"
            )
    topics = {
        f"projects/{planned.project}/topics/{topic['name']}"
        for topic in foundation.of("google_pubsub_topic")
    }
    assert topics == {place.topic(kind) for kind in environments.TOPICS}
    repositories = {
        one["repository_id"]: one["format"]
        for one in foundation.of("google_artifact_registry_repository")
    }
    assert repositories[place.templates.rsplit("/", 1)[1]] == "KFP"
    if not planned.case["existing"]:
        assert repositories[place.images.rsplit("/", 1)[1]] == "DOCKER"
    [endpoint] = stack.of("google_vertex_ai_endpoint")
    assert endpoint["display_name"] == place.name
    assert [block["kms_key_name"] for block in endpoint["encryption_spec"]] == (
        [place.key] if place.key else []
    )
    [function] = stack.of("google_cloud_run_v2_service")
    environment = {
        one["name"]: one["value"] for one in function["template"][0]["containers"][0]["env"]
    }
    assert environment == {
        "PROJECT": place.project,
        "REGION": place.region,
        "PIPELINE_ROOT": place.pipeline_root,
        "TEMPLATES": f"{place.storage}/templates/train-and-register",
        "SERVICE_ACCOUNT": place.account("pipeline"),
        "KMS_KEY": place.key,
        "INCOMING": place.incoming,
        "NETWORK_ATTACHMENT": place.network_attachment,
        "DATA_SOURCE": "gs://rows/all.csv" if planned.case["more"] else "",
        "BATCH_WINDOW_MINUTES": "30" if planned.case["more"] else "0",
    }
    assert environment.keys() == events.RULES.keys()
    events.read_config(environment)
    [notification] = stack.of("google_storage_notification")
    assert set(notification["event_types"]) == {events.FINALIZE, events.ARCHIVE, events.DELETE}
    assert notification["payload_format"] == "JSON_API_V1"
    assert (
        f"gs://{notification['bucket']}/{notification['object_name_prefix']}"
        == f"{place.incoming}/"
    )
    if planned.case["private"]:
        [attachment] = foundation.of("google_compute_network_attachment")
        attached = f"projects/{place.project}/regions/{place.region}/networkAttachments/{attachment['name']}"
        assert attached == place.network_attachment


def test_topic_and_schedule_use_the_functions_request_schema(
    planned: Planned, default_project: Path
) -> None:
    definition = (
        default_project / "level_2_cicd/trigger_function_container/request.avsc"
    ).read_text(encoding="utf-8")
    [schema] = planned.foundation.of("google_pubsub_schema")
    assert (schema["type"], schema["definition"]) == ("AVRO", definition)
    topics = {
        topic["name"]: topic["schema_settings"]
        for topic in planned.foundation.of("google_pubsub_topic")
    }
    assert [block["encoding"] for block in topics.pop("digit-reader-requests")] == ["JSON"]
    assert not any(topics.values())
    for schedule in planned.stack.of("google_cloud_scheduler_job"):
        if schedule["name"] == "digit-reader-schedule":
            content = base64.b64decode(schedule["pubsub_target"][0]["data"])
            message = parse(RunMessage, content, "request")
            assert (message.event, message.parameters) == (events.SCHEDULE, "{}")


def test_the_pipeline_is_published_under_its_name(
    monkeypatch: pytest.MonkeyPatch, default_project: Path
) -> None:
    monkeypatch.chdir(default_project)
    assert pipeline_compiler.load_definition().NAME == pipeline_version.NAME == "train-and-register"


_NAME = r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"
_RUN_NAME = r"[a-z][a-z0-9-]{0,47}[a-z0-9]"
_TOPIC_NAME = r"[A-Za-z](?!oog)[\w.~+%-]{2,254}"
_POOL_ID = r"(?!gcp-)[a-z0-9-]{4,32}"
# Resource type → attribute and Google's rule for it.
RULES = {
    "google_storage_bucket": ("name", r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"),
    "google_service_account": ("account_id", r"[a-z][a-z0-9-]{4,28}[a-z0-9]"),
    "google_pubsub_topic": ("name", _TOPIC_NAME),
    "google_pubsub_subscription": ("name", _TOPIC_NAME),
    "google_pubsub_schema": ("name", _TOPIC_NAME),
    "google_artifact_registry_repository": ("repository_id", r"[a-z][a-z0-9-]{0,61}[a-z0-9]"),
    "google_kms_key_ring": ("name", r"[\w-]{1,63}"),
    "google_kms_crypto_key": ("name", r"[\w-]{1,63}"),
    "google_cloud_run_v2_service": ("name", _RUN_NAME),
    "google_cloud_run_v2_job": ("name", _RUN_NAME),
    "google_cloud_scheduler_job": ("name", r"[\w-]{1,500}"),
    "google_vertex_ai_endpoint": ("name", r"[1-9][0-9]{0,9}"),
    "google_composer_environment": ("name", r"[a-z][a-z0-9-]{0,62}[a-z0-9]"),
    "google_workbench_instance": ("name", r"[a-z][a-z0-9-]{0,61}[a-z0-9]"),
    "google_cloudbuild_trigger": ("name", r"[A-Za-z0-9][A-Za-z0-9-]{0,62}[A-Za-z0-9]"),
    "google_cloudbuild_worker_pool": ("name", r"[a-z0-9-]{1,63}"),
    "google_iam_workload_identity_pool": ("workload_identity_pool_id", _POOL_ID),
    "google_iam_workload_identity_pool_provider": ("workload_identity_pool_provider_id", _POOL_ID),
    "google_project_iam_custom_role": ("role_id", r"[a-zA-Z0-9_.]{3,64}"),
    "google_compute_network": ("name", _NAME),
    "google_compute_subnetwork": ("name", _NAME),
    "google_compute_firewall": ("name", _NAME),
    "google_compute_global_address": ("name", _NAME),
    "google_compute_global_forwarding_rule": ("name", r"[a-z][a-z0-9]{0,19}"),
    "google_compute_network_attachment": ("name", _NAME),
    "google_dns_managed_zone": ("name", _NAME),
}


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["private"] and not case["existing"]][:2]
)
@pytest.mark.parametrize("slug", ["a-" + 17 * "b" + "9", "abc"])
def test_longest_and_shortest_names_satisfy_googles_rules(
    copies: dict[str, Configuration], default_project: Path, case: dict[str, Any], slug: str
) -> None:
    document = settings_of(
        read_settings(default_project), {**case, "encryption": "customer-managed", "more": True}
    )
    document["name"] = slug
    for where in document["cloud"]["environments"].values():
        kind = where["project"].rpartition("-")[2]
        where["project"] = f"p-{kind}-{30 * 'x'}"[:30]
    plans = (
        copies["foundation"].plan(case["environment"], document),
        copies[""].plan(case["environment"], document, IMAGES),
    )
    seen = set()
    for plan in plans:
        for resource in plan.resources:
            if resource["type"] in RULES:
                key, rule = RULES[resource["type"]]
                assert re.fullmatch(rule, resource["values"][key]), resource["address"]
                seen.add(resource["type"])
    assert len(seen) >= 18
    labels = [
        value
        for plan in plans
        for one in plan.resources
        for value in (one["values"].get("labels") or {}).values()
    ]
    assert all(re.fullmatch(r"[\w@.-]{0,63}", label) for label in labels if "@" not in label)


def plan_error(configuration: Configuration, *options: str) -> str:
    """The message of a plan that fails, without its frame and line breaks."""
    output = configuration.run("plan", "-input=false", *options, fails=True)
    return " ".join(output.replace("│", " ").split())


# ── Terraform itself ───────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("version", ["6.50.0", ">= 6.50, < 8"])
def test_format_validity_and_terraforms_own_tests(
    terraform: None, default_project: Path, tmp_path: Path, part: str, version: str
) -> None:
    copy = Configuration.of(default_project, tmp_path / "copy", part, version)
    for path in sorted(copy.folder.rglob("*.hcl")) + sorted(copy.folder.glob("*.tf")):
        assert (
            "mock_provider" in path.read_text(encoding="utf-8")
            or path.suffix == ".tf"
            or path.name.startswith(".terraform")
        ), path
    copy.run("fmt", "-check", "-recursive")
    assert "Success! The configuration is valid" in copy.run("validate")
    assert re.search(r"Success! [1-9]\d* passed, 0 failed", copy.run("test"))


def test_variables_are_described_and_validated(
    copies: dict[str, Configuration], default_project: Path
) -> None:
    document = settings_of(read_settings(default_project), CASES[0])
    configuration = Plan(copies[""].plan("dev", document, IMAGES).document).document[
        "configuration"
    ]["root_module"]
    assert all(variable.get("description") for variable in configuration["variables"].values())
    options = copies[""].variables("dev", document)
    for option, message in (
        ("-var=environment=Dev!", "for example dev"),
        ('-var=images={"train": "train:latest"}', "never a tag; for example"),
        ("-var=project_file=./nowhere.yaml", "expected a file like ../../project.yaml"),
    ):
        assert message in plan_error(copies[""], *options, option)


@pytest.mark.parametrize(
    ("change", "environment", "message"),
    [
        ({"project": ""}, "dev", "project.yaml: cloud.environments.dev.project is empty"),
        ({"buket": "x"}, "dev", "unknown key: cloud.environments.dev.buket"),
        ({"bucket": "my-bucket"}, "dev", "cloud.environments.dev.bucket must be empty"),
        ({}, "prd", "unknown environment 'prd'; project.yaml has dev, prod"),
    ],
)
def test_invalid_project_yaml_fails_the_plan_with_a_clear_error(
    copies: dict[str, Configuration],
    default_project: Path,
    change: dict[str, str],
    environment: str,
    message: str,
) -> None:
    document = settings_of(read_settings(default_project), CASES[0])
    document["cloud"]["environments"]["dev"].update(change)
    for part in PARTS:
        assert message in plan_error(copies[part], *copies[part].variables(environment, document))


def test_plan_fails_without_a_repository(
    copies: dict[str, Configuration], default_project: Path
) -> None:
    for ci in FACTORS["ci"]:
        document = settings_of(
            read_settings(default_project), {**CASES[0], "ci": ci, "existing": False}
        )
        document["cloud"]["repository"] = {"name": "", "id": "", "branch": "main"}
        options = copies["foundation"].variables("dev", document)
        assert "cloud.repository" in plan_error(copies["foundation"], *options)


def test_apply_keeps_the_traffic_split_and_is_idempotent(
    terraform: None, default_project: Path, tmp_path: Path
) -> None:
    copy = Configuration.of(default_project, tmp_path / "copy", "")
    document = settings_of(read_settings(default_project), CASES[0])
    options = copy.variables(CASES[0]["environment"], document, IMAGES)
    copy.run("apply", "-auto-approve", "-input=false", *options)
    state = json.loads((copy.folder / "terraform.tfstate").read_text(encoding="utf-8"))
    [endpoint] = [one for one in state["resources"] if one["type"] == "google_vertex_ai_endpoint"]
    endpoint["instances"][0]["attributes"]["traffic_split"] = json.dumps({"4": 90, "5": 10})
    state["serial"] += 1
    (copy.folder / "terraform.tfstate").write_text(json.dumps(state), encoding="utf-8")
    assert "No changes" in copy.run("plan", "-detailed-exitcode", "-input=false", *options)
    # A plan does not show ignored attributes, and the real provider may differ from the fake.
    assert "ignore_changes = [traffic_split]" in (copy.folder / "vertex.tf").read_text(
        encoding="utf-8"
    )


@pytest.fixture
def clean_project(
    terraform: None, default_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A project with an ID for dev, in a temporary folder."""
    project = tmp_path / "digit-reader"
    shutil.copytree(default_project, project)
    document = settings_of(
        read_settings(default_project), {**CASES[0], "existing": False, "ci": "gitlab"}
    )
    (project / "project.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    monkeypatch.chdir(project)
    for name in ("ENVIRONMENT", "SET"):
        monkeypatch.delenv(name, raising=False)
    return project


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command that make runs."""
    command = [sys.executable, "-m", "level_2_cicd.infra", *words]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path.cwd() / 'src'}:{Path.cwd()}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


LOCK = rb'\{"ID":.*/stack/default.*\}'  # as Terraform writes it


def test_state_moves_from_this_machine_to_the_bucket(
    clean_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terraform's gcs backend uses the fake of Cloud Storage; the first apply creates the bucket."""
    with FakeStorage(tmp_path / "buckets") as store:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.address)
        refused = launch("plan")
        assert refused.returncode == 2
        assert "make foundation" in refused.stderr or "bucket does not exist" in refused.stderr
        for bucket in ("terraform", "storage"):  # the fake providers create nothing
            store.create_bucket(f"my-project-dev-digit-reader-{bucket}")
        first = launch("foundation", "--yes")
        assert first.returncode == 0, first.stderr
        assert (
            "is now in gs://my-project-dev-digit-reader-terraform/foundation/default.tfstate"
            in first.stdout
        )
        state = (
            tmp_path
            / "buckets"
            / "my-project-dev-digit-reader-terraform"
            / "foundation"
            / "default.tfstate"
        )
        kinds = {
            resource["type"]
            for resource in json.loads(state.read_text(encoding="utf-8"))["resources"]
        }
        assert {"google_storage_bucket", "google_service_account", "google_pubsub_topic"} <= kinds
        assert not list(clean_project.rglob("*_override.tf"))
        again = launch("foundation", "--plan")
        assert "No changes" in again.stdout, again.stdout + again.stderr
        (clean_project / "build" / "images.json").write_text(json.dumps(IMAGES), encoding="utf-8")
        assert "Apply complete" in launch("apply", "--yes").stdout
        assert "No changes" in launch("plan").stdout
        locks = [call for call in store.received if "tflock" in str(call.path)]
        assert locks  # the lock prevents concurrent applies
        # Restore the last lock, as a killed apply would leave it.
        [*_, content] = [
            lock_match[0] for call in store.received if (lock_match := re.search(LOCK, call.body))
        ]
        lock = (
            tmp_path
            / "buckets"
            / "my-project-dev-digit-reader-terraform"
            / "stack"
            / "default.tflock"
        )
        storage.write("gs://my-project-dev-digit-reader-terraform/stack/default.tflock", content)
        refused = launch("destroy", "--yes")  # does not wait for the lock
        match = re.search(r"make unlock ID=(\d+) ENVIRONMENT=dev\n$", refused.stderr)
        assert match, refused.stderr
        assert lock.exists()
        unlocked = launch("unlock", "--id", match[1])
        assert unlocked.returncode == 0, unlocked.stderr
        assert not lock.exists()
        assert "Apply complete" in launch("apply", "--yes").stdout


def test_make_plan_and_make_doctor_report_the_same_error(
    clean_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clean_project / "project.yaml"
    right = path.read_text(encoding="utf-8")
    for old, new, message in (
        (
            "project: my-project-dev",
            "project: ''",
            "cloud.environments.dev.project in project.yaml is empty",
        ),
        ("data_ingestion:", "data_ingestio:", "did you mean 'data_ingestion'"),
    ):
        path.write_text(right.replace(old, new, 1), encoding="utf-8")
        output = launch("plan").stderr
        with pytest.raises(UserError) as doctors:
            from level_1_pipeline.vertex import doctor as vertex_doctor
            from level_2_cicd.doctor import LEVEL_2

            vertex_doctor.report(load_settings(""), clean_project, LEVEL_2)
        assert message in output
        assert message in str(doctors.value)
        assert "Traceback" not in output
    path.write_text(right, encoding="utf-8")
    monkeypatch.setenv("ENVIRONMENT", "prd")
    assert "ENVIRONMENT=prd: project.yaml has dev, prod" in launch("plan").stderr


def test_documented_permissions_match_the_plan(clean_project: Path) -> None:
    done = launch("grants")
    assert done.returncode == 0, done.stderr
    table = done.stdout.strip()
    assert table.count("\n") > 40
    page = (ROOT / "docs" / "level-2-permissions.md").read_text(encoding="utf-8")
    assert table in page, "docs/level-2-permissions.md must contain the output of make grants"
    assert infra.table([]) == "| account | role | on | why |\n| --- | --- | --- | --- |"


def test_checkov_reports_no_failed_check(default_project: Path, tmp_path: Path) -> None:
    """It needs an environment of its own, because it pins older versions."""
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path / "checkov")}
    for pip, name in (
        ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
        ("PIP_EXTRA_INDEX_URL", "UV_INDEX"),
        ("PIP_FIND_LINKS", "UV_FIND_LINKS"),
    ):
        if pip in os.environ:
            environment.setdefault(name, os.environ[pip])
    subprocess.run(
        [uv, "venv", "--quiet", "--python", sys.executable, environment["VIRTUAL_ENV"]],
        env=environment,
        check=True,
    )
    subprocess.run(
        [uv, "pip", "sync", "--quiet", "--require-hashes", ROOT / "requirements" / "checkov.txt"],
        env=environment,
        check=True,
    )
    folder = tmp_path / "level_2_cicd" / "terraform"
    shutil.copytree(default_project / "level_2_cicd" / "terraform", folder)
    shutil.copy(default_project / "project.yaml", tmp_path)

    def run_checkov() -> Any:
        command = [
            tmp_path / "checkov" / "bin" / "checkov",
            "--directory",
            folder,
            "--framework",
            "terraform",
            "--output",
            "json",
        ]
        done = subprocess.run(
            [*command, "--skip-download"], env=environment, capture_output=True, text=True
        )
        return json.loads(done.stdout)

    results = run_checkov()
    assert [(one["check_id"], one["resource"]) for one in results["results"]["failed_checks"]] == []
    assert results["summary"]["resource_count"] > 40
    assert all(
        len(one["check_result"]["suppress_comment"]) > 20
        for one in results["results"]["skipped_checks"]
    )
    buckets = folder / "foundation" / "buckets.tf"
    buckets.write_text(
        buckets.read_text(encoding="utf-8").replace('"enforced"', '"inherited"'), encoding="utf-8"
    )
    assert {one["check_id"] for one in run_checkov()["results"]["failed_checks"]} == {"CKV_GCP_114"}
