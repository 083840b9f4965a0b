"""The CI files: valid, secure, equal steps, and no values of project.yaml."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.auth import identity_pool
from level_2_cicd import submit_build

from tests.projects import makefile_text

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "{{cookiecutter.project_slug}}"
BIN = Path(sys.executable).parent

# Answer → its files; the first one explains the variables.
FILES = {
    "github-actions": [".github/workflows/deploy.yml", ".github/workflows/checks.yml"],
    "gitlab": [".gitlab-ci.yml"],
    "azure-devops": ["level_2_cicd/azure-pipelines.yml", "level_2_cicd/azure-submit.yml"],
    "cloud-build": [],
}
HAVE_FILES = [ci for ci, paths in FILES.items() if paths]
EVERY = [path for paths in FILES.values() for path in paths]
GET_TERRAFORM = "level_2_cicd/get_terraform.sh"

# Checks of Cloud Build only: a plan reads the cloud, where the other CIs have no permissions before a merge.
NEEDS_CLOUD = {"plan"}
ENVIRONMENTS = ["dev", "prod"]


@pytest.fixture(scope="module", params=FILES)
def made(
    request: pytest.FixtureRequest,
    generate: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """An answer and the project generated from it."""
    return request.param, generate(tmp_path_factory.mktemp(request.param), ci=request.param)


def read(path: str) -> str:
    return (PROJECT / path).read_text(encoding="utf-8")


def parsed(path: str) -> Any:
    return yaml.safe_load(read(path))


def tool(
    *command: str | Path, cwd: Path = PROJECT, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a program and capture its output."""
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )


# ── files ──────────────────────────────────────────────────────────────────────────────────────


def test_a_project_has_the_files_of_its_ci_and_no_other(made: tuple[str, Path]) -> None:
    ci, project = made
    assert [path for path in EVERY if (project / path).exists()] == FILES[ci]
    assert (project / ".github").exists() == (ci == "github-actions")
    assert (
        yaml.safe_load((project / "project.yaml").read_text(encoding="utf-8"))["cloud"]["ci"] == ci
    )
    for path in FILES[ci]:
        assert (project / path).read_bytes() == (PROJECT / path).read_bytes()


def test_no_ci_file_is_missing_from_the_list() -> None:
    found = {
        path.relative_to(PROJECT).as_posix()
        for path in PROJECT.glob(".github/**/*")
        if path.is_file()
    }
    found |= {path.relative_to(PROJECT).as_posix() for path in PROJECT.glob("level_2_cicd/azure*")}
    assert found | {".gitlab-ci.yml"} == set(EVERY)


# ── schemas ────────────────────────────────────────────────────────────────────────────────────

SCHEMAS = {
    "github-actions": ["vendor.github-workflows"],
    "gitlab": ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
    "azure-devops": [
        "vendor.azure-pipelines",
        "--data-transform",
        "azure-pipelines",
        "--regex-variant",
        "python",
    ],
}


def schema_says(ci: str, *files: Path) -> "subprocess.CompletedProcess[str]":
    return tool(BIN / "check-jsonschema", "--builtin-schema", *SCHEMAS[ci], *files)


def test_files_match_their_schema(made: tuple[str, Path]) -> None:
    ci, project = made
    if FILES[ci]:
        done = schema_says(ci, *map(project.joinpath, FILES[ci]))
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("ci", "old", "new"),
    [
        ("github-actions", "runs-on:", "run-on:"),
        ("gitlab", "when: manual", "when: maybe"),
        ("azure-devops", "pool:", "pools:"),
    ],
    ids=HAVE_FILES,
)
def test_schema_rejects_a_misspelt_key(ci: str, old: str, new: str, tmp_path: Path) -> None:
    text = read(FILES[ci][0])
    assert old in text
    (tmp_path / "slip.yml").write_text(text.replace(old, new), encoding="utf-8")
    assert schema_says(ci, tmp_path / "slip.yml").returncode != 0


# ── security ───────────────────────────────────────────────────────────────────────────────────


