"""Starts builds: each command line of `gcloud builds submit` is put together here, and everything that a build is told.

python -m level_2_cicd.submit_build [--dry-run]       make submit: what a push would start, from this folder as it is
python -m level_2_cicd.submit_build --triggers        make setup-triggers: a trigger for each container, for those who want them

The source goes to a folder of the project's own bucket, in its region and under its key; .gcloudignore says what stays here.
"""

import argparse
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from core import manifest
from core.errors import UserError, run_command
from core.paths import PROJECT_FILE, project_root
from gcp.environment import Environment, resolve_environment
from level_1_pipeline import containers
from level_1_pipeline.vertex import gpu_jobs
from project import git
from project.settings import Settings, load_settings

FOLDER = "level_2_cicd"
PUSH, PULL_REQUEST, IMAGE, CONTAINER = (
    f"{FOLDER}/cloudbuild{kind}.yaml" for kind in ("", ".pr", ".image", ".container")
)
TOOLBOX = f"{FOLDER}/toolbox/toolbox.sh"
TRIGGERS = Path("build/triggers.yaml")


def level_2(environment: Environment) -> None:
    """Level 2 has accounts of its own, so it needs what Terraform makes.

    Raises:
        UserError: everything was made by hand.
    """
    if environment.by_hand:
        raise UserError(
            f"cloud.environments.{environment.environment}.bucket in {PROJECT_FILE} names a bucket made by hand (level 1). Level 2 "
            "has buckets and accounts that Terraform makes: leave it empty, and type make foundation."
        )


def commit() -> str:
    """The code's version: what the build was told, or what git tells; empty where nobody knows."""
    return os.environ.get("COMMIT") or git.version().removesuffix("unknown")


# ── what builds are told ────────────────────────────────────────────────────────────────────────────────────────────
def substitutions(settings: Settings, environment: Environment) -> dict[str, str]:
    """What cloudbuild.yaml is told.

    Raises:
        UserError: nobody knows the commit, or there is no such job.
    """
    if not commit():
        raise UserError(
            "a build bears the code's version, and git knows no commit here. Commit first, or set COMMIT=1a2b3c."
        )
    for name in os.environ.get("JOB_SPEC", "").split():
        gpu_jobs.load(name, project_root())
    own = {
        "_INFRA_ACCOUNT": environment.account("infra"),
        "_COMMIT": commit(),
        "_JOB_SPEC": os.environ.get("JOB_SPEC", ""),
    }
    return {**substitutions_of_pull_request(settings, environment), **own}


def substitutions_of_pull_request(settings: Settings, environment: Environment) -> dict[str, str]:
    """What cloudbuild.pr.yaml is told."""
    return {
        "_ENVIRONMENT": environment.environment,
        "_REGISTRY": environment.images,
        "_BASE_IMAGES": settings.cloud.mirrors.base_images,
        "_PYTHON_INDEX": settings.cloud.mirrors.python_index,
    }


def substitutions_of_image(
    environment: Environment, container: containers.Container
) -> dict[str, str]:
    """What cloudbuild.image.yaml is told."""
    return {
        "_ENVIRONMENT": environment.environment,
        "_COMMIT": commit(),
        "_TOOLBOX": toolbox(environment),
        "_CONTAINER": container.name,
        "_IMAGE": f"{environment.images}/{container.name}",
        "_TAG": container.tag(),
    }


def substitutions_of_container(
    settings: Settings, environment: Environment, container: containers.Container
) -> dict[str, str]:
    """What cloudbuild.container.yaml is told by its trigger, which puts the commit in."""
    return {
        **substitutions_of_pull_request(settings, environment),
        "_COMMIT": "$COMMIT_SHA",
        "_CONTAINER": container.name,
    }


