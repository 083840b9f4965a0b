"""make status and make rollback: a run's story from its event to the champion, and another champion.

python -m level_1_pipeline.status                   the champion, and the last runs
python -m level_1_pipeline.status --run ID          one run's story; ID may be that of a run in the cloud
python -m level_1_pipeline.status --rollback N      make version N the champion again

With RUNNER=vertex, of the cloud's registry.
"""

import argparse
import os
from typing import Any

from core.errors import UserError, run_command
from core.registry import LocalRegistry, Registry, Version, by_hand
from gcp import environment as environments
from gcp.environment import resolve_environment
from gcp.model_registry import open_registry
from project import runs
from project.settings import load_settings

LAST_RUNS = 8


def overview(registry: Registry) -> str:
    """The champion and why it is; the versions; the last runs of the pipeline."""
    champion, lost = _champion(registry)
    change, lines = registry.last_change(), []
    more = " RUNNER=vertex" if in_cloud() else ""
    if lost:
        lines.append(f"The champion is lost: {lost} Choose another: make rollback VERSION=N{more}")
    elif champion is None or change is None:
        lines.append(
            f"Champion: none yet. `make level1{more}` trains a model and registers it if it is good enough."
        )
    else:
        lines.append(
            f"Champion: version {champion.number}, since {change['time']}, because {change['reason']}."
        )
        lines.append(
            f"The endpoint serves it; it is kept in {registry.where}."
            if in_cloud()
            else "`make serve` serves it; a running server takes it by itself."
        )
    versions = registry.versions()
    if versions:
        lines.append("\nversion  accuracy  macro F1  run                    created")
        for version in reversed(versions):
            mark = "*" if champion and version.number == champion.number else " "
            scores = "  ".join(
                f"{version.metrics.get(name, float('nan')):8.4f}"
                for name in ("accuracy", "macro_f1")
            )
            lines.append(
                f"{version.number:>6}{mark}  {scores}  {version.run:<21}  {version.created}"
            )
    stories = [
        story for run in runs.all_runs() if (story := runs.read_json(run.folder / "story.json"))
    ]
    if stories:
        lines.append("\nrun                    state      gate")
        lines += [
            f"{story['run']:<21}  {story['state']:<9}  {_gate(story)}"
            for story in stories[-LAST_RUNS:][::-1]
        ]
        lines.append(
            f"\nOne run's story: make status RUN=ID · another champion: make rollback VERSION=N{more}"
        )
    return "\n".join(lines)


def story(run: runs.Run, registry: Registry) -> str:
    """Event → run → steps → gate and reason → version → the champion."""
    told = _told(run)
    lines = [
        f"event    {told['event']}, {told['started']}",
        f"run      {told['run']}: {told['state']}",
    ]
    lines += [
        f"step     {step['name']:<12} {step['state']:<10} {step['seconds']:6.1f} s"
        for step in told["steps"]
    ]
    if told["problem"]:
        lines.append(f"problem  {told['problem']}")
    lines.append(f"gate     {_gate(told)}")
    registered = told["registered"]
    number = registered["version"] if registered else None
    lines.append(f"version  {number or 'none was registered by this run'}")
    if registered and registered["problem"]:
        lines.append(f"         {registered['problem']}")
    if told.get("job"):
        from level_1_pipeline.vertex import run as vertex_run

        return "\n".join([*lines, f"page     {vertex_run.page(told['job'])}"])
    champion, lost = _champion(registry)
    if champion is None:
        lines.append(f"champion {lost or 'none yet'}")
    else:
        whose = "this run's" if champion.number == number else f"of run {champion.run}"
        lines.append(f"champion version {champion.number}, {whose}")
    return "\n".join(lines)


def _told(run: runs.Run) -> dict[str, Any]:
    """A run's story as it was written; one in the cloud is asked for, unless its end is written already.

    Raises:
        UserError: there is no such run, or the cloud does not answer.
    """
    told = runs.read_json(run.folder / "story.json")
    if told and not (told.get("job") and told["state"] == "running"):
        return told
    from level_1_pipeline.vertex import run as vertex_run

    if told:
        return vertex_run.look_again(run.folder, told)
    if run.folder.exists() or not environments.names_a_project(load_settings()):
        raise UserError(
            f"run '{run.name}' is no run of the pipeline, or there is none. `make status` lists them."
        )
    return vertex_run.story_of(run.name)


def _champion(registry: Registry) -> tuple[Version | None, str]:
    """The champion, or why it is not to be had."""
    try:
        return registry.champion(), ""
    except UserError as error:
        return None, str(error)


def _gate(told: dict[str, Any]) -> str:
    if told["gate"] is None:
        return "not reached"
    return f"{'open' if told['gate']['passed'] else 'closed'}: {told['gate']['reason']}"


def rollback(registry: LocalRegistry, number: int) -> str:
    """Make a version the champion again, whatever its scores."""
    served = registry.champion_number()
    if served == number:
        raise UserError(f"version {number} is the champion already.")
    registry.promote(number, by_hand(served), served)
    return f"Version {number} is the champion. A running server takes it within a second."


def in_cloud() -> bool:
    """Whether the cloud's registry is meant: the RUNNER variable says so."""
    return os.environ.get("RUNNER") == "vertex"


def rollback_in_cloud(number: int) -> str:
    """The same in the cloud, where a version must answer before it gets all requests; DRY_RUN=1 shows what would be sent.

    Raises:
        UserError: there is no such version, or it does not answer.
    """
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
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_1_pipeline.status", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--run", help="a run's id")
    parser.add_argument("--rollback", metavar="VERSION", help="the version to serve again")
    asked = parser.parse_args()
    if asked.rollback is not None:
        if not asked.rollback.isdecimal():
            raise UserError(
                f"VERSION={asked.rollback!r} is not a version's number. `make status` lists them."
            )
        number = int(asked.rollback)
        print(
            rollback_in_cloud(number)
            if in_cloud()
            else rollback(LocalRegistry(runs.registry_folder()), number)
        )
        return
    registry = (
        open_registry(resolve_environment(load_settings()).registry)
        if in_cloud()
        else LocalRegistry(runs.registry_folder())
    )
    print(
        story(runs.Run(runs.runs_folder() / asked.run), registry)
        if asked.run
        else overview(registry)
    )


if __name__ == "__main__":
    run_command(main)
