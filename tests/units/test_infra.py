"""make foundation, plan, apply, destroy: what Terraform is called with, in which order, and what is left when it fails.

A script stands in for it, and writes down how it was called. The real one is tried in the template's tests.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from core.errors import UserError
from core.paths import project_root
from gcp import client as api
from gcp import endpoint, storage
from gcp.environment import resolve_environment
from google.cloud.aiplatform_v1 import types
from level_2_cicd import infra
from level_2_cicd.rehearsal.protojson import canonical
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex
from project.settings import load_settings

PROJECT, PROD, NAME = "my-project", "my-prod", "animals"
STATE = f"{PROJECT}-{NAME}-terraform"
FOLDER = Path("level_2_cicd/terraform")
OVERRIDE = FOLDER / "foundation" / "backend_override.tf"
DIGEST = "@sha256:" + "1" * 64
ENVIRONMENTS = f"{{dev: {{project: {PROJECT}}}, prod: {{project: {PROD}, promote_from: dev}}}}"
MIRROR = "https://mirror.example.com/terraform/"
GRANT = {
    "who": "trainer",
    "role": "storage.objectViewer",
    "on": "bucket data",
    "only": "",
    "why": "reads rows",
}

# What stands in for Terraform: it keeps calls.jsonl beside it, and a state where the backend says, as the real one does.
STAND_IN = r"""#!{python} -S
import json, os, re, signal, sys, time
from pathlib import Path
from urllib.request import Request, urlopen

here = Path(__file__).parent
if sys.argv[1] == "version":
    sys.exit(print((here / "version").read_text()))
folder, word, words = Path(sys.argv[1].removeprefix("-chdir=")), sys.argv[2], sys.argv[3:]
override, data = folder / "backend_override.tf", Path(os.environ["TF_DATA_DIR"])
said = {{
    "part": "foundation" if folder.name == "foundation" else "stack",
    "words": [word, *(option for option in words if option != "-no-color")],
    "data": str(data),
    "automation": os.environ.get("TF_IN_AUTOMATION"),
    "local": override.read_text() if override.is_file() else None,
    "config": os.environ.get("TF_CLI_CONFIG_FILE"),
}}
with (here / "calls.jsonl").open("a") as stream:
    stream.write(json.dumps(said) + "\n")
kind = " ".join([word, *(option for option in words if option in ("-migrate-state", "-destroy"))])
if word != "show":
    print(f"terraform {{kind}} speaks", flush=True)


def trouble(when):
    fault = json.loads((here / "fault").read_text()) if (here / "fault").is_file() else {{}}
    if (fault.get("kind"), fault.get("when")) == (kind, when):
        (here / "fault").unlink()
        print(fault["says"], end="", file=sys.stderr, flush=True)
        if fault["how"] == "fails":
            sys.exit(1)
        os.kill(os.getpid(), signal.SIGKILL)


def end(number, _):
    (here / "ended").write_text(str(number))
    sys.exit(1)


trouble("before")
if (here / "slow").is_file() and kind == "apply":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    (here / "waiting").touch()
    time.sleep(30)
local = re.search(r'path = "(.*)"', said["local"] or "")
if word == "init":
    data.mkdir(parents=True, exist_ok=True)
    if "-migrate-state" in words:
        options = dict(word.split("=", 2)[1:] for word in words if word.startswith("-backend-config="))
        server, bucket = os.environ["STORAGE_EMULATOR_HOST"], options["bucket"]
        address = f"{{server}}/upload/storage/v1/b/{{bucket}}/o?uploadType=media&name={{options['prefix']}}/default.tfstate"
        urlopen(Request(address, data=Path((data / "local").read_text()).read_bytes(), method="POST"))
    (data / "local").write_text(local[1]) if local else (data / "local").unlink(missing_ok=True)
if word == "apply" and local:
    Path(local[1]).write_text(json.dumps({{"lineage": "this", "serial": 1}}))
for option in words:
    if option.startswith("-out="):
        Path(option.removeprefix("-out=")).write_text("a plan")
if word == "show":
    print((here / "plan.json").read_text())
