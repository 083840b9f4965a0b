"""Level 2's infrastructure, with the real Terraform: properties of plans, for combinations of what project.yaml may say."""

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
from launcher import kfp_compile, published, request_message, request_run, trigger
from launcher import terraform as launcher_terraform
from project import cloud, settings, storage
from project.errors import UserError
from rehearsal.storage import FakeStorage

from tests.terraform import EXISTING, FACTORS, IMAGES, PROJECTS, Configuration, Plan, pairwise, read_settings, settings_of
from tests.test_cloudbuild import used

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[1]
CASES = pairwise(FACTORS)


@dataclass(frozen=True)
class Planned:
    """A combination, its project.yaml, and the plans of both configurations."""

    case: dict[str, Any]
    document: dict[str, Any]
    foundation: Plan
    stack: Plan

    @property
    def project(self) -> str:
        return PROJECTS[self.case["environment"]]

    @property
    def keys_are_own(self) -> bool:
        return bool(self.case["encryption"] == "customer-managed")


@pytest.fixture(scope="module")
def terraform() -> None:
    """Terraform, and its providers; without them a test is skipped, and where REQUIRE_DOCKER is set it fails."""
    problem = "" if shutil.which("terraform") else "terraform is not installed"
    if problem:
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)(f"this test needs Terraform: {problem}")


@pytest.fixture(scope="module")
def copies(terraform: None, default_project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Configuration]:
    """Both configurations."""
    return {
        part: Configuration.of(default_project, tmp_path_factory.mktemp("terraform") / "copy", part)
        for part in ("", "foundation")
    }


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "+".join(str(value) for value in case.values()))
def planned(request: pytest.FixtureRequest, copies: dict[str, Configuration], default_project: Path) -> Planned:
    """Every pair of choices occurs in some combination."""
    case = request.param
    document = settings_of(read_settings(default_project), case)
    foundation = copies["foundation"].plan(case["environment"], document)
    return Planned(case, document, foundation, copies[""].plan(case["environment"], document, IMAGES))


def addresses(plan: Plan, pattern: str) -> list[str]:
    return [resource["address"] for resource in plan.resources if re.search(pattern, resource["type"])]


# ── rights ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_stack_holds_no_right_and_no_key(planned: Planned) -> None:
    """Whoever applies it on each push cannot raise its own rights."""
    assert addresses(planned.stack, r"_iam_|_kms_|google_service_account|workload_identity|organization_policy") == []
    assert addresses(planned.foundation, r"_iam_")


def rights(plan: Plan) -> list[tuple[str, str, str]]:
    """Kind of resource, role, member."""
    return [
        (resource["type"], resource["values"]["role"], resource["values"]["member"])
        for resource in plan.resources
        if resource["type"].endswith("_iam_member")
    ]


# What administers something is refused, but for these: the first makes the clock, the next two what somebody chose, and the
# last is Google's own agent's in the private mode.
ADMINISTER = {
    "roles/cloudscheduler.admin",
    "roles/composer.admin",
    "roles/notebooks.admin",
    "roles/compute.networkAdmin",
}
FORBIDDEN = re.compile(r"roles/(editor|owner|viewer|resourcemanager\..+|.*\.\w*[aA]dmin)")


def test_no_right_is_too_wide(planned: Planned) -> None:
    wide = {right[1] for right in rights(planned.foundation) if FORBIDDEN.fullmatch(right[1])}
    assert wide <= ADMINISTER
    agents = {member for _, role, member in rights(planned.foundation) if role == "roles/compute.networkAdmin"}
    assert all("@gcp-sa-aiplatform.iam" in member for member in agents)
    assert [right for right in rights(planned.foundation) if right[2] in ("allUsers", "allAuthenticatedUsers")] == []
    # Only single members are added: nobody else's rights are taken away, and nobody gets a key file.
    assert addresses(planned.foundation, r"_iam_(binding|policy)|google_service_account_key") == []
    for kind, role, member in rights(planned.foundation):
        if role in ("roles/iam.serviceAccountUser", "roles/iam.serviceAccountTokenCreator", "roles/storage.objectUser"):
            assert kind != "google_project_iam_member", (role, member)


def test_whoever_applies_the_stack_cannot_write_the_foundations_state(planned: Planned) -> None:
    on_state = [
        (right["role"], [block["expression"] for block in right["condition"]])
        for right in planned.foundation.of("google_storage_bucket_iam_member")
        if right["bucket"].endswith("-terraform") and "-infra@" in right["member"]
    ]
    below = f"projects/_/buckets/{planned.project}-digit-reader-terraform/objects/stack/"
    assert sorted(on_state) == [
        ("roles/storage.objectUser", [f'resource.name.startsWith("{below}")']),
        ("roles/storage.objectViewer", []),
    ]


def test_own_roles_cannot_grant(planned: Planned) -> None:
    permissions = {name for role in planned.foundation.of("google_project_iam_custom_role") for name in role["permissions"]}
    assert permissions == {"storage.buckets.get", "storage.buckets.update"}


