"""make doctor LEVEL=2: what a push needs and is not there is told, with what to type, before anything is applied or sent."""

import os
import re
import subprocess
import sys

import pytest
from core.errors import UserError
from core.paths import project_root
from gcp import pipeline_version
from gcp.environment import resolve_environment
from level_1_pipeline.vertex import doctor as vertex_doctor
from level_1_pipeline.vertex import rest
from level_2_cicd import doctor as doctor_level_2
from level_2_cicd import infra
from level_2_cicd.doctor import LEVEL_2
from level_2_cicd.rehearsal.cloud_project import FakeProject
from level_2_cicd.rehearsal.server import ApiError
from project.settings import load_settings

PROJECT, PROD, REGION = "my-project", "my-prod", "europe-west4"
LINKED = "mine/code"
ENTRA = "https://login.microsoftonline.com/01234567-89ab-cdef-0123-456789abcdef/v2.0"
GUID = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture(autouse=True)
def programs(tmp_path, monkeypatch):
    """A machine with gcloud and Terraform, both of them scripts, and no credentials."""
    folder = tmp_path / "programs"
    folder.mkdir()
    gcloud = 'case "$1" in auth) echo ada@example.com ;; *) echo Google Cloud SDK 528.0.0 ;; esac'
    for name, does in (
        ("gcloud", gcloud),
        ("terraform", """echo '{"terraform_version": "1.11.4"}'"""),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def settings_with(
    environments=f"{{dev: {{project: {PROJECT}}}, prod: {{project: {PROD}, promote_from: dev}}}}",
    **changed,
):
    """This project's settings, with its environments, and other values of the block `cloud`."""
    cloud = {
        "region": REGION,
        "ci": "github-actions",
        "repository": "{name: owner/name, id: '12345'}",
        "train.jobs": "[l4]",
        "environments": environments,
        **changed,
    }
    return load_settings(
        " ".join(f'"cloud.{key}={value}"' for key, value in cloud.items())
        + " containers.registry='\"\"'"
    )


@pytest.fixture
def settings():
    """Settings of level 2, in which nothing is wrong."""
    return settings_with()


class Surroundings(FakeProject):
    """A project's surroundings, with Vertex AI's metadata store, or without."""

    def __init__(self, project):
        super().__init__(project)
        self.metadata_store = False
        path = f"/v1/projects/{project}/locations/{REGION}/metadataStores/default"
        self.routes.append(("GET", path, "metadataStores.get", self._metadata_store))

    def _metadata_store(self, request):
        request.message = request.path
        if not self.metadata_store:
            raise ApiError(404, f"The metadata store {request.path} does not exist.")
        return {"name": request.path.removeprefix("/v1/")}


def ask(double, monkeypatch):
    """Bring everybody to a double: gcloud's variables do, and the emulator's."""
    for service in (*rest.SERVICES, "aiplatform"):
        monkeypatch.setenv(f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}", double.address)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", double.address)


@pytest.fixture
def platform(settings, monkeypatch):
    """A project with the foundation, and a published pipeline."""
    where = resolve_environment(settings)
    with Surroundings(PROJECT) as double:
        double.services = {
            *doctor_level_2.FIRST,
            *(f"{name}.googleapis.com" for name in doctor_level_2.APIS),
        }
        double.buckets = dict.fromkeys([where.terraform_state, *buckets(where)], REGION.upper())
        pointer = f"{pipeline_version.templates_folder(where)}/current.json".removeprefix("gs://")
        double.objects = {f"{where.terraform_state}/foundation/default.tfstate", pointer}
        double.accounts = {where.account("build")}
        double.quotas = {("custom_model_training_nvidia_l4_gpus", REGION): 1}
        double.permissions = {("project", right) for right in doctor_level_2.PERMISSIONS}
        double.permissions |= {
            (bucket, right) for bucket in buckets(where) for right in vertex_doctor.OBJECTS
        }
        double.permissions.add((where.account("build"), vertex_doctor.ACT_AS))
        ask(double, monkeypatch)
        yield double


