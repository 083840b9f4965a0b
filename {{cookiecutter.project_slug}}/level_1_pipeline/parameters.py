"""The pipeline's parameters, all but the run's own name, as project.yaml has them: for this machine, and for the cloud."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from core.paths import project_root
from gcp.environment import Environment
from project.settings import Settings

STEP_IMAGES = ("train", "deploy", "vertex_train")  # what the cloud's steps run in
IMAGES = (*STEP_IMAGES, "predict")  # and what serves the model


def from_settings(
    settings: Settings,
    csv: str,
    registry: str,
    jobs: Sequence[Mapping[str, Any]] = (),
    serving: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The parameters.

    Args:
        csv, registry: a path or a gs:// address.
        jobs: where to train; on this machine, none: the step trains by itself.
        serving: where to serve; on this machine, nothing: a person types `make serve`.
    """
    data, gate = settings.data, settings.gate
    return {
        "csv": csv,
        "label": data.label,
        "ignore": list(data.ignore),
        "categorical": list(data.categorical),
        "test_share": data.test_share,
        "split_seed": data.split_seed,
        "hyperparameters": asdict(settings.hyperparameters),
        "jobs": list(jobs),
        "metric": gate.metric,
        "threshold": gate.threshold,
        "margin": gate.margin,
        "registry": registry,
        "serving": dict(serving or {}),
        "register": True,  # a build's functional test says False: it tries all steps, and the champion stays
    }


def for_cloud(
    settings: Settings, environment: Environment, images: Mapping[str, str], csv: str
) -> dict[str, Any]:
    """The parameters of a run in the cloud.

    Args:
        images: container → its image's address; train and predict are needed.
        csv: the rows' gs:// address.

    Raises:
        UserError: a job of cloud.train.jobs is none, or cannot be had.
    """
    from level_1_pipeline.vertex import gpu_jobs

    jobs = gpu_jobs.chosen_jobs(settings, project_root(), environment, images["train"])
    return from_settings(
        settings, csv, environment.registry, jobs, serving(settings, environment, images["predict"])
    )


def serving(settings: Settings, environment: Environment, image: str = "") -> dict[str, Any]:
    """The endpoint and its machines, as the pipeline's last step takes them; see gcp.deployment.

    Args:
        image: the predictor's; a rollback needs none.
    """
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