def test_each_actor_has_one_account_and_every_grant_names_one(planned: Planned) -> None:
    chosen = planned.document["cloud"]
    actors = {"trainer", "pipeline", "build", "infra", "function", "trigger", "predictor"}
    actors |= {"checker" if chosen["ci"] == "cloud-build" else "deployer"}
    actors |= {"ingestion"} if chosen["data_ingestion"] != "none" else set()
    made = {account["account_id"] for account in planned.foundation.of("google_service_account")}
    there = {"trainer"} if planned.case["existing"] else set()
    assert made == {f"digit-reader-{actor}" for actor in actors - there}
    granted = planned.foundation.output("grants")
    agents = {"pubsub agent", "storage agent"} | ({"vertex agent"} if chosen["private"] else set())
    assert {grant["who"] for grant in granted} == actors | agents
    assert all(grant["why"] for grant in granted)


def pool_users(foundation: Plan) -> set[str]:
    """Who may build in private pools of the project."""
    given = [right for right in rights(foundation) if right[1] == "roles/cloudbuild.workerPoolUser"]
    assert all(kind == "google_project_iam_member" for kind, _, _ in given)
    return {re.sub(r"serviceAccount:digit-reader-(\w+)@.*", r"\1", member) for _, _, member in given}


def test_whoever_starts_a_build_may_use_the_private_pool(planned: Planned) -> None:
    """That of another project, which the existing one is here, is its owner's to grant."""
    own = planned.case["private"] and not planned.case["existing"]
    starters = {"build", "checker"} if planned.case["ci"] == "cloud-build" else {"build", "deployer"}
    assert pool_users(planned.foundation) == (starters if own else set())


@pytest.mark.parametrize(("project", "users"), [("my-project-dev", {"build", "deployer"}), ("my-project", set())])
def test_a_pool_that_is_there_already_is_used_without_the_private_mode_too(
    copies: dict[str, Configuration], default_project: Path, project: str, users: set[str]
) -> None:
    [case] = [case for case in CASES if not case["private"] and not case["existing"] and case["ci"] == "gitlab"][:1]
    document = settings_of(read_settings(default_project), {**case, "environment": "dev"})
    pool = f"projects/{project}/locations/europe-west4/workerPools/theirs"
    document["cloud"]["environments"]["dev"]["existing"] = {"build_pool": pool}
    assert pool_users(copies["foundation"].plan("dev", document)) == users


def test_prod_reads_the_images_of_dev_and_cannot_write_them(planned: Planned) -> None:
    on_dev = [
        (right["role"], right["member"])
        for right in planned.foundation.of("google_artifact_registry_repository_iam_member")
        if right["project"] == PROJECTS["dev"]
    ]
    if planned.case["environment"] == "prod":
        of_dev = [pair for pair in on_dev if not (planned.case["existing"] and pair[0] != "roles/artifactregistry.reader")]
        build = "serviceAccount:digit-reader-build@my-project-prod.iam.gserviceaccount.com"
        assert ("roles/artifactregistry.reader", build) in of_dev
        [passed] = [
            right
            for right in planned.foundation.of("google_storage_bucket_iam_member")
            if right["bucket"] == "my-project-dev-digit-reader-storage"
        ]
        assert (passed["role"], passed["member"]) == ("roles/storage.objectViewer", build)
        assert "/objects/builds/passed/" in passed["condition"][0]["expression"]
        if not planned.case["existing"]:  # where the repository is theirs, it may be the very one of dev
            assert {role for role, _ in on_dev} == {"roles/artifactregistry.reader"}
    else:
        assert all(PROJECTS["dev"] in member for _, member in on_dev)


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────
AGENTS = {  # FACTS of Google's documentation: which of its accounts encrypts for which service
    "storage": {"gs-project-accounts"},
    "registry": {"gcp-sa-artifactregistry"},
    "vertex": {"gcp-sa-aiplatform", "gcp-sa-aiplatform-cc"},
    "pubsub": {"gcp-sa-pubsub"},
    "run": {"serverless-robot-prod"},
    "secrets": {"gcp-sa-secretmanager"},
    "airflow": {"cloudcomposer-accounts", "gs-project-accounts"},
    "compute": {"compute-system", "gcp-sa-notebooks"},
}
# Which key each kind of resource has: that of the service whose agent reads it.
USE_OF = {
    "google_storage_bucket": "storage",
    "google_artifact_registry_repository": "registry",
    "google_pubsub_topic": "pubsub",
    "google_vertex_ai_metadata_store": "vertex",
    "google_vertex_ai_endpoint": "vertex",
    "google_cloud_run_v2_service": "run",
    "google_cloud_run_v2_job": "run",
    "google_composer_environment": "airflow",
    "google_workbench_instance": "compute",
}
RING = "locations/europe-west4/keyRings/digit-reader"
# Where a resource names its key.
KEY_OF: dict[str, Any] = {
    "google_storage_bucket": lambda values: [block["default_kms_key_name"] for block in values["encryption"]],
    "google_artifact_registry_repository": lambda values: [values["kms_key_name"]],
    "google_pubsub_topic": lambda values: [values["kms_key_name"]],
    "google_vertex_ai_metadata_store": lambda values: [block["kms_key_name"] for block in values["encryption_spec"]],
    "google_vertex_ai_endpoint": lambda values: [block["kms_key_name"] for block in values["encryption_spec"]],
    "google_cloud_run_v2_service": lambda values: [values["template"][0]["encryption_key"]],
    "google_cloud_run_v2_job": lambda values: [values["template"][0]["template"][0]["encryption_key"]],
    "google_composer_environment": lambda values: [
        block["kms_key_name"] for block in values["config"][0].get("encryption_config") or []
    ],
    "google_workbench_instance": lambda values: [
        disk["kms_key"] for disk in values["gce_setup"][0]["boot_disk"] + values["gce_setup"][0]["data_disks"]
    ],
}
SCHEMA_KEY = re.compile(r"kms_key|encryption_key$|crypto_key(?!_id)|kms_key_name")


