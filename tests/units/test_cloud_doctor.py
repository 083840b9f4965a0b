"""make doctor LEVEL=1: what is missing in the cloud is told, with what to type, before anything is sent."""

import json
import re

import pytest
from core.errors import UserError
from core.paths import project_root
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp.environment import resolve_environment
from level_1_pipeline.vertex import doctor as vertex_doctor
from level_1_pipeline.vertex import rest
from level_1_pipeline.vertex.machines import GPUS
from level_2_cicd.rehearsal.cloud_project import NUMBER, FakeProject
from level_2_cicd.rehearsal.server import ApiError, FakeServer
from project.settings import load_settings

PROJECT, BUCKET, REGION = "my-project", "my-bucket", "europe-west4"
HOST = f"{REGION}-docker.pkg.dev"
COMPUTE = f"{NUMBER}-compute@developer.gserviceaccount.com"
L4 = {"machineType": "g2-standard-4", "acceleratorType": "NVIDIA_L4", "acceleratorCount": 1}
POOL = {"machineSpec": L4, "replicaCount": 1}


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with gcloud and Docker, both of them scripts, and no credentials."""
    programs = tmp_path / "programs"
    programs.mkdir()
    gcloud = 'case "$1" in auth) echo ada@example.com ;; *) echo Google Cloud SDK 528.0.0 ;; esac'
    for name, does in (("gcloud", gcloud), ("docker", "echo engine 29.0.0")):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    for name in ("DOCKER_CONFIG", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    (tmp_path / "DOCKER_CONFIG" / "config.json").write_text(
        json.dumps({"credHelpers": {HOST: "gcloud"}})
    )
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # do not look for Google's machines' own credentials
    for name in (
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_CLOUD_QUOTA_PROJECT",
        "STORAGE_EMULATOR_HOST",
    ):
        monkeypatch.delenv(name, raising=False)
    for service in rest.SERVICES:
        monkeypatch.delenv(f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}", raising=False)
    return tmp_path


@pytest.fixture
def settings(settings):
    """This project's settings, with a project and a bucket."""
    name = next(iter(settings.cloud.environments))
    own = {"project": PROJECT, "bucket": BUCKET}
    overrides = " ".join(f"cloud.environments.{name}.{key}={value}" for key, value in own.items())
    return load_settings(
        f"{overrides} cloud.region={REGION} cloud.train.jobs=[l4-spot,l4] containers.registry='\"\"'"
    )


@pytest.fixture
def platform(settings):
    """A project in which nothing is missing."""
    with FakeProject(PROJECT) as double:
        double.services = {*vertex_doctor.APIS, "compute.googleapis.com"}
        double.buckets = {BUCKET: REGION.upper()}
        double.repositories = {(REGION, settings.name): "DOCKER"}
        double.accounts = {COMPUTE}
        double.quotas = {("custom_model_training_preemptible_nvidia_l4_gpus", ""): 0}
        double.quotas["custom_model_training_preemptible_nvidia_l4_gpus", REGION] = 1
        double.permissions = {("project", right) for right in vertex_doctor.PERMISSIONS}
        double.permissions |= {(BUCKET, right) for right in vertex_doctor.OBJECTS}
        double.permissions |= {
            (settings.name, vertex_doctor.UPLOAD),
            (COMPUTE, vertex_doctor.ACT_AS),
        }
        double.quotas["custom_model_training_nvidia_l4_gpus", ""] = 0
        yield double


@pytest.fixture
def overridden(platform, monkeypatch):
    """gcloud's variables name the double, and so no credentials are needed."""
    for service in rest.SERVICES:
        monkeypatch.setenv(f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}", platform.address)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", platform.address)
    return platform


def examine(settings, capsys):
    """The verdict, and what was said about each: {name: (sign, text)}."""
    ready = vertex_doctor.report(settings, project_root())
    said = capsys.readouterr().out
    return ready, {
        name: (sign, text.strip())
        for sign, name, text in re.findall(r"(?ms)^  (.) (\w+) +(.*?)(?=^  \S|\Z)", said)
    }