def buckets(where):
    """The three, without gs://."""
    return [root.removeprefix("gs://") for root in (where.pipeline_root, where.storage, where.data)]


def examine(settings, capsys):
    """The verdict, and what was said about each: {name: (sign, text)}."""
    ready = vertex_doctor.report(settings, project_root(), LEVEL_2)
    said = capsys.readouterr().out
    return ready, {
        name: (sign, text.strip())
        for sign, name, text in re.findall(r"(?ms)^  (.) (\w+) +(.*?)(?=^  \S|\Z)", said)
    }


def test_nothing_is_missing(settings, platform, capsys):
    where = resolve_environment(settings)
    ready, said = examine(settings, capsys)
    assert ready
    assert list(said) == ["credentials", *LEVEL_2.checks]
    assert {sign for sign, _ in said.values()} == {"✓"}, said
    assert said["terraform"][1] == "1.11.4"
    assert said["projects"][1] == f"dev: {PROJECT}, prod: {PROD}"
    assert said["pushes"][1] == "github-actions: owner/name, 12345, branch main"
    assert said["foundation"][1] == f"its state is in gs://{where.terraform_state}"
    assert said["buckets"][1].startswith(
        ", ".join(f"gs://{name}" for name in sorted(buckets(where)))
    )
    assert f"as {where.account('build')}" in said["permissions"][1]
    assert said["metadata"][1] == "it is not there yet: the first apply makes it"
    # What was asked, and not only what was answered.
    names = [f"projects/{PROJECT}/services/{name}" for name in sorted(platform.services)]
    assert [sorted(asked) for asked in platform.calls("services.batchGet")] == [names]
    assert platform.calls("buckets.testIamPermissions") == 3 * [list(vertex_doctor.OBJECTS)]
    assert platform.calls("projects.testIamPermissions") == [list(doctor_level_2.PERMISSIONS)]
    assert platform.calls("serviceAccounts.testIamPermissions") == [[vertex_doctor.ACT_AS]]
    assert len(platform.calls("objects.get")) == 2


def test_another_environment_is_looked_at_in_its_own_project(
    settings, platform, capsys, monkeypatch
):
    monkeypatch.setenv("ENVIRONMENT", "prod")
    where = resolve_environment(settings)
    with Surroundings(PROD) as other:
        for name in ("services", "quotas", "permissions"):
            setattr(other, name, getattr(platform, name))
        other.buckets = dict.fromkeys([where.terraform_state, *buckets(where)], REGION.upper())
        other.permissions = platform.permissions | {
            (bucket, right) for bucket in buckets(where) for right in vertex_doctor.OBJECTS
        }
        ask(other, monkeypatch)
        ready, said = examine(settings, capsys)
    assert not ready
    assert "gs://my-prod-" in said["foundation"][1]
    assert "make foundation ENVIRONMENT=prod" in said["foundation"][1]


def lose(name, *which):
    """Take away what a set or a dictionary of the double holds: what contains one of these words, or all."""

    def change(double):
        kept = getattr(double, name)
        for key in [key for key in kept if not which or any(word in str(key) for word in which)]:
            kept.pop(key) if isinstance(kept, dict) else kept.remove(key)

    return change


def move(double):
    """Let the bucket of the rows be elsewhere."""
    double.buckets.update({name: "US" for name in double.buckets if name.endswith("-data")})


