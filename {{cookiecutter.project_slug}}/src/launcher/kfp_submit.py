"""Starts a run of a published pipeline on Vertex AI: parameters checked before anything is sent, one run for one event.

python -m launcher.kfp_submit --template gs://…/pipeline.json --parameters gs://…/parameters.json --event EVENT \\
    --project PROJECT --region REGION --pipeline-root gs://…           kfp_run_container runs it

The run's id is made of the event and the pipeline's name, so Vertex AI itself refuses a second run of the same event: that is
success here too, also when the event comes late, and the pipeline has been published anew meanwhile.
The request holds the pipeline itself and not only its address: what was checked is what runs, caching can be switched for
each run, and a template in a bucket is as good as one in a registry. Only the standard library is imported until all is
checked.
"""

import argparse
import gc
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher import command_line, kfp_template
from project.errors import UserError, run_command

LONGEST_NAME = 90  # of the 128 characters of an id


@dataclass(frozen=True)
class Target:
    """Where a run takes place, and as whom.

    Attributes:
        root: the gs:// folder below which its steps write.
        service_account, key: empty for Google's own.
        network_attachment: where the steps reach into a network of your own; empty: they do not.
    """

    project: str
    region: str
    root: str
    service_account: str = ""
    key: str = ""
    network_attachment: str = ""


def target_of(place: Any) -> Target:
    """Where an environment's runs take place: of a `project.cloud.Place`, whose module is not in every image."""
    account = place.account("pipeline")
    return Target(place.project, place.region, place.pipeline_root, account, place.key, place.network_attachment)


@dataclass(frozen=True)
class Submission:
    """A run to start.

    Attributes:
        spec: the compiled pipeline; template: where it came from.
        parameters: values for all that it asks for, but `run`: that is the run's id where nobody gives another.
        event: what happened; the same event gives the same id.
        attempt: 2 and more for a deliberate rerun of the same event.
        name: what the run is called where people look; its id if empty.
        cache: whether a step with inputs that were seen before may be left out.
    """

    spec: dict[str, Any]
    parameters: Mapping[str, Any]
    event: str
    template: str = ""
    attempt: int = 1
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    cache: bool = False

    @property
    def identity(self) -> str:
        """The run's id: ^[a-z][-a-z0-9]{0,127}$."""
        name = re.sub(r"[^a-z0-9]+", "-", self.spec["pipelineInfo"]["name"].lower()).strip("-")
        name = name if name[:1].isalpha() else f"run-{name}"
        attempt = f"-a{self.attempt}" if self.attempt > 1 else ""
        return f"{name[:LONGEST_NAME]}-{hashlib.sha256(self.event.encode()).hexdigest()[:16]}{attempt}"


@dataclass(frozen=True)
class Started:
    """A run in the cloud.

    Attributes:
        name: its resource name.
        new: whether this call started it.
        same: whether it has the template and the parameters that were asked for.
    """

    name: str
    new: bool
    same: bool = True

    @property
    def link(self) -> str:
        """The run's page."""
        _, project, _, region, _, identity = self.name.split("/")
        return f"https://console.cloud.google.com/vertex-ai/locations/{region}/pipelines/runs/{identity}?project={project}"


def request(asked: Submission, target: Target) -> dict[str, Any]:
    """What is sent, as JSON of Google's REST interface: parent, pipelineJobId, pipelineJob.

    Raises:
        UserError: the parameters do not fit the template; names each.
    """
    values = dict(asked.parameters)
    if "run" in kfp_template.signature(asked.spec):
        values.setdefault("run", asked.identity)
    kfp_template.check_parameters(asked.spec, values)
    job: dict[str, Any] = {
        "displayName": (asked.name or asked.identity)[:128],
        "pipelineSpec": with_caching(asked.spec, asked.cache),
        "runtimeConfig": {"gcsOutputDirectory": target.root, "parameterValues": values},
        "labels": labels(asked, values),
    }
    if target.service_account:
        job["serviceAccount"] = target.service_account
    if target.key:
        job["encryptionSpec"] = {"kmsKeyName": target.key}
    if target.network_attachment:
        job["pscInterfaceConfig"] = {"networkAttachment": target.network_attachment}
    if asked.template.startswith("https://"):
        job["templateUri"] = asked.template
    parent = f"projects/{target.project}/locations/{target.region}"
    return {"parent": parent, "pipelineJobId": asked.identity, "pipelineJob": job}


def with_caching(spec: Mapping[str, Any], cache: bool) -> dict[str, Any]:
    """The pipeline with caching switched on or off for every task."""
    changed: dict[str, Any] = json.loads(json.dumps(spec))
    for task in kfp_template.tasks(changed):
        task["cachingOptions"] = {"enableCache": cache}
    return changed


def labels(asked: Submission, values: Mapping[str, Any]) -> dict[str, str]:
    """The labels that were given, the event, and a hash of what the run was told, to know another one by."""
    from launcher import api

    told = json.dumps([asked.spec, values], sort_keys=True).encode()
    return api.labels({**asked.labels, "event": asked.event, "content": hashlib.sha256(told).hexdigest()[:16]})