def test_nothing_is_missing(settings, overridden, capsys):
    ready, said = examine(settings, capsys)
    assert ready
    assert list(said) == ["credentials", *vertex_doctor.LEVEL_1.checks]
    assert {sign for sign, _ in said.values()} == {"✓"}
    assert f"engine 29.0.0; knows how to log in to {HOST}" in said["docker"][1]
    assert f"you may act as {COMPUTE}" in said["actAs"][1]
    # What was asked, and not only what was answered.
    names = [
        f"projects/{PROJECT}/services/{api}"
        for api in (*vertex_doctor.APIS, "compute.googleapis.com")
    ]
    assert names in overridden.calls("services.batchGet")
    assert overridden.calls("buckets.testIamPermissions") == [list(vertex_doctor.OBJECTS)]
    assert overridden.calls("repositories.testIamPermissions") == [[vertex_doctor.UPLOAD]]
    assert overridden.calls("serviceAccounts.testIamPermissions") == [[vertex_doctor.ACT_AS]]
    assert overridden.calls("projects.testIamPermissions") == [list(vertex_doctor.PERMISSIONS)]
    assert len(overridden.calls("consumerQuotaMetrics.get")) == 1


def lose(name, *lost):
    """Take away what a set or a dictionary of the double holds."""

    def change(double):
        kept = getattr(double, name)
        for key in [key for key in kept if key in lost or not lost]:
            kept.pop(key) if isinstance(kept, dict) else kept.remove(key)

    return change


def put(name, key, value):
    """Set what a dictionary of the double holds."""
    return lambda double: getattr(double, name).update({key: value})


MISSING = [
    (
        lose("services", "storage.googleapis.com"),
        "APIs",
        "storage.googleapis.com is off",
        "gcloud services enable storage.googleapis.com",
    ),
    (
        lose("buckets"),
        "bucket",
        "gs://my-bucket is not there",
        "--location=europe-west4 --uniform-bucket-level-access",
    ),
    (
        put("buckets", BUCKET, "US"),
        "bucket",
        "gs://my-bucket is in us, and cloud.region",
        "gcloud storage buckets create gs://",
    ),
    (
        lose("permissions", (BUCKET, "storage.objects.create")),
        "bucket",
        "you lack storage.objects.create",
        "roles/storage.objectUser",
    ),
    (lose("repositories"), "repository", "is not there", "gcloud artifacts repositories create"),
    (
        lose("permissions", (COMPUTE, vertex_doctor.ACT_AS)),
        "actAs",
        f"you may not act as {COMPUTE}",
        "roles/iam.serviceAccountUser",
    ),
    (
        lose("accounts"),
        "actAs",
        f"{COMPUTE} is not there",
        "gcloud services enable compute.googleapis.com",
    ),
    (
        lose("permissions", ("project", "aiplatform.endpoints.deploy")),
        "permissions",
        "you lack aiplatform.endpoints.deploy",
        "gcloud projects add-iam-policy-binding my-project --member=user:YOU --role=roles/aiplatform.user",
    ),
    (
        put("quotas", ("custom_model_training_preemptible_nvidia_l4_gpus", REGION), 0),
        "quota",
        "custom_model_training_preemptible_nvidia_l4_gpus in europe-west4 is 0, and 'l4-spot' needs 1",
        "ask for more at https://console.cloud.google.com/iam-admin/quotas?project=my-project",
    ),
]


@pytest.mark.parametrize(
    ("change", "name", "what", "fix"), MISSING, ids=[f"{row[1]}: {row[2][:30]}" for row in MISSING]
)
def test_what_is_missing_is_told_alone_and_with_what_to_type(
    settings, overridden, capsys, change, name, what, fix
):
    change(overridden)
    ready, said = examine(settings, capsys)
    assert not ready
    assert {key for key, (sign, _) in said.items() if sign == "✗"} == {name}
    text, typed = said[name][1].split("fix: ")
    assert what in text
    assert fix in typed


def test_a_repository_must_be_for_images_and_yours_to_write(settings, overridden, capsys):
    overridden.repositories[REGION, settings.name] = "KFP"
    assert "holds KFP, not images" in examine(settings, capsys)[1]["repository"][1]
    overridden.repositories[REGION, settings.name] = "DOCKER"
    overridden.permissions.remove((settings.name, vertex_doctor.UPLOAD))
    assert "roles/artifactregistry.writer" in examine(settings, capsys)[1]["repository"][1]


@pytest.mark.parametrize(
    "call",
    ["services.batchGet", "buckets.get", "repositories.get", "projects.test", "consumerQuota"],
)
@pytest.mark.parametrize("status", [503, 0, 429])
def test_what_cannot_be_found_out_is_not_called_missing(settings, overridden, capsys, call, status):
    overridden.fail(call, status=status, times=9)
    ready, said = examine(settings, capsys)
    unknown = {
        key
        for key, (sign, text) in said.items()
        if sign == "·" and text.startswith("not checked: ")
    }
    assert ready
    assert unknown
    assert {sign for sign, _ in said.values()} == {"✓", "·"}