trouble("after")
"""


class Program:
    """The stand-in, and what it was told."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "version").write_text('{"terraform_version": "1.11.4"}')
        (folder / "terraform").write_text(STAND_IN.format(python=sys.executable))
        (folder / "terraform").chmod(0o755)

    @property
    def calls(self):
        """How it was called, in order."""
        path = self.folder / "calls.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        )

    @property
    def words(self):
        """Its words without the last ones: part and options."""
        return [(call["part"], *call["words"]) for call in self.calls]

    def forget(self):
        """Forget what it was told."""
        (self.folder / "calls.jsonl").unlink(missing_ok=True)

    def fault(self, kind, when, how, says=""):
        """Let it fail, or be killed, once at this word, before or after it has done what it is there for."""
        (self.folder / "fault").write_text(
            json.dumps({"kind": kind, "when": when, "how": how, "says": says})
        )


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The stand-in, first in PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return Program(folder)


@pytest.fixture
def here(tmp_path, monkeypatch, program):
    """A project's folder, with the folders of Terraform's files and two environments."""
    folder = tmp_path / "project"
    (folder / FOLDER / "foundation").mkdir(parents=True)
    (folder / "project.yaml").write_text(
        (project_root() / "project.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    monkeypatch.chdir(folder)
    for name in ("ENVIRONMENT", "TF_DATA_DIR", "TF_CLI_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    values = {
        "name": NAME,
        "containers.registry": "''",
        "cloud.region": "europe-west4",
        "cloud.environments": ENVIRONMENTS,
        "cloud.encryption": "google-managed",
        "cloud.private": "false",
    }
    monkeypatch.setenv("SET", " ".join(f'"{key}={value}"' for key, value in values.items()))
    return folder


@pytest.fixture
def store(here, tmp_path, monkeypatch):
    """Cloud Storage, with the buckets of both environments and no state."""
    with FakeStorage(tmp_path / "gcs") as double:
        for project in (PROJECT, PROD):
            for bucket in ("terraform", "storage"):
                double.create_bucket(f"{project}-{NAME}-{bucket}")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", double.address)
        yield double


@pytest.fixture
def founded(store):
    """The same, where the foundation has been applied, in both."""
    for project in (PROJECT, PROD):
        storage.write(
            f"gs://{project}-{NAME}-terraform/foundation/default.tfstate",
            b'{"lineage": "this", "serial": 3}',
        )
    return store


def launch(monkeypatch, *words, typed=None):
    """What make calls; what is typed when somebody is asked, None: nobody is there."""

    def answer(asked):
        if typed is None:
            raise EOFError
        print(asked)
        return typed

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys, "argv", ["level_2_cicd.infra", *words])
    infra.main()


def bucket_of(part, store, project=PROJECT):
    """The options that name the state's bucket."""
    return [
        f"-backend-config=bucket={project}-{NAME}-terraform",
        f"-backend-config=prefix={part}",
        f"-backend-config=storage_custom_endpoint={store.address}/storage/v1/",
        "-backend-config=access_token=none",
    ]


def keep_images(folder, environment=None):
    """What make images leaves."""
    text = json.dumps(
        {"predict": f"{resolve_environment(load_settings(), environment).images}/predict{DIGEST}"}
    )
    (folder / "build").mkdir(exist_ok=True)
    (folder / "build" / "images.json").write_text(text)
    return f"-var=images={text}"


# ── the stack ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_plan(here, program, founded, monkeypatch):
    images = keep_images(here)
    launch(monkeypatch, "plan")
    assert program.words == [
        ("stack", "init", "-reconfigure", "-input=false", *bucket_of("stack", founded)),
        ("stack", "plan", "-input=false", "-lock=false", "-var=environment=dev", images),
    ]
    assert {call["data"] for call in program.calls} == {
        str(here / "build" / "terraform" / "dev" / "stack")
    }
    assert {call["automation"] for call in program.calls} == {"1"}


def test_google_itself_is_named_by_nothing_but_the_bucket(here, founded, monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    module = infra.RootModule("stack", here, "dev", STATE, "")
    assert module.backend() == bucket_of("stack", founded)[:2]


def test_each_environment_has_folders_of_its_own(here, program, founded, monkeypatch):
    monkeypatch.setenv("ENVIRONMENT", "prod")
    launch(monkeypatch, "plan")
    launch(monkeypatch, "foundation", "--plan")
    folder = here / "build" / "terraform" / "prod"
    assert [call["data"] for call in program.calls] == 2 * [str(folder / "stack")] + 2 * [
        str(folder / "foundation")
    ]
    assert program.words[0][4:] == tuple(bucket_of("stack", founded, PROD))
    assert program.words[2][4:] == tuple(bucket_of("foundation", founded, PROD))
    assert {option for words in program.words for option in words if "environment=" in option} == {
        "-var=environment=prod"
    }


def test_apply_asks_unless_told_not_to(here, program, founded, monkeypatch):
    images = keep_images(here)
    launch(monkeypatch, "apply")
    launch(monkeypatch, "apply", "--yes")
    _, asks, _, does_not = program.words
    assert asks == ("stack", "apply", "-var=environment=dev", images)
    assert does_not == (
        "stack",
        "apply",
        "-auto-approve",
        "-input=false",
        "-lock-timeout=20m",
        "-var=environment=dev",
        images,
    )


def test_images_are_those_made_here_or_else_those_of_the_last_build(
    here, program, founded, monkeypatch
):
    with pytest.raises(
        UserError, match=r"build/images\.json is missing.*Run: make images ENVIRONMENT=dev"
    ):
        launch(monkeypatch, "apply", "--yes")
    assert program.calls == []
    launch(monkeypatch, "plan")
    assert (
        program.words[-1][-1] == "-var=images={}"
    )  # so that a plan can be had before the first build
    storage.write(f"gs://{PROJECT}-{NAME}-storage/builds/images.json", b'{"predict": "built"}')
    for word in ("plan", "apply"):
        launch(monkeypatch, word)
        assert program.words[-1][-1] == '-var=images={"predict": "built"}'
    images = keep_images(here)
    launch(monkeypatch, "apply")
    assert program.words[-1][-1] == images
    keep_images(here, "prod")
    launch(monkeypatch, "apply")
    assert program.words[-1][-1] == '-var=images={"predict": "built"}'


@pytest.mark.parametrize(
    "words", [["plan"], ["apply", "--yes"], ["destroy", "--yes"], ["unlock", "--id", "1"]]
)
@pytest.mark.parametrize("there", ["a bucket", "nothing"])
def test_the_foundation_comes_first(here, program, store, monkeypatch, words, there):
    keep_images(here)
    if there == "nothing":
        (store.root / STATE).rmdir()
    with pytest.raises(UserError) as told:
        launch(monkeypatch, *words)
    assert str(told.value) == (
        "the foundation of dev is missing: no gs://my-project-animals-terraform/foundation/default.tfstate. "
        "An admin of my-project runs once: make foundation ENVIRONMENT=dev"
    )
    assert program.calls == []


@pytest.mark.parametrize("how", ["fails", "is killed"])
@pytest.mark.parametrize("kind", ["init", "apply"])
def test_a_failure_is_told_with_terraforms_own_words(
    here, program, founded, monkeypatch, capfd, kind, how
):
    keep_images(here)
    program.fault(kind, "before", how)
    with pytest.raises(
        UserError, match=f"terraform {kind} of the stack failed; see its output above"
    ):
        launch(monkeypatch, "apply", "--yes")
    out, err = capfd.readouterr()
    assert f"terraform {kind} speaks" in (err if kind == "init" else out)
    assert program.words[-1][1] == kind
    launch(monkeypatch, "apply", "--yes")  # the same again, and it goes on
    out, err = capfd.readouterr()
    assert (
        out == "terraform apply speaks\n"
    )  # what initialising says is nobody's business where it succeeds
    assert err == ""


# ── a lock that is left ─────────────────────────────────────────────────────────────────────────────────────────────
LOCKED = """╷
│ \x1b[1mError: \x1b[0mError acquiring the state lock
│
│ Error message: writing "gs://BUCKET/stack/default.tflock" failed:
│ googleapi: Error 412: conditionNotMet
│ Lock Info:
│   ID:        1764214871234567
│   Path:      {path}
│   Operation: OperationTypeApply
│   Who:       root@build
╵
"""


@pytest.mark.parametrize(
    ("words", "kind", "typed"),
    [
        (["apply", "--yes"], "apply", "make unlock ID=1764214871234567 ENVIRONMENT=dev"),
        (["destroy", "--yes"], "plan -destroy", "make unlock ID=1764214871234567 ENVIRONMENT=dev"),
        (
            ["foundation", "--yes"],
            "apply",
            "make unlock ID=1764214871234567 ENVIRONMENT=dev FOUNDATION=1",
        ),
    ],
)
def test_a_lock_is_told_with_what_takes_it_away(
    here, program, founded, monkeypatch, capfd, words, kind, typed
):
    keep_images(here)
    said = LOCKED.format(path="gs://BUCKET/stack/default.tflock")
    program.fault(kind, "before", "fails", said)
    with pytest.raises(UserError) as told:
        launch(monkeypatch, *words)
    assert str(told.value).endswith(f"If none is running, run: {typed}")
    assert said in capfd.readouterr().err  # Terraform's own words, as it says them


@pytest.mark.parametrize(
    "said", [LOCKED.format(path="/tmp/foundation.tfstate"), "Error: ID:  5\n  Path:  gs://x\n", ""]
)
def test_what_is_no_lock_in_the_bucket_is_not_to_be_unlocked(
    here, program, founded, monkeypatch, said
):
    """A state on this machine is held by a program that runs, and by nothing else."""
    keep_images(here)
    program.fault("apply", "before", "fails", said)
    with pytest.raises(UserError) as told:
        launch(monkeypatch, "apply", "--yes")
    assert str(told.value).endswith("see its output above.")


@pytest.mark.parametrize(("words", "part"), [([], "stack"), (["--foundation"], "foundation")])
def test_unlock(here, program, founded, monkeypatch, words, part):
    monkeypatch.setenv("ENVIRONMENT", "prod")
    launch(monkeypatch, "unlock", "--id", "1764214871234567", *words)
    assert program.words == [
        (part, "init", "-reconfigure", "-input=false", *bucket_of(part, founded, PROD)),
        (part, "force-unlock", "-force", "1764214871234567"),
    ]


# ── where providers come from ───────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "words", [["plan"], ["foundation", "--plan"], ["check"], ["unlock", "--id", "1"]]
)
def test_providers_come_from_the_mirror_that_is_named(here, program, founded, monkeypatch, words):
    config = here / "build" / "terraform.rc"
    launch(monkeypatch, *words)
    assert {call["config"] for call in program.calls} == {None}
    assert not config.exists()
    program.forget()
    monkeypatch.setenv("SET", f"{os.environ['SET']} cloud.mirrors.terraform={MIRROR}")
    launch(monkeypatch, *words)
    assert {call["config"] for call in program.calls} == {str(config)}
    assert (
        config.read_text()
        == f'provider_installation {{\n  network_mirror {{\n    url = "{MIRROR}"\n  }}\n}}\n'
    )


def test_a_file_that_the_environment_names_counts_more_than_the_mirror(
    here, program, founded, monkeypatch
):
    monkeypatch.setenv("SET", f"{os.environ['SET']} cloud.mirrors.terraform={MIRROR}")
    monkeypatch.setenv("TF_CLI_CONFIG_FILE", "/mine.rc")
    launch(monkeypatch, "plan")
    assert {call["config"] for call in program.calls} == {"/mine.rc"}
    assert not (here / "build" / "terraform.rc").exists()


@pytest.mark.parametrize(
    "mirror", [MIRROR.rstrip("/"), MIRROR.replace("https", "http"), "https://", '"https://m/${x}/"']
)
def test_a_mirror_is_an_address_that_ends_as_terraform_wants_it(here, monkeypatch, mirror):
    monkeypatch.setenv("SET", f"{os.environ['SET']} cloud.mirrors.terraform={mirror}")
    with pytest.raises(
        UserError,
        match=r"cloud\.mirrors\.terraform: should be an address such as https://.*, with / at its end",
    ):
        launch(monkeypatch, "plan")


# ── destroy ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def vertex(monkeypatch):
    """Vertex AI, where two versions are served in each environment; `vertex.calls` holds what was asked for."""
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint, "PAUSE", 0.01)
    with FakeVertex() as double:
        monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM", double.address)
        for project in (PROJECT, PROD):
            parent = canonical(f"projects/{project}/locations/europe-west4")
            found = types.Endpoint(
                name=f"{parent}/endpoints/7",
                display_name=NAME,
                etag="1",
                traffic_split={"1": 90, "2": 10},
            )
            for version in ("1", "2"):
                model = f"{parent}/models/{NAME}"
                found.deployed_models.append(
                    types.DeployedModel(id=version, model=model, model_version_id=version)
                )
            double.endpoints.by_name[found.name] = found
        yield double