def zizmor(folder: Path) -> list[dict[str, Any]]:
    """Return the findings of zizmor in its strictest mode."""
    command = [
        BIN / "zizmor",
        "--offline",
        "--no-progress",
        "--strict-collection",
        "--persona=auditor",
        "--format=json",
    ]
    done = tool(*command, "--no-exit-codes", ".github/workflows", cwd=folder)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_zizmor_reports_nothing(default_project: Path) -> None:
    assert zizmor(default_project) == []


def test_zizmor_reports_insecure_workflows(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / ".github", tmp_path / ".github")
    for path in (tmp_path / ".github/workflows").iterdir():
        text = path.read_text(encoding="utf-8").replace(
            "persist-credentials: false", "fetch-depth: 1"
        )
        path.write_text(re.sub(r"@[0-9a-f]{40} .*", "@main", text), encoding="utf-8")
    assert {finding["ident"] for finding in zizmor(tmp_path)} >= {"unpinned-uses", "artipacked"}


def test_actions_are_pinned_and_each_has_one_version() -> None:
    used = [
        line for path in FILES["github-actions"] for line in re.findall(r"uses: (.*)", read(path))
    ]
    assert len(used) == len(re.findall(r"uses:", "".join(map(read, FILES["github-actions"]))))
    pins = {re.fullmatch(r"([\w/-]+)@([0-9a-f]{40})  # v(\d+\.\d+\.\d+)", line) for line in used}
    assert None not in pins
    assert len(set(used)) == len({line.partition("@")[0] for line in used})


def test_permissions_are_minimal() -> None:
    """Jobs read the source, deployments also get an ID token; none writes to the repository."""
    asked = {}
    for path in FILES["github-actions"]:
        workflow = parsed(path)
        assert workflow["permissions"] == {}
        asked |= {(path, name): job["permissions"] for name, job in workflow["jobs"].items()}
    deploy, checks = FILES["github-actions"]
    assert asked == {
        (checks, "checks"): {"contents": "read"},
        **{(deploy, name): {"contents": "read", "id-token": "write"} for name in ENVIRONMENTS},
    }


def test_pull_requests_have_no_cloud_credentials() -> None:
    github = read(FILES["github-actions"][1])
    assert set(parsed(FILES["github-actions"][1])[True]) == {
        "pull_request"
    }  # `on` is YAML's word for true
    checks = [
        github,
        json.dumps(parsed(".gitlab-ci.yml")["checks"]),
        json.dumps(parsed(FILES["azure-devops"][0])["stages"][0]),
    ]
    for text in checks:
        assert not re.search(
            r"id-token|id_tokens|GCP_|secrets\.|google-github-actions|AzureCLI|\bgroup\"", text
        )


def test_checkouts_do_not_keep_credentials() -> None:
    fetched = [
        step
        for path in FILES["github-actions"]
        for step in steps_of_github(path)
        if "checkout@" in step.get("uses", "")
    ]
    assert [step["with"]["persist-credentials"] for step in fetched] == [False] * 3
    azure = [step for step in steps_of_azure() if "checkout" in step]
    assert [step["persistCredentials"] for step in azure] == ["false"] * 3


def test_login_files_are_outside_the_uploaded_folder() -> None:
    """They are next to the source, not ignored files in it."""
    for job in parsed(FILES["github-actions"][0])["jobs"].values():
        assert (
            job["steps"][0]["with"]["path"]
            == job["defaults"]["run"]["working-directory"]
            == "source"
        )
    gitlab = parsed(".gitlab-ci.yml")[".submit"]["variables"]
    assert set(gitlab.values()) == {"/tmp/google.json"}
    azure = parsed("level_2_cicd/azure-submit.yml")["steps"][-1]["env"]
    assert {azure[name] for name in gitlab} == {"$(Agent.TempDirectory)/google.json"}


# ── equal steps ────────────────────────────────────────────────────────────────────────────────


def steps_of_github(path: str) -> list[dict[str, Any]]:
    return [step for job in parsed(path)["jobs"].values() for step in job["steps"]]


