"""The CI's files: valid, safe, the same steps in each, and nothing in them that project.yaml says."""

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
from launcher import submit_build

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "{{cookiecutter.project_slug}}"
BIN = Path(sys.executable).parent

# Answer → its files, the one that a person reads first coming first.
FILES = {
    "github-actions": [".github/workflows/deploy.yml", ".github/workflows/checks.yml"],
    "gitlab": [".gitlab-ci.yml"],
    "azure-devops": ["level_2_cicd/azure-pipelines.yml", "level_2_cicd/azure-submit.yml"],
    "cloud-build": [],
}
HAVE_FILES = [ci for ci, paths in FILES.items() if paths]
EVERY = [path for paths in FILES.values() for path in paths]
GET_TERRAFORM = "level_2_cicd/get_terraform.sh"

# What Cloud Build does for a pull request, and the others do not: a plan reads the cloud, and they have no rights there before
# a merge.
WITH_RIGHTS = {"plan"}
ENVIRONMENTS = ["dev", "prod"]


@pytest.fixture(scope="module", params=FILES)
def made(request: pytest.FixtureRequest, generate: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An answer, and the project that it makes."""
    return request.param, generate(tmp_path_factory.mktemp(request.param), ci=request.param)


def read(path: str) -> str:
    return (PROJECT / path).read_text(encoding="utf-8")


def parsed(path: str) -> Any:
    return yaml.safe_load(read(path))


def tool(*command: str | Path, cwd: Path = PROJECT, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a program, and keep what it says."""
    return subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True)


# ── which files there are ───────────────────────────────────────────────────────────────────────────────────


def test_a_project_has_the_files_of_its_ci_and_no_other(made: tuple[str, Path]) -> None:
    ci, project = made
    assert [path for path in EVERY if (project / path).exists()] == FILES[ci]
    assert (project / ".github").exists() == (ci == "github-actions")
    assert yaml.safe_load((project / "project.yaml").read_text(encoding="utf-8"))["cloud"]["ci"] == ci
    for path in FILES[ci]:
        assert (project / path).read_bytes() == (PROJECT / path).read_bytes()


def test_there_are_no_other_files() -> None:
    found = {path.relative_to(PROJECT).as_posix() for path in PROJECT.glob(".github/**/*") if path.is_file()}
    found |= {path.relative_to(PROJECT).as_posix() for path in PROJECT.glob("level_2_cicd/azure*")}
    assert found | {".gitlab-ci.yml"} == set(EVERY)


# ── valid ───────────────────────────────────────────────────────────────────────────────────────────────────

SCHEMAS = {
    "github-actions": ["vendor.github-workflows"],
    "gitlab": ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
    "azure-devops": ["vendor.azure-pipelines", "--data-transform", "azure-pipelines", "--regex-variant", "python"],
}


def schema_says(ci: str, *files: Path) -> "subprocess.CompletedProcess[str]":
    return tool(BIN / "check-jsonschema", "--builtin-schema", *SCHEMAS[ci], *files)


def test_each_is_valid_by_its_schema(made: tuple[str, Path]) -> None:
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
def test_the_schema_finds_a_slip(ci: str, old: str, new: str, tmp_path: Path) -> None:
    text = read(FILES[ci][0])
    assert old in text
    (tmp_path / "slip.yml").write_text(text.replace(old, new), encoding="utf-8")
    assert schema_says(ci, tmp_path / "slip.yml").returncode != 0


# ── safe ────────────────────────────────────────────────────────────────────────────────────────────────────


def zizmor(folder: Path) -> list[dict[str, Any]]:
    """What the strictest reader finds in a project's workflows."""
    command = [BIN / "zizmor", "--offline", "--no-progress", "--strict-collection", "--persona=auditor", "--format=json"]
    done = tool(*command, "--no-exit-codes", ".github/workflows", cwd=folder)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_nothing_is_dangerous_in_the_workflows(default_project: Path) -> None:
    assert zizmor(default_project) == []


