"""Run the pipeline on Vertex AI with the caller's credentials: make level1 RUNNER=vertex.

DRY_RUN=1 only prints the request.
"""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core import run_record
from core.paths import project_root
from core.run_record import Story
from gcp import pipeline_run, pipeline_template
from gcp.environment import Environment, resolve_environment
from gcp.model_registry import open_registry
from gcp.pipeline_run import RunRequest, SubmittedRun
from level_1_pipeline import compile as pipeline_compiler
from level_1_pipeline import containers, parameters
from level_1_pipeline.parameters import IMAGES
from level_1_pipeline.vertex.train import check_image, data_uri, source_csv, upload_data
from project import git, runs
from project.runs import Run
from project.settings import Settings, load_settings

POLL = 10.0  # seconds between polls of a run
# Placeholder in planned requests: an image gets its digest when it is pushed.
UNKNOWN_DIGEST = f"@sha256:{64 * '0'}"


def run(settings: Settings, dry_run: bool) -> None:
    """Build and push images, upload the data, submit the pipeline and follow it."""
    environment = resolve_environment(settings)
    local = None if settings.data.source.startswith("gs://") else source_csv(settings)
    csv = data_uri(environment, local) if local else settings.data.source
    this = runs.new()
    # Make the whole request before the slow build, so that its errors show early.
    planned = {name: f"{environment.images}/{name}{UNKNOWN_DIGEST}" for name in IMAGES}
    request = make_request(settings, environment, planned, csv, this)
    if dry_run:
        print(json.dumps(request, indent=2, ensure_ascii=False))
        return
    check_image(request["pipelineJob"]["runtimeConfig"]["parameterValues"]["jobs"])
    story = run_record.begin(this.name)
    steps = containers.find(project_root(), list(IMAGES))
    images = containers.make_all(steps, settings, environment.images)
    this.start(settings)
    started = None
    try:
        if local:
            upload_data(environment, local)
        request = make_request(settings, environment, images, csv, this)
        story.job = f"{environment.parent}/pipelineJobs/{request['pipelineJobId']}"
        # Recorded before the call: if its response is lost, `make status` still finds the job.
        story.write(this.folder)
        started = pipeline_run.submit(request)
        print(
            f"Run {this.name}: on {settings.data.source}, in {environment.region} of "
            f"{environment.project}: {started.link}",
            flush=True,
        )
        status = pipeline_run.follow(started.name, POLL)
        record(story, status)
        pipeline_run.require_success(status)
    except KeyboardInterrupt:
        if story.job:
            print(f"\nThe run continues. `make status RUN={this.name}` shows it.", flush=True)
        else:
            story.state, story.problem = "interrupted", "stopped with Ctrl-C"
        raise
    except BaseException as error:
        if not started and not getattr(error, "transient", False):
            story.job = None  # Vertex AI rejected the request
        # A run with a job already has its state, or only the connection was lost.
        if not story.job:
            story.state, story.problem = "failed", str(error) or type(error).__name__
        raise
    finally:
        story.write(this.folder)
    print(run_record.summary(story, open_registry(environment.registry).champion_number(), ""))


def make_request(
    settings: Settings, environment: Environment, images: dict[str, str], csv: str, this: Run
) -> dict[str, Any]:
    """Return the request to Vertex AI; keep the compiled pipeline if the run's folder exists."""
    values = {**parameters.for_cloud(settings, environment, images, csv), "run": this.name}
    with tempfile.TemporaryDirectory() as temporary:
        folder = this.folder if this.folder.is_dir() else Path(temporary)
        path = folder / "pipeline.yaml"
        pipeline_compiler.compile_for_cloud(images, path)
        spec = pipeline_template.read(str(path))
    actor = os.environ.get("USER") or "somebody"
    labels = {"commit": git.version(), "actor": actor, "project": settings.name}
    submission = RunRequest(
        spec,
        values,
        event=f"by hand {this.name}",
        name=f"{settings.name} {this.name}",
        labels=labels,
    )
    return pipeline_run.request(submission, pipeline_run.target_of(environment))


def record(story: Story, status: pipeline_run.RunStatus) -> None:
    """Copy a run's status on Vertex AI into its record."""
    story.steps = status.steps
    story.gate = status.facts.get(("gate", "decision"))
    story.registered = status.facts.get(("register", "version"))
    story.problem = status.problem or None
    if status.state in pipeline_run.ENDED:
        story.state = status.state.lower()


def refresh(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Update the stored record of a running run from Vertex AI; return it."""
    story = Story(**{**document, "steps": []})
    record(story, pipeline_run.look(str(story.job)))
    story.write(folder)
    return runs.read_json(folder / "story.json")


def record_of(identity: str) -> dict[str, Any]:
    """Return the record of a run started elsewhere, by its id on Vertex AI."""
    name = f"{resolve_environment(load_settings()).parent}/pipelineJobs/{identity}"
    status = pipeline_run.look(name)
    story = Story(identity, status.event, status.began, job=name)
    record(story, status)
    return asdict(story)


def page(job: str) -> str:
    """Return the URL of a run's page in the console."""
    return SubmittedRun(job, new=False).link