def test_what_can_carry_a_key_does_when_keys_are_chosen(planned: Planned) -> None:
    for plan in (planned.foundation, planned.stack):
        for resource in plan.resources:
            if resource["type"] in KEY_OF:
                keys = KEY_OF[resource["type"]](resource["values"])
                use = USE_OF[resource["type"]]
                name = "buckets" if planned.case["existing"] and use == "storage" else use  # what theirs is called
                ring = EXISTING["key_ring"] if planned.case["existing"] else f"projects/{planned.project}/{RING}"
                wanted = f"{ring}/cryptoKeys/{name}"
                assert set(keys) - {None, ""} == ({wanted} if planned.keys_are_own else set()), resource["address"]
                assert not planned.keys_are_own or all(keys), resource["address"]


def test_nothing_that_can_carry_a_key_is_forgotten(copies: dict[str, Configuration], planned: Planned) -> None:
    """By the providers' own definitions, of all kinds of resources that are made."""
    for part, plan in (("", planned.stack), ("foundation", planned.foundation)):
        schemas = _schemas(copies[part])
        able = {kind for kind in plan.types() if SCHEMA_KEY.search(" ".join(_attributes(schemas[kind]["block"])))}
        # A key's own back end, and the key of a secret that a trigger's inline build could hold: there is none.
        assert able - KEY_OF.keys() <= {"google_kms_crypto_key", "google_cloudbuild_trigger"}, (part, able)


_read: dict[Path, dict[str, Any]] = {}


def _schemas(configuration: Configuration) -> dict[str, Any]:
    if configuration.folder not in _read:
        providers = json.loads(configuration.run("providers", "schema", "-json"))["provider_schemas"].values()
        _read[configuration.folder] = {k: v for one in reversed(list(providers)) for k, v in one["resource_schemas"].items()}
    return _read[configuration.folder]


def _attributes(block: dict[str, Any]) -> Iterator[str]:
    """Names that may be set, of the block and of those within."""
    for name, attribute in block.get("attributes", {}).items():
        if attribute.get("optional") or attribute.get("required"):
            yield name
    for inner in block.get("block_types", {}).values():
        yield from _attributes(inner["block"])


def test_each_key_is_for_its_agents_and_nobody_else(planned: Planned) -> None:
    uses = {"storage", "registry", "vertex", "pubsub", "run", "secrets"}
    uses |= {"airflow"} if planned.case["data_ingestion"] == "managed-airflow" else set()
    uses |= {"compute"} if planned.case["more"] else set()
    theirs = set(EXISTING["keys"]) if planned.case["existing"] else set()
    wanted = uses - theirs if planned.keys_are_own else set()
    made = {key["name"]: key for key in planned.foundation.of("google_kms_crypto_key")}
    assert made.keys() == wanted
    assert all(key["rotation_period"] == "7776000s" for key in made.values())
    users: dict[str, set[str]] = {use: set() for use in wanted}
    for resource in planned.foundation.resources:
        if resource["type"] == "google_kms_crypto_key_iam_member":
            assert resource["values"]["crypto_key_id"].startswith(f"projects/{planned.project}/"), resource["address"]
            use = resource["index"].split(" ")[0]
            assert resource["values"]["role"] == "roles/cloudkms.cryptoKeyEncrypterDecrypter"
            found = re.fullmatch(r"serviceAccount:service-\d+@([a-z-]+)\.iam\.gserviceaccount\.com", resource["values"]["member"])
            assert found, resource["values"]["member"]
            users[use].add(found[1])
    # Keys in a ring of another project are granted by its owner.
    assert users == {use: (set() if planned.case["existing"] else AGENTS[use]) for use in wanted}
    rings = planned.foundation.of("google_kms_key_ring")
    assert len(rings) == (planned.keys_are_own and not planned.case["existing"])
    ring = EXISTING["key_ring"] if planned.case["existing"] else None
    assert all(key["key_ring"] == ring for key in made.values() if ring)


# ── what is open, and to whom ───────────────────────────────────────────────────────────────────────────────────────
def test_no_bucket_is_public(planned: Planned) -> None:
    buckets = planned.foundation.of("google_storage_bucket")
    assert len(buckets) == (3 if planned.case["existing"] else 4)
    for bucket in buckets:
        assert bucket["uniform_bucket_level_access"] is True
        assert bucket["public_access_prevention"] == "enforced"
        assert bucket["versioning"][0]["enabled"] is True
        assert bucket["location"].lower() == "europe-west4"
    assert planned.stack.of("google_storage_bucket") == []


