"""The pipeline's parameters, all but the run's own name, as project.yaml has them: for this machine, and for the cloud."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from project.cloud import Place
from project.settings import Settings, project_root

STEP_IMAGES = ("train", "deploy", "vertex_train")  # what the cloud's steps run in
IMAGES = (*STEP_IMAGES, "predict")  # and what serves the model


def from_settings(
    chosen: Settings,
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
    data, gate = chosen.data, chosen.gate
    return {
        "csv": csv,
        "label": data.label,
        "ignore": list(data.ignore),
        "categorical": list(data.categorical),
        "test_share": data.test_share,
        "split_seed": data.split_seed,
        "hyperparameters": asdict(chosen.train),
        "jobs": list(jobs),
        "metric": gate.metric,
        "threshold": gate.threshold,
        "margin": gate.margin,
        "registry": registry,
        "serving": dict(serving or {}),
        "register": True,  # a build's functional test says False: it tries all steps, and the champion stays
    }


def for_cloud(chosen: Settings, place: Place, images: Mapping[str, str], csv: str) -> dict[str, Any]:
    """The parameters of a run in the cloud.

    Args:
        images: container → its image's address; train and predict are needed.
        csv: the rows' gs:// address.

    Raises:
        UserError: a job of cloud.train.jobs is none, or cannot be had.
    """
    from launcher import gpu_jobs

    jobs = gpu_jobs.chosen_jobs(chosen, project_root(), place, images["train"])
    return from_settings(chosen, csv, place.registry, jobs, serving(chosen, place, images["predict"]))


def serving(chosen: Settings, place: Place, image: str = "") -> dict[str, Any]:
    """The endpoint and its machines, as the pipeline's last step takes them; see launcher.deploy.

    Args:
        image: the predictor's; a rollback needs none.
    """
    serve = chosen.cloud.serve
    return {
        "project": place.project,
        "region": place.region,
        "endpoint": place.name,
        "image": image,
        "machine": serve.machine,
        "replicas": list(serve.replicas),
        "canary_percent": serve.canary_percent,
        "service_account": place.account("predictor"),
        "key": place.key,
    }
