"""The pipeline's steps as containers of this machine: their images, how they run, and how they end."""

import os
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.paths import project_root
from level_1_pipeline import containers
from project import git
from project.settings import Settings

LABEL = "run"  # of a step's container: the run that it belongs to


def build_images(settings: Settings) -> dict[str, str]:
    """Build the images that the steps run in; returns them by the names of `make_pipeline`'s arguments."""
    made = containers.find(project_root(), ["train", "deploy"])
    containers.make_all(made, settings)
    return {
        f"{container.name}_image": containers.image(container, settings.name) for container in made
    }


def options(values: dict[str, Any], run: str) -> dict[str, Any]:
    """How a step's container runs: as this user, without a network and without privileges, on a read-only root.

    It sees the CSV file, the registry and, by kfp's doing, the run's folder.
    """
    Path(values["registry"]).mkdir(parents=True, exist_ok=True)
    return {
        "mounts": {values["csv"]: True, values["registry"]: False},  # read only or not
        "environment": {"CODE_VERSION": git.version()},
        "user": user(),
        "labels": {LABEL: run},
        "init": True,  # ends at SIGTERM, whatever the step does
        "read_only": True,
        "tmpfs": {"/tmp": ""},  # noqa: S108 (the container's own)
        "network_mode": "none",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "gpus": containers.torch_build() != "cpu",
    }


def user() -> str:
    """Who owns what a container writes: this user. A rootless engine calls this user root."""
    if not hasattr(os, "getuid") or "rootless" in containers.docker(
        "info", "--format", "{{.SecurityOptions}}"
    ):
        return "0:0"
    return f"{os.getuid()}:{os.getgid()}"


def remove(run: str) -> None:
    """End what still runs of a run that was stopped: a container outlives the process that started it."""
    try:
        left = containers.docker("ps", "--quiet", "--filter", f"label={LABEL}={run}").split()
        if left:
            containers.docker("rm", "--force", *left)
    except UserError:
        pass  # without an engine nothing runs