def submit(sent: Mapping[str, Any], patience: float | None = None) -> Started:
    """Start the run, or find that it was started already.

    It may be repeated as often as need be: Vertex AI knows a run by its id.

    Args:
        patience: seconds for each call with its repetitions; otherwise api.PATIENCE.

    Raises:
        ApiError: it was refused, or not answered.
        UserError: there are no credentials.
    """
    from google.cloud.aiplatform_v1 import types
    from google.protobuf import json_format

    from launcher import api

    message = types.CreatePipelineJobRequest(parent=sent["parent"], pipeline_job_id=sent["pipelineJobId"])
    json_format.ParseDict(sent["pipelineJob"], types.CreatePipelineJobRequest.pb(message).pipeline_job)
    client = api.client("PipelineService", sent["parent"].split("/")[3])
    name = f"{sent['parent']}/pipelineJobs/{sent['pipelineJobId']}"
    try:
        api.call(client.create_pipeline_job, message, "starting the run", patience=patience)
    except api.ApiError as error:
        if error.code != 409:
            raise
    else:
        return Started(name, new=True)
    there = api.call(client.get_pipeline_job, {"name": name}, "looking at the run", patience=patience)
    return Started(name, new=False, same=there.labels.get("content") == sent["pipelineJob"]["labels"]["content"])


def start(sent: Mapping[str, Any]) -> None:
    """Start the run, and tell in one line what became of it, and its page.

    Raises:
        UserError: see `submit`.
    """
    gc.disable()  # while Google's packages are loaded, which make much that stays: a fifth of the time
    started = submit(sent)
    gc.enable()
    print(f"{'started' if started.new else 'already started'} {started.name.rpartition('/')[2]}: {started.link}", flush=True)
    if not started.same:
        print(
            "note: it was started with another template or other parameters. For a deliberate rerun add --attempt 2.",
            file=sys.stderr,
            flush=True,
        )


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────────────
def options() -> argparse.ArgumentParser:
    """What can be asked."""
    parser = argparse.ArgumentParser(prog="python -m launcher.kfp_submit", description="Start a run of a published pipeline.")
    add = parser.add_argument
    add("--template", required=True, help="the compiled pipeline: gs://…, https://REGION-kfp.pkg.dev/…, or a file")
    add("--parameters", default="{}", help="its parameters: JSON, or a file or gs:// address with JSON")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one parameter, over those; hyperparameters.epochs=50")
    add("--event", required=True, help="what happened; the same event never starts two runs")
    add("--attempt", type=_positive, default=1, help="2 and more: run the same event once again")
    add("--name", default="", help="what the run is called in the console; otherwise its id")
    add("--labels", action="append", default=[], metavar="KEY=VALUE", help="such as actor=…; over those beside the parameters")
    add("--project", required=True, help="Google Cloud's id of the project")
    add("--region", required=True, help="such as europe-west4")
    add("--pipeline-root", required=True, help="the gs:// folder below which the steps write")
    add("--service-account", default="", help="as whom the steps act")
    add("--key", default="", help="a Cloud KMS key: projects/…/cryptoKeys/…")
    add("--network-attachment", default="", help="where the steps reach into your network: projects/…/networkAttachments/…")
    add("--cache", action=argparse.BooleanOptionalAction, default=False, help="leave out steps that were done before")
    add("--wait", action="store_true", help="follow the run, and end as it ends")
    add("--poll", type=float, default=10.0, help="seconds between two looks at the run")
    add("--cancel-on-exit", action="store_true", help="with --wait: cancel the run when this is stopped")
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
        "pipeline_root": (r"gs://[a-z0-9][^\s]+", "a folder in a bucket, such as gs://BUCKET/pipeline-root"),
        "service_account": (r"([^@\s]+@[^@\s]+)?", "an address such as NAME@PROJECT.iam.gserviceaccount.com"),
        "network_attachment": (r"(projects/[^/]+/regions/[^/]+/networkAttachments/[^/]+)?", "projects/…/networkAttachments/NAME"),
        "key": (r"(projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+)?", "projects/…/cryptoKeys/NAME"),
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
    spec = kfp_template.read(asked.template)
    published, own = kfp_template.read_parameters(asked.parameters)
    values = kfp_template.override(spec, published, asked.set)
    submission = Submission(spec, values, asked.event, asked.template, asked.attempt, asked.name, own | given, asked.cache)
    target = Target(asked.project, asked.region, asked.pipeline_root, asked.service_account, asked.key, asked.network_attachment)
    sent = request(submission, target)
    if asked.dry_run:
        print(json.dumps(sent, indent=2, ensure_ascii=False))
        return
    if not asked.wait:
        start(sent)
        return
    from launcher import kfp_follow

    name = f"{sent['parent']}/pipelineJobs/{sent['pipelineJobId']}"
    kfp_follow.start_and_follow(lambda: start(sent), name, asked.poll, cancel=asked.cancel_on_exit)


if __name__ == "__main__":
    run_command(main)