def toolbox(environment: Environment) -> str:
    """The toolbox's name in the registry.

    Raises:
        UserError: its inputs cannot be read.
    """
    done = subprocess.run(
        ["sh", TOOLBOX, "--name", environment.images], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise UserError(f"{TOOLBOX} --name: {done.stderr.strip()}")
    return done.stdout.strip()


# ── gcloud ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def submit_command(environment: Environment, config: str, told: Mapping[str, str]) -> list[str]:
    """The command that sends this folder's files, and starts a build of them."""
    return [
        "gcloud",
        "builds",
        "submit",
        ".",
        f"--config={config}",
        f"--project={environment.project}",
        f"--region={environment.region}",
        f"--service-account=projects/{environment.project}/serviceAccounts/{environment.account('build')}",
        f"--gcs-source-staging-dir={environment.builds}/source",
        *([f"--worker-pool={environment.build_pool}"] if environment.build_pool else []),
        f"--substitutions={as_flag(told)}",
    ]


def as_flag(told: Mapping[str, str]) -> str:
    """A mapping as gcloud takes it; another sign than the comma parts it where a value holds one."""
    joined = [f"{key}={value}" for key, value in told.items()]
    sign = next(sign for sign in ",|;~" if not any(sign in pair for pair in joined))
    return (f"^{sign}^" if sign != "," else "") + sign.join(joined)


def run(command: list[str], log: Path | None = None) -> None:
    """Run gcloud, or another program; what it says goes to the terminal, or to a log.

    Raises:
        UserError: it is not there, or it failed.
    """
    try:
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as stream:
                done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)
        else:
            done = subprocess.run(command, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not installed: see cloud.google.com/sdk/docs/install"
        ) from None
    if done.returncode != 0:
        raise UserError(
            f"`{' '.join(command[:3])}` failed; "
            + (last_words(log) if log else "what it said is above.")
        )


def last_words(log: Path) -> str:
    """What a log ends with, and where it is."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    errors = [line for line in lines if line.startswith("ERROR")]
    page = next(
        (
            found[0]
            for line in lines
            if (found := re.search(r"https://console\.cloud\.google\.com/\S+\w", line))
        ),
        "",
    )
    said = (errors or lines or ["it does not say why"])[-1]
    return (
        f"{said.rstrip('.')}. " + (f"Its page: {page} " if page else "") + f"The whole log: {log}"
    )


# ── a trigger for each container ────────────────────────────────────────────────────────────────────────────────────
def triggers(environment: Environment, settings: Settings, root: Path) -> list[dict[str, Any]]:
    """A trigger for each container, in the API's form: a push that changes its files builds its image, and no more.

    Raises:
        UserError: project.yaml names no linked repository.
    """
    if settings.cloud.ci != "cloud-build":
        raise UserError(
            f"cloud.ci in {PROJECT_FILE} is {settings.cloud.ci}, so cloud.repository names no repository that is linked to Cloud "
            "Build. For such triggers: make setup-triggers SET='cloud.ci=cloud-build cloud.repository.name=CONNECTION/NAME'"
        )
    connection, slash, name = settings.cloud.repository.name.partition("/")
    if not slash or "/" in name:
        raise UserError(
            f"cloud.repository.name in {PROJECT_FILE} is '{settings.cloud.repository.name}': triggers want the repository that is "
            "linked to Cloud Build, CONNECTION/NAME"
        )
    push = {
        "repository": f"{environment.parent}/connections/{connection}/repositories/{name}",
        "push": {"branch": f"^{re.escape(settings.cloud.repository.branch)}$"},
    }
    return [
        {
            "name": f"{environment.name}-{container.name.replace('_', '-')}",
            "repositoryEventConfig": push,
            "filename": CONTAINER,
            "includedFiles": files_of(container),
            "serviceAccount": f"projects/{environment.project}/serviceAccounts/{environment.account('build')}",
            "substitutions": substitutions_of_container(settings, environment, container),
        }
        for container in containers.find(root)
    ]


def files_of(container: containers.Container) -> list[str]:
    """The files whose change asks for another image."""
    own = {str(containers.BASE), str(container.dockerfile), f"{container.dockerfile}.dockerignore"}
    return sorted(own | {path.as_posix() for path in container.inputs()})


def triggers_command(environment: Environment) -> list[str]:
    """The command that makes the triggers of a file, or makes them anew."""
    own = [f"--project={environment.project}", f"--region={environment.region}"]
    return ["gcloud", "builds", "triggers", "import", f"--source={TRIGGERS}", *own]


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────────────
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="make submit", description="Start what a push would start."
    )
    parser.add_argument(
        "--triggers", action="store_true", help="make a trigger for each container instead"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command, and do not run it"
    )
    asked = parser.parse_args()
    settings = load_settings()
    environment = resolve_environment(settings)
    level_2(environment)
    if asked.triggers:
        made = triggers(environment, settings, project_root())
        TRIGGERS.parent.mkdir(exist_ok=True)
        manifest.write_bytes(TRIGGERS, yaml.safe_dump_all(made, sort_keys=False).encode())
        print(f"{TRIGGERS}: {', '.join(one['name'] for one in made)}", flush=True)
        command = triggers_command(environment)
    else:
        command = submit_command(environment, PUSH, substitutions(settings, environment))
    if asked.dry_run:
        print(shlex.join(command))
    else:
        run(command)


if __name__ == "__main__":
    run_command(main)