def endpoint_of(vertex, project=PROJECT):
    """The endpoint of a Google Cloud project."""
    return vertex.endpoints.by_name[
        canonical(f"projects/{project}/locations/europe-west4/endpoints/7")
    ]


def served(vertex, project=PROJECT):
    """The versions that it serves."""
    return [model.id for model in endpoint_of(vertex, project).deployed_models]


def test_destroy_shows_asks_undeploys_and_then_removes(
    here, program, founded, vertex, monkeypatch, capfd
):
    images = keep_images(here)
    seen = []
    run = infra.run_to_end

    def watch(command, *rest):
        seen.append((command[2], served(vertex)))
        return run(command, *rest)

    monkeypatch.setattr(infra, "run_to_end", watch)
    launch(monkeypatch, "destroy", typed=PROJECT)
    assert seen == [("init", ["1", "2"]), ("plan", ["1", "2"]), ("apply", [])]
    plan = here / "build" / "terraform" / "dev" / "stack" / "destroy.plan"
    assert program.words[1:] == [
        (
            "stack",
            "plan",
            "-destroy",
            "-input=false",
            f"-out={plan}",
            "-var=environment=dev",
            images,
        ),
        ("stack", "apply", "-input=false", str(plan)),
    ]
    assert served(vertex, PROD) == ["1", "2"]
    said = capfd.readouterr().out
    assert (
        "This removes the endpoint of dev. Type the project's ID, my-project, to continue: " in said
    )
    assert (
        said.index("terraform plan -destroy speaks")
        < said.index("to continue")
        < said.index("What remains in my-project")
    )


