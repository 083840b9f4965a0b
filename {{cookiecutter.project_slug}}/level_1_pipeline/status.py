"""Show runs and the champion, or make another version the champion.

make status             the champion and the last runs
make status RUN=ID      one run, from its event to the champion; also a run on Vertex AI
make rollback VERSION=N make version N the champion again

RUNNER=vertex uses the registry on Google Cloud.
"""

import argparse
import os
from typing import Any

from core.errors import UserError, run_command
from core.registry import LocalRegistry, Registry, Version, rollback_reason
from gcp.environment import names_a_project, resolve_environment
from gcp.model_registry import open_registry
from project import runs
from project.settings import load_settings

LAST_RUNS = 8


def overview(registry: Registry) -> str:
    """Return the champion and its reason, the versions, and the last pipeline runs as text."""
    champion, problem = _champion(registry)
    change = registry.last_change()
    more = " RUNNER=vertex" if in_cloud() else ""
    if problem:
        lines = [f"The champion is lost: {problem} Choose another: make rollback VERSION=N{more}"]
    elif champion is None or change is None:
        lines = [
            f"Champion: none yet. `make level1{more}` trains a model and registers it if it passes "
            "the gate."
        ]
    else:
        lines = [
            f"Champion: version {champion.number}, since {change['time']}, "
            f"because {change['reason']}.",
            f"The endpoint serves it; it is kept in {registry.where}."
            if in_cloud()
            else "`make serve` serves it; a running server loads it automatically.",
        ]
    versions = registry.versions()
    if versions:
        lines.append("\nversion  accuracy  macro F1  run                    created")
    for version in reversed(versions):  # newest first
        mark = "*" if champion and version.number == champion.number else " "
        accuracy, f1 = (
            version.metrics.get(name, float("nan")) for name in ("accuracy", "macro_f1")
        )
        row = f"{version.number:>6}{mark}  {accuracy:8.4f}  {f1:8.4f}  {version.run:<21}"
        lines.append(f"{row}  {version.created}")
    documents = [runs.read_json(run.folder / "story.json") for run in runs.all_runs()]
    records = [record for record in documents if record]
    if records:
        lines.append("\nrun                    state      gate")
        for record in reversed(records[-LAST_RUNS:]):
            lines.append(f"{record['run']:<21}  {record['state']:<9}  {_gate(record)}")
        lines.append(
            f"\nOne run: make status RUN=ID · another champion: make rollback VERSION=N{more}"
        )
    return "\n".join(lines)


def story(run: runs.Run, registry: Registry) -> str:
    """Return one run as text: event, steps, gate with its reason, version, champion."""
    record = _record(run)
    lines = [
        f"event    {record['event']}, {record['started']}",
        f"run      {record['run']}: {record['state']}",
    ]
    for step in record["steps"]:
        lines.append(f"step     {step['name']:<12} {step['state']:<10} {step['seconds']:6.1f} s")
    if record["problem"]:
        lines.append(f"problem  {record['problem']}")
    lines.append(f"gate     {_gate(record)}")
    registered = record["registered"] or {}
    number = registered.get("version")
    lines.append(f"version  {number or 'this run registered none'}")
    if registered.get("problem"):
        lines.append(f"         {registered['problem']}")
    if record.get("job"):
        from level_1_pipeline.vertex import run as vertex_run

        return "\n".join([*lines, f"page     {vertex_run.page(record['job'])}"])
    champion, problem = _champion(registry)
    if champion is None:
        lines.append(f"champion {problem or 'none yet'}")
    else:
        whose = "this run's" if champion.number == number else f"of run {champion.run}"
        lines.append(f"champion version {champion.number}, {whose}")
    return "\n".join(lines)


def _record(run: runs.Run) -> dict[str, Any]:
    """Return a run's record, updated from Vertex AI while its job is running."""
    record = runs.read_json(run.folder / "story.json")
    if record and not (record.get("job") and record["state"] == "running"):
        return record
    from level_1_pipeline.vertex import run as vertex_run

    if record:
        return vertex_run.refresh(run.folder, record)
    # Without a local folder the id may be that of a run started elsewhere, on Vertex AI.
    if run.folder.exists() or not names_a_project(load_settings()):
        raise UserError(f"run '{run.name}' is not a run of the pipeline. `make status` lists them.")
    return vertex_run.record_of(run.name)


def _champion(registry: Registry) -> tuple[Version | None, str]:
    """Return the champion, or the reason why it is unavailable."""
    try:
        return registry.champion(), ""
    except UserError as error:
        return None, str(error)


def _gate(record: dict[str, Any]) -> str:
    gate = record["gate"]
    if gate is None:
        return "not reached"
    return f"{'open' if gate['passed'] else 'closed'}: {gate['reason']}"


def in_cloud() -> bool:
    """Return True if RUNNER selects the registry on Google Cloud."""
    return os.environ.get("RUNNER") == "vertex"


def rollback(registry: LocalRegistry, number: int) -> str:
    """Make a version the champion again, regardless of its scores."""
    champion = registry.champion_number()
    if champion == number:
        raise UserError(f"version {number} is the champion already.")
    # The expected champion is passed too, so that a change in the meantime is detected.
    registry.promote(number, rollback_reason(champion), champion)
    return f"Version {number} is the champion. A running server loads it within a second."


def rollback_in_cloud(number: int) -> str:
    """Make a version the champion on Google Cloud again; DRY_RUN=1 prints the requests."""
    # The version must answer a test request first, unlike in a local rollback.
    from gcp import deployment
    from level_1_pipeline import parameters
    from level_1_pipeline.deploy_container import main as deploy_main

    settings = load_settings()
    environment = resolve_environment(settings)
    serving = parameters.serving(settings, environment)
    if os.environ.get("DRY_RUN"):
        return deploy_main.preview_of_rollback(number, serving)
    outcome = deployment.rollback(environment.registry, number, serving)
    if outcome["problem"]:
        raise UserError(outcome["problem"])
    return (
        f"Version {number} is the champion, and gets all requests of endpoint {environment.name}."
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m level_1_pipeline.status")
    parser.add_argument("--run", help="a run's id")
    parser.add_argument("--rollback", metavar="VERSION", help="the version to serve again")
    options = parser.parse_args()
    local = LocalRegistry(runs.registry_folder())
    if options.rollback is not None:
        if not options.rollback.isdecimal():
            raise UserError(
                f"VERSION={options.rollback!r} is not a version number. `make status` lists them."
            )
        number = int(options.rollback)
        print(rollback_in_cloud(number) if in_cloud() else rollback(local, number))
        return
    registry: Registry = local
    if in_cloud():
        registry = open_registry(resolve_environment(load_settings()).registry)
    run = runs.Run(runs.runs_folder() / options.run) if options.run else None
    print(story(run, registry) if run else overview(registry))


if __name__ == "__main__":
    run_command(main)