FOUNDATION = "make foundation ENVIRONMENT=dev"
MISSING = [
    (
        lose("services", "serviceusage"),
        "APIs",
        "serviceusage.googleapis.com must be on before Terraform can run",
        f"gcloud services enable serviceusage.googleapis.com --project={PROJECT}",
    ),
    (
        lose("services", "run.google", "pubsub"),
        "APIs",
        "pubsub.googleapis.com, run.googleapis.com: off",
        FOUNDATION,
    ),
    (
        lose("objects", "default.tfstate"),
        "foundation",
        "-terraform/foundation is not there",
        FOUNDATION,
    ),
    (lose("buckets", "-terraform"), "foundation", "-terraform/foundation is not there", FOUNDATION),
    (lose("buckets", "-storage"), "buckets", "-storage is not there", FOUNDATION),
    (
        move,
        "buckets",
        "-data is in us, and cloud.region in project.yaml is europe-west4",
        "write that region into cloud.region",
    ),
    (
        lose("permissions", "objects.delete"),
        "buckets",
        "you lack storage.objects.delete",
        "--member=user:YOU --role=roles/storage.objectUser",
    ),
    (
        lose("accounts"),
        "permissions",
        f"-build@{PROJECT}.iam.gserviceaccount.com is not there",
        FOUNDATION,
    ),
    (
        lose("permissions", "actAs"),
        "permissions",
        "you may not act as",
        "--member=user:YOU --role=roles/iam.serviceAccountUser",
    ),
    (
        lose("permissions", "builds.create"),
        "permissions",
        "you lack cloudbuild.builds.create",
        f"gcloud projects add-iam-policy-binding {PROJECT} --member=user:YOU --role=roles/cloudbuild.builds.editor",
    ),
    (
        lambda double: double.quotas.update({("custom_model_training_nvidia_l4_gpus", REGION): 0}),
        "quota",
        "custom_model_training_nvidia_l4_gpus in europe-west4 is 0, and 'l4' needs 1",
        f"ask for more at https://console.cloud.google.com/iam-admin/quotas?project={PROJECT}",
    ),
]


def alone(said, name):
    """What is missing, and what mends it, where nothing else is missing."""
    assert {key for key, (sign, _) in said.items() if sign == "✗"} == {name}, said
    what, fix = said[name][1].split("fix: ")
    return what, fix


@pytest.mark.parametrize(
    ("change", "name", "what", "fix"), MISSING, ids=[f"{row[1]}: {row[2][:30]}" for row in MISSING]
)
def test_what_is_missing_is_told_alone_and_with_what_to_type(
    settings, platform, capsys, change, name, what, fix
):
    change(platform)
    ready, said = examine(settings, capsys)
    assert not ready
    found, typed = alone(said, name)
    assert what in found
    assert fix in typed


def test_before_the_foundation_everything_leads_to_it(settings, platform, capsys):
    """A new project, in which only the two APIs are on that Terraform itself calls."""
    platform.services = set(doctor_level_2.FIRST)
    for name in ("buckets", "objects", "accounts", "quotas"):
        getattr(platform, name).clear()
    ready, said = examine(settings, capsys)
    assert not ready
    missing = {name: text for name, (sign, text) in said.items() if sign == "✗"}
    assert list(missing) == ["APIs", "foundation", "buckets", "permissions"]
    assert all(f"fix: {FOUNDATION}" in text for text in missing.values()), missing


def test_a_bucket_that_was_brought_along_is_nobodys_to_make(platform, capsys):
    brought = settings_with(
        f"{{dev: {{project: {PROJECT}, existing: {{buckets: {{data: their-data}}}}}}}}"
    )
    what, fix = alone(examine(brought, capsys)[1], "buckets")
    assert what.strip() == "gs://their-data is not there"
    assert "cloud.environments.dev.existing.buckets" in fix
    assert "make foundation" not in fix


# ── Vertex AI's metadata store, of which there is one ───────────────────────────────────────────────────────────────
def test_a_metadata_store_from_earlier_use_is_told_before_an_apply_fails(
    settings, platform, capsys
):
    platform.metadata_store = True
    what, fix = alone(examine(settings, capsys)[1], "metadata")
    assert what.strip() == "Vertex AI's metadata store is there already, from earlier use"
    assert (
        fix == "write existing: {metadata_store: true} under cloud.environments.dev in project.yaml"
    )
    assert platform.calls("metadataStores.get") == [
        f"/v1/projects/{PROJECT}/locations/{REGION}/metadataStores/default"
    ]