def test_nobody_waits_for_ever(settings, overridden, capsys, monkeypatch):
    monkeypatch.setattr(rest, "CALL", 0.2)
    overridden.fail("buckets.get", seconds=1.0, status=None)
    ready, said = examine(settings, capsys)
    assert ready
    assert "no response from storage within" in said["bucket"][1]
    assert said["repository"][0] == "✓"


def test_a_project_that_is_not_there(settings, overridden, capsys):
    overridden.fail(
        "services.batchGet",
        status=403,
        message="Permission denied to list services for my-project.",
        times=9,
    )
    ready, said = examine(settings, capsys)
    assert not ready
    assert "gcloud projects list" in said["APIs"][1]


def test_an_api_that_is_off_is_no_missing_repository(settings, overridden, capsys):
    off = "Artifact Registry API has not been used in project 1 before or it is disabled."
    overridden.fail("repositories.get", status=403, message=off)
    _, said = examine(settings, capsys)
    assert said["repository"][0] == "·"
    assert (
        "gcloud services enable artifactregistry.googleapis.com --project=my-project"
        in said["repository"][1]
    )


def test_one_job_that_has_its_quota_is_enough(settings, overridden, capsys):
    overridden.quotas["custom_model_training_preemptible_nvidia_l4_gpus", REGION] = 0
    overridden.quotas["custom_model_training_nvidia_l4_gpus", ""] = 1
    ready, said = examine(settings, capsys)
    assert ready
    assert "'l4-spot' needs 1; enough for 'l4'" in said["quota"][1]


def test_nobody_is_logged_in_with_gcloud(settings, overridden, capsys, machine):
    assert examine(settings, capsys)[1]["gcloud"][1].endswith(", as ada@example.com")
    (machine / "programs" / "gcloud").write_text(
        "#!/bin/sh\ncase $1 in auth) echo WARNING: nobody >&2 ;; *) echo SDK ;; esac\n"
    )
    ready, said = examine(settings, capsys)
    assert not ready
    assert "not logged in\n      fix: gcloud auth login" in said["gcloud"][1]


def test_an_engine_that_does_not_answer_is_not_called_missing(
    settings, overridden, capsys, machine
):
    (machine / "programs" / "docker").write_text("#!/bin/sh\nexit 1\n")
    assert "does not respond" in examine(settings, capsys)[1]["docker"][1]
    (machine / "programs" / "docker").unlink()
    assert "it is not installed" in examine(settings, capsys)[1]["docker"][1]


def test_docker_and_gcloud(settings, overridden, capsys, machine):
    (machine / "DOCKER_CONFIG" / "config.json").unlink()
    (machine / "programs" / "gcloud").unlink()
    ready, said = examine(settings, capsys)
    assert not ready
    assert f"gcloud auth configure-docker {HOST}" in said["docker"][1]
    assert said["gcloud"][0] == "✗"
    (machine / "DOCKER_CONFIG" / "config.json").write_text("{")
    assert "cannot be read" in examine(settings, capsys)[1]["docker"][1]
    (machine / "DOCKER_CONFIG" / "config.json").write_text("[]")
    assert "unexpected response" in examine(settings, capsys)[1]["docker"][1]
    (machine / "programs" / "docker").unlink()
    assert "it is not installed" in examine(settings, capsys)[1]["docker"][1]


def test_a_job_that_is_not_there_is_told_offline(settings, overridden, capsys):
    wrong = settings.model_copy(
        update={
            "cloud": settings.cloud.model_copy(
                update={"train": type(settings.cloud.train)(jobs=("l5",))}
            )
        }
    )
    ready, said = examine(wrong, capsys)
    assert not ready
    assert said["jobs"][0] == "✗"
    assert "l5" in said["jobs"][1]
    assert said["quota"][0] == "·"
    assert overridden.calls("consumerQuotaMetrics.get") == []


