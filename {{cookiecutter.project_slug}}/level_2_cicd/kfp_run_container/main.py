"""Starts a run of a published pipeline, one per event, and follows it with --wait.

python -m level_2_cicd.kfp_run_container.main --template gs://…/pipeline.json \\
    --parameters gs://…/parameters.json --event EVENT --project PROJECT --region REGION \\
    --pipeline-root gs://…
"""

import argparse
import gc
import json
import re
import sys

from core.errors import UserError, run_command
from gcp import pipeline_run, pipeline_template
from gcp.pipeline_run import RunRequest, Target


def options() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.kfp_run_container.main",
        description="Start a run of a published pipeline.",
    )
    add = parser.add_argument
    add(
        "--template",
        required=True,
        help="the compiled pipeline: gs://…, https://REGION-kfp.pkg.dev/…, or a file",
    )
    add(
        "--parameters",
        default="{}",
        help="its parameters: JSON, or a file or gs:// address with JSON",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a parameter, such as hyperparameters.epochs=50",
    )
    add("--event", required=True, help="what happened; the same event never starts two runs")
    add("--attempt", type=_positive, default=1, help="2 and more: rerun the same event")
    add("--name", default="", help="display name in the console; otherwise the id")
    add(
        "--labels",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="labels of the run, such as actor=…",
    )
    add("--project", required=True, help="project id")
    add("--region", required=True, help="such as europe-west4")
    add("--pipeline-root", required=True, help="the gs:// folder below which the steps write")
    add("--service-account", default="", help="of the steps; otherwise Google's default")
    add("--key", default="", help="a Cloud KMS key: projects/…/cryptoKeys/…")
    add(
        "--network-attachment",
        default="",
        help="of your network: projects/…/networkAttachments/…",
    )
    add(
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="reuse results of earlier runs",
    )
    add("--wait", action="store_true", help="follow the run and end as it ends")
    add("--poll", type=float, default=10.0, help="seconds between two requests")
    add(
        "--cancel-on-exit",
        action="store_true",
        help="with --wait: cancel the run when this command is stopped",
    )
    add("--dry-run", action="store_true", help="print the request without sending it")
    return parser


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"expected 1, 2, 3 …; got '{text}'")
    return int(text)


# Option → pattern and description; everything that can be checked without a request.
RULES = {
    "event": (r"(?s).*\S.*", "text that identifies what happened"),
    "project": (r"[a-z][a-z0-9:.-]{4,60}[a-z0-9]", "a project id, such as my-project-123"),
    "region": (r"[a-z]+-[a-z]+\d+", "a region, such as europe-west4"),
    "pipeline_root": (r"gs://[a-z0-9][^\s]+", "a folder, such as gs://BUCKET/pipeline-root"),
    "service_account": (
        r"([^@\s]+@[^@\s]+)?",
        "an address such as NAME@PROJECT.iam.gserviceaccount.com",
    ),
    "network_attachment": (
        r"(projects/[^/]+/regions/[^/]+/networkAttachments/[^/]+)?",
        "projects/…/networkAttachments/NAME",
    ),
    "key": (
        r"(projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+)?",
        "projects/…/cryptoKeys/NAME",
    ),
}


def main() -> None:
    """Check the options, start the run, follow it with --wait."""
    args = options().parse_args()
    for name, (pattern, expected) in RULES.items():
        value = getattr(args, name)
        if not re.fullmatch(pattern, value):
            raise UserError(f"--{name.replace('_', '-')} '{value}': expected {expected}.")
    labels = pipeline_template.pairs(args.labels, "--labels")
    spec = pipeline_template.read(args.template)
    values, published_labels = pipeline_template.read_parameters(args.parameters)
    run = RunRequest(
        spec=spec,
        parameters=pipeline_template.override(spec, values, args.set),
        event=args.event,
        template=args.template,
        attempt=args.attempt,
        name=args.name,
        labels=published_labels | labels,
        cache=args.cache,
    )
    target = Target(
        project=args.project,
        region=args.region,
        root=args.pipeline_root,
        service_account=args.service_account,
        key=args.key,
        network_attachment=args.network_attachment,
    )
    job = pipeline_run.request(run, target)
    if args.dry_run:
        print(json.dumps(job, indent=2, ensure_ascii=False))
        return

    def start() -> None:
        # Importing Google's packages creates many long-lived objects: without the garbage
        # collector it takes a fifth less time.
        gc.disable()
        submitted = pipeline_run.submit(job)
        gc.enable()
        state = "started" if submitted.new else "already started"
        print(f"{state} {run.identity}: {submitted.link}", flush=True)
        if not submitted.same:
            print(
                "note: it was started with another template or other parameters. "
                "For a deliberate rerun add --attempt 2.",
                file=sys.stderr,
                flush=True,
            )

    if args.wait:
        name = f"{job['parent']}/pipelineJobs/{run.identity}"
        pipeline_run.start_and_follow(start, name, args.poll, cancel=args.cancel_on_exit)
    else:
        start()


if __name__ == "__main__":
    run_command(main)
