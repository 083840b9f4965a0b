"""Train in a custom training job with the caller's credentials, and download the model: make train.

RUN=ID resumes a run: it finds the submitted job and does not submit a second one.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
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
from level_1_pipeline.vertex import gpu_jobs
from project import git, runs
from project.runs import Run
from project.settings import Settings, load_settings
from trainer.csv_reader import check_header
from trainer.data import find_csv, prepare

REQUEST = "request.json"  # in the run's folder; written before submission, so RUN=ID can resume
PLATFORM = "linux/amd64"  # Vertex AI's machines


# ── the data ──────────────────────────────────────────────────────────────────────────────────────
def source_csv(settings: Settings) -> Path:
    """Return the CSV file of project.yaml after a check of its header."""
    data = settings.data
    csv = find_csv(data.source, project_root() / "data").resolve()
    check_header(csv, data.label, data.ignore, data.categorical)
    return csv


def data_uri(environment: Environment, file: Path) -> str:
    """Return the gs:// address of a data file."""
    # It contains the hash of the content, so the same data is uploaded only once.
    return f"{environment.data}/{manifest.sha256(file)[:32]}/{file.name}"


def upload_data(environment: Environment, file: Path) -> str:
    """Upload a data file unless it exists; return its address."""
    uri = data_uri(environment, file)
    # Generation 0 means "only if the object does not exist"; the same address is the same content.
    with suppress(storage.Conflict):
        storage.upload(file, uri, if_generation_match=0)
    return uri


def split(settings: Settings, folder: Path) -> tuple[Path, Path]:
    """Write the training and test rows to a folder, split as in level 0."""
    data, train_data, test_data = settings.data, folder / "train.parquet", folder / "test.parquet"
    prepare(
        source_csv(settings),
        data.label,
        train_data,
        test_data,
        ignore=data.ignore,
        categorical=data.categorical,
        test_fraction=data.test_fraction,
        split_seed=data.split_seed,
    )
    return train_data, test_data


# ── the request ───────────────────────────────────────────────────────────────────────────────────
def check_image(jobs: Sequence[dict[str, Any]]) -> None:
    """Reject jobs whose machines cannot run an image built here."""
    platform = containers.target_platform()
    if platform != PLATFORM:
        raise UserError(
            f"this machine builds images for {platform}; Vertex AI's machines are {PLATFORM}. "
            f"Put DOCKER_DEFAULT_PLATFORM={PLATFORM} before the command."
        )
    with_gpu = [
        job
        for job in jobs
        for pool in job["workerPoolSpecs"]
        if "acceleratorType" in pool["machineSpec"]
    ]
    if with_gpu and containers.torch_build() == "cpu":
        raise UserError(
            f"{machine(with_gpu[0])}: the training image's torch would not use that GPU. Put "
            "TORCH=cu130 before the command (another CUDA version will do), or choose a job "
            'without a GPU: SET="cloud.train.jobs=[cpu]"'
        )


def find_jobs(
    settings: Settings, environment: Environment, name: str | None, image: str
) -> list[dict[str, Any]]:
    """Return the named job, or else those of project.yaml, resolved."""
    root = project_root()
    if name:
        return [gpu_jobs.resolve(name, root, environment, image)]
    return gpu_jobs.chosen_jobs(settings, root, environment, image)


def make_request(
    settings: Settings,
    environment: Environment,
    run: str,
    jobs: Sequence[dict[str, Any]],
    train_uri: str,
) -> Request:
    return Request(
        run=f"{environment.parent}/runs/{run}",
        jobs=jobs,
        args=["--train", train_uri, "--hyperparameters", settings.hyperparameters.to_json()],
        output=f"{environment.pipeline_root}/runs/{run}/model",
        labels={"project": settings.name, "commit": git.version(), "run": run},
        key=environment.key,
    )


def dry_run(settings: Settings, environment: Environment, name: str | None) -> str:
    """Return the requests as YAML, without sending them."""
    # The image has a tag here: only a push assigns a digest.
    (container,) = containers.find(project_root(), ["train"])
    image = containers.image(container, environment.images)
    jobs = find_jobs(settings, environment, name, image)
    with tempfile.TemporaryDirectory() as folder:
        train_data, _ = split(settings, Path(folder))
        uri = data_uri(environment, train_data)
    request = make_request(settings, environment, "DRY-RUN", jobs, uri)
    request.messages()
    attempts = [request.custom_job(number) for number in range(1, len(jobs) + 1)]
    return yaml.safe_dump_all(attempts, sort_keys=False, width=200)


# ── the run ───────────────────────────────────────────────────────────────────────────────────────
def begin(settings: Settings, environment: Environment, name: str | None) -> tuple[Run, Request]:
    """Upload the data, push the image and write the run's folder; submit no job yet."""
    check_image(find_jobs(settings, environment, name, ""))
    notebooks.require_in_sync()
    with tempfile.TemporaryDirectory() as folder:
        train_data, test_data = split(settings, Path(folder))
        # Before the slow build, so that errors in the data or the bucket show early.
        uri = upload_data(environment, train_data)
        training = containers.find(project_root(), ["train"])
        image = containers.make_all(training, settings, environment.images)["train"]
        run = runs.new()
        jobs = find_jobs(settings, environment, name, image)
        request = make_request(settings, environment, run.name, jobs, uri)
        run.start(settings)
        shutil.copy(train_data, run.train_data)
        shutil.copy(test_data, run.test_data)
    manifest.write_json(run.folder / REQUEST, asdict(request))
    return run, request


def resume(name: str) -> tuple[Run, Request]:
    """Return an earlier run and its stored request."""
    run = Run(runs.runs_folder() / name)
    document = runs.read_json(run.folder / REQUEST)
    if not document:
        raise UserError(
            f"RUN={name}: no training was sent from {run.folder}. Without RUN a new one begins: "
            "make train"
        )
    return run, Request(**document)


def conclude(run: Run, request: Request) -> dict[str, Any]:
    """Download the model, unless it is here already, and evaluate it on the test rows."""
    if not run.model.exists():
        with tempfile.TemporaryDirectory(dir=run.folder) as folder:
            model = storage.fetch(request.output, Path(folder, "model"))
            manifest.read(model)
            # Copied, not moved: `model` may be a path in a mounted bucket. The rename is atomic.
            shutil.copytree(model, Path(folder, "whole"))
            Path(folder, "whole").rename(run.model)
    from trainer.evaluate import evaluate

    return evaluate(run.model, run.test_data, run.evaluation)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="make train", description="Train in a custom training job on Vertex AI."
    )
    parser.add_argument(
        "--job", help="one of level_1_pipeline/gpu_jobs; otherwise those of cloud.train.jobs"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the request; send nothing")
    options = parser.parse_args()
    settings = load_settings()
    environment = resolve_environment(settings)
    if options.dry_run:
        print(dry_run(settings, environment, options.job), end="")
        return
    name = os.environ.get("RUN")
    run, request = resume(name) if name else begin(settings, environment, options.job)
    print(
        f"Run {run.name}, in {environment.region} of {environment.project}. "
        f"After an interruption: make train RUN={run.name}"
    )
    train(request)
    metrics = conclude(run, request)
    print(
        f"\nAccuracy {metrics['accuracy']:.4f} on {metrics['rows']:,} test rows "
        f"(always answering the most common class: {metrics['baseline']:.4f}).\n"
        f"The model is in runs/{run.name}/model/. "
        f"Next: make predict ROW=1 RUN={run.name} · make runs"
    )


if __name__ == "__main__":
    run_command(main)
