"""make train: trains on a rented machine, with a person's own credentials, and brings the model here.

python -m level_1_pipeline.vertex.train [--job l4] [--dry-run]
RUN=ID goes on with a run whose job was sent before: it is found again, not sent twice.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from core import manifest
from core.errors import UserError, run_command
from core.paths import project_root
from gcp import storage
from gcp.environment import Environment, resolve_environment
from gcp.training_job import Request, machine, train
from level_0_manual import notebooks
from level_1_pipeline import containers
from level_1_pipeline.vertex import gpu_jobs, rows
from project import git, runs
from project.runs import Run
from project.settings import Settings, load_settings
from trainer.data import prepare

REQUEST = "request.json"  # in the run's folder, before anything is sent
PLATFORM = "linux/amd64"  # what Vertex AI's machines are


def prepare_rows(settings: Settings, train_data: Path, test_data: Path) -> None:
    """The rows to train on and to test on, as level 0 makes them.

    Raises:
        UserError: see trainer.data.
    """
    data, csv = settings.data, rows.find(settings)
    options: dict[str, Any] = {"ignore": data.ignore, "categorical": data.categorical}
    prepare(
        csv,
        data.label,
        train_data,
        test_data,
        **options,
        test_share=data.test_share,
        split_seed=data.split_seed,
    )


def check_image(jobs: Sequence[dict[str, Any]]) -> None:
    """Raises UserError where the image that would be built here cannot use the machine that would be rented."""
    if containers.target_platform() != PLATFORM:
        raise UserError(
            f"this machine builds images for {containers.target_platform()}, and Vertex AI's machines are {PLATFORM}. "
            f"Put DOCKER_DEFAULT_PLATFORM={PLATFORM} before the command."
        )
    rented = [
        job
        for job in jobs
        for pool in job["workerPoolSpecs"]
        if "acceleratorType" in pool["machineSpec"]
    ]
    if rented and containers.torch_build() == "cpu":
        raise UserError(
            f"{machine(rented[0])}: the training image's torch would not use that GPU. Put TORCH=cu130 before the command "
            '(another CUDA version will do), or choose a job without one: SET="cloud.train.jobs=[cpu]"'
        )


def publish_image(settings: Settings, where: Environment) -> str:
    """Build the training image unless it is here, send it to the registry; returns its address there, by digest."""
    training = containers.find(project_root(), ["train"])
    return containers.make_all(training, settings, where.images)["train"]


def make_request(
    settings: Settings, where: Environment, run: str, jobs: Sequence[dict[str, Any]], address: str
) -> Request:
    """What is asked of Vertex AI; `address` is the training rows'."""
    return Request(
        run=f"{where.parent}/runs/{run}",
        jobs=jobs,
        args=["--train", address, "--hyperparameters", settings.hyperparameters.to_json()],
        output=f"{where.pipeline_root}/runs/{run}/model",
        labels={"project": settings.name, "commit": git.version(), "run": run},
        key=where.key,
    )


def find_jobs(
    settings: Settings, where: Environment, name: str | None, image: str
) -> list[dict[str, Any]]:
    """The job of that name, or those of project.yaml; resolved.

    Raises:
        UserError: there is none of that name, or something is wrong in it.
    """
    root = project_root()
    return (
        [gpu_jobs.resolve(name, root, where, image)]
        if name
        else gpu_jobs.chosen_jobs(settings, root, where, image)
    )


def dry_run(settings: Settings, where: Environment, name: str | None) -> str:
    """What would be sent, as YAML; the image has a tag here, because it gets its digest when it is sent."""
    image = containers.image(containers.find(project_root(), ["train"])[0], where.images)
    jobs = find_jobs(settings, where, name, image)
    with tempfile.TemporaryDirectory() as folder:
        train_rows = Path(folder, "train.parquet")
        prepare_rows(settings, train_rows, Path(folder, "test.parquet"))
        request = make_request(settings, where, "DRY-RUN", jobs, rows.address(where, train_rows))
    request.messages()
    return yaml.safe_dump_all(
        (request.custom_job(number) for number in range(1, len(jobs) + 1)),
        sort_keys=False,
        width=200,
    )


def begin(settings: Settings, where: Environment, name: str | None) -> tuple[Run, Request]:
    """Everything up to sending: rows, image, the run's folder.

    Raises:
        UserError: says what is missing; nothing is rented then.
    """
    check_image(find_jobs(settings, where, name, ""))
    notebooks.require_in_step()
    with tempfile.TemporaryDirectory() as folder:
        train_rows, test_rows = Path(folder, "train.parquet"), Path(folder, "test.parquet")
        prepare_rows(settings, train_rows, test_rows)
        address = rows.upload(
            where, train_rows
        )  # a mistake in the data, or of the bucket, is told before an image is built
        image = publish_image(settings, where)
        run = runs.new()
        request = make_request(
            settings, where, run.name, find_jobs(settings, where, name, image), address
        )
        run.start(settings)
        shutil.copy(train_rows, run.train_data)
        shutil.copy(test_rows, run.test_data)
    manifest.write_json(run.folder / REQUEST, asdict(request))
    return run, request


def resume(name: str) -> tuple[Run, Request]:
    """A run that was begun before.

    Raises:
        UserError: it was not.
    """
    run = Run(runs.runs_folder() / name)
    document = runs.read_json(run.folder / REQUEST)
    if not document:
        raise UserError(
            f"RUN={name}: no training was sent from {run.folder}. Without RUN a new one begins: make train"
        )
    return run, Request(**document)


def conclude(run: Run, request: Request) -> dict[str, Any]:
    """Bring the model here, and measure it on the test rows."""
    if not run.model.exists():
        with tempfile.TemporaryDirectory(dir=run.folder) as folder:
            found = storage.fetch(request.output, Path(folder, "model"))
            manifest.read(found)
            shutil.copytree(found, Path(folder, "whole"))
            Path(folder, "whole").rename(run.model)
    from trainer.evaluate import evaluate

    return evaluate(run.model, run.test_data, run.evaluation)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="make train", description="Train on a machine that Vertex AI rents out for it."
    )
    parser.add_argument(
        "--job",
        help="one of level_1_pipeline/gpu_jobs; otherwise those of cloud.train.jobs, in their order",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be sent; build and send nothing"
    )
    given = parser.parse_args()
    settings = load_settings()
    where = resolve_environment(settings)
    if given.dry_run:
        print(dry_run(settings, where, given.job), end="")
        return
    run, request = (
        resume(os.environ["RUN"]) if os.environ.get("RUN") else begin(settings, where, given.job)
    )
    print(
        f"Run {run.name}, in {where.region} of {where.project}. Should this be cut off: make train RUN={run.name}"
    )
    train(request)
    metrics = conclude(run, request)
    print(
        f"\nAccuracy {metrics['accuracy']:.4f} on {metrics['rows']:,} test rows "
        f"(always answering the most common class: {metrics['baseline']:.4f}).\n"
        f"The model is in runs/{run.name}/model/. Next: make predict ROW=1 RUN={run.name} · make runs"
    )


if __name__ == "__main__":
    run_command(main)
