"""Starts a run of a published pipeline."""

import argparse
import gc
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from core.errors import UserError, run_command
from gcp import command_line, pipeline_template
from gcp.pipeline_run import Submission, Target, request, submit


def options() -> argparse.ArgumentParser:
    """What can be asked."""
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
        help="one parameter, over those; hyperparameters.epochs=50",
    )
    add("--event", required=True, help="what happened; the same event never starts two runs")
    add("--attempt", type=_positive, default=1, help="2 and more: run the same event once again")
    add("--name", default="", help="what the run is called in the console; otherwise its id")
    add(
        "--labels",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="such as actor=…; over those beside the parameters",
    )
    add("--project", required=True, help="Google Cloud's id of the project")
    add("--region", required=True, help="such as europe-west4")
    add("--pipeline-root", required=True, help="the gs:// folder below which the steps write")
    add("--service-account", default="", help="as whom the steps act")
    add("--key", default="", help="a Cloud KMS key: projects/…/cryptoKeys/…")
    add(
        "--network-attachment",
        default="",
        help="where the steps reach into your network: projects/…/networkAttachments/…",
    )
    add(
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out steps that were done before",
    )
    add("--wait", action="store_true", help="follow the run, and end as it ends")
    add("--poll", type=float, default=10.0, help="seconds between two looks at the run")
    add(
        "--cancel-on-exit",
        action="store_true",
        help="with --wait: cancel the run when this is stopped",
    )
    add("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    return parser


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"wants 1, 2, 3 …; it is '{text}'")
    return int(text)


def check(asked: argparse.Namespace) -> None:
    """What can be seen to be wrong without asking anybody.

    Raises:
        UserError: says which option, and what it wants.
    """
    rules = {
        "event": (r"(?s).*\S.*", "some words that name what happened"),
        "project": (r"[a-z][a-z0-9:.-]{4,60}[a-z0-9]", "a project's id, such as my-project-123"),
        "region": (r"[a-z]+-[a-z]+\d+", "a region, such as europe-west4"),
        "pipeline_root": (
            r"gs://[a-z0-9][^\s]+",
            "a folder in a bucket, such as gs://BUCKET/pipeline-root",
        ),
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
    for name, (pattern, wanted) in rules.items():
        value = getattr(asked, name)
        if not re.fullmatch(pattern, value):
            raise UserError(f"--{name.replace('_', '-')} '{value}': wants {wanted}.")


def main() -> None:
    """Check, start, and follow if asked to."""
    asked = options().parse_args()
    check(asked)
    given = command_line.pairs(asked.labels, "--labels")
    spec = pipeline_template.read(asked.template)
    published, own = pipeline_template.read_parameters(asked.parameters)
    values = pipeline_template.override(spec, published, asked.set)
    submission = Submission(
        spec,
        values,
        asked.event,
        asked.template,
        asked.attempt,
        asked.name,
        own | given,
        asked.cache,
    )
    target = Target(
        asked.project,
        asked.region,
        asked.pipeline_root,
        asked.service_account,
        asked.key,
        asked.network_attachment,
    )
    sent = request(submission, target)
    if asked.dry_run:
        print(json.dumps(sent, indent=2, ensure_ascii=False))
        return
    if not asked.wait:
        start(sent)
        return
    from gcp import pipeline_follow

    name = f"{sent['parent']}/pipelineJobs/{sent['pipelineJobId']}"
    pipeline_follow.start_and_follow(
        lambda: start(sent), name, asked.poll, cancel=asked.cancel_on_exit
    )


def start(sent: Mapping[str, Any]) -> None:
    """Start the run, and tell in one line what became of it, and its page.

    Raises:
        UserError: see `submit`.
    """
    gc.disable()  # while Google's packages are loaded, which make much that stays: a fifth of the time
    started = submit(sent)
    gc.enable()
    print(
        f"{'started' if started.new else 'already started'} {started.name.rpartition('/')[2]}: {started.link}",
        flush=True,
    )
    if not started.same:
        print(
            "note: it was started with another template or other parameters. For a deliberate rerun add --attempt 2.",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    run_command(main)