def test_something_dangerous_would_be_found(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / ".github", tmp_path / ".github")
    for path in (tmp_path / ".github/workflows").iterdir():
        text = path.read_text(encoding="utf-8").replace("persist-credentials: false", "fetch-depth: 1")
        path.write_text(re.sub(r"@[0-9a-f]{40} .*", "@main", text), encoding="utf-8")
    assert {finding["ident"] for finding in zizmor(tmp_path)} >= {"unpinned-uses", "artipacked"}


def test_actions_are_pinned_and_each_has_one_version() -> None:
    used = [line for path in FILES["github-actions"] for line in re.findall(r"uses: (.*)", read(path))]
    assert len(used) == len(re.findall(r"uses:", "".join(map(read, FILES["github-actions"]))))
    pins = {re.fullmatch(r"([\w/-]+)@([0-9a-f]{40})  # v(\d+\.\d+\.\d+)", line) for line in used}
    assert None not in pins
    assert len(set(used)) == len({line.partition("@")[0] for line in used})


def test_permissions_are_the_fewest() -> None:
    """Reading the source; and where the cloud is asked, a token that says who asks. Nothing may write to the repository."""
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


def test_a_pull_request_has_no_way_into_the_cloud() -> None:
    github = read(FILES["github-actions"][1])
    assert set(parsed(FILES["github-actions"][1])[True]) == {"pull_request"}  # `on` is YAML's word for true
    checks = [github, json.dumps(parsed(".gitlab-ci.yml")["checks"]), json.dumps(parsed(FILES["azure-devops"][0])["stages"][0])]
    for text in checks:
        assert not re.search(r"id-token|id_tokens|GCP_|secrets\.|google-github-actions|AzureCLI|\bgroup\"", text)


def test_no_source_is_left_with_the_ci_s_own_rights() -> None:
    fetched = [step for path in FILES["github-actions"] for step in steps_of_github(path) if "checkout@" in step.get("uses", "")]
    assert [step["with"]["persist-credentials"] for step in fetched] == [False] * 3
    azure = [step for step in steps_of_azure() if "checkout" in step]
    assert [step["persistCredentials"] for step in azure] == ["false"] * 3


def test_what_logging_in_writes_is_not_sent_to_the_build() -> None:
    """Beside the source, not in it: not even an ignored file is there."""
    for job in parsed(FILES["github-actions"][0])["jobs"].values():
        assert job["steps"][0]["with"]["path"] == job["defaults"]["run"]["working-directory"] == "source"
    gitlab = parsed(".gitlab-ci.yml")[".submit"]["variables"]
    assert set(gitlab.values()) == {"/tmp/google.json"}
    azure = parsed("level_2_cicd/azure-submit.yml")["steps"][-1]["env"]
    assert {azure[name] for name in gitlab} == {"$(Agent.TempDirectory)/google.json"}


# ── the same in each ────────────────────────────────────────────────────────────────────────────────────────


def steps_of_github(path: str) -> list[dict[str, Any]]:
    return [step for job in parsed(path)["jobs"].values() for step in job["steps"]]


def steps_of_azure(*stages: str) -> list[dict[str, Any]]:
    """The steps of these stages, or of all; what a template holds is put in its place."""
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
    """The shell commands of these stages' steps, or of all."""
    scripts = [step.get("script") or step.get("inputs", {}).get("inlineScript") for step in steps_of_azure(*stages)]
    return [script for script in scripts if script]


def makes(commands: list[str]) -> list[str]:
    """The calls of make among shell commands, word for word; but for what every other target calls for itself."""
    lines = [" ".join(line.split()) for command in commands for line in command.splitlines()]
    return [line for line in lines if line.startswith("make ") and line != "make setup"]


def called() -> dict[str, dict[str, list[str]]]:
    """CI → when → the calls of make in their order."""
    deploy, checks = FILES["github-actions"]
    gitlab = parsed(".gitlab-ci.yml")
    github = {"checks": makes([step["run"] for step in steps_of_github(checks) if "run" in step])}
    for name, job in parsed(deploy)["jobs"].items():
        commands = [step["run"].replace('"$ENVIRONMENT"', job["env"]["ENVIRONMENT"]) for step in job["steps"] if "run" in step]
        github[name] = makes(commands)
    when = ["checks", *ENVIRONMENTS]
    return {
        "github-actions": github,
        "gitlab": {stage: makes(gitlab[stage]["script"]) for stage in when},
        "azure-devops": {stage: makes(commands_of_azure(stage)) for stage in when},
    }


