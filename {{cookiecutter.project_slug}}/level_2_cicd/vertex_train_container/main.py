"""Run a custom training job on Vertex AI and exit with its result."""

import argparse
import json
import shlex
from typing import Any

from core.errors import UserError, run_command
from gcp import pipeline_template
from gcp.training_job import Request, train


def read_jobs(text: str) -> list[dict[str, Any]]:
    """Parse one resolved job or a list of jobs from JSON, a JSON file or a gs:// address."""
    document = pipeline_template.read_json(text, "--jobs")
    jobs = [document] if isinstance(document, dict) else document
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise UserError(
            "--jobs: expected a JSON list of jobs, as `make gpu-job JOB=…` prints them."
        )
    return jobs


def main() -> None:
    """Parse the command line and run the training job."""
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.vertex_train_container.main", description=__doc__
    )
    add = parser.add_argument
    add("--run", required=True, help="projects/P/locations/R/pipelineJobs/ID, or …/runs/ID")
    add("--jobs", required=True, help="resolved jobs: JSON, a file or a gs:// address")
    add("--output", required=True, help="gs://BUCKET/…/model, the saved model's folder")
    add("--label", action="append", default=[], metavar="KEY=VALUE", help="of the job; repeatable")
    add("--key", default="", help="the Cloud KMS key that encrypts the job's disk")
    add("--dry-run", action="store_true", help="print the request; send nothing")
    add("args", nargs="*", metavar="ARGUMENT", help="after --: arguments of trainer.train")
    options = parser.parse_args()
    labels = pipeline_template.pairs(options.label, "--label")
    jobs = read_jobs(options.jobs)
    request = Request(options.run, jobs, options.args, options.output, labels, options.key)
    if options.dry_run:
        request.messages()  # validates the jobs against the API
        attempts = [request.custom_job(number) for number in range(1, len(jobs) + 1)]
        print(json.dumps(attempts, indent=2))
        return
    print(f"trained: {train(request)['page']}\n{shlex.quote(request.output)} holds the model")


if __name__ == "__main__":
    run_command(main)