@pytest.mark.parametrize(
    ("environment", "words", "typed"),
    [
        ("dev", [], "yes"),
        ("dev", [], PROD),
        ("dev", [], None),
        ("prod", [], ""),
        ("prod", ["--yes"], PROJECT),
        ("prod", ["--yes"], None),
    ],
)
def test_without_the_projects_id_nothing_is_changed(
    here, program, founded, vertex, monkeypatch, environment, words, typed
):
    monkeypatch.setenv("ENVIRONMENT", environment)
    with pytest.raises(UserError, match=r"is not my-pro\w+; nothing was changed"):
        launch(monkeypatch, "destroy", *words, typed=typed)
    assert [words[1] for words in program.words] == ["init", "plan"]
    assert served(vertex) == served(vertex, PROD) == ["1", "2"]
    assert vertex.calls("endpoints.undeployModel") == vertex.calls("endpoints.patch") == []


def test_where_nothing_is_promoted_to_yes_is_enough(here, program, founded, vertex, monkeypatch):
    launch(monkeypatch, "destroy", "--yes")
    assert served(vertex) == []
    assert program.words[-1][1] == "apply"


def test_prod_is_removed_when_its_id_is_typed(here, program, founded, vertex, monkeypatch):
    monkeypatch.setenv("ENVIRONMENT", "prod")
    launch(monkeypatch, "destroy", "--yes", typed=f" {PROD} ")
    assert (served(vertex), served(vertex, PROD)) == (["1", "2"], [])
    assert program.words[-1][1] == "apply"