def test_the_function_hears_pubsub_alone(planned: Planned) -> None:
    [function] = planned.stack.of("google_cloud_run_v2_service")
    assert function["ingress"] == "INGRESS_TRAFFIC_INTERNAL_ONLY"
    assert function["template"][0]["service_account"] == f"digit-reader-function@{planned.project}.iam.gserviceaccount.com"
    assert function["template"][0]["containers"][0]["image"] == IMAGES["trigger_function"]
    pushes = [one for one in planned.stack.of("google_pubsub_subscription") if one["push_config"]]
    assert {push["name"] for push in pushes} == {"digit-reader-requests", "digit-reader-data"}
    for push in pushes:
        [token] = push["push_config"][0]["oidc_token"]
        assert token["service_account_email"] == f"digit-reader-trigger@{planned.project}.iam.gserviceaccount.com"
        assert push["dead_letter_policy"][0]["dead_letter_topic"].endswith("/topics/digit-reader-dead-letters")


def test_private_means_no_external_address(planned: Planned) -> None:
    private, given = planned.case["private"], planned.case["existing"]
    pools = planned.foundation.of("google_cloudbuild_worker_pool")
    assert len(pools) == (private and not given)
    assert all(pool["worker_config"][0]["no_external_ip"] is True for pool in pools)
    assert len(planned.foundation.of("google_compute_network")) == (private and not given)
    assert len(planned.foundation.of("google_compute_network_attachment")) == private
    assert all(address["address_type"] == "INTERNAL" for address in planned.foundation.of("google_compute_global_address"))
    assert addresses(planned.foundation, "google_compute_(address|router_nat|instance)$") == []
    [function] = planned.stack.of("google_cloud_run_v2_service")
    assert bool(function["template"][0]["vpc_access"]) == private
    for job in planned.stack.of("google_cloud_run_v2_job"):
        assert bool(job["template"][0]["template"][0]["vpc_access"]) == private
    for airflow in planned.stack.of("google_composer_environment"):
        assert airflow["config"][0]["enable_private_environment"] is private
    for workbench in planned.stack.of("google_workbench_instance"):
        assert workbench["gce_setup"][0]["disable_public_ip"] is private


def test_who_may_push(planned: Planned) -> None:
    """Workload identity for a CI outside, with the repository's number; triggers for Cloud Build alone."""
    ci, prod = planned.case["ci"], planned.case["environment"] == "prod"
    providers = planned.foundation.of("google_iam_workload_identity_pool_provider")
    triggers = {trigger["name"]: trigger for trigger in planned.foundation.of("google_cloudbuild_trigger")}
    if ci == "cloud-build":
        assert providers == []
        assert triggers.keys() == {"digit-reader-push"} | (set() if prod else {"digit-reader-pull-request"})
        push = triggers["digit-reader-push"]
        assert push["approval_config"][0]["approval_required"] is prod
        assert push["filename"] == "level_2_cicd/cloudbuild.yaml"
        assert push["repository_event_config"][0]["push"][0]["branch"] == "^main$"
        assert push["service_account"].endswith(f"/digit-reader-build@{planned.project}.iam.gserviceaccount.com")
        assert push["substitutions"].keys() == used("cloudbuild.yaml")
        if not prod:  # what somebody proposes runs with the rights of an account that only reads
            proposed = triggers["digit-reader-pull-request"]
            assert proposed["substitutions"].keys() == used("cloudbuild.pr.yaml")
            assert proposed["service_account"].endswith(f"/digit-reader-checker@{planned.project}.iam.gserviceaccount.com")
            roles = {grant["role"] for grant in planned.foundation.output("grants") if grant["who"] == "checker"}
            reads = r"\w+\.(viewer|reader|objectViewer)|composer\.user|browser|own\.stager|logging\.logWriter|"
            reads += r"cloudbuild\.workerPoolUser"  # a machine to run on
            assert all(re.fullmatch(reads, role) for role in roles), roles
        return
    assert triggers == {}
    [provider] = providers
    condition = provider["attribute_condition"]
    [member] = [
        right["member"]
        for right in planned.foundation.of("google_service_account_iam_member")
        if right["role"] == "roles/iam.workloadIdentityUser"
    ]
    identity = {"github-actions": "12345", "gitlab": "67890", "azure-devops": "sc://organisation/project/connection"}[ci]
    assert identity in condition
    assert member.endswith(f"/workloadIdentityPools/digit-reader-ci/attribute.repository/{identity}")
    if ci != "azure-devops":
        assert "main" in condition
        assert ("assertion.environment == 'prod'" in condition) == prod