def test_the_metadata_store_that_the_stack_has_made_is_right(settings, platform, capsys):
    platform.metadata_store = True
    platform.objects.add(f"{resolve_environment(settings).terraform_state}/stack/default.tfstate")
    ready, said = examine(settings, capsys)
    assert ready
    assert said["metadata"] == ("✓", "it is there, and so is the stack's state")


def test_a_metadata_store_that_project_yaml_tells_of_is_not_looked_for(platform, capsys):
    platform.metadata_store = True
    ready, said = examine(
        settings_with(f"{{dev: {{project: {PROJECT}, existing: {{metadata_store: true}}}}}}"),
        capsys,
    )
    assert ready
    assert said["metadata"] == ("✓", "project.yaml says that it is there already")
    assert platform.calls("metadataStores.get") == []


# ── a private pool ──────────────────────────────────────────────────────────────────────────────────────────────────
def with_pool(owner):
    """Environments where builds run in somebody's pool."""
    pool = f"projects/{owner}/locations/{REGION}/workerPools/theirs"
    return f"{{dev: {{project: {PROJECT}, existing: {{build_pool: {pool}}}}}}}"


@pytest.mark.parametrize("owner", [PROJECT, "shared"])
def test_who_builds_in_a_private_pool_must_be_allowed_to(platform, capsys, owner):
    """In the private mode, or in one that is there already, as another project's is."""
    settings = (
        settings_with(private="true") if owner == PROJECT else settings_with(with_pool(owner))
    )
    what = "project" if owner == PROJECT else owner

    def answer(request):
        return platform.granted(request, owner)

    platform.routes.append(
        ("POST", "/v1/projects/shared:testIamPermissions", "shared.test", answer)
    )
    lacks, fix = alone(examine(settings, capsys)[1], "permissions")
    assert resolve_environment(settings).build_pool.startswith(f"projects/{owner}/")
    assert (
        lacks.strip()
        == f"you lack cloudbuild.workerpools.use for {resolve_environment(settings).build_pool}"
    )
    typed = f"gcloud projects add-iam-policy-binding {owner} --member=user:YOU --role=roles/cloudbuild.workerPoolUser"
    assert fix.strip() == f"ask an owner to run: {typed}"
    platform.permissions.add((what, doctor_level_2.USE_POOL))
    assert examine(settings, capsys)[0]


def test_a_pool_whose_project_you_may_not_look_at_is_not_called_missing(platform, capsys):
    settings = settings_with(with_pool("shared"))
    platform.routes.append(
        ("POST", "/v1/projects/shared:testIamPermissions", "shared.test", lambda *_: None)
    )
    platform.fail("shared.test", status=403, message="you do not have access to it", times=9)
    ready, said = examine(settings, capsys)
    assert ready
    whether = f"whether you may build in {resolve_environment(settings).build_pool}"
    assert said["permissions"] == ("·", f"not checked: {whether}: you do not have access to it")


# ── what is told without asking anybody ─────────────────────────────────────────────────────────────────────────────
PUSHES = [
    ("github-actions", "{id: '12345'}", "12345, branch main"),
    (
        "github-actions",
        "{name: owner/name}",
        "cloud.repository must say id,|id is ''|gh api repos/OWNER/NAME --jq .id",
    ),
    ("gitlab", "{name: group/name, id: '67890', branch: trunk}", "group/name, 67890, branch trunk"),
    ("gitlab", "{name: group/name}", "cloud.repository must say id,|id is ''|the project's number"),
    (
        "gitlab",
        f"{{id: {GUID}}}",
        f"cloud.repository must say id,|id is '{GUID}'|the project's number",
    ),
    ("azure-devops", f"{{name: a/b/c, host: '{ENTRA}'}}", "a/b/c, branch main"),
    ("azure-devops", f"{{name: o/p/c, id: {GUID}}}", f"o/p/c, {GUID}, branch main"),
    (
        "azure-devops",
        "{name: o/p/c}",
        "must say name and host, or name and id|host is '', id is ''|the issuer",
    ),
    (
        "azure-devops",
        f"{{host: '{ENTRA}'}}",
        "must say name and host, or name and id|name is ''|behind /sc/",
    ),
    (
        "azure-devops",
        "{name: o/p/c, host: 'https://vstoken.dev.azure.com/x'}",
        "or name and id|host is 'https://vstoken|GUID",
    ),
    ("cloud-build", f"{{name: {LINKED}}}", f"{LINKED}, branch main"),
    ("cloud-build", "{id: '1'}", "must say name,|name is ''|gcloud builds repositories list"),
    (
        "cloud-build",
        "{name: code}",
        "must say name,|name is 'code'|CONNECTION/NAME",
    ),
]