def test_where_no_endpoint_is_left_destroy_goes_on(
    here, program, founded, vertex, monkeypatch, capsys
):
    """As when the last attempt got so far."""
    vertex.endpoints.by_name.clear()
    launch(monkeypatch, "destroy", "--yes")
    assert [words[1] for words in program.words] == ["init", "plan", "apply"]
    out, err = capsys.readouterr()
    assert "no endpoint animals: nothing to undeploy" in err
    assert "What remains in my-project" in out


@pytest.mark.parametrize("kind", ["init", "plan -destroy"])
def test_before_anything_is_undeployed_terraform_must_be_able_to_go_on(
    here, program, founded, vertex, monkeypatch, kind
):
    program.fault(kind, "before", "fails")
    with pytest.raises(UserError, match="failed"):
        launch(monkeypatch, "destroy", "--yes")
    assert served(vertex) == ["1", "2"]


def test_what_cannot_be_undeployed_is_not_destroyed(here, program, founded, vertex, monkeypatch):
    endpoint_of(vertex).deployed_models[1].model = "other/models/x"
    with pytest.raises(UserError, match="also serves other/models/x, which is not this project's"):
        launch(monkeypatch, "destroy", "--yes")
    assert [words[1] for words in program.words] == ["init", "plan"]


def test_a_destroy_that_failed_is_typed_again(here, program, founded, vertex, monkeypatch, capsys):
    program.fault("apply", "before", "fails")
    with pytest.raises(UserError, match="terraform apply of the stack failed"):
        launch(monkeypatch, "destroy", "--yes")
    assert "What remains" not in capsys.readouterr().out
    launch(monkeypatch, "destroy", "--yes")
    assert "What remains" in capsys.readouterr().out


