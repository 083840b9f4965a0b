"""Make the pipeline parameters from project.yaml; each run adds its own name."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from core.paths import project_root
from gcp.environment import Environment
from level_1_pipeline.vertex import gpu_jobs
from project.settings import Settings

STEP_IMAGES = ("train", "deploy", "vertex_train")  # of the steps on Vertex AI
IMAGES = (*STEP_IMAGES, "predict")  # and of the server


def from_settings(
    settings: Settings,
    csv: str,
    registry: str,
    jobs: Sequence[Mapping[str, Any]] = (),
    serving: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the parameters; `csv` and `registry` are paths or gs:// addresses.

    A local run has no `jobs` (custom training jobs) and no `serving` (endpoint).
    """
    data, gate = settings.data, settings.gate
    return {
        "csv": csv,
        "label": data.label,
        "ignore": list(data.ignore),
        "categorical": list(data.categorical),
        "test_fraction": data.test_fraction,
        "split_seed": data.split_seed,
        "hyperparameters": asdict(settings.hyperparameters),
        "jobs": list(jobs),
        "metric": gate.metric,
        "threshold": gate.threshold,
        "max_regression": gate.max_regression,
        "registry": registry,
        "serving": dict(serving or {}),
        "register": True,  # False in a build's functional test, which must not change the champion
    }


def for_cloud(
    settings: Settings, environment: Environment, images: Mapping[str, str], csv: str
) -> dict[str, Any]:
    """Return the parameters of a run on Vertex AI; `images` must have train and predict."""
    jobs = gpu_jobs.chosen_jobs(settings, project_root(), environment, images["train"])
    endpoint = serving(settings, environment, images["predict"])
    return from_settings(settings, csv, environment.registry, jobs, endpoint)


def serving(settings: Settings, environment: Environment, image: str = "") -> dict[str, Any]:
    """Return the parameters of gcp.deployment; a rollback needs no image."""
    serve = settings.cloud.serve
    return {
        "project": environment.project,
        "region": environment.region,
        "endpoint": environment.name,
        "image": image,
        "machine": serve.machine,
        "replicas": list(serve.replicas),
        "canary_percent": serve.canary_percent,
        "service_account": environment.account("predictor"),
        "key": environment.key,
    }