def steps_of_azure(*stages: str) -> list[dict[str, Any]]:
    """Return the steps of these stages, or of all, with templates expanded."""
    found: list[dict[str, Any]] = []
    for stage in parsed("level_2_cicd/azure-pipelines.yml")["stages"]:
        (job,) = stage["jobs"]
        if stages and stage["stage"] not in stages:
            continue
        for step in job.get("steps") or job["strategy"]["runOnce"]["deploy"]["steps"]:
            if "template" in step:
                text = read(f"level_2_cicd/{step['template']}")
                for name, value in step["parameters"].items():
                    text = text.replace(f"${{{{ parameters.{name} }}}}", value)
                found += yaml.safe_load(text)["steps"]
            else:
                found.append(step)
    return found


def commands_of_azure(*stages: str) -> list[str]:
    """Return the shell commands of these stages, or of all."""
    scripts = [
        step.get("script") or step.get("inputs", {}).get("inlineScript")
        for step in steps_of_azure(*stages)
    ]
    return [script for script in scripts if script]


def makes(commands: list[str]) -> list[str]:
    """Return the make commands, without `make setup`, which every target runs itself."""
    lines = [" ".join(line.split()) for command in commands for line in command.splitlines()]
    return [line for line in lines if line.startswith("make ") and line != "make setup"]


def called() -> dict[str, dict[str, list[str]]]:
    """CI → stage → make commands in order."""
    deploy, checks = FILES["github-actions"]
    gitlab = parsed(".gitlab-ci.yml")
    github = {"checks": makes([step["run"] for step in steps_of_github(checks) if "run" in step])}
    for name, job in parsed(deploy)["jobs"].items():
        commands = [
            step["run"].replace('"$ENVIRONMENT"', job["env"]["ENVIRONMENT"])
            for step in job["steps"]
            if "run" in step
        ]
        github[name] = makes(commands)
    when = ["checks", *ENVIRONMENTS]
    return {
        "github-actions": github,
        "gitlab": {stage: makes(gitlab[stage]["script"]) for stage in when},
        "azure-devops": {stage: makes(commands_of_azure(stage)) for stage in when},
    }


def rules() -> dict[str, list[str]]:
    """Make target → its prerequisites."""
    found = re.findall(r"^([a-z0-9-]+):([^#=\n]*)(?:##.*)?$", makefile_text(), re.MULTILINE)
    return {target: re.findall(r"[a-z0-9-]+", needs) for target, needs in found}


def expanded(targets: set[str]) -> set[str]:
    """Replace targets without a recipe by their prerequisites."""
    recipes = set(re.findall(r"^([a-z0-9-]+):.*\n\t", makefile_text(), re.MULTILINE))
    found: set[str] = set()
    for target in targets:
        found |= {target} if target in recipes else expanded(set(rules()[target]))
    return found


def targets_of_build(path: str) -> set[str]:
    """Return the make targets of a build's steps, without `setup`."""
    steps = [step for step in parsed(path)["steps"] if step.get("entrypoint") == "make"]
    return {step["args"][0] for step in steps} - {"setup"}


def goal(call: str) -> str:
    return call.split()[1]


def test_all_cis_run_the_same_make_commands() -> None:
    calls = called()
    assert set(calls) == set(HAVE_FILES)
    for ci in HAVE_FILES:
        assert calls[ci] == {
            "checks": ["make check", "make terraform-check", "make containers"],
            "dev": ["make submit ENVIRONMENT=dev"],
            "prod": ["make submit ENVIRONMENT=prod"],
        }, ci


def test_azure_installs_packages_before_the_login() -> None:
    """The token is valid for ten minutes."""
    for environment in ENVIRONMENTS:
        scripts = commands_of_azure(environment)
        (login,) = (number for number, script in enumerate(scripts) if "idToken" in script)
        assert "make setup" in scripts[:login]
        assert scripts[login + 1 :] == []
        assert scripts[login].splitlines()[-1] == f"make submit ENVIRONMENT={environment}"


def test_make_commands_name_existing_targets() -> None:
    assert {
        goal(call) for jobs in called().values() for calls in jobs.values() for call in calls
    } <= set(rules())