def test_what_remains_is_listed(here):
    def lines(more):
        settings = load_settings(f"{os.environ['SET']} {more}")
        said = infra.describe_remains(resolve_environment(settings), settings)
        return {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}

    plain = lines("")
    assert list(plain) == ["models", "buckets", "images", "state", "foundation"]
    assert (
        "my-project-animals-data, my-project-animals-pipelines, my-project-animals-storage"
        in plain["buckets"]
    )
    assert f"gs://{STATE}" in plain["state"]
    assert "europe-west4-docker.pkg.dev/my-project/animals" in plain["images"]
    assert "never deletes a key ring" in lines("cloud.encryption=customer-managed")["keys"]
    assert "billed by the hour" in lines("cloud.private=true")["network"]
    theirs = "{dev: {project: my-project, existing: {network: projects/p/global/networks/theirs}}}"
    assert "network" not in lines(f"cloud.private=true 'cloud.environments={theirs}'")


# ── the foundation ──────────────────────────────────────────────────────────────────────────────────────────────────
def local_of(folder):
    """The state while it is on this machine."""
    return folder / "build" / "terraform" / "dev" / "foundation.tfstate"


def test_the_first_foundation_begins_here_and_moves_to_the_bucket(
    here, program, store, monkeypatch, capsys
):
    (store.root / STATE).rmdir()  # which the apply makes
    run = infra.run_to_end

    def make_bucket(command, *rest):
        if command[2] == "apply":
            store.create_bucket(STATE)
        return run(command, *rest)

    monkeypatch.setattr(infra, "run_to_end", make_bucket)
    launch(monkeypatch, "foundation", "--yes")
    assert program.words == [
        ("foundation", "init", "-reconfigure", "-input=false"),
        (
            "foundation",
            "apply",
            "-auto-approve",
            "-input=false",
            "-lock-timeout=20m",
            "-var=environment=dev",
        ),
        (
            "foundation",
            "init",
            "-migrate-state",
            "-force-copy",
            "-input=false",
            *bucket_of("foundation", store),
        ),
    ]
    here_first = f'terraform {{\n  backend "local" {{\n    path = "{local_of(here)}"\n  }}\n}}\n'
    assert [call["local"] for call in program.calls] == [here_first, here_first, None]
    assert {call["data"] for call in program.calls} == {
        str(here / "build" / "terraform" / "dev" / "foundation")
    }
    assert (
        json.loads(storage.read(f"gs://{STATE}/foundation/default.tfstate")[0])["lineage"] == "this"
    )
    assert not local_of(here).exists()
    assert not OVERRIDE.exists()
    assert (
        f"The state is now in gs://{STATE}/foundation/default.tfstate." in capsys.readouterr().out
    )
    program.forget()
    launch(monkeypatch, "foundation", "--yes")
    assert [words[:3] for words in program.words] == [
        ("foundation", "init", "-reconfigure"),
        ("foundation", "apply", "-auto-approve"),
    ]
    assert program.words[0][4:] == tuple(bucket_of("foundation", store))
    assert [call["local"] for call in program.calls] == [None, None]


def test_the_first_plan_leaves_nothing(here, program, store, monkeypatch):
    launch(monkeypatch, "foundation", "--plan")
    assert [words[1:] for words in program.words] == [
        ("init", "-reconfigure", "-input=false"),
        ("plan", "-input=false", "-lock=false", "-var=environment=dev"),
    ]
    assert not OVERRIDE.exists()
    assert not local_of(here).exists()
    assert storage.read(f"gs://{STATE}/foundation/default.tfstate") is None