@pytest.mark.parametrize(
    ("ci", "repository", "expected"), PUSHES, ids=[f"{row[0]} {row[1][:20]}" for row in PUSHES]
)
def test_whose_pushes_may_deploy(platform, capsys, ci, repository, expected):
    ready, said = examine(settings_with(ci=ci, repository=repository), capsys)
    if "|" not in expected:
        assert ready
        assert said["pushes"] == ("✓", f"{ci}: {expected}")
        return
    what, fix = alone(said, "pushes")
    must, found, typed = expected.split("|")
    assert must in what
    assert found in what
    assert typed in fix


def test_an_environment_without_a_project(platform, capsys):
    settings = settings_with(
        f"{{dev: {{project: {PROJECT}}}, test: {{project: ''}}, prod: {{project: '', promote_from: dev}}}}"
    )
    what, fix = alone(examine(settings, capsys)[1], "projects")
    assert what.strip() == "test, prod: no project is named"
    assert "write the ids into project.yaml, or remove what you do not want" in fix


def test_a_bucket_by_hand_is_the_one_thing_to_mend(platform, capsys):
    """Nothing that Terraform would make is called missing: it cannot be there yet."""
    settings = settings_with(f"{{dev: {{project: {PROJECT}, bucket: my-bucket}}}}")
    what, fix = alone(examine(settings, capsys)[1], "projects")
    assert what.strip() == "cloud.environments.dev.bucket names a bucket created manually (level 1)"
    assert "empty it in project.yaml" in fix
    assert (
        platform.calls("serviceAccounts.testIamPermissions") == platform.calls("objects.get") == []
    )


def test_a_job_that_is_not_there(platform, capsys):
    what, fix = alone(examine(settings_with(**{"train.jobs": "[l5]"}), capsys)[1], "jobs")
    assert "l5" in what
    assert "make gpu-jobs" in fix


def test_nothing_published_is_no_mistake(settings, platform, capsys):
    lose("objects", "current.json")(platform)
    ready, said = examine(settings, capsys)
    assert ready
    assert said["published"] == ("·", "not checked: nothing is published yet: the first push does")


def test_terraform_and_gcloud(settings, platform, capsys, programs):
    (programs / "gcloud").unlink()
    (programs / "terraform").write_text('#!/bin/sh\necho \'{"terraform_version": "1.8.5"}\'\n')
    ready, said = examine(settings, capsys)
    assert not ready
    assert "it is not installed" in said["gcloud"][1]
    what, fix = said["terraform"][1].split("fix: ")
    assert "terraform 1.8.5 is too old; it must be 1.9 or newer" in what
    assert fix.count("https://developer.hashicorp.com/terraform/install") == 1
    (programs / "terraform").unlink()
    assert "terraform is not installed" in examine(settings, capsys)[1]["terraform"][1]


@pytest.mark.parametrize(
    "call",
    [
        "services.batchGet",
        "objects.get",
        "buckets.get",
        "serviceAccounts",
        "projects.test",
        "metadata",
    ],
)
@pytest.mark.parametrize("status", [503, 0, 429])
def test_what_cannot_be_found_out_is_not_called_missing(settings, platform, capsys, call, status):
    platform.fail(call, status=status, times=9)
    ready, said = examine(settings, capsys)
    assert ready
    assert {sign for sign, _ in said.values()} == {"✓", "·"}