def rules() -> dict[str, list[str]]:
    """The project's make targets, and what each calls for first."""
    found = re.findall(r"^([a-z0-9-]+):([^#=\n]*)(?:##.*)?$", read("Makefile"), re.MULTILINE)
    return {target: re.findall(r"[a-z0-9-]+", needs) for target, needs in found}


def expanded(targets: set[str]) -> set[str]:
    """A target that only stands for others is those others."""
    recipes = set(re.findall(r"^([a-z0-9-]+):.*\n\t", read("Makefile"), re.MULTILINE))
    found: set[str] = set()
    for target in targets:
        found |= {target} if target in recipes else expanded(set(rules()[target]))
    return found


def targets_of_build(path: str) -> set[str]:
    """What the steps of a build call, but for what every other target calls for itself."""
    steps = [step for step in parsed(path)["steps"] if step.get("entrypoint") == "make"]
    return {step["args"][0] for step in steps} - {"setup"}


def goal(call: str) -> str:
    return call.split()[1]


def test_each_calls_the_same_in_the_same_order() -> None:
    calls = called()
    assert set(calls) == set(HAVE_FILES)
    for ci in HAVE_FILES:
        assert calls[ci] == {
            "checks": ["make check", "make terraform-check", "make containers"],
            "dev": ["make submit ENVIRONMENT=dev"],
            "prod": ["make submit ENVIRONMENT=prod"],
        }, ci


def test_azure_s_token_does_not_age_while_packages_are_installed() -> None:
    """It is valid for ten minutes."""
    for environment in ENVIRONMENTS:
        scripts = commands_of_azure(environment)
        (login,) = (number for number, script in enumerate(scripts) if "idToken" in script)
        assert "make setup" in scripts[:login]
        assert scripts[login + 1 :] == []
        assert scripts[login].splitlines()[-1] == f"make submit ENVIRONMENT={environment}"


def test_each_call_is_a_target() -> None:
    assert {goal(call) for jobs in called().values() for calls in jobs.values() for call in calls} <= set(rules())


def test_cloud_build_alone_checks_the_same() -> None:
    for ci, jobs in called().items():
        checks = expanded({goal(call) for call in jobs["checks"]})
        assert checks | WITH_RIGHTS == targets_of_build(submit_build.PULL_REQUEST), ci
        assert not checks & WITH_RIGHTS


def test_cloud_build_alone_starts_the_same_build() -> None:
    """`make submit` sends cloudbuild.yaml, and so do Terraform's triggers."""
    triggers = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "level_2_cicd/terraform").rglob("*.tf"))
    files = set(re.findall(r'filename\s*=\s*"([^"]+)"', triggers))
    assert files == {submit_build.PUSH, submit_build.PULL_REQUEST}


def test_nothing_else_is_done_than_make_and_what_make_needs() -> None:
    """Beside make, a CI only fetches the source, gets tools, and logs in."""
    allowed = (
        r"make |sudo level_2|level_2|apt-get |\(umask 077 && printf %s |gcloud iam workload-identity-pools create-cred-config"
    )
    commands = [step["run"] for path in FILES["github-actions"] for step in steps_of_github(path) if "run" in step]
    gitlab = parsed(".gitlab-ci.yml")
    commands += [line for job in ("checks", ".submit") for line in gitlab[job]["before_script"]]
    commands += [line for job in ("checks", *ENVIRONMENTS) for line in gitlab[job]["script"]]
    commands += [step["script"] for step in steps_of_azure() if "script" in step]
    for command in commands:
        assert re.match(allowed, command), command