@pytest.mark.parametrize("how", ["fails", "is killed"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["init", "apply", "init -migrate-state"])
def test_cut_off_anywhere_the_same_command_goes_on(
    here, program, store, monkeypatch, kind, when, how
):
    program.fault(kind, when, how)
    with pytest.raises(UserError, match="of the foundation failed"):
        launch(monkeypatch, "foundation", "--yes")
    assert not OVERRIDE.exists()
    moved = storage.read(f"gs://{STATE}/foundation/default.tfstate") is not None
    assert moved == (
        when == "after" and kind != "init"
    )  # what a failed apply has made is no longer known here alone
    assert local_of(here).is_file() == (kind == "init -migrate-state")
    launch(monkeypatch, "foundation", "--yes")
    assert not OVERRIDE.exists()
    assert not local_of(here).exists()
    assert (
        json.loads(storage.read(f"gs://{STATE}/foundation/default.tfstate")[0])["lineage"] == "this"
    )
    launch(monkeypatch, "plan")


@pytest.mark.parametrize("bucket", [True, False])
def test_a_failed_apply_moves_the_state_if_it_has_made_the_bucket(
    here, program, store, monkeypatch, capfd, bucket
):
    """As with keys of one's own, where an account of Google's comes with the first training job only."""
    if not bucket:
        (store.root / STATE).rmdir()
    program.fault("apply", "after", "fails", "that account does not exist")
    with pytest.raises(UserError, match="terraform apply of the foundation failed"):
        launch(monkeypatch, "foundation", "--yes")
    out, err = capfd.readouterr()
    assert "that account does not exist" in err
    assert ("The state is now in" in out) == bucket
    assert [words[1:3] for words in program.words] == [
        ("init", "-reconfigure"),
        ("apply", "-auto-approve"),
        *([("init", "-migrate-state")] if bucket else []),
    ]
    assert local_of(here).is_file() == (not bucket)
    assert not OVERRIDE.exists()


def test_a_failed_plan_moves_nothing(here, program, store, monkeypatch):
    program.fault("plan", "after", "fails")
    local_of(here).parent.mkdir(parents=True)
    local_of(here).write_text('{"lineage": "this", "serial": 1}')
    with pytest.raises(UserError, match="terraform plan of the foundation failed"):
        launch(monkeypatch, "foundation", "--plan")
    assert [words[1] for words in program.words] == ["init", "plan"]
    assert local_of(here).is_file()


def test_once_moved_the_bucket_counts(here, program, store, monkeypatch):
    """Cut off just after the move; meanwhile somebody else has gone on, with the state in the bucket."""
    program.fault("init -migrate-state", "after", "fails")
    with pytest.raises(UserError):
        launch(monkeypatch, "foundation", "--yes")
    newer = b'{"lineage": "this", "serial": 9}'
    storage.write(f"gs://{STATE}/foundation/default.tfstate", newer)
    program.forget()
    launch(monkeypatch, "foundation", "--yes")
    assert storage.read(f"gs://{STATE}/foundation/default.tfstate")[0] == newer
    assert [words[1] for words in program.words] == ["init", "apply"]
    assert [call["local"] for call in program.calls] == [None, None]
    assert not local_of(here).exists()


@pytest.mark.parametrize("content", ['{"lineage": "another", "serial": 1}', "{", "[]"])
def test_two_states_are_not_laid_over_each_other(here, program, founded, monkeypatch, content):
    local_of(here).parent.mkdir(parents=True)
    local_of(here).write_text(content)
    with pytest.raises(UserError, match="are unrelated states"):
        launch(monkeypatch, "foundation", "--yes")
    assert program.calls == []
    assert local_of(here).read_text() == content


def test_an_empty_file_is_no_state(here, program, founded, monkeypatch):
    local_of(here).parent.mkdir(parents=True)
    local_of(here).touch()
    launch(monkeypatch, "foundation", "--yes")
    assert [call["local"] for call in program.calls] == [None, None]


def test_what_a_killed_foundation_left_is_removed(here, program, founded, monkeypatch):
    """SIGKILL leaves the file that names the state on this machine."""
    OVERRIDE.write_text('terraform {\n  backend "local" {}\n}\n')
    launch(monkeypatch, "foundation", "--plan")
    assert [call["local"] for call in program.calls] == [None, None]
    assert not OVERRIDE.exists()


# ── form, grammar, rights ───────────────────────────────────────────────────────────────────────────────────────────
def test_check_needs_neither_account_nor_project(here, program, monkeypatch):
    monkeypatch.setenv("SET", "cloud.environments='{dev: {project: \"\"}}'")
    launch(monkeypatch, "check")
    assert program.words == [
        ("foundation", "fmt", "-check", "-diff"),
        ("foundation", "init", "-backend=false", "-input=false"),
        ("foundation", "validate"),
        ("stack", "fmt", "-check", "-diff", "-recursive"),
        ("stack", "init", "-backend=false", "-input=false"),
        ("stack", "validate"),
    ]
    assert len({call["data"] for call in program.calls}) == 2


@pytest.mark.parametrize("kind", ["fmt", "init", "validate"])
def test_what_check_finds(here, program, monkeypatch, kind):
    program.fault(kind, "before", "fails")
    with pytest.raises(UserError, match=f"terraform {kind} of the foundation failed"):
        launch(monkeypatch, "check")


def test_grants_are_those_of_a_new_foundation_whatever_is_there(
    here, program, founded, monkeypatch, capsys
):
    granted = [GRANT, {**GRANT, "only": "incoming/"}]
    planned = {"planned_values": {"outputs": {"grants": {"value": granted}}}}
    (program.folder / "plan.json").write_text(json.dumps(planned))
    launch(monkeypatch, "grants")
    assert capsys.readouterr().out.splitlines() == [
        "| account | role | on | why |",
        "| --- | --- | --- | --- |",
        "| trainer | `storage.objectViewer` | bucket data | reads rows |",
        "| trainer | `storage.objectViewer` | bucket data, below `incoming/` | reads rows |",
    ]
    plan = here / "build" / "terraform" / "dev" / "foundation" / "grants.plan"
    assert program.words == [
        ("foundation", "init", "-reconfigure", "-input=false"),
        (
            "foundation",
            "plan",
            "-input=false",
            "-lock=false",
            f"-out={plan}",
            "-var=environment=dev",
        ),
        ("foundation", "show", "-json", str(plan)),
    ]
    assert all('backend "local"' in call["local"] for call in program.calls)
    assert not plan.exists()
    assert not OVERRIDE.exists()


# ── the program ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("version", "said"),
    [
        ('{"terraform_version": "1.8.5"}', "terraform 1.8.5 is too old; it must be 1.9 or newer"),
        ('{"terraform_version": "0.15.0"}', "terraform 0.15.0 is too old"),
        ("Terraform v0.11.14", "invalid output of `terraform version -json`: Terraform v0.11.14"),
        ("", "invalid output of `terraform version -json`"),
    ],
)
def test_a_terraform_that_will_not_do(here, program, monkeypatch, version, said):
    (program.folder / "version").write_text(version)
    with pytest.raises(UserError) as told:
        launch(monkeypatch, "check")
    assert said in str(told.value)
    assert program.calls == []


