"""Submit builds to Cloud Build with the substitutions of each build file.

python -m level_2_cicd.submit_build [--dry-run]              make submit: build as a push does
python -m level_2_cicd.submit_build --triggers [--dry-run]   make setup-triggers: one per container
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
from level_1_pipeline.containers import Container
from level_1_pipeline.vertex import gpu_jobs
from project import git
from project.settings import Settings, load_settings

PUSH, PULL_REQUEST, IMAGE, CONTAINER = (
    f"level_2_cicd/cloudbuild{kind}.yaml" for kind in ("", ".pr", ".image", ".container")
)
TOOLBOX = "level_2_cicd/toolbox/toolbox.sh"
TRIGGERS = Path("build/triggers.yaml")


def require_level_2(environment: Environment) -> None:
    """Fail in an environment whose bucket was created manually."""
    # Such an environment lacks the service accounts that Terraform creates.
    if environment.by_hand:
        raise UserError(
            f"cloud.environments.{environment.environment}.bucket in {PROJECT_FILE} names a "
            "manually created bucket (level 1). Level 2 uses the buckets and service accounts that "
            "Terraform creates: leave the bucket empty, and run: make foundation"
        )


def commit() -> str:
    """Return the code's version: COMMIT in a build, else git's; empty if unknown."""
    # `gcloud builds submit` uploads no .git folder, so builds get the version as a variable.
    return os.environ.get("COMMIT") or git.version().removesuffix("unknown")


# ── substitutions ─────────────────────────────────────────────────────────────────────────────
def push_substitutions(settings: Settings, environment: Environment) -> dict[str, str]:
    """Return the substitutions of cloudbuild.yaml."""
    if not commit():
        raise UserError(
            "a build needs the code's version, and git has no commit here. Commit first, or set "
            "COMMIT=1a2b3c."
        )
    job_spec = os.environ.get("JOB_SPEC", "")
    for name in job_spec.split():
        gpu_jobs.load(name, project_root())  # fail here on an unknown job, not after an hour
    return {
        **pull_request_substitutions(settings, environment),
        "_INFRA_ACCOUNT": environment.account("infra"),
        "_COMMIT": commit(),
        "_JOB_SPEC": job_spec,
    }


def pull_request_substitutions(settings: Settings, environment: Environment) -> dict[str, str]:
    """Return the substitutions of cloudbuild.pr.yaml."""
    return {
        "_ENVIRONMENT": environment.environment,
        "_REGISTRY": environment.images,
        "_BASE_IMAGES": settings.cloud.mirrors.base_images,
        "_PYTHON_INDEX": settings.cloud.mirrors.python_index,
    }


def image_substitutions(environment: Environment, container: Container) -> dict[str, str]:
    """Return the substitutions of cloudbuild.image.yaml."""
    # The script that builds the toolbox image also computes its name.
    result = subprocess.run(
        ["sh", TOOLBOX, "--name", environment.images], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise UserError(f"{TOOLBOX} --name: {result.stderr.strip()}")
    return {
        "_ENVIRONMENT": environment.environment,
        "_COMMIT": commit(),
        "_TOOLBOX": result.stdout.strip(),
        "_CONTAINER": container.name,
        "_IMAGE": f"{environment.images}/{container.name}",
        "_TAG": container.tag(),
    }


def container_substitutions(
    settings: Settings, environment: Environment, container: Container
) -> dict[str, str]:
    """Return the substitutions of cloudbuild.container.yaml."""
    # Cloud Build replaces $COMMIT_SHA when the trigger runs.
    return {
        **pull_request_substitutions(settings, environment),
        "_COMMIT": "$COMMIT_SHA",
        "_CONTAINER": container.name,
    }


# ── gcloud ────────────────────────────────────────────────────────────────────────────────────
def submit_command(
    environment: Environment, config: str, substitutions: Mapping[str, str]
) -> list[str]:
    """Return the command that uploads this folder (see .gcloudignore) and builds it."""
    pool = environment.build_pool
    # Stage sources in the project's own bucket: it has the project's region and encryption key.
    return [
        *("gcloud", "builds", "submit", "."),
        f"--config={config}",
        f"--project={environment.project}",
        f"--region={environment.region}",
        f"--service-account={build_account(environment)}",
        f"--gcs-source-staging-dir={environment.builds}/source",
        *([f"--worker-pool={pool}"] if pool else []),
        f"--substitutions={format_flag(substitutions)}",
    ]


def build_account(environment: Environment) -> str:
    """Return the resource name of the service account that builds."""
    return f"projects/{environment.project}/serviceAccounts/{environment.account('build')}"


def format_flag(values: Mapping[str, str]) -> str:
    """Format a mapping as the value of a gcloud option."""
    pairs = [f"{key}={value}" for key, value in values.items()]
    # The separator must not occur in a value; ^;^ selects another one (gcloud topic escaping).
    separator = next(sign for sign in ",|;~" if not any(sign in pair for pair in pairs))
    return (f"^{separator}^" if separator != "," else "") + separator.join(pairs)


def run(command: list[str], log: Path | None = None) -> None:
    """Run gcloud with its output on the terminal or in a log file."""
    try:
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as stream:
                code = subprocess.call(command, stdout=stream, stderr=subprocess.STDOUT)
        else:
            code = subprocess.call(command)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not installed: see cloud.google.com/sdk/docs/install"
        ) from None
    if code != 0:
        reason = summarize(log) if log else "see its output above."
        raise UserError(f"`{' '.join(command[:3])}` failed; {reason}")


def summarize(log: Path) -> str:
    """Return the error in a log of gcloud, the URL of the build, and the path of the log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Parallel builds write to log files, so the message must carry the last error itself.
    errors = [line for line in lines if line.startswith("ERROR")]
    reason = (errors or lines or ["no reason given"])[-1]
    page = re.search(r"https://console\.cloud\.google\.com/\S+\w", text)
    link = f"Build: {page[0]} " if page else ""
    return f"{reason.rstrip('.')}. {link}Log: {log}"


