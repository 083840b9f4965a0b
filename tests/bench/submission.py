"""How soon a run is submitted: from the start of the process to the request's arrival at a server on this machine.

Four ways take turns: `gcp.pipeline_run`, the same from a bucket; a process that only imports Google's generated
client, to its end; and the same submission through Google's high-level library, which is spared its look at the
bucket, because for that it asks servers that are not on this machine. The median of seven turns counts.
The template is compiled for the cloud by a process of its own, five times.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from level_2_cicd.rehearsal.server import Request, Response
from level_2_cicd.rehearsal.storage import FakeStorage
from level_2_cicd.rehearsal.vertex import FakeVertex

from tests.bench import generated
from tests.bench.report import Figure

COMPILE = """
import sys
from pathlib import Path
from level_1_pipeline import compile as pipeline_compiler, parameters
images = {name: f"example.com/{name}@sha256:{'0' * 64}" for name in parameters.STEP_IMAGES}
pipeline_compiler.compile_for_cloud(images, Path(sys.argv[1]))
"""
JSON = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))"
IMPORT = "import google.cloud.aiplatform_v1"
LIBRARY = """
import sys
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform
from google.cloud.aiplatform.utils import gcs_utils

gcs_utils.create_gcs_bucket_for_pipeline_artifacts_if_it_does_not_exist = lambda *_, **__: None
template, parameters, address, identity = sys.argv[1:]
import json
aiplatform.init(
    project="my-project", location="europe-west4", credentials=AnonymousCredentials(), api_endpoint=address, api_transport="rest"
)
aiplatform.PipelineJob(
    display_name=identity, template_path=template, job_id=identity, pipeline_root="gs://root/runs",
    parameter_values=json.loads(parameters), enable_caching=False,
).submit()
"""
EXAMPLES: Mapping[str, Any] = {
    "STRING": "x",
    "NUMBER_INTEGER": 1,
    "NUMBER_DOUBLE": 0.5,
    "LIST": [],
    "STRUCT": {},
    "BOOLEAN": True,
}


class Watched(FakeVertex):
    """Notes when a run's request has arrived."""

    arrived = 0.0

    def handle(self, request: Request) -> Response | None:
        """Note it, and answer."""
        if request.method == "POST" and request.path.endswith("/pipelineJobs"):
            self.arrived = time.perf_counter()
        return super().handle(request)


def run(project: Path, environment: Mapping[str, str], *command: str) -> tuple[float, str]:
    """A Python process of the project: when it began, and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env=dict(environment),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return began, done.stdout


def measure(small: bool) -> Iterator[Figure]:
    """Seconds, and their ratios."""
    with (
        TemporaryDirectory() as name,
        Watched() as vertex,
        FakeStorage(Path(name, "buckets")) as storage,
    ):
        folder = Path(name)
        (folder / "generated").mkdir()
        project = generated.project(folder / "generated")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{project / 'src'}:{project}",
            "STORAGE_EMULATOR_HOST": storage.address,
        }
        environment["CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"] = vertex.address
        compiled = folder / "pipeline.yaml"
        compiling = []
        for _ in range(1 if small else 5):
            began, _ = run(project, environment, "-c", COMPILE, str(compiled))
            compiling.append(time.perf_counter() - began)
        bucket = folder / "buckets" / "root"
        bucket.mkdir(parents=True)
        template = bucket / "pipeline.json"
        template.write_text(
            run(project, environment, "-c", JSON, str(compiled))[1], encoding="utf-8"
        )
        declared = json.loads(template.read_text(encoding="utf-8"))["root"]["inputDefinitions"][
            "parameters"
        ]
        values = json.dumps(
            {name: EXAMPLES[parameter["parameterType"]] for name, parameter in declared.items()}
        )
        where = [
            "--project",
            "my-project",
            "--region",
            "europe-west4",
            "--pipeline-root",
            "gs://root/runs",
        ]
        submit = [
            "-m",
            "level_2_cicd.kfp_run_container.main",
            *where,
            "--parameters",
            values,
            "--template",
        ]
        taken: dict[str, list[float]] = {"file": [], "bucket": [], "import": [], "library": []}
        for turn in range(-1, 1 if small else 7):  # the first turn fills caches
            ways = {
                "file": [*submit, str(template), "--event", f"file {turn}"],
                "bucket": [*submit, "gs://root/pipeline.json", "--event", f"bucket {turn}"],
                "import": ["-c", IMPORT],
                "library": [
                    "-c",
                    LIBRARY,
                    str(template),
                    values,
                    vertex.address,
                    f"library-{turn + 1}",
                ],
            }
            for way, command in ways.items():
                vertex.arrived = 0.0
                began, _ = run(project, environment, *command)
                if way != "import" and not vertex.arrived:
                    raise RuntimeError(f"{way}: no request arrived")
                if turn >= 0:
                    taken[way].append((vertex.arrived or time.perf_counter()) - began)
    seconds = {way: statistics.median(times) for way, times in taken.items()}
    yield Figure("kfp_submit, to the request's arrival", seconds["file"], "s")
    yield Figure("the same, with the template in a bucket", seconds["bucket"], "s")
    yield Figure("importing the generated client alone", seconds["import"], "s")
    yield Figure("the same submission through google.cloud.aiplatform", seconds["library"], "s")
    yield Figure("kfp_submit, over the import", seconds["file"] / seconds["import"], "×", "≤ 1.5")
    yield Figure(
        "from a bucket, over the import", seconds["bucket"] / seconds["import"], "×", "≤ 1.5"
    )
    yield Figure(
        "kfp_submit, over google.cloud.aiplatform",
        seconds["file"] / seconds["library"],
        "×",
        "≤ 0.4",
    )
    yield Figure("compiling and checking for the cloud", statistics.median(compiling), "s", "≤ 3")
