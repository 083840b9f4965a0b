"""Starts builds: each command line of `gcloud builds submit` is put together here, and everything that a build is told.

python -m launcher.submit_build [--dry-run]       make submit: what a push would start, from this folder as it is
python -m launcher.submit_build --triggers        make setup-triggers: a trigger for each container, for those who want them

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

from launcher import containers, gpu_jobs
from project import cloud, git, manifest, settings
from project.cloud import Place
from project.errors import UserError, run_command
from project.settings import Settings

FOLDER = "level_2_cicd"
PUSH, PULL_REQUEST, IMAGE, CONTAINER = (f"{FOLDER}/cloudbuild{kind}.yaml" for kind in ("", ".pr", ".image", ".container"))
TOOLBOX = f"{FOLDER}/toolbox/toolbox.sh"
TRIGGERS = Path("build/triggers.yaml")


def level_2(place: Place) -> None:
    """Level 2 has accounts of its own, so it needs what Terraform makes.

    Raises:
        UserError: everything was made by hand.
    """
    if place.by_hand:
        raise UserError(
            f"cloud.environments.{place.environment}.bucket in {settings.FILE} names a bucket made by hand (level 1). Level 2 "
            "has buckets and accounts that Terraform makes: leave it empty, and type make foundation."
        )


def commit() -> str:
    """The code's version: what the build was told, or what git tells; empty where nobody knows."""
    return os.environ.get("COMMIT") or git.version().removesuffix("unknown")


# ── what builds are told ────────────────────────────────────────────────────────────────────────────────────────────
def substitutions(chosen: Settings, place: Place) -> dict[str, str]:
    """What cloudbuild.yaml is told.

    Raises:
        UserError: nobody knows the commit, or there is no such job.
    """
    if not commit():
        raise UserError("a build bears the code's version, and git knows no commit here. Commit first, or set COMMIT=1a2b3c.")
    for name in os.environ.get("JOB_SPEC", "").split():
        gpu_jobs.load(name, settings.project_root())
    own = {"_INFRA_ACCOUNT": place.account("infra"), "_COMMIT": commit(), "_JOB_SPEC": os.environ.get("JOB_SPEC", "")}
    return {**substitutions_of_pull_request(chosen, place), **own}


def substitutions_of_pull_request(chosen: Settings, place: Place) -> dict[str, str]:
    """What cloudbuild.pr.yaml is told."""
    return {
        "_ENVIRONMENT": place.environment,
        "_REGISTRY": place.images,
        "_BASE_IMAGES": chosen.cloud.mirrors.base_images,
        "_PYTHON_INDEX": chosen.cloud.mirrors.python_index,
    }


def substitutions_of_image(place: Place, container: containers.Container) -> dict[str, str]:
    """What cloudbuild.image.yaml is told."""
    return {
        "_ENVIRONMENT": place.environment,
        "_COMMIT": commit(),
        "_TOOLBOX": toolbox(place),
        "_CONTAINER": container.name,
        "_IMAGE": f"{place.images}/{container.name}",
        "_TAG": container.tag(),
    }


def substitutions_of_container(chosen: Settings, place: Place, container: containers.Container) -> dict[str, str]:
    """What cloudbuild.container.yaml is told by its trigger, which puts the commit in."""
    return {**substitutions_of_pull_request(chosen, place), "_COMMIT": "$COMMIT_SHA", "_CONTAINER": container.name}