def test_without_a_bucket_made_by_hand_terraforms_are_looked_for(settings, overridden, capsys):
    """And its accounts: nothing of level 1's by hand is asked for."""
    name = next(iter(settings.cloud.environments))
    environments = {
        **settings.cloud.environments,
        name: settings.cloud.environments[name].model_copy(update={"bucket": ""}),
    }
    terraform = settings.model_copy(
        update={"cloud": settings.cloud.model_copy(update={"environments": environments})}
    )
    where = resolve_environment(terraform)
    ready, said = examine(terraform, capsys)
    assert not ready
    assert f"cloud.environments.{name}.bucket names no bucket" in said["bucket"][1]
    assert "is not there" in said["actAs"][1]
    names = [
        root.removeprefix("gs://") for root in (where.pipeline_root, where.storage, where.data)
    ]
    overridden.buckets = dict.fromkeys(names, REGION.upper())
    overridden.permissions |= {
        (bucket, right) for bucket in names for right in vertex_doctor.OBJECTS
    }
    overridden.accounts = {where.account("pipeline"), where.account("trainer")}
    overridden.permissions |= {(account, vertex_doctor.ACT_AS) for account in overridden.accounts}
    overridden.services.remove("compute.googleapis.com")
    assert examine(terraform, capsys)[0]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (
            f"/v1/projects/{PROJECT}:testIamPermissions",
            {"permissions": []},
            "Invalid value at 'permissions'",
        ),
        (
            f"/v1/projects/{PROJECT}:testIamPermissions",
            {"permissions": ["a.b"], "more": 1},
            "Invalid value at 'permissions'",
        ),
        (
            f"/v1/projects/{PROJECT}/services:batchGet?names=x",
            None,
            "x is not a service of this project",
        ),
        (f"/v1/projects/{PROJECT}/services", None, "does not know GET"),
        ("/v1/projects/other/services:batchGet", None, "does not know GET"),
    ],
)
def test_the_double_of_google_refuses_what_google_would(settings, overridden, path, body, said):
    with pytest.raises((rest.Refused, rest.Unchecked), match=said):
        rest.Rest(None, PROJECT).call("serviceusage", path, body=body)


# ── quotas ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("pools", "strategy", "expected"),
    [
        ([POOL], None, {"custom_model_training_nvidia_l4_gpus": 1}),
        ([POOL], "SPOT", {"custom_model_training_preemptible_nvidia_l4_gpus": 1}),
        ([POOL], "FLEX_START", {"custom_model_training_preemptible_nvidia_l4_gpus": 1}),
        (
            [POOL, {"machineSpec": L4, "replicaCount": 3}],
            "STANDARD",
            {"custom_model_training_nvidia_l4_gpus": 4},
        ),
        (
            [{"machineSpec": {"machineType": "n1-standard-4"}, "replicaCount": 2}],
            None,
            {"custom_model_training_cpus": 8},
        ),
        (
            [
                {
                    "machineSpec": {
                        **L4,
                        "machineType": "n1-standard-8",
                        "acceleratorType": "NVIDIA_TESLA_T4",
                    }
                }
            ],
            None,
            {"custom_model_training_cpus": 8, "custom_model_training_nvidia_t4_gpus": 1},
        ),
        ([{"machineSpec": {**L4, "acceleratorType": "NVIDIA_NEW"}}], None, {}),
        ([{"machineSpec": {"machineType": "n2-standard-4"}}], None, {}),
    ],
)
def test_which_quota_a_job_draws_on(pools, strategy, expected):
    job = {"workerPoolSpecs": pools, **({"scheduling": {"strategy": strategy}} if strategy else {})}
    assert vertex_doctor.needed(job) == expected


def test_every_named_accelerator_is_one():
    """A misspelt one would only ever say "not known"."""
    assert set(vertex_doctor.QUOTAS) <= set(GPUS)


def test_a_limit_is_the_regions_own_or_else_everybodys():
    def answer(*buckets):
        return {"consumerQuotaLimits": [{"quotaBuckets": list(buckets)}]}

    everywhere, here = (
        {"effectiveLimit": "2"},
        {"effectiveLimit": "-1", "dimensions": {"region": REGION}},
    )
    assert vertex_doctor.in_region(answer(everywhere, here), REGION) == -1
    assert vertex_doctor.in_region(answer(everywhere, here), "us-central1") == 2
    assert vertex_doctor.in_region(answer(here), "us-central1") is None
    assert vertex_doctor.in_region({}, REGION) is None


# ── credentials ─────────────────────────────────────────────────────────────────────────────────────────────────────
class Tokens(FakeServer):
    """Gives a token for any signed request, or none."""

    def __init__(self):
        super().__init__()
        self.refuses = False
        self.routes = [
            ("POST", "/token", "token", self.token),
            ("GET", "/userinfo", "userinfo", self.userinfo),
        ]

    def token(self, request):
        request.message = request.body
        if self.refuses:
            raise ApiError(400, "invalid_grant")
        return {"access_token": "a-token", "expires_in": 3600, "token_type": "Bearer"}

    def userinfo(self, request):
        request.message = request.headers["authorization"]
        return {"email": "jo@example.com"}


