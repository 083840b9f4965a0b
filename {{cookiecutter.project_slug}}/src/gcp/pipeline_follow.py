"""A run in the cloud, followed: its steps as they end, its result, and what its gate and its registry said."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from core.errors import UserError
from core.run_record import Step, show
from core.signals import stoppable
from gcp import client as api
from gcp import pipeline_template

ENDED = {"SUCCEEDED", "FAILED", "CANCELLED"}
# What Vertex AI calls a task's state: what we call a step's.
STEP_STATES = {
    "RUNNING": "running",
    "CANCEL_PENDING": "running",
    "CANCELLING": "running",
    "SUCCEEDED": "succeeded",
    "SKIPPED": "succeeded",  # it was done before, and its result is taken from the cache
    "FAILED": "failed",
    "CANCELLED": "failed",
}


@dataclass
class Seen:
    """A run as it is now.

    Attributes:
        state: PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLED …
        steps: those that have begun, in the order in which they did.
        facts: what steps wrote about their outputs: (step, output) → metadata.
    """

    state: str
    event: str
    began: str
    problem: str
    steps: list[Step] = field(default_factory=list)
    facts: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)


def look(name: str, timeout: float | None = None) -> Seen:
    """Ask for a run by its resource name; `timeout` as in api.call.

    Raises:
        ApiError: there is no such run, or nobody answers.
    """
    client = api.client("PipelineService", name.split("/")[3])
    return read(
        api.call(client.get_pipeline_job, {"name": name}, "looking at the run", timeout=timeout)
    )


def read(job: Any) -> Seen:
    """A PipelineJob as a person wants to know it."""
    from google.protobuf import json_format

    document = json_format.MessageToDict(type(job).pb(job))
    names = pipeline_template.steps(document.get("pipelineSpec") or {"root": {}, "components": {}})
    # A retried step has an entry for each try: the last one counts.
    tasks = {
        task.task_name: task for task in job.job_detail.task_details if task.task_name in names
    }
    begun = sorted(tasks.values(), key=lambda task: str(task.create_time or task.start_time or ""))
    state = job.state.name.removeprefix("PIPELINE_STATE_")
    seen = Seen(
        state,
        job.labels.get("event", ""),
        job.create_time.isoformat(timespec="seconds"),
        _problem(job, begun),
    )
    for task in begun:
        if task.state.name in STEP_STATES:
            seen.steps.append(Step(task.task_name, STEP_STATES[task.state.name], _seconds(task)))
        for output, artifacts in task.outputs.items():
            for artifact in artifacts.artifacts:
                facts = json_format.MessageToDict(type(artifact).pb(artifact)).get("metadata", {})
                seen.facts[task.task_name, output] = {
                    name: _whole(value) for name, value in facts.items()
                }
    return seen


def _problem(job: Any, tasks: list[Any]) -> str:
    """Why the run failed: what its first failed step said, or else what is said of the run."""
    failed = [
        f"step '{task.task_name}': {task.error.message}" for task in tasks if task.error.message
    ]
    return (failed or [str(job.error.message)])[0]


def _seconds(task: Any) -> float:
    if not task.start_time or not task.end_time:
        return 0.0
    return round(float((task.end_time - task.start_time).total_seconds()), 1)


def _whole(value: Any) -> Any:
    """The integer that travelled as a double."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def follow(
    name: str,
    poll: float,
    tell: Callable[[Step], None] = show,
    changed: Callable[[Seen], None] = lambda _: None,
) -> Seen:
    """Wait for a run's end, and tell each step as it begins and ends.

    Args:
        poll: seconds between two looks.
        changed: is called after each look.

    Raises:
        ApiError: for long nobody answered; the run goes on.
    """
    told: dict[str, str] = {}
    while True:
        seen = look(name, api.WATCH)
        for step in seen.steps:
            if told.get(step.name) != step.state:
                told[step.name] = step.state
                tell(step)
        changed(seen)
        if seen.state in ENDED:
            return seen
        time.sleep(poll)


def start_and_follow(start: Callable[[], Any], name: str, poll: float, cancel: bool) -> None:
    """Start a run, follow it, and end as it ends; stopped by a signal, leave it running, or cancel it.

    Args:
        start: starts the run. A signal waits meanwhile: else nobody would know of a run that comes into being a moment later.

    Raises:
        ApiError: the run could not be started, or for long nobody answered.
        UserError: the run failed, or was cancelled.
        SystemExit: this was stopped; the code is 128 + the signal's number.
    """
    started = False
    with stoppable() as stop:
        try:
            with stop.held():
                start()
                started = True
            seen = follow(name, poll, changed=lambda _: stop.check())
        except SystemExit:
            stop.holding = True  # it is ending already
            if cancel:
                print(
                    "stopped; the run is cancelled"
                    if cancel_run(name)
                    else "stopped; no run goes on",
                    flush=True,
                )
            else:
                print(
                    "stopped; the run goes on"
                    if started
                    else "stopped before a run was seen to start",
                    flush=True,
                )
            raise
    require_success(seen)
    print("succeeded", flush=True)


def cancel_run(name: str) -> bool:
    """Ask Vertex AI to cancel a run; False if it has ended already, or there is none.

    Raises:
        ApiError: it was refused, or nobody answers.
    """
    client = api.client("PipelineService", name.split("/")[3])
    return api.cancel(client.cancel_pipeline_job, name, "cancelling the run")


def require_success(seen: Seen) -> None:
    """Pass if the run has succeeded.

    Raises:
        UserError: it has not; says why.
    """
    if seen.state != "SUCCEEDED":
        raise UserError(
            f"the run {seen.state.lower()}" + (f": {seen.problem}" if seen.problem else ".")
        )