def test_cloud_build_runs_the_same_checks() -> None:
    for ci, jobs in called().items():
        checks = expanded({goal(call) for call in jobs["checks"]})
        assert checks | NEEDS_CLOUD == targets_of_build(submit_build.PULL_REQUEST), ci
        assert not checks & NEEDS_CLOUD


def test_terraforms_triggers_use_the_same_build_files() -> None:
    """`make submit` sends cloudbuild.yaml, and so do Terraform's triggers."""
    triggers = "".join(
        path.read_text(encoding="utf-8")
        for path in (PROJECT / "level_2_cicd/terraform").rglob("*.tf")
    )
    files = set(re.findall(r'filename\s*=\s*"([^"]+)"', triggers))
    assert files == {submit_build.PUSH, submit_build.PULL_REQUEST}


def test_cis_only_install_tools_log_in_and_run_make() -> None:
    allowed = r"make |sudo level_2|level_2|apt-get |\(umask 077 && printf %s |gcloud iam workload-identity-pools create-cred-config"
    commands = [
        step["run"]
        for path in FILES["github-actions"]
        for step in steps_of_github(path)
        if "run" in step
    ]
    gitlab = parsed(".gitlab-ci.yml")
    commands += [line for job in ("checks", ".submit") for line in gitlab[job]["before_script"]]
    commands += [line for job in ("checks", *ENVIRONMENTS) for line in gitlab[job]["script"]]
    commands += [step["script"] for step in steps_of_azure() if "script" in step]
    for command in commands:
        assert re.match(allowed, command), command


def test_tool_versions_match_those_of_the_builds() -> None:
    toolbox = dict(
        re.findall(r"^ARG ([A-Z]+)=(\S+)$", read("level_2_cicd/toolbox/Dockerfile"), re.MULTILINE)
    )
    python = read("level_1_pipeline/base_image.txt").partition(":")[2].split("-")[0]
    gcloud = re.sub(r"-slim$", "", toolbox["GCLOUD"])
    gitlab = parsed(".gitlab-ci.yml")
    github = [
        step.get("with", {}) for path in FILES["github-actions"] for step in steps_of_github(path)
    ]
    assert {found["python-version"] for found in github if "python-version" in found} == {python}
    assert {found["version"] for found in github if "version" in found} == {
        gcloud.rpartition(":")[2]
    }
    assert {
        step["inputs"]["versionSpec"]
        for step in steps_of_azure()
        if step.get("task") == "UsePythonVersion@0"
    } == {python}
    assert gitlab["checks"]["image"] == f"python:{python}-bookworm"
    assert gitlab["checks"]["services"][0]["name"] == toolbox["DOCKER"].replace("-cli", "-dind")
    assert gitlab[".submit"]["image"] == gcloud
    for path in (FILES["github-actions"][1], ".gitlab-ci.yml", FILES["azure-devops"][0]):
        assert f"{GET_TERRAFORM} /usr/local/bin" in read(path)


def test_ci_timeouts_exceed_that_of_the_build() -> None:
    build = int(parsed(submit_build.PUSH)["timeout"].removesuffix("s"))
    limits = {
        "github-actions": [
            job["timeout-minutes"] for job in parsed(FILES["github-actions"][0])["jobs"].values()
        ],
        "gitlab": [int(parsed(".gitlab-ci.yml")[".submit"]["timeout"].removesuffix("h")) * 60] * 2,
        "azure-devops": [
            int(stage["jobs"][0]["timeoutInMinutes"])
            for stage in parsed(FILES["azure-devops"][0])["stages"][1:]
        ],
    }
    for ci, minutes in limits.items():
        assert len(minutes) == len(ENVIRONMENTS)
        assert all(limit * 60 >= build + 1800 for limit in minutes), ci


# ── conditions ─────────────────────────────────────────────────────────────────────────────────


def matches(path: str, pattern: str) -> bool:
    """Return whether a CI's pattern matches the path."""
    parts = re.split(r"(\*\*/|\*|\[\^.\])", pattern)
    means = {"**/": "(.*/)?", "*": "[^/]*"}
    return bool(
        re.fullmatch(
            "".join(
                means.get(part) or (part if part[:2] == "[^" else re.escape(part)) for part in parts
            ),
            path,
        )
    )