def test_tools_are_those_of_the_builds() -> None:
    """One version each: CI, toolbox, images."""
    toolbox = dict(re.findall(r"^ARG ([A-Z]+)=(\S+)$", read("level_2_cicd/toolbox/Dockerfile"), re.MULTILINE))
    python = read("level_1_pipeline/base_image.txt").partition(":")[2].split("-")[0]
    gcloud = re.sub(r"-slim$", "", toolbox["GCLOUD"])
    gitlab = parsed(".gitlab-ci.yml")
    github = [step.get("with", {}) for path in FILES["github-actions"] for step in steps_of_github(path)]
    assert {found["python-version"] for found in github if "python-version" in found} == {python}
    assert {found["version"] for found in github if "version" in found} == {gcloud.rpartition(":")[2]}
    assert {step["inputs"]["versionSpec"] for step in steps_of_azure() if step.get("task") == "UsePythonVersion@0"} == {python}
    assert gitlab["checks"]["image"] == f"python:{python}-bookworm"
    assert gitlab["checks"]["services"][0]["name"] == toolbox["DOCKER"].replace("-cli", "-dind")
    assert gitlab[".submit"]["image"] == gcloud
    for path in (FILES["github-actions"][1], ".gitlab-ci.yml", FILES["azure-devops"][0]):
        assert f"{GET_TERRAFORM} /usr/local/bin" in read(path)


def test_nobody_stops_listening_before_the_build_ends() -> None:
    build = int(parsed(submit_build.PUSH)["timeout"].removesuffix("s"))
    limits = {
        "github-actions": [job["timeout-minutes"] for job in parsed(FILES["github-actions"][0])["jobs"].values()],
        "gitlab": [int(parsed(".gitlab-ci.yml")[".submit"]["timeout"].removesuffix("h")) * 60] * 2,
        "azure-devops": [int(stage["jobs"][0]["timeoutInMinutes"]) for stage in parsed(FILES["azure-devops"][0])["stages"][1:]],
    }
    for ci, minutes in limits.items():
        assert len(minutes) == len(ENVIRONMENTS)
        assert all(limit * 60 >= build + 1800 for limit in minutes), ci


# ── when ────────────────────────────────────────────────────────────────────────────────────────────────────


def matches(path: str, pattern: str) -> bool:
    """Whether a path is one of those that a CI's pattern means."""
    parts = re.split(r"(\*\*/|\*|\[\^.\])", pattern)
    means = {"**/": "(.*/)?", "*": "[^/]*"}
    return bool(re.fullmatch("".join(means.get(part) or (part if part[:2] == "[^" else re.escape(part)) for part in parts), path))


@pytest.mark.parametrize(
    ("path", "started"),
    [
        *(("README.md", False), ("level_2_cicd/README.md", False), (".github/x.md", False), ("a/b/c/.md", False)),
        *(("project.yaml", True), ("Makefile", True), (".gitignore", True), ("requirements/train.txt", True)),
        *(("src/trainer/model.py", True), ("level_1_pipeline/train_container/Dockerfile", True), ("src/x.md/y.py", True)),
        *(("a/readme.MD5", True), ("a/amd", True), ("a/cmd", True), ("word", True), ("notes.ad", True), ("LICENSE", True)),
    ],
)
def test_documents_start_nothing(path: str, started: bool) -> None:
    left_out = parsed(FILES["github-actions"][0])[True]["push"]["paths-ignore"]
    assert any(matches(path, pattern) for pattern in left_out) != started
    left_out = parsed(FILES["azure-devops"][0])["trigger"]["paths"]["exclude"]
    assert any(matches(path, pattern) for pattern in left_out) != started
    gitlab = parsed(".gitlab-ci.yml")
    for environment in ENVIRONMENTS:
        (rule,) = gitlab[environment]["rules"]
        assert any(matches(path, pattern) for pattern in rule["changes"]) == started


def test_prod_waits_for_dev_and_for_somebody() -> None:
    """Each is in an environment of its own name, where approvals are set and variables are kept."""
    github = parsed(FILES["github-actions"][0])["jobs"]
    gitlab = parsed(".gitlab-ci.yml")
    azure = {stage["stage"]: stage for stage in parsed(FILES["azure-devops"][0])["stages"]}
    for environment in ENVIRONMENTS:
        assert github[environment]["environment"] == environment
        assert gitlab[environment]["environment"] == environment
        assert azure[environment]["jobs"][0]["environment"] == environment
        assert azure[environment]["variables"] == [{"group": environment}]
        for condition in (github[environment]["if"], gitlab[environment]["rules"][0]["if"], azure[environment]["condition"]):
            assert "DEPLOY_TO" in condition
            assert environment in condition
    assert github["prod"]["needs"] == azure["prod"]["dependsOn"] == "dev"
    assert gitlab["prod"]["needs"] == ["dev"]
    assert gitlab["prod"]["rules"][0]["when"] == "manual"