# ── what is there already, and what is chosen ───────────────────────────────────────────────────────────────────────
def test_what_is_there_already_is_used_and_not_made(planned: Planned) -> None:
    if not planned.case["existing"]:
        return
    texts = json.dumps([resource["values"] for plan in (planned.foundation, planned.stack) for resource in plan.resources])
    assert "my-project-dev-digit-reader-data" not in texts
    assert "digit-reader-trainer@" not in texts
    assert [one for one in planned.foundation.of("google_artifact_registry_repository") if one["format"] == "DOCKER"] == []
    assert [one["bucket"] for one in planned.stack.of("google_storage_notification")] == ["their-data"]
    for kind, count in (("google_compute_network", 0), ("google_compute_subnetwork", 0), ("google_kms_key_ring", 0)):
        assert len(planned.foundation.of(kind)) == count


def test_choices_make_what_they_say(planned: Planned) -> None:
    stack, case = planned.stack, planned.case
    assert len(stack.of("google_composer_environment")) == (case["data_ingestion"] == "managed-airflow")
    assert len(stack.of("google_cloud_run_v2_job")) == (case["data_ingestion"] == "scheduled-job")
    assert len(stack.of("google_workbench_instance")) == case["more"]
    assert len(planned.foundation.of("google_billing_budget")) == case["more"]
    clocks = {job["name"] for job in stack.of("google_cloud_scheduler_job")}
    assert ("digit-reader-schedule" in clocks) == case["more"]
    assert ("digit-reader-ingestion" in clocks) == (case["data_ingestion"] == "scheduled-job")
    alerts = {policy["display_name"].split(": ")[1] for policy in stack.of("google_monitoring_alert_policy")}
    assert alerts == {"run failed", "error rate", "latency", "dead letters", "function"}
    assert all(policy["notification_channels"] for policy in stack.of("google_monitoring_alert_policy"))
    assert len(json.loads(stack.of("google_monitoring_dashboard")[0]["dashboard_json"])["mosaicLayout"]["tiles"]) == 6


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def place_of(planned: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> cloud.Place:
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(planned.document), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return cloud.place(settings.load(""), planned.case["environment"])


def test_terraform_and_python_say_the_same_names(planned: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = place_of(planned, monkeypatch, tmp_path)
    foundation, stack = planned.foundation, planned.stack
    made = {bucket["name"] for bucket in foundation.of("google_storage_bucket")}
    named = {address.removeprefix("gs://") for address in (place.pipeline_root, place.storage, place.data)}
    assert made == named - ({"their-data"} if planned.case["existing"] else set()) | {place.terraform_state}
    accounts = {account["account_id"]: account for account in foundation.of("google_service_account")}
    for actor in cloud.ACTORS:
        if f"digit-reader-{actor}" in accounts:
            assert place.account(actor) == f"digit-reader-{actor}@{planned.project}.iam.gserviceaccount.com"
    topics = {f"projects/{planned.project}/topics/{topic['name']}" for topic in foundation.of("google_pubsub_topic")}
    assert topics == {place.topic(kind) for kind in cloud.TOPICS}
    repositories = {one["repository_id"]: one["format"] for one in foundation.of("google_artifact_registry_repository")}
    assert repositories[place.templates.rsplit("/", 1)[1]] == "KFP"
    if not planned.case["existing"]:
        assert repositories[place.images.rsplit("/", 1)[1]] == "DOCKER"
    [endpoint] = stack.of("google_vertex_ai_endpoint")
    assert endpoint["display_name"] == place.name
    assert [block["kms_key_name"] for block in endpoint["encryption_spec"]] == ([place.key] if place.key else [])
    [function] = stack.of("google_cloud_run_v2_service")
    given = {one["name"]: one["value"] for one in function["template"][0]["containers"][0]["env"]}
    assert given == {
        "PROJECT": place.project,
        "REGION": place.region,
        "PIPELINE_ROOT": place.pipeline_root,
        "TEMPLATES": f"{place.storage}/templates/train-and-register",
        "SERVICE_ACCOUNT": place.account("pipeline"),
        "KMS_KEY": place.key,
        "INCOMING": place.incoming,
        "NETWORK_ATTACHMENT": place.network_attachment,
        "DATA_SOURCE": "gs://rows/all.csv" if planned.case["more"] else "",
        "FOLD_MINUTES": "30" if planned.case["more"] else "0",
    }
    assert given.keys() == trigger.RULES.keys()
    trigger.read_place(given)
    [notification] = stack.of("google_storage_notification")
    assert set(notification["event_types"]) == {trigger.FINALIZE, trigger.ARCHIVE, trigger.DELETE}
    assert notification["payload_format"] == "JSON_API_V1"
    assert f"gs://{notification['bucket']}/{notification['object_name_prefix']}" == f"{place.incoming}/"
    if planned.case["private"]:
        [attachment] = foundation.of("google_compute_network_attachment")
        attached = f"projects/{place.project}/regions/{place.region}/networkAttachments/{attachment['name']}"
        assert attached == place.network_attachment


def test_the_topic_and_the_clock_have_the_functions_form_of_a_request(planned: Planned, default_project: Path) -> None:
    written = (default_project / request_run.SCHEMA).read_text(encoding="utf-8")
    [schema] = planned.foundation.of("google_pubsub_schema")
    assert (schema["type"], schema["definition"]) == ("AVRO", written)
    topics = {topic["name"]: topic["schema_settings"] for topic in planned.foundation.of("google_pubsub_topic")}
    assert [block["encoding"] for block in topics.pop("digit-reader-requests")] == ["JSON"]
    assert not any(topics.values())
    fields = request_message.read_fields(default_project / request_run.SCHEMA)
    for clock in planned.stack.of("google_cloud_scheduler_job"):
        if clock["name"] == "digit-reader-schedule":
            said = request_message.decode(base64.b64decode(clock["pubsub_target"][0]["data"]), fields)
            assert (said["event"], said["parameters"]) == (trigger.SCHEDULE, "{}")


def test_the_published_folder_bears_the_pipelines_name(monkeypatch: pytest.MonkeyPatch, default_project: Path) -> None:
    monkeypatch.chdir(default_project)
    assert kfp_compile.load_definition().NAME == published.NAME == "train-and-register"


RULES = {
    "google_storage_bucket": ("name", r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"),
    "google_service_account": ("account_id", r"[a-z][a-z0-9-]{4,28}[a-z0-9]"),
    "google_pubsub_topic": ("name", r"[A-Za-z](?!oog)[\w.~+%-]{2,254}"),
    "google_pubsub_subscription": ("name", r"[A-Za-z][\w.~+%-]{2,254}"),
    "google_pubsub_schema": ("name", r"[A-Za-z][\w.~+%-]{2,254}"),
    "google_artifact_registry_repository": ("repository_id", r"[a-z][a-z0-9-]{0,61}[a-z0-9]"),
    "google_kms_key_ring": ("name", r"[\w-]{1,63}"),
    "google_kms_crypto_key": ("name", r"[\w-]{1,63}"),
    "google_cloud_run_v2_service": ("name", r"[a-z][a-z0-9-]{0,47}[a-z0-9]"),
    "google_cloud_run_v2_job": ("name", r"[a-z][a-z0-9-]{0,47}[a-z0-9]"),
    "google_cloud_scheduler_job": ("name", r"[\w-]{1,500}"),
    "google_vertex_ai_endpoint": ("name", r"[1-9][0-9]{0,9}"),
    "google_composer_environment": ("name", r"[a-z][a-z0-9-]{0,62}[a-z0-9]"),
    "google_workbench_instance": ("name", r"[a-z][a-z0-9-]{0,61}[a-z0-9]"),
    "google_cloudbuild_trigger": ("name", r"[A-Za-z0-9][A-Za-z0-9-]{0,62}[A-Za-z0-9]"),
    "google_cloudbuild_worker_pool": ("name", r"[a-z0-9-]{1,63}"),
    "google_iam_workload_identity_pool": ("workload_identity_pool_id", r"(?!gcp-)[a-z0-9-]{4,32}"),
    "google_iam_workload_identity_pool_provider": ("workload_identity_pool_provider_id", r"(?!gcp-)[a-z0-9-]{4,32}"),
    "google_project_iam_custom_role": ("role_id", r"[a-zA-Z0-9_.]{3,64}"),
    "google_compute_network": ("name", r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"),
    "google_compute_subnetwork": ("name", r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"),
    "google_compute_firewall": ("name", r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"),
    "google_compute_global_address": ("name", r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"),
    "google_compute_global_forwarding_rule": ("name", r"[a-z][a-z0-9]{0,19}"),
    "google_compute_network_attachment": ("name", r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"),
    "google_dns_managed_zone": ("name", r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"),
}


@pytest.mark.parametrize("case", [case for case in CASES if case["private"] and not case["existing"]][:2])
@pytest.mark.parametrize("slug", ["a-" + 17 * "b" + "9", "abc"])
def test_names_fit_googles_rules_for_the_longest_slug_and_project(
    copies: dict[str, Configuration], default_project: Path, case: dict[str, Any], slug: str
) -> None:
    document = settings_of(read_settings(default_project), {**case, "encryption": "customer-managed", "more": True})
    document["name"] = slug
    for where in document["cloud"]["environments"].values():
        kind = where["project"].rpartition("-")[2]
        where["project"] = f"p-{kind}-{30 * 'x'}"[:30]
    plans = copies["foundation"].plan(case["environment"], document), copies[""].plan(case["environment"], document, IMAGES)
    seen = set()
    for plan in plans:
        for resource in plan.resources:
            if resource["type"] in RULES:
                key, rule = RULES[resource["type"]]
                assert re.fullmatch(rule, resource["values"][key]), resource["address"]
                seen.add(resource["type"])
    assert len(seen) >= 18
    labels = [value for plan in plans for one in plan.resources for value in (one["values"].get("labels") or {}).values()]
    assert all(re.fullmatch(r"[\w@.-]{0,63}", label) for label in labels if "@" not in label)


# ── the real program ────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("part", ["", "foundation"])
@pytest.mark.parametrize("version", ["6.50.0", ">= 6.50, < 8"])
def test_form_grammar_and_terraforms_own_tests(
    terraform: None, default_project: Path, tmp_path: Path, part: str, version: str
) -> None:
    copy = Configuration.of(default_project, tmp_path / "copy", part, version)
    for path in sorted(copy.folder.rglob("*.hcl")) + sorted(copy.folder.glob("*.tf")):
        assert (
            "mock_provider" in path.read_text(encoding="utf-8") or path.suffix == ".tf" or path.name.startswith(".terraform")
        ), path
    copy.run("fmt", "-check", "-recursive")
    assert "Success! The configuration is valid" in copy.run("validate")
    assert re.search(r"Success! [1-9]\d* passed, 0 failed", copy.run("test"))


def test_every_variable_says_what_it_is_and_refuses_what_it_is_not(
    copies: dict[str, Configuration], default_project: Path
) -> None:
    document = settings_of(read_settings(default_project), CASES[0])
    configuration = Plan(copies[""].plan("dev", document, IMAGES).document).document["configuration"]["root_module"]
    assert all(variable.get("description") for variable in configuration["variables"].values())
    given = copies[""].variables("dev", document)
    for wrong, said in (
        ("-var=environment=Dev!", "for example dev"),
        ('-var=images={"train": "train:latest"}', "never a tag; for example"),
        ("-var=project_file=./nowhere.yaml", "expected a file like ../../project.yaml"),
    ):
        told = copies[""].run("plan", "-input=false", *given, wrong, fails=True)
        assert said in " ".join(told.replace("│", " ").split()), told


@pytest.mark.parametrize(
    ("change", "environment", "said"),
    [
        ({"project": ""}, "dev", "project.yaml: cloud.environments.dev.project is empty"),
        ({"buket": "x"}, "dev", "unknown key: cloud.environments.dev.buket"),
        ({"bucket": "my-bucket"}, "dev", "cloud.environments.dev.bucket must be empty"),
        ({}, "prd", "unknown environment 'prd'; project.yaml has dev, prod"),
    ],
)
def test_a_mistake_in_project_yaml_is_one_clear_error_at_plan(
    copies: dict[str, Configuration], default_project: Path, change: dict[str, str], environment: str, said: str
) -> None:
    document = settings_of(read_settings(default_project), CASES[0])
    document["cloud"]["environments"]["dev"].update(change)
    for part in ("", "foundation"):
        told = copies[part].run("plan", "-input=false", *copies[part].variables(environment, document), fails=True)
        assert said in " ".join(told.replace("│", " ").split()), told


def test_who_may_push_must_be_said(copies: dict[str, Configuration], default_project: Path) -> None:
    for ci in FACTORS["ci"]:
        document = settings_of(read_settings(default_project), {**CASES[0], "ci": ci, "existing": False})
        document["cloud"]["repository"] = {"name": "", "id": "", "branch": "main"}
        told = copies["foundation"].run("plan", "-input=false", *copies["foundation"].variables("dev", document), fails=True)
        assert "cloud.repository" in told


def test_an_apply_leaves_the_requests_shares_alone_and_changes_nothing_twice(
    terraform: None, default_project: Path, tmp_path: Path
) -> None:
    copy = Configuration.of(default_project, tmp_path / "copy", "")
    document = settings_of(read_settings(default_project), CASES[0])
    given = copy.variables(CASES[0]["environment"], document, IMAGES)
    copy.run("apply", "-auto-approve", "-input=false", *given)
    state = json.loads((copy.folder / "terraform.tfstate").read_text(encoding="utf-8"))
    [endpoint] = [one for one in state["resources"] if one["type"] == "google_vertex_ai_endpoint"]
    endpoint["instances"][0]["attributes"]["traffic_split"] = json.dumps({"4": 90, "5": 10})
    state["serial"] += 1
    (copy.folder / "terraform.tfstate").write_text(json.dumps(state), encoding="utf-8")
    assert "No changes" in copy.run("plan", "-detailed-exitcode", "-input=false", *given)
    # No plan tells what is ignored, and the stand-in may keep a value that the real provider would not.
    assert "ignore_changes = [traffic_split]" in (copy.folder / "vertex.tf").read_text(encoding="utf-8")


@pytest.fixture
def clean_project(terraform: None, default_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose dev is named; what it leaves, such as a lock file, goes with it."""
    project = tmp_path / "digit-reader"
    shutil.copytree(default_project, project)
    document = settings_of(read_settings(default_project), {**CASES[0], "existing": False, "ci": "gitlab"})
    (project / "project.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    monkeypatch.chdir(project)
    for name in ("ENVIRONMENT", "SET"):
        monkeypatch.delenv(name, raising=False)
    return project


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """The command that make calls."""
    command = [sys.executable, "-m", "launcher.terraform", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd() / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


LOCK = rb'\{"ID":.*/stack/default.*\}'  # as Terraform writes it


def test_the_state_begins_here_and_moves_to_the_bucket(
    clean_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terraform's own backend speaks to the fake of Cloud Storage; the bucket comes with the first apply."""
    with FakeStorage(tmp_path / "buckets") as store:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.address)
        refused = launch("plan")
        assert refused.returncode == 2
        assert "make foundation" in refused.stderr or "bucket does not exist" in refused.stderr
        for bucket in ("terraform", "storage"):  # the stand-in for the providers makes nothing, so these are made here
            store.create_bucket(f"my-project-dev-digit-reader-{bucket}")
        first = launch("foundation", "--yes")
        assert first.returncode == 0, first.stderr
        assert "foundation/default.tfstate from now on" in first.stdout
        state = tmp_path / "buckets" / "my-project-dev-digit-reader-terraform" / "foundation" / "default.tfstate"
        kinds = {resource["type"] for resource in json.loads(state.read_text(encoding="utf-8"))["resources"]}
        assert {"google_storage_bucket", "google_service_account", "google_pubsub_topic"} <= kinds
        assert not list(clean_project.rglob("*_override.tf"))
        again = launch("foundation", "--plan")
        assert "No changes" in again.stdout, again.stdout + again.stderr
        (clean_project / "build" / "images.json").write_text(json.dumps(IMAGES), encoding="utf-8")
        assert "Apply complete" in launch("apply", "--yes").stdout
        assert "No changes" in launch("plan").stdout
        locks = [call for call in store.received if "tflock" in str(call.path)]
        assert locks  # two applies at once are refused by the state's lock
        # The last lock is laid there again, as an apply leaves it that is killed.
        [*_, written] = [found[0] for call in store.received if (found := re.search(LOCK, call.body))]
        lock = tmp_path / "buckets" / "my-project-dev-digit-reader-terraform" / "stack" / "default.tflock"
        storage.write("gs://my-project-dev-digit-reader-terraform/stack/default.tflock", written)
        refused = launch("destroy", "--yes")  # which waits for no lock
        found = re.search(r"make unlock ID=(\d+) ENVIRONMENT=dev\n$", refused.stderr)
        assert found, refused.stderr
        assert lock.exists()
        unlocked = launch("unlock", "--id", found[1])
        assert unlocked.returncode == 0, unlocked.stderr
        assert not lock.exists()
        assert "Apply complete" in launch("apply", "--yes").stdout


def test_a_mistake_is_told_by_make_plan_and_by_make_doctor_alike(clean_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clean_project / "project.yaml"
    right = path.read_text(encoding="utf-8")
    for old, new, said in (
        ("project: my-project-dev", "project: ''", "cloud.environments.dev.project in project.yaml is empty"),
        ("data_ingestion:", "data_ingestio:", "did you mean 'data_ingestion'"),
    ):
        path.write_text(right.replace(old, new, 1), encoding="utf-8")
        told = [launch("plan").stderr]
        with pytest.raises(UserError) as doctors:
            from launcher import doctor
            from launcher.doctor_level_2 import LEVEL_2

            doctor.report(settings.load(""), clean_project, LEVEL_2)
        assert said in told[0], told
        assert said in str(doctors.value)
        assert "Traceback" not in told[0]
    path.write_text(right, encoding="utf-8")
    monkeypatch.setenv("ENVIRONMENT", "prd")
    assert "ENVIRONMENT=prd: project.yaml has dev, prod" in launch("plan").stderr


def test_the_table_of_rights_in_the_documentation_is_the_plans(clean_project: Path) -> None:
    done = launch("grants")
    assert done.returncode == 0, done.stderr
    table = done.stdout.strip()
    assert table.count("\n") > 40
    page = (ROOT / "docs" / "level-2-permissions.md").read_text(encoding="utf-8")
    assert table in page, "make grants prints the table; put it into docs/level-2-permissions.md"
    assert launcher_terraform.table([]) == "| account | role | on | why |\n| --- | --- | --- | --- |"


def test_checkov_finds_nothing(default_project: Path, tmp_path: Path) -> None:
    """Its environment is its own: it pins what the others need newer."""
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path / "checkov")}
    for pip, name in (
        ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
        ("PIP_EXTRA_INDEX_URL", "UV_INDEX"),
        ("PIP_FIND_LINKS", "UV_FIND_LINKS"),
    ):
        if pip in os.environ:
            environment.setdefault(name, os.environ[pip])
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment["VIRTUAL_ENV"]], env=environment, check=True)
    subprocess.run(
        [uv, "pip", "sync", "--quiet", "--require-hashes", ROOT / "requirements" / "checkov.txt"], env=environment, check=True
    )
    folder = tmp_path / "level_2_cicd" / "terraform"
    shutil.copytree(default_project / "level_2_cicd" / "terraform", folder)
    shutil.copy(default_project / "project.yaml", tmp_path)

    def found() -> Any:
        command = [
            tmp_path / "checkov" / "bin" / "checkov",
            "--directory",
            folder,
            "--framework",
            "terraform",
            "--output",
            "json",
        ]
        done = subprocess.run([*command, "--skip-download"], env=environment, capture_output=True, text=True)
        return json.loads(done.stdout)

    results = found()
    assert [(one["check_id"], one["resource"]) for one in results["results"]["failed_checks"]] == []
    assert results["summary"]["resource_count"] > 40
    assert all(len(one["check_result"]["suppress_comment"]) > 20 for one in results["results"]["skipped_checks"])
    buckets = folder / "foundation" / "buckets.tf"
    buckets.write_text(buckets.read_text(encoding="utf-8").replace('"enforced"', '"inherited"'), encoding="utf-8")
    assert {one["check_id"] for one in found()["results"]["failed_checks"]} == {"CKV_GCP_114"}
