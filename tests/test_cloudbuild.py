"""The Cloud Build files: schema, order, substitutions; and `gcloud builds submit` over HTTP."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from gcp.environment import resolve_environment
from level_1_pipeline import containers
from level_2_cicd import submit_build
from level_2_cicd.rehearsal import build_steps
from level_2_cicd.rehearsal.cloud_build import BuildFailed, FakeCloudBuild
from level_2_cicd.rehearsal.storage import FakeStorage
from project.settings import load_settings

from tests.projects import makefile_text
from tests.push import edit, settings_of_nobody, within

PROJECT = Path(__file__).resolve().parents[1] / "{{cookiecutter.project_slug}}"
FILES = sorted((PROJECT / "level_2_cicd").glob("cloudbuild*.yaml"))
NAMES = [path.name for path in FILES]


def document(name: str) -> dict[str, Any]:
    """A Cloud Build file."""
    return dict(yaml.safe_load((PROJECT / "level_2_cicd" / name).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def project(generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a Google Cloud project."""
    folder = generate(tmp_path_factory.mktemp("project"))
    edit(folder / "project.yaml", 'dev: {project: ""', 'dev: {project: "my-project"')
    edit(folder / "project.yaml", 'prod: {project: ""', 'prod: {project: "my-prod"')
    return folder


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In that project, with a commit."""
    with within(project), settings_of_nobody():
        monkeypatch.setenv("COMMIT", "1a2b3c4d")
        yield project


# ── schema ─────────────────────────────────────────────────────────────────────────────────────
def test_all_files_are_listed() -> None:
    assert NAMES == [
        "cloudbuild.container.yaml",
        "cloudbuild.image.yaml",
        "cloudbuild.pr.yaml",
        "cloudbuild.yaml",
    ]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_match_cloud_builds_schema(path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "check_jsonschema",
            "--builtin-schema",
            "vendor.cloudbuild",
            str(path),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_builds_have_timeouts_logs_and_tags(name: str) -> None:
    build = document(name)
    assert build["options"]["logging"] == "CLOUD_LOGGING_ONLY"
    assert all("timeout" in step for step in build["steps"])
    assert max(
        build_steps.seconds(step["timeout"]) for step in build["steps"]
    ) <= build_steps.seconds(build["timeout"])
    limits = [build_steps.seconds(step["timeout"]) for step in build["steps"]]
    assert (
        build_steps.critical_path(build["steps"], limits)
        <= build_steps.seconds(build["timeout"]) * 1.2
    )
    assert "substitutions" not in build, "a default would hide a missing substitution"
    assert build["tags"][0] == "$_ENVIRONMENT"


def test_pushed_images_have_provenance_and_pull_requests_push_nothing() -> None:
    assert document("cloudbuild.yaml")["options"]["requestedVerifyOption"] == "VERIFIED"
    image = document("cloudbuild.image.yaml")
    assert image["options"]["requestedVerifyOption"] == "VERIFIED"
    assert image["images"] == ["$_IMAGE:$_TAG"]
    request = document("cloudbuild.pr.yaml")
    assert "images" not in request
    words = {word for step in request["steps"] for word in step["args"]}
    assert "--no-push" in words
    assert not words & {"images", "apply", "publish", "release", "functional-test", "PUSH=1"}


@pytest.mark.parametrize("name", NAMES)
def test_steps_get_no_secrets(name: str) -> None:
    text = (PROJECT / "level_2_cicd" / name).read_text(encoding="utf-8")
    assert not re.search(
        r"secretEnv|availableSecrets|password|token|private_key", text, re.IGNORECASE
    )


# ── steps ──────────────────────────────────────────────────────────────────────────────────────
def targets() -> set[str]:
    """The project's make targets."""
    return {
        name
        for line in re.findall(r"^\.PHONY: (.*)$", makefile_text(), re.MULTILINE)
        for name in line.split()
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_step_runs_one_make_target_in_the_toolbox(name: str) -> None:
    for step in document(name)["steps"]:
        if step["id"] == "toolbox":
            assert step["args"][0] == "level_2_cicd/toolbox/toolbox.sh"
            continue
        assert step["entrypoint"] == "make"
        assert step["name"] in {"toolbox", "$_TOOLBOX"}
        target, *values = step["args"]
        assert target in targets()
        assert all(re.fullmatch(r"[A-Z_]+=\S*", value) for value in values)
        assert not any(key in step for key in ("script", "secretEnv", "volumes"))


def test_steps_wait_only_for_what_they_need() -> None:
    build = document("cloudbuild.yaml")
    waits = {step["id"]: set(step["waitFor"]) for step in build["steps"]}
    assert waits == {
        "toolbox": {"-"},
        "setup": {"toolbox"},
        "images": {"toolbox"},
        "lint": {"setup"},
        "test": {"setup"},
        "apply": {"lint", "test", "images"},
        "publish": {"setup", "images"},
        "sbom": {"setup", "images"},
        "functional-test": {"apply", "publish"},
        "release": {"functional-test", "sbom"},
    }
    before = {name: needed for name, needed in waits.items()}
    for name in waits:  # transitively
        before[name] = before[name].union(
            *(before[other] for other in before[name] if other != "-")
        )
    assert {"lint", "test", "images", "apply", "publish", "sbom", "functional-test"} <= before[
        "release"
    ]
    assert {"lint", "test"} <= before["apply"]


# ── substitutions ──────────────────────────────────────────────────────────────────────────────
def used(name: str) -> set[str]:
    """Return the substitutions that a file uses."""
    return {found for found in build_steps.variables(document(name)) if found.startswith("_")}


def test_callers_set_exactly_the_substitutions_in_use(here: Path) -> None:
    settings = load_settings("")
    environment = resolve_environment(settings)
    train = containers.find(here, ["train"])[0]
    assert set(submit_build.push_substitutions(settings, environment)) == used("cloudbuild.yaml")
    assert set(submit_build.pull_request_substitutions(settings, environment)) == used(
        "cloudbuild.pr.yaml"
    )
    assert set(submit_build.image_substitutions(environment, train)) == used(
        "cloudbuild.image.yaml"
    )
    assert set(submit_build.container_substitutions(settings, environment, train)) == used(
        "cloudbuild.container.yaml"
    )


def test_missing_or_unknown_substitutions_are_rejected() -> None:
    path = PROJECT / "level_2_cicd" / "cloudbuild.image.yaml"
    values = dict.fromkeys(used("cloudbuild.image.yaml"), "x")
    assert build_steps.read(path, values)["images"] == ["x:x"]
    with pytest.raises(build_steps.InvalidBuild, match="_TAG"):
        build_steps.read(path, {name: value for name, value in values.items() if name != "_TAG"})
    with pytest.raises(build_steps.InvalidBuild, match="_MORE"):
        build_steps.read(path, {**values, "_MORE": ""})


def test_values_with_commas_are_escaped_for_gcloud() -> None:
    assert submit_build.format_flag({"_A": "1", "_B": ""}) == "_A=1,_B="
    assert submit_build.format_flag({"_A": "1,2", "_B": "x|y"}) == "^;^_A=1,2;_B=x|y"


# ── gcloud builds submit, over HTTP ────────────────────────────────────────────────────────────
@pytest.fixture
def fakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FakeCloudBuild, FakeStorage]]:
    """Cloud Build and Cloud Storage, to which the real gcloud talks."""
    if shutil.which("gcloud") is None:
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)("this test needs gcloud")
    with FakeStorage(tmp_path / "buckets") as storage, FakeCloudBuild() as builds:
        storage.create_bucket("my-project-digit-reader-storage")
        variables = {
            "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_CLOUDBUILD": f"{builds.address}/",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{storage.address}/storage/v1/",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield builds, storage


def make(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a make target in the current folder."""
    environment = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": "src:.", **variables}
    return subprocess.run(["make", *words], env=environment, capture_output=True, text=True)


SECRETS = {
    ".env": "PASSWORD=x",
    ".env.local": "PASSWORD=x",
    "key.pem": "x",
    "my-service-account.json": "{}",
    "level_2_cicd/terraform/secret.auto.tfvars": "x",
    "level_2_cicd/terraform/.terraform/terraform.tfstate": "{}",
    "level_2_cicd/terraform/terraform.tfstate.backup": "{}",
    "application_default_credentials.json": "{}",
    "data/rows.csv": "x",
    "runs/one/model/model.onnx": "x",
    "registry/champion.json": "{}",
    "scratch/try.py": "x",
    "build/images.json": "{}",
    ".venv/bin/python": "x",
    ".git/config": "x",
    "src/trainer/__pycache__/model.pyc": "x",
}


def test_submit_sends_cloudbuild_yaml_and_no_secrets(
    here: Path, fakes: tuple[FakeCloudBuild, FakeStorage]
) -> None:
    builds, storage = fakes
    for name, text in SECRETS.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    (here / "src" / "trainer" / "new.py").write_text("# untracked, but uploaded")
    done = make("submit", JOB_SPEC="l4")
    assert done.returncode == 0, done.stdout + done.stderr

    [build] = builds.calls("builds.create")
    sent = type(build).to_dict(build, use_integers_for_enums=False)
    written = document("cloudbuild.yaml")
    for step, asked in zip(sent["steps"], written["steps"], strict=True):
        assert {key: step[key] for key in ("id", "name", "entrypoint", "args")} == {
            key: asked[key] for key in ("id", "name", "entrypoint", "args")
        }
        assert step["wait_for"] == asked["waitFor"]
        assert step["env"] == asked.get("env", [])
        assert step["timeout"] == asked["timeout"]
    assert sent["timeout"] == written["timeout"]
    assert sent["tags"] == written["tags"]
    assert sent["options"]["logging"] == "CLOUD_LOGGING_ONLY"
    assert sent["options"]["requested_verify_option"] == "VERIFIED"
    assert sent["options"]["env"] == written["options"]["env"]
    assert (
        sent["service_account"]
        == "projects/my-project/serviceAccounts/digit-reader-build@my-project.iam.gserviceaccount.com"
    )
    assert sent["substitutions"] == {
        "_ENVIRONMENT": "dev",
        "_REGISTRY": "europe-west4-docker.pkg.dev/my-project/digit-reader",
        "_INFRA_ACCOUNT": "digit-reader-infra@my-project.iam.gserviceaccount.com",
        "_BASE_IMAGES": "",
        "_PYTHON_INDEX": "",
        "_COMMIT": "1a2b3c4d",
        "_JOB_SPEC": "l4",
    }
    [received] = [one for one in builds.received if one.call == "builds.create"]
    assert received.path == "/v1/projects/my-project/locations/europe-west4/builds"

    source = sent["source"]["storage_source"]
    assert source["bucket"] == "my-project-digit-reader-storage"
    assert source["object_"].startswith("builds/source/")
    archive = storage.root / source["bucket"] / source["object_"]
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as files:
        names = {
            name.removeprefix("./") for name in files.getnames() if files.getmember(name).isfile()
        }
        mode = files.getmember(
            next(name for name in files.getnames() if name.endswith("toolbox.sh"))
        ).mode
    assert not names & set(SECRETS)
    with within(here):
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            text=True,
        )
    known = set(listed.stdout.split("\0")) - {""} if listed.returncode == 0 else set()
    wanted = {
        "src/trainer/new.py",
        "Makefile",
        "project.yaml",
        "requirements/dev.txt",
        ".gitignore",
        "level_2_cicd/cloudbuild.yaml",
    }
    assert wanted <= names
    assert mode & 0o100
    assert {name for name in known if name not in SECRETS and name != ".gcloudignore"} <= names


def test_sources_of_every_container_are_uploaded(here: Path) -> None:
    """.gcloudignore excludes no input of a container, so tags are the same in the build."""
    done = subprocess.run(
        ["gcloud", "meta", "list-files-for-upload", "."],
        capture_output=True,
        text=True,
        env={**os.environ, "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
    )
    assert done.returncode == 0, done.stderr
    sent = set(done.stdout.split("\n"))
    for container in containers.find(here):
        needed = {
            str(container.dockerfile),
            f"{container.dockerfile}.dockerignore",
            *map(str, container.inputs()),
        }
        assert needed <= sent, container.name


def test_submit_uses_the_pool_and_account_of_the_environment(
    here: Path, fakes: tuple[FakeCloudBuild, FakeStorage]
) -> None:
    builds, storage = fakes
    storage.create_bucket("my-prod-digit-reader-storage")
    pool = "projects/my-prod/locations/europe-west4/workerPools/private"
    done = make(
        "submit",
        ENVIRONMENT="prod",
        SET=f'"cloud.environments.prod.existing={{build_pool: {pool}}}"',
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [build] = builds.calls("builds.create")
    assert build.options.pool.name == pool
    assert build.substitutions["_ENVIRONMENT"] == "prod"
    assert build.service_account.endswith("/digit-reader-build@my-prod.iam.gserviceaccount.com")
    assert build.source.storage_source.bucket == "my-prod-digit-reader-storage"


def test_dry_run_prints_the_command_and_sends_nothing(
    here: Path, fakes: tuple[FakeCloudBuild, FakeStorage]
) -> None:
    done = make("submit", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "gcloud builds submit . --config=level_2_cicd/cloudbuild.yaml --project=my-project"
    )
    assert not any(fake.received for fake in fakes)


def test_failed_build_fails_submit(here: Path, fakes: tuple[FakeCloudBuild, FakeStorage]) -> None:
    builds, _ = fakes

    def fail(_: object) -> dict[str, str]:
        raise BuildFailed("step test failed")

    builds.work = fail
    done = make("submit")
    assert done.returncode == 2
    assert "`gcloud builds submit` failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_fake_rejects_invalid_builds(here: Path, fakes: tuple[FakeCloudBuild, FakeStorage]) -> None:
    def submit(text: str, *more: str) -> str:
        (here / "build").mkdir(exist_ok=True)
        (here / "build" / "bad.yaml").write_text(text)
        command = [
            "gcloud",
            "builds",
            "submit",
            "--no-source",
            "--config=build/bad.yaml",
            "--project=my-project",
            "--region=europe-west4",
        ]
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode != 0
        return done.stderr

    step = "steps: [{name: x, args: [$_A]}]\n"
    assert "_A" in submit(step)
    assert "_B" in submit(step, "--substitutions=_A=1,_B=2")
    account = (
        "--service-account=projects/my-project/serviceAccounts/a@my-project.iam.gserviceaccount.com"
    )
    assert "CLOUD_LOGGING_ONLY" in submit(step, "--substitutions=_A=1", account)
    assert "no earlier step" in submit("steps: [{name: x, waitFor: [later]}]\n")
    assert "two steps" in submit("steps: [{name: x, id: a}, {name: x, id: a}]\n")
    assert not fakes[0].calls("builds.create")


def test_setup_triggers_is_idempotent_and_names_files(
    here: Path, fakes: tuple[FakeCloudBuild, FakeStorage]
) -> None:
    linked = "cloud.ci=cloud-build cloud.repository.name=connection/code"
    for turn in ("created", "updated"):
        done = make("setup-triggers", SET=linked)
        assert done.returncode == 0, f"{turn}: {done.stderr}"
    builds, _ = fakes
    assert len(builds.triggers) == len(containers.find(here))
    assert len(builds.calls("triggers.create")) == len(builds.triggers)  # not created twice
    predict = builds.triggers["digit-reader-predict"]
    repository = (
        "projects/my-project/locations/europe-west4/connections/connection/repositories/code"
    )
    assert predict.repository_event_config.repository == repository
    assert predict.repository_event_config.push.branch == "^main$"
    assert predict.filename == "level_2_cicd/cloudbuild.container.yaml"
    assert (
        predict.service_account
        == "projects/my-project/serviceAccounts/digit-reader-build@my-project.iam.gserviceaccount.com"
    )
    assert predict.substitutions["_CONTAINER"] == "predict"
    assert {"src/predictor/server.py", "level_1_pipeline/predict_container/Dockerfile"} <= set(
        predict.included_files
    )
    assert not any(name.startswith("src/trainer") for name in predict.included_files)


def test_setup_triggers_requires_a_linked_repository(
    here: Path, fakes: tuple[FakeCloudBuild, FakeStorage]
) -> None:
    for options, message in (
        ("", "cloud.ci in project.yaml is github-actions"),
        ("cloud.ci=cloud-build", "cloud.repository.name in"),
    ):
        done = make("setup-triggers", SET=options)
        assert done.returncode == 2
        assert message in done.stderr
    assert not fakes[0].received


# ── step runner ────────────────────────────────────────────────────────────────────────────────
def build(*written: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a build whose steps are shell commands."""
    shells = [
        {"name": "x", "entrypoint": "sh", "args": ["-c", step.pop("run")], **step}
        for step in written
    ]
    return build_steps.resolve({"steps": shells, **more}, {"PROJECT_ID": "p"})


def test_steps_start_when_their_dependencies_end(tmp_path: Path) -> None:
    made = build(
        {"id": "a", "run": "echo a >>log"},
        {"id": "slow", "run": "sleep 1; echo slow >>log", "waitFor": ["a"]},
        {"id": "quick", "run": "echo quick >>log", "waitFor": ["a"]},
        {"id": "last", "run": "echo last $PROJECT_ID $$PLACE >>log", "env": ["PLACE=$PROJECT_ID"]},
    )
    outcome = build_steps.run(made, tmp_path, build_steps.as_process({}))
    assert outcome.status == "SUCCESS", outcome.failures()
    assert (tmp_path / "log").read_text().splitlines()[:3] == ["a", "quick", "slow"]
    assert (tmp_path / "log").read_text().splitlines()[3] == "last p p"
    assert outcome.critical < sum(step.seconds for step in outcome.steps)


def test_failed_step_cancels_the_build(tmp_path: Path) -> None:
    made = build(
        {"id": "long", "run": "sleep 60", "waitFor": ["-"]},
        {"id": "bad", "run": "echo so; exit 3", "waitFor": ["-"]},
        {"id": "after", "run": "touch after", "waitFor": ["bad"]},
    )
    outcome = build_steps.run(made, tmp_path, build_steps.as_process({}))
    assert [step.status for step in outcome.steps] == ["CANCELLED", "FAILURE", "QUEUED"]
    assert outcome.status == "FAILURE"
    assert "so" in outcome.failures()
    assert not (tmp_path / "after").exists()


def test_allow_failure_continues_the_build(tmp_path: Path) -> None:
    made = build(
        {"id": "bad", "run": "exit 3", "allowFailure": True}, {"id": "after", "run": "touch after"}
    )
    outcome = build_steps.run(made, tmp_path, build_steps.as_process({}))
    assert [step.status for step in outcome.steps] == ["FAILURE", "SUCCESS"]
    assert outcome.status == "SUCCESS"


def test_timeouts_and_kills_are_reported(tmp_path: Path) -> None:
    late = build_steps.run(
        build({"id": "a", "run": "sleep 60", "timeout": "1s"}), tmp_path, build_steps.as_process({})
    )
    assert (late.status, late.step("a").status) == ("TIMEOUT", "TIMEOUT")
    late = build_steps.run(
        build({"id": "a", "run": "sleep 60"}, timeout="1s"), tmp_path, build_steps.as_process({})
    )
    assert late.status == "TIMEOUT"
    made = build({"id": "a", "run": "true"}, {"id": "b", "run": "touch b"})
    assert (
        build_steps.run(made, tmp_path, build_steps.as_process({}), kill_after=1).status == "KILLED"
    )
    assert not (tmp_path / "b").exists()


def test_critical_path_is_the_longest_chain() -> None:
    made = build(
        {"id": "a", "run": ""},
        {"id": "b", "run": "", "waitFor": ["-"]},
        {"id": "c", "run": "", "waitFor": ["a"]},
    )
    assert build_steps.critical_path(made["steps"], [1, 5, 2]) == 5
    assert build_steps.critical_path(made["steps"], [4, 5, 2]) == 6