def test_one_build_at_a_time_and_none_is_broken_off() -> None:
    groups = [job["concurrency"] for job in parsed(FILES["github-actions"][0])["jobs"].values()]
    assert groups == [{"group": name, "cancel-in-progress": False} for name in ENVIRONMENTS]
    gitlab = parsed(".gitlab-ci.yml")
    assert [gitlab[name]["resource_group"] for name in ENVIRONMENTS] == ENVIRONMENTS
    assert not any(gitlab[name].get("interruptible") for name in (".submit", *ENVIRONMENTS))
    assert parsed(FILES["azure-devops"][0])["lockBehavior"] == "runLatest"


# ── no value of project.yaml, and no variable that nobody explains ──────────────────────────────────────────


def code(path: str) -> str:
    """A file without its comments."""
    return re.sub(r"(^|\s)#.*$", "", read(path), flags=re.MULTILINE)


def strings(value: Any) -> Iterator[str]:
    """Every text and number below a key of project.yaml; not the keys, such as the names of the environments."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif not isinstance(value, bool) and value not in ("", None):
        yield str(value)


def test_no_value_of_project_yaml_is_in_them(generate: Callable[..., Path], tmp_path: Path) -> None:
    project = generate(tmp_path)
    settings = yaml.safe_load((project / "project.yaml").read_text(encoding="utf-8"))
    cloud = settings["cloud"]
    assert cloud["repository"].pop("branch") == "main"  # a trigger must name it: the files say where else it stands
    for key in ("ci", "data_ingestion", "environments"):  # choices; and ids, which are empty: see below
        cloud.pop(key)
    values = {value for part in ("name", "description", "cloud") for value in strings(settings[part]) if len(value) > 2}
    assert {"digit-reader", "europe-west4", "you@example.com", "n2-standard-2", "l4-spot"} <= values
    for path in EVERY:
        assert not [value for value in values if value in code(path)], path
        assert not re.search(r"gs://|gserviceaccount|docker\.pkg\.dev|projects/|[a-z]-[a-z]+\d\b", code(path)), path


def test_the_main_branch_is_that_of_project_yaml(default_project: Path) -> None:
    branch = yaml.safe_load((default_project / "project.yaml").read_text(encoding="utf-8"))["cloud"]["repository"]["branch"]
    assert parsed(FILES["github-actions"][0])[True]["push"]["branches"] == [branch]
    assert f"github.ref == 'refs/heads/{branch}'" in parsed(FILES["github-actions"][0])["jobs"]["dev"]["if"]
    azure = parsed(FILES["azure-devops"][0])
    assert azure["trigger"]["branches"]["include"] == [branch]
    assert f"'refs/heads/{branch}'" in azure["stages"][1]["condition"]
    assert "$CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH" in read(".gitlab-ci.yml")
    for ci in ("github-actions", "azure-devops"):
        assert "cloud.repository.branch" in " ".join(re.sub(r"\n# ?", " ", read(FILES[ci][0])).split())


FROM_A_PERSON = {
    "github-actions": {"DEPLOY_TO", "GCP_WORKLOAD_IDENTITY_PROVIDER", "GCP_DEPLOYER"},
    "gitlab": {"DEPLOY_TO", "GCP_WORKLOAD_IDENTITY_PROVIDER", "GCP_DEPLOYER"},
    "azure-devops": {"DEPLOY_TO", "GCP_WORKLOAD_IDENTITY_PROVIDER", "GCP_DEPLOYER", "GCP_SERVICE_CONNECTION"},
}
# What the CI, or the file itself, sets.
GIVEN = re.compile(
    r"CI_[A-Z_]+|AGENT_TEMPDIRECTORY|Agent\.TempDirectory|Build\.\w+|idToken|GOOGLE_\w+|ENVIRONMENT|token|"
    r"SYSTEM_ACCESSTOKEN|System\.AccessToken|SYSTEM_OIDCREQUESTURI|AZURESUBSCRIPTION_SERVICE_CONNECTION_ID"
)
USES = {
    "github-actions": r"vars\.(\w+)|secrets\.(\w+)|\$(\w+)",
    "gitlab": r"\$\{?(\w+)",
    "azure-devops": r"\$\(([\w.]+)\)|variables\['([\w.]+)'\]|\$\{?([A-Za-z]\w*)",
}


@pytest.mark.parametrize("ci", HAVE_FILES)
def test_each_variable_is_explained_where_a_person_reads_first(ci: str) -> None:
    used = {name for path in FILES[ci] for names in re.findall(USES[ci], code(path)) for name in names}
    if ci == "gitlab":
        used = {name for path in FILES[ci] for name in re.findall(USES[ci], code(path))}
    assert {name for name in used if name and not GIVEN.fullmatch(name)} == FROM_A_PERSON[ci]
    opening = re.match(r"(#.*\n)+", read(FILES[ci][0]))
    assert opening
    assert FROM_A_PERSON[ci] <= set(re.findall(r"[A-Z_]{5,}", opening[0]))


def test_terraform_prints_those_variables() -> None:
    printed = re.search(r'output "ci_variables" \{(.*?)^\}', read("level_2_cicd/terraform/foundation/outputs.tf"), re.M | re.S)
    assert printed
    assert set(re.findall(r"\bGCP_\w+", printed[1])) == FROM_A_PERSON["gitlab"] - {"DEPLOY_TO"}


# ── logging in, with the real gcloud ────────────────────────────────────────────────────────────────────────

VARIABLES = {
    "GCP_WORKLOAD_IDENTITY_PROVIDER": "projects/123456789/locations/global/workloadIdentityPools/digit-reader-ci/providers/ci",
    "GCP_DEPLOYER": "digit-reader-deployer@my-project-123.iam.gserviceaccount.com",
}


def login(ci: str) -> str:
    """What GitLab and Azure run to log in, without what installs packages, and what comes after the login."""
    if ci == "gitlab":
        return "\n".join(line for line in parsed(".gitlab-ci.yml")[".submit"]["before_script"] if "apt-get" not in line)
    script, follows, _ = commands_of_azure("dev")[-1].partition("renew() (")
    assert follows
    return script


def log_in(ci: str, folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run it with a token, in a folder in the place of the job's own."""
    if shutil.which("gcloud") is None:
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)("this test needs gcloud")
    given = {
        "gitlab": {"GOOGLE_TOKEN": "a.b.c"},
        "azure-devops": {"idToken": "a.b.c", "AGENT_TEMPDIRECTORY": str(folder)},
    }
    script = login(ci).replace("/tmp/", f"{folder}/")
    file = str(folder / "google.json")
    given[ci] |= {"GOOGLE_APPLICATION_CREDENTIALS": file, "CLOUDSDK_AUTH_CREDENTIAL_FILE_OVERRIDE": file}
    environment = {"CLOUDSDK_CONFIG": str(folder / "gcloud"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1", **given[ci], **variables}
    return tool("bash", "-e", "-o", "pipefail", "-c", script, cwd=folder, **environment)


@pytest.mark.parametrize("ci", ["gitlab", "azure-devops"])
def test_the_token_becomes_credentials_that_google_s_library_takes(ci: str, tmp_path: Path) -> None:
    done = log_in(ci, tmp_path, **VARIABLES)
    assert done.returncode == 0, done.stderr
    assert "a.b.c" not in done.stdout + done.stderr
    token = tmp_path / "google.jwt"
    assert token.read_text(encoding="utf-8") == "a.b.c"
    assert token.stat().st_mode & 0o077 == 0
    written = json.loads((tmp_path / "google.json").read_text(encoding="utf-8"))
    assert written["audience"] == f"//iam.googleapis.com/{VARIABLES['GCP_WORKLOAD_IDENTITY_PROVIDER']}"
    credentials = identity_pool.Credentials.from_file(str(tmp_path / "google.json"))
    assert credentials.service_account_email == VARIABLES["GCP_DEPLOYER"]
    assert credentials.retrieve_subject_token(None) == "a.b.c"


@pytest.mark.parametrize("missing", VARIABLES)
@pytest.mark.parametrize("ci", ["gitlab", "azure-devops"])
def test_a_variable_that_was_forgotten_is_named(ci: str, missing: str, tmp_path: Path) -> None:
    done = log_in(ci, tmp_path, **{**VARIABLES, missing: ""})
    assert done.returncode != 0
    assert f"{missing}: is not set; make foundation prints it" in done.stderr
    assert not (tmp_path / "google.json").exists()


def test_a_connection_without_a_token_is_told(tmp_path: Path) -> None:
    done = log_in("azure-devops", tmp_path, **VARIABLES, idToken="")
    assert done.returncode != 0
    assert "idToken: is not set; the service connection must use workload identity federation" in done.stderr


# Programs in the place of those that Azure's step calls: make ends, with an error, when the third token has come.
DOUBLES = {
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
echo nobody ended it >>slept
exit 1""",
}


def test_azure_s_token_stays_fresh_while_the_build_is_followed(tmp_path: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    class Azure(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            answer = [b'{"oidcToken": "the.first"}', None, b'{"oidcToken": "the.third"}'][min(len(asked), 3) - 1]
            self.send_response(200 if answer else 403)
            self.end_headers()
            self.wfile.write(answer or b"not now")

        def log_message(self, format: str, *args: Any) -> None:
            """Nobody reads it."""

    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in DOUBLES.items():
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
    assert made == ["submit ENVIRONMENT=prod; no token of the job; no token of the connection", "the.third 600"]
    assert set((tmp_path / "slept").read_text(encoding="utf-8").splitlines()) == {"300"}
    assert set(asked) == {("/oidctoken?api-version=7.1&serviceConnectionId=1234-5678", "Bearer of-the-job")}
    assert "Azure returned no token; next attempt in five minutes." in done.stderr
    assert not re.search(r"the\.(first|third)|of-the-job|a\.b\.c", done.stdout + done.stderr)


# ── Terraform for the CI ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def releases(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder of releases, and its address on this machine."""
    folder = tmp_path / "releases"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def release(folder: Path) -> bytes:
    """Puts an archive where that of the toolbox's version is asked for."""
    (version,) = re.findall(r"^ARG TERRAFORM=.*:([\d.]+)$", read("level_2_cicd/toolbox/Dockerfile"), re.MULTILINE)
    archive = folder / version / f"terraform_{version}_linux_amd64.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("terraform", "#!/bin/sh\necho it runs\n")
    return archive.read_bytes()


def get_terraform(root: Path, into: Path, address: str) -> "subprocess.CompletedProcess[str]":
    return tool("sh", root / GET_TERRAFORM, into, cwd=root, TERRAFORM_RELEASES=address)


def test_an_archive_with_another_sum_is_not_unpacked(releases: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = releases
    release(folder)
    done = get_terraform(PROJECT, tmp_path, address)
    assert done.returncode == 2
    assert "linux_amd64.zip: wrong checksum; not installed." in done.stderr
    assert not (tmp_path / "terraform").exists()


def test_one_with_the_right_sum_is_put_into_the_folder(releases: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = releases
    right = sha256(release(folder)).hexdigest()
    root = tmp_path / "project"
    (root / "level_2_cicd/toolbox").mkdir(parents=True)
    shutil.copy(PROJECT / "level_2_cicd/toolbox/Dockerfile", root / "level_2_cicd/toolbox")
    (root / GET_TERRAFORM).write_text(re.sub(r"(?m)^sum=[0-9a-f]{64}$", f"sum={right}", read(GET_TERRAFORM)), encoding="utf-8")
    done = get_terraform(root, tmp_path, address)
    assert done.returncode == 0, done.stderr
    assert tool(tmp_path / "terraform", cwd=tmp_path).stdout == "it runs\n"


def test_without_a_folder_or_a_network_it_says_what_to_do(releases: tuple[Path, str], tmp_path: Path) -> None:
    _, address = releases
    done = get_terraform(PROJECT, tmp_path, address)
    assert done.returncode == 2
    assert "In a closed network set TERRAFORM_RELEASES to a mirror." in done.stderr
    done = get_terraform(PROJECT, tmp_path / "none", address)
    assert done.returncode == 2
    assert done.stderr.startswith("error: missing folder. Example: ")