# ── triggers ──────────────────────────────────────────────────────────────────────────────────
def list_triggers(environment: Environment, settings: Settings, root: Path) -> list[dict[str, Any]]:
    """Return one trigger per container: a push that changes its files builds its image."""
    # Triggers need a repository that is connected to Cloud Build.
    if settings.cloud.ci != "cloud-build":
        raise UserError(
            f"cloud.ci in {PROJECT_FILE} is {settings.cloud.ci}, so no repository is connected to "
            "Cloud Build. For triggers run: make setup-triggers "
            "SET='cloud.ci=cloud-build cloud.repository.name=CONNECTION/NAME'"
        )
    repository = settings.cloud.repository
    parts = re.fullmatch(r"([^/]+)/([^/]*)", repository.name)
    if not parts:
        raise UserError(
            f"cloud.repository.name in {PROJECT_FILE} is '{repository.name}'; triggers need the "
            "repository that is connected to Cloud Build: CONNECTION/NAME"
        )
    connection, name = parts.groups()
    event = {
        "repository": f"{environment.parent}/connections/{connection}/repositories/{name}",
        "push": {"branch": f"^{re.escape(repository.branch)}$"},
    }
    return [
        {
            "name": f"{environment.name}-{container.name.replace('_', '-')}",
            "repositoryEventConfig": event,
            "filename": CONTAINER,
            # The same files determine the image's tag, so other pushes need no build.
            "includedFiles": sorted(
                {
                    containers.BASE.as_posix(),
                    container.dockerfile.as_posix(),
                    f"{container.dockerfile.as_posix()}.dockerignore",
                    *(path.as_posix() for path in container.inputs()),
                }
            ),
            "serviceAccount": build_account(environment),
            "substitutions": container_substitutions(settings, environment, container),
        }
        for container in containers.find(root)
    ]


# ── command line ──────────────────────────────────────────────────────────────────────────────
def main() -> None:
    """Submit a build, or create the triggers with --triggers."""
    parser = argparse.ArgumentParser(prog="make submit", description="Start the build of a push.")
    parser.add_argument("--triggers", action="store_true", help="create a trigger per container")
    parser.add_argument("--dry-run", action="store_true", help="print the command only")
    options = parser.parse_args()
    settings = load_settings()
    environment = resolve_environment(settings)
    require_level_2(environment)
    if options.triggers:
        triggers = list_triggers(environment, settings, project_root())
        TRIGGERS.parent.mkdir(exist_ok=True)
        manifest.write_bytes(TRIGGERS, yaml.safe_dump_all(triggers, sort_keys=False).encode())
        print(f"{TRIGGERS}: {', '.join(trigger['name'] for trigger in triggers)}", flush=True)
        # `import` creates or updates a trigger by name, so it is idempotent.
        command = ["gcloud", "builds", "triggers", "import", f"--source={TRIGGERS}"]
        command += [f"--project={environment.project}", f"--region={environment.region}"]
    else:
        command = submit_command(environment, PUSH, push_substitutions(settings, environment))
    if options.dry_run:
        print(shlex.join(command))
    else:
        run(command)


if __name__ == "__main__":
    run_command(main)