@pytest.mark.parametrize(
    ("path", "started"),
    [
        *(
            ("README.md", False),
            ("level_2_cicd/README.md", False),
            (".github/x.md", False),
            ("a/b/c/.md", False),
        ),
        *(
            ("project.yaml", True),
            ("Makefile", True),
            (".gitignore", True),
            ("requirements/train.txt", True),
        ),
        *(
            ("src/trainer/model.py", True),
            ("level_1_pipeline/train_container/Dockerfile", True),
            ("src/x.md/y.py", True),
        ),
        *(
            ("a/readme.MD5", True),
            ("a/amd", True),
            ("a/cmd", True),
            ("word", True),
            ("notes.ad", True),
            ("LICENSE", True),
        ),
    ],
)
def test_documentation_changes_start_no_build(path: str, started: bool) -> None:
    left_out = parsed(FILES["github-actions"][0])[True]["push"]["paths-ignore"]
    assert any(matches(path, pattern) for pattern in left_out) != started
    left_out = parsed(FILES["azure-devops"][0])["trigger"]["paths"]["exclude"]
    assert any(matches(path, pattern) for pattern in left_out) != started
    gitlab = parsed(".gitlab-ci.yml")
    for environment in ENVIRONMENTS:
        (rule,) = gitlab[environment]["rules"]
        assert any(matches(path, pattern) for pattern in rule["changes"]) == started


def test_prod_needs_dev_and_an_approval() -> None:
    """Approvals and variables belong to the CI's environments dev and prod."""
    github = parsed(FILES["github-actions"][0])["jobs"]
    gitlab = parsed(".gitlab-ci.yml")
    azure = {stage["stage"]: stage for stage in parsed(FILES["azure-devops"][0])["stages"]}
    for environment in ENVIRONMENTS:
        assert github[environment]["environment"] == environment
        assert gitlab[environment]["environment"] == environment
        assert azure[environment]["jobs"][0]["environment"] == environment
        assert azure[environment]["variables"] == [{"group": environment}]
        for condition in (
            github[environment]["if"],
            gitlab[environment]["rules"][0]["if"],
            azure[environment]["condition"],
        ):
            assert "DEPLOY_TO" in condition
            assert environment in condition
    assert github["prod"]["needs"] == azure["prod"]["dependsOn"] == "dev"
    assert gitlab["prod"]["needs"] == ["dev"]
    assert gitlab["prod"]["rules"][0]["when"] == "manual"


def test_deployments_are_serial_and_not_cancelled() -> None:
    groups = [job["concurrency"] for job in parsed(FILES["github-actions"][0])["jobs"].values()]
    assert groups == [{"group": name, "cancel-in-progress": False} for name in ENVIRONMENTS]
    gitlab = parsed(".gitlab-ci.yml")
    assert [gitlab[name]["resource_group"] for name in ENVIRONMENTS] == ENVIRONMENTS
    assert not any(gitlab[name].get("interruptible") for name in (".submit", *ENVIRONMENTS))
    assert parsed(FILES["azure-devops"][0])["lockBehavior"] == "runLatest"


# ── settings and variables ─────────────────────────────────────────────────────────────────────


def code(path: str) -> str:
    """Return a file without its comments."""
    return re.sub(r"(^|\s)#.*$", "", read(path), flags=re.MULTILINE)