@pytest.fixture
def tokens():
    with Tokens() as double:
        yield double


@pytest.fixture
def google(platform, monkeypatch):
    """The double, as if it were Google: asked with credentials."""
    monkeypatch.setattr(rest, "SERVICES", dict.fromkeys(rest.SERVICES, platform.address))
    return platform


@pytest.fixture
def key(machine, monkeypatch, tokens):
    """Application Default Credentials of a service account."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    content = {
        "type": "service_account",
        "project_id": PROJECT,
        "private_key" + "_id": "1",  # in two parts: the check for keys in files knows such a line
        "private_key": private.private_bytes(*form).decode(),
        "client_email": "robot@example.com",
        "client_id": "1",
        "token_uri": f"{tokens.address}/token",
    }
    (machine / "key.json").write_text(json.dumps(content))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(machine / "key.json"))


def test_google_is_asked_with_your_credentials(settings, google, key, capsys):
    ready, said = examine(settings, capsys)
    assert ready
    assert said["credentials"] == ("✓", "robot@example.com")
    assert {received.headers.get("authorization") for received in google.received} == {
        "Bearer a-token"
    }


def test_credentials_that_have_expired(settings, google, key, tokens, capsys):
    tokens.refuses = True
    ready, said = examine(settings, capsys)
    assert not ready
    assert "invalid or expired" in said["credentials"][1]
    assert "fix: gcloud auth application-default login" in said["credentials"][1]
    assert google.received == []


def test_no_credentials(settings, google, capsys):
    ready, said = examine(settings, capsys)
    assert not ready
    assert said["credentials"] == (
        "✗",
        "not found\n      fix: gcloud auth application-default login",
    )
    assert said["bucket"] == ("·", "not checked: credentials come first")
    assert said["jobs"][0] == "✓"  # nobody need be asked for that
    assert google.received == []


@pytest.mark.parametrize("content", ["", "[]", '{"type": "something"}', "{"])
def test_credentials_that_cannot_be_read(settings, google, machine, monkeypatch, capsys, content):
    (machine / "key.json").write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(machine / "key.json"))
    ready, said = examine(settings, capsys)
    assert not ready
    assert "they cannot be read" in said["credentials"][1]


def test_a_person(settings, google, tokens, machine, monkeypatch, capsys):
    """Who has logged in with gcloud; Google wants to know which project pays for what a person asks."""
    import google.oauth2.credentials as people

    monkeypatch.setattr(people, "_GOOGLE_OAUTH2_TOKEN_ENDPOINT", f"{tokens.address}/token")
    monkeypatch.setattr(rest, "WHO", f"{tokens.address}/userinfo")
    person = {
        "type": "authorized_user",
        "client_id": "1",
        "client_secret": "s",
        "refresh_token": "r",
    }
    file = machine / "CLOUDSDK_CONFIG" / "application_default_credentials.json"
    file.write_text(json.dumps(person))
    ready, said = examine(settings, capsys)
    assert not ready
    assert "gcloud auth application-default set-quota-project my-project" in said["credentials"][1]
    file.write_text(json.dumps({**person, "quota_project_id": PROJECT}))
    ready, said = examine(settings, capsys)
    assert ready
    assert said["credentials"] == ("✓", "jo@example.com")
    assert {received.headers.get("x-goog-user-project") for received in google.received} == {
        PROJECT
    }


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_exit_code(settings, overridden, monkeypatch, capsys):
    monkeypatch.setattr(vertex_doctor, "load_settings", lambda: settings)
    vertex_doctor.main()
    assert "make train" in capsys.readouterr().out
    overridden.buckets.clear()
    with pytest.raises(SystemExit) as left:
        vertex_doctor.main()
    assert left.value.code == 2
    assert "make doctor LEVEL=1" in capsys.readouterr().out


def test_an_empty_project_id_is_told_at_once(settings):
    name = next(iter(settings.cloud.environments))
    with pytest.raises(
        UserError, match=rf"cloud\.environments\.{name}\.project in project\.yaml is empty"
    ):
        vertex_doctor.report(
            load_settings(f"cloud.environments.{name}.project='\"\"'"), project_root()
        )