@pytest.mark.parametrize("call", ["objects.get", "serviceAccounts", "projects.test", "metadata"])
def test_what_you_may_not_look_at_is_not_called_missing(settings, platform, capsys, call):
    platform.fail(call, status=403, message="you do not have access to it", times=9)
    ready, said = examine(settings, capsys)
    assert ready
    assert any(
        "you do not have access to it" in text for sign, text in said.values() if sign == "·"
    )


def test_a_project_that_is_not_there(settings, platform, capsys):
    platform.fail(
        "services.batchGet", status=403, message="Permission denied to list services.", times=9
    )
    assert "gcloud projects list" in alone(examine(settings, capsys)[1], "APIs")[1]


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────
def command(environment="dev", edit=lambda text: text):
    """What make calls, in a folder with this project.yaml; nobody is asked but the doubles."""
    text = (project_root() / "project.yaml").read_text(encoding="utf-8")
    (project_root() / "project.yaml").write_text(edit(text), encoding="utf-8")
    variables = {**os.environ, "ENVIRONMENT": environment}
    return subprocess.run(
        [sys.executable, "-m", "level_2_cicd.doctor"],
        env=variables,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


@pytest.fixture
def copied(project, monkeypatch):
    """A copy of the project, with an environment dev and SET as it is in `settings_with`."""
    monkeypatch.setenv(
        "SET",
        f'"cloud.environments={{dev: {{project: {PROJECT}}}}}" "cloud.repository={{id: \'1\'}}"',
    )
    return project


def test_what_is_typed_next(copied, platform, monkeypatch):
    monkeypatch.setenv("SET", f"{os.environ['SET']} cloud.region={REGION} cloud.ci=gitlab")
    done = command()
    assert done.returncode == 2  # in the copy there are no jobs
    assert done.stdout.startswith(f"Level 2: environment dev, project {PROJECT}, {REGION}\n")
    assert "Level 2: some checks failed (✗).\nFix them, then: make doctor LEVEL=2" in done.stdout
    assert done.stderr == ""


def test_ready_to_push(settings, platform, monkeypatch, capsys):
    monkeypatch.setattr(vertex_doctor, "load_settings", lambda: settings)
    vertex_doctor.run_level(LEVEL_2)
    assert "Level 2: all checks passed.\nNext: git push, or make submit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "assigned", "edit", "said"),
    [
        (
            "dev",
            "cloud.environments.dev.project='\"\"'",
            ("", ""),
            "cloud.environments.dev.project in project.yaml is empty",
        ),
        ("prd", "", ("", ""), "ENVIRONMENT=prd: project.yaml has dev under cloud.environments"),
        ("dev", "", ("\ncloud:", "\nclowd: 1\ncloud:"), "clowd: there is no such key"),
        ("dev", "", ("  region: ", "  regoin: "), "did you mean 'region'"),
    ],
)
def test_a_mistake_in_project_yaml_is_one_message(
    copied, platform, monkeypatch, environment, assigned, edit, said
):
    monkeypatch.setenv("SET", f"{os.environ['SET']} {assigned}")
    done = command(environment, lambda text: text.replace(*edit, 1))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert platform.received == []


def test_what_terraform_says_of_a_mistake_is_what_the_doctor_says(platform, monkeypatch):
    """One home: both read project.yaml through the same model."""
    monkeypatch.setenv("ENVIRONMENT", "prd")
    monkeypatch.setattr(infra.sys, "argv", ["terraform", "plan"])
    settings = settings_with()
    monkeypatch.setattr(infra, "load_settings", lambda: settings)
    with pytest.raises(UserError) as told:
        infra.main()
    with pytest.raises(UserError) as doctors:
        vertex_doctor.report(settings, project_root(), LEVEL_2)
    assert str(told.value) == str(doctors.value)
