"""The run record: steps, gate result and registered version; `make status` prints it."""

import os
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.manifest import write_json


@dataclass
class Step:
    """One step of a run."""

    name: str
    state: str = "running"  # then "succeeded" or "failed"
    seconds: float = 0.0


@dataclass
class Story:
    """The record of one run; `job` is its resource name on Vertex AI, None for a local run."""

    run: str
    event: str
    started: str
    state: str = "running"
    steps: list[Step] = field(default_factory=list)
    gate: dict[str, Any] | None = None
    registered: dict[str, Any] | None = None
    problem: str | None = None
    job: str | None = None

    def write(self, folder: Path) -> None:
        """Write the record to the run's folder."""
        write_json(folder / "story.json", asdict(self))


def begin(run: str) -> Story:
    """Return the record of a run that a user starts now."""
    return Story(
        run,
        f"by hand, {os.environ.get('USER') or 'somebody'}",
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def show(step: Step) -> None:
    """Print a step's line when it ends; on a terminal also while it runs."""
    if step.state == "running":
        # \r lets the final line overwrite this one, which a log file could not do.
        if sys.stdout.isatty():
            print(f"  ▶ {step.name:<12} …", end="\r", flush=True)
        return
    sign = "✓" if step.state == "succeeded" else "✗"
    print(f"  {sign} {step.name:<12} {step.seconds:6.1f} s", flush=True)


def describe(registered: dict[str, Any]) -> str:
    """Describe the registered version: champion, or the reason why it is not served."""
    number = registered["version"]
    return (
        f"version {number}; it is the champion"
        if registered["champion"]
        else f"version {number}; it is not served: {registered['problem']}"
    )


def summary(story: Story, champion: int | None, following: str) -> str:
    """Summarize the run's result and the next command."""
    gate = story.gate or {"passed": False, "reason": "it was not reached"}
    lines = [f"\nGate: {'open' if gate['passed'] else 'closed'}, because {gate['reason']}."]
    if story.registered:
        lines.append(f"Registered: {describe(story.registered)}.")
    elif champion:
        lines.append(f"Nothing was registered. The champion stays version {champion}.")
    else:
        lines.append("Nothing was registered, and there is no champion yet.")
    if not gate["passed"]:
        lines.append(
            "(The gate's numbers are in project.yaml: gate.threshold, gate.max_regression.)"
        )
    return "\n".join([*lines, f"Next: {following}make status RUN={story.run} · make runs"])