@pytest.mark.parametrize("version", ["1.9.0", "1.11.4", "1.10.0-beta1", "2.0.0"])
def test_a_terraform_that_will_do(program, version):
    (program.folder / "version").write_text(json.dumps({"terraform_version": version}))
    assert infra.require() == version


def test_no_terraform(here, program, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    with pytest.raises(
        UserError,
        match=r"terraform is not installed\. See https://developer\.hashicorp\.com.*make toolbox",
    ):
        launch(monkeypatch, "plan")


@pytest.mark.parametrize("words", [["plan"], ["apply"], ["destroy"], ["foundation"], ["grants"]])
@pytest.mark.parametrize(
    ("environment", "environments", "said"),
    [
        (
            "dev",
            "{dev: {project: my-project, bucket: my-bucket}}",
            "cloud.environments.dev.bucket in project.yaml names a manually created bucket",
        ),
        ("dev", "{dev: {project: ''}}", "cloud.environments.dev.project in project.yaml is empty"),
        (
            "prd",
            "{dev: {project: my-project}}",
            "ENVIRONMENT=prd: project.yaml has dev under cloud.environments",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_called(
    here, program, store, monkeypatch, words, environment, environments, said
):
    monkeypatch.setenv("ENVIRONMENT", environment)
    monkeypatch.setenv("SET", f'{os.environ["SET"]} "cloud.environments={environments}"')
    with pytest.raises(UserError) as told:
        launch(monkeypatch, *words)
    assert said in str(told.value)
    assert program.calls == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["apply", "foundation"])
def test_whoever_interrupts_terraform_writes_its_state_first(here, program, store, what, number):
    """Ctrl-C reaches Terraform by itself, as all of a terminal's programs; SIGTERM is handed on, once."""
    keep_images(here)
    if what == "apply":
        storage.write(f"gs://{STATE}/foundation/default.tfstate", b"{}")
    (program.folder / "slow").touch()
    variables = {**os.environ}
    command = [sys.executable, "-m", "level_2_cicd.infra", what, "--yes"]
    with subprocess.Popen(
        command, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        while not (program.folder / "waiting").exists():
            assert running.poll() is None
            time.sleep(0.01)
        assert OVERRIDE.exists() == (what == "foundation")
        if number == signal.SIGINT:
            os.killpg(running.pid, number)
        else:
            running.send_signal(number)
        _, said = running.communicate()
    assert running.returncode == 128 + number
    assert (program.folder / "ended").read_text() == str(int(number))
    assert not OVERRIDE.exists()
    assert "Traceback" not in said
    assert ("interrupted" in said) == (number == signal.SIGINT)