def strings(value: Any) -> Iterator[str]:
    """Yield all texts and numbers of a block of project.yaml, without its keys."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif not isinstance(value, bool) and value not in ("", None):
        yield str(value)


def test_ci_files_contain_no_settings(generate: Callable[..., Path], tmp_path: Path) -> None:
    project = generate(tmp_path)
    settings = yaml.safe_load((project / "project.yaml").read_text(encoding="utf-8"))
    cloud = settings["cloud"]
    assert (
        cloud["repository"].pop("branch") == "main"
    )  # a trigger must name it; the files refer to project.yaml
    for key in (
        "ci",
        "data_ingestion",
        "environments",
    ):  # choices; and IDs, which are empty: see below
        cloud.pop(key)
    values = {
        value
        for part in ("name", "description", "cloud")
        for value in strings(settings[part])
        if len(value) > 2
    }
    assert {"digit-reader", "europe-west4", "you@example.com", "n2-standard-2", "l4-spot"} <= values
    for path in EVERY:
        assert not [value for value in values if value in code(path)], path
        assert not re.search(
            r"gs://|gserviceaccount|docker\.pkg\.dev|projects/|[a-z]-[a-z]+\d\b", code(path)
        ), path


def test_main_branch_matches_project_yaml(default_project: Path) -> None:
    branch = yaml.safe_load((default_project / "project.yaml").read_text(encoding="utf-8"))[
        "cloud"
    ]["repository"]["branch"]
    assert parsed(FILES["github-actions"][0])[True]["push"]["branches"] == [branch]
    assert (
        f"github.ref == 'refs/heads/{branch}'"
        in parsed(FILES["github-actions"][0])["jobs"]["dev"]["if"]
    )
    azure = parsed(FILES["azure-devops"][0])
    assert azure["trigger"]["branches"]["include"] == [branch]
    assert f"'refs/heads/{branch}'" in azure["stages"][1]["condition"]
    assert "$CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH" in read(".gitlab-ci.yml")
    for ci in ("github-actions", "azure-devops"):
        assert "cloud.repository.branch" in " ".join(
            re.sub(r"\n# ?", " ", read(FILES[ci][0])).split()
        )


USER_VARIABLES = {
    "github-actions": {"DEPLOY_TO", "GCP_WORKLOAD_IDENTITY_PROVIDER", "GCP_DEPLOYER"},
    "gitlab": {"DEPLOY_TO", "GCP_WORKLOAD_IDENTITY_PROVIDER", "GCP_DEPLOYER"},
    "azure-devops": {
        "DEPLOY_TO",
        "GCP_WORKLOAD_IDENTITY_PROVIDER",
        "GCP_DEPLOYER",
        "GCP_SERVICE_CONNECTION",
    },
}
# Set by the CI or the file itself.
PREDEFINED = re.compile(
    r"CI_[A-Z_]+|AGENT_TEMPDIRECTORY|Agent\.TempDirectory|Build\.\w+|idToken|GOOGLE_\w+|ENVIRONMENT|token|"
    r"SYSTEM_ACCESSTOKEN|System\.AccessToken|SYSTEM_OIDCREQUESTURI|AZURESUBSCRIPTION_SERVICE_CONNECTION_ID"
)
USES = {
    "github-actions": r"vars\.(\w+)|secrets\.(\w+)|\$(\w+)",
    "gitlab": r"\$\{?(\w+)",
    "azure-devops": r"\$\(([\w.]+)\)|variables\['([\w.]+)'\]|\$\{?([A-Za-z]\w*)",
}


@pytest.mark.parametrize("ci", HAVE_FILES)
def test_first_file_explains_every_variable(ci: str) -> None:
    used = {
        name for path in FILES[ci] for names in re.findall(USES[ci], code(path)) for name in names
    }
    if ci == "gitlab":
        used = {name for path in FILES[ci] for name in re.findall(USES[ci], code(path))}
    assert {name for name in used if name and not PREDEFINED.fullmatch(name)} == USER_VARIABLES[ci]
    opening = re.match(r"(#.*\n)+", read(FILES[ci][0]))
    assert opening
    assert USER_VARIABLES[ci] <= set(re.findall(r"[A-Z_]{5,}", opening[0]))


def test_terraform_prints_the_ci_variables() -> None:
    printed = re.search(
        r'output "ci_variables" \{(.*?)^\}',
        read("level_2_cicd/terraform/foundation/outputs.tf"),
        re.M | re.S,
    )
    assert printed
    assert set(re.findall(r"\bGCP_\w+", printed[1])) == USER_VARIABLES["gitlab"] - {"DEPLOY_TO"}


# ── logging in, with the real gcloud ───────────────────────────────────────────────────────────

VARIABLES = {
    "GCP_WORKLOAD_IDENTITY_PROVIDER": "projects/123456789/locations/global/workloadIdentityPools/digit-reader-ci/providers/ci",
    "GCP_DEPLOYER": "digit-reader-deployer@my-project-123.iam.gserviceaccount.com",
}


def login(ci: str) -> str:
    """Return the login commands of GitLab or Azure only."""
    if ci == "gitlab":
        return "\n".join(
            line
            for line in parsed(".gitlab-ci.yml")[".submit"]["before_script"]
            if "apt-get" not in line
        )
    script, follows, _ = commands_of_azure("dev")[-1].partition("renew() (")
    assert follows
    return script


def log_in(ci: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the login with a token, in this folder."""
    if shutil.which("gcloud") is None:
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)("this test needs gcloud")
    given = {
        "gitlab": {"GOOGLE_TOKEN": "a.b.c"},
        "azure-devops": {"idToken": "a.b.c", "AGENT_TEMPDIRECTORY": str(folder)},
    }
    script = login(ci).replace("/tmp/", f"{folder}/")
    file = str(folder / "google.json")
    given[ci] |= {
        "GOOGLE_APPLICATION_CREDENTIALS": file,
        "CLOUDSDK_AUTH_CREDENTIAL_FILE_OVERRIDE": file,
    }
    environment = {
        "CLOUDSDK_CONFIG": str(folder / "gcloud"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        **given[ci],
        **variables,
    }
    return tool("bash", "-e", "-o", "pipefail", "-c", script, cwd=folder, **environment)


@pytest.mark.parametrize("ci", ["gitlab", "azure-devops"])
def test_login_writes_credentials_for_googles_library(ci: str, tmp_path: Path) -> None:
    done = log_in(ci, tmp_path, **VARIABLES)
    assert done.returncode == 0, done.stderr
    assert "a.b.c" not in done.stdout + done.stderr
    token = tmp_path / "google.jwt"
    assert token.read_text(encoding="utf-8") == "a.b.c"
    assert token.stat().st_mode & 0o077 == 0
    written = json.loads((tmp_path / "google.json").read_text(encoding="utf-8"))
    assert (
        written["audience"] == f"//iam.googleapis.com/{VARIABLES['GCP_WORKLOAD_IDENTITY_PROVIDER']}"
    )
    credentials = identity_pool.Credentials.from_file(str(tmp_path / "google.json"))
    assert credentials.service_account_email == VARIABLES["GCP_DEPLOYER"]
    assert credentials.retrieve_subject_token(None) == "a.b.c"


@pytest.mark.parametrize("missing", VARIABLES)
@pytest.mark.parametrize("ci", ["gitlab", "azure-devops"])
def test_login_names_a_missing_variable(ci: str, missing: str, tmp_path: Path) -> None:
    done = log_in(ci, tmp_path, **{**VARIABLES, missing: ""})
    assert done.returncode != 0
    assert f"{missing}: is not set; make foundation prints it" in done.stderr
    assert not (tmp_path / "google.json").exists()


def test_login_reports_a_missing_azure_token(tmp_path: Path) -> None:
    done = log_in("azure-devops", tmp_path, **VARIABLES, idToken="")
    assert done.returncode != 0
    assert (
        "idToken: is not set; the service connection must use workload identity federation"
        in done.stderr
    )


# Fakes of the programs in Azure's step; make fails after the third token.
FAKE_PROGRAMS = {
    "gcloud": "exit 0",
    "make": """
echo "$*; ${SYSTEM_ACCESSTOKEN-no token of the job}; ${idToken-no token of the connection}" >made
for _ in $(seq 200); do grep -q third google.jwt && break; /bin/sleep 0.1; done
echo "$(cat google.jwt) $(stat -c %a google.jwt)" >>made
exit 3""",
    "sleep": """
echo "$1" >>slept
[ $(wc -l <slept) -gt 2 ] || exit 0
/bin/sleep 20
echo not stopped >>slept
exit 1""",
}


def test_azure_renews_the_token_during_the_build(tmp_path: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    class Azure(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            answer = [b'{"oidcToken": "the.first"}', None, b'{"oidcToken": "the.third"}'][
                min(len(asked), 3) - 1
            ]
            self.send_response(200 if answer else 403)
            self.end_headers()
            self.wfile.write(answer or b"not now")

        def log_message(self, format: str, *args: Any) -> None:
            """No output."""

    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in FAKE_PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    with ThreadingHTTPServer(("127.0.0.1", 0), Azure) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {
            **VARIABLES,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "AGENT_TEMPDIRECTORY": str(tmp_path),
            "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "google.json"),
            "idToken": "a.b.c",
            "SYSTEM_ACCESSTOKEN": "of-the-job",
            "SYSTEM_OIDCREQUESTURI": f"http://127.0.0.1:{server.server_port}/oidctoken",
            "AZURESUBSCRIPTION_SERVICE_CONNECTION_ID": "1234-5678",
        }
        done = tool("bash", "-c", commands_of_azure("prod")[-1], cwd=tmp_path, **variables)
        server.shutdown()
    assert done.returncode == 3, done.stderr
    made = (tmp_path / "made").read_text(encoding="utf-8").splitlines()
    assert made == [
        "submit ENVIRONMENT=prod; no token of the job; no token of the connection",
        "the.third 600",
    ]
    assert set((tmp_path / "slept").read_text(encoding="utf-8").splitlines()) == {"300"}
    assert set(asked) == {
        ("/oidctoken?api-version=7.1&serviceConnectionId=1234-5678", "Bearer of-the-job")
    }
    assert "Azure returned no token; next attempt in five minutes." in done.stderr
    assert not re.search(r"the\.(first|third)|of-the-job|a\.b\.c", done.stdout + done.stderr)


# ── Terraform for the CI ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def releases(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder of releases and its local URL."""
    folder = tmp_path / "releases"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """No output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def release(folder: Path) -> bytes:
    """Create an archive of the toolbox's version."""
    (version,) = re.findall(
        r"^ARG TERRAFORM=.*:([\d.]+)$", read("level_2_cicd/toolbox/Dockerfile"), re.MULTILINE
    )
    archive = folder / version / f"terraform_{version}_linux_amd64.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("terraform", "#!/bin/sh\necho it runs\n")
    return archive.read_bytes()


def get_terraform(root: Path, into: Path, address: str) -> "subprocess.CompletedProcess[str]":
    return tool("sh", root / GET_TERRAFORM, into, cwd=root, TERRAFORM_RELEASES=address)


def test_get_terraform_rejects_a_wrong_checksum(releases: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = releases
    release(folder)
    done = get_terraform(PROJECT, tmp_path, address)
    assert done.returncode == 2
    assert "linux_amd64.zip: wrong checksum; not installed." in done.stderr
    assert not (tmp_path / "terraform").exists()


def test_get_terraform_installs_a_verified_archive(
    releases: tuple[Path, str], tmp_path: Path
) -> None:
    folder, address = releases
    right = sha256(release(folder)).hexdigest()
    root = tmp_path / "project"
    (root / "level_2_cicd/toolbox").mkdir(parents=True)
    shutil.copy(PROJECT / "level_2_cicd/toolbox/Dockerfile", root / "level_2_cicd/toolbox")
    (root / GET_TERRAFORM).write_text(
        re.sub(r"(?m)^sum=[0-9a-f]{64}$", f"sum={right}", read(GET_TERRAFORM)), encoding="utf-8"
    )
    done = get_terraform(root, tmp_path, address)
    assert done.returncode == 0, done.stderr
    assert tool(tmp_path / "terraform", cwd=tmp_path).stdout == "it runs\n"


def test_get_terraform_reports_a_missing_folder_or_download(
    releases: tuple[Path, str], tmp_path: Path
) -> None:
    _, address = releases
    done = get_terraform(PROJECT, tmp_path, address)
    assert done.returncode == 2
    assert "In a closed network set TERRAFORM_RELEASES to a mirror." in done.stderr
    done = get_terraform(PROJECT, tmp_path / "none", address)
    assert done.returncode == 2
    assert done.stderr.startswith("error: missing folder. Example: ")
