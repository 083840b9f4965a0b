"""Sends a training job to Vertex AI, follows it, and ends as it ends."""

import argparse
import json
import shlex
from typing import Any

from core.errors import UserError, run_command
from gcp import command_line
from gcp.training_job import Request, train


def read_jobs(text: str) -> list[dict[str, Any]]:
    """Resolved jobs, from JSON or where it is: one, or a list.

    Raises:
        UserError: it is neither.
    """
    found = command_line.read_json(text, "--jobs")
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(job, dict) for job in found):
        raise UserError(
            "--jobs: should be a JSON list of jobs, as `make gpu-job JOB=…` prints them."
        )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.vertex_train_container.main",
        description="Train on a machine that Vertex AI rents out for it.",
    )
    parser.add_argument(
        "--run",
        required=True,
        help="whose training it is: projects/P/locations/R/pipelineJobs/ID or …/runs/ID",
    )
    parser.add_argument(
        "--jobs",
        required=True,
        help="resolved jobs as JSON, or a file or gs:// address of it; tried in order",
    )
    parser.add_argument(
        "--output", required=True, help="gs://BUCKET/…/model, where the saved model goes"
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for the job; may be repeated",
    )
    parser.add_argument(
        "--key", default="", help="the Cloud KMS key that encrypts what the job writes to its disk"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be sent, and send nothing"
    )
    parser.add_argument(
        "args", nargs="*", metavar="ARGUMENT", help="after --: what trainer.train is told"
    )
    given = parser.parse_args()
    labels = command_line.pairs(given.label, "--label")
    request = Request(given.run, read_jobs(given.jobs), given.args, given.output, labels, given.key)
    if given.dry_run:
        request.messages()
        print(
            json.dumps(
                [request.custom_job(attempt) for attempt in range(1, len(request.jobs) + 1)],
                indent=2,
            )
        )
        return
    print(f"trained: {train(request)['page']}\n{shlex.quote(request.output)} holds the model")


if __name__ == "__main__":
    run_command(main)