def toolbox(place: Place) -> str:
    """The toolbox's name in the registry.

    Raises:
        UserError: its inputs cannot be read.
    """
    done = subprocess.run(["sh", TOOLBOX, "--name", place.images], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{TOOLBOX} --name: {done.stderr.strip()}")
    return done.stdout.strip()


# ── gcloud ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def submit_command(place: Place, config: str, told: Mapping[str, str]) -> list[str]:
    """The command that sends this folder's files, and starts a build of them."""
    return [
        "gcloud",
        "builds",
        "submit",
        ".",
        f"--config={config}",
        f"--project={place.project}",
        f"--region={place.region}",
        f"--service-account=projects/{place.project}/serviceAccounts/{place.account('build')}",
        f"--gcs-source-staging-dir={place.builds}/source",
        *([f"--worker-pool={place.build_pool}"] if place.build_pool else []),
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
        raise UserError(f"{command[0]} is not installed: see cloud.google.com/sdk/docs/install") from None
    if done.returncode != 0:
        raise UserError(f"`{' '.join(command[:3])}` failed; " + (last_words(log) if log else "what it said is above."))


def last_words(log: Path) -> str:
    """What a log ends with, and where it is."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    page = next((found[0] for line in lines if (found := re.search(r"https://console\.cloud\.google\.com/\S+\w", line))), "")
    said = (errors or lines or ["it does not say why"])[-1]
    return f"{said.rstrip('.')}. " + (f"Its page: {page} " if page else "") + f"The whole log: {log}"


# ── a trigger for each container ────────────────────────────────────────────────────────────────────────────────────
def triggers(place: Place, chosen: Settings, root: Path) -> list[dict[str, Any]]:
    """A trigger for each container, in the API's form: a push that changes its files builds its image, and no more.

    Raises:
        UserError: project.yaml names no linked repository.
    """
    if chosen.cloud.ci != "cloud-build":
        raise UserError(
            f"cloud.ci in {settings.FILE} is {chosen.cloud.ci}, so cloud.repository names no repository that is linked to Cloud "
            "Build. For such triggers: make setup-triggers SET='cloud.ci=cloud-build cloud.repository.name=CONNECTION/NAME'"
        )
    connection, slash, name = chosen.cloud.repository.name.partition("/")
    if not slash or "/" in name:
        raise UserError(
            f"cloud.repository.name in {settings.FILE} is '{chosen.cloud.repository.name}': triggers want the repository that is "
            "linked to Cloud Build, CONNECTION/NAME"
        )
    push = {
        "repository": f"{place.parent}/connections/{connection}/repositories/{name}",
        "push": {"branch": f"^{re.escape(chosen.cloud.repository.branch)}$"},
    }
    return [
        {
            "name": f"{place.name}-{container.name.replace('_', '-')}",
            "repositoryEventConfig": push,
            "filename": CONTAINER,
            "includedFiles": files_of(container),
            "serviceAccount": f"projects/{place.project}/serviceAccounts/{place.account('build')}",
            "substitutions": substitutions_of_container(chosen, place, container),
        }
        for container in containers.find(root)
    ]


def files_of(container: containers.Container) -> list[str]:
    """The files whose change asks for another image."""
    own = {str(containers.BASE), str(container.dockerfile), f"{container.dockerfile}.dockerignore"}
    return sorted(own | {path.as_posix() for path in container.inputs()})


def triggers_command(place: Place) -> list[str]:
    """The command that makes the triggers of a file, or makes them anew."""
    own = [f"--project={place.project}", f"--region={place.region}"]
    return ["gcloud", "builds", "triggers", "import", f"--source={TRIGGERS}", *own]


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────────────
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="make submit", description="Start what a push would start.")
    parser.add_argument("--triggers", action="store_true", help="make a trigger for each container instead")
    parser.add_argument("--dry-run", action="store_true", help="print the command, and do not run it")
    asked = parser.parse_args()
    chosen = settings.load()
    place = cloud.place(chosen)
    level_2(place)
    if asked.triggers:
        made = triggers(place, chosen, settings.project_root())
        TRIGGERS.parent.mkdir(exist_ok=True)
        manifest.write_bytes(TRIGGERS, yaml.safe_dump_all(made, sort_keys=False).encode())
        print(f"{TRIGGERS}: {', '.join(one['name'] for one in made)}", flush=True)
        command = triggers_command(place)
    else:
        command = submit_command(place, PUSH, substitutions(chosen, place))
    if asked.dry_run:
        print(shlex.join(command))
    else:
        run(command)


if __name__ == "__main__":
    run_command(main)
