"""Models are trained, read and served on a file system that cannot rename folders, like buckets."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trainer.data import find_csv

pytestmark = pytest.mark.heavy

Command = Callable[..., str]
# The system's Python has the package that mounts; this environment has not.
SYSTEM_PYTHON = shutil.which("python3", path=os.defpath) or "python3"


@pytest.fixture
def bucket(root: Path, tmp_path: Path) -> Iterator[Path]:
    """A mounted bucket, GCS_MOUNT/bucket."""
    import_fusepy = [SYSTEM_PYTHON, "-c", "import fusepy"]
    failed = subprocess.run(import_fusepy, capture_output=True).returncode
    if failed or not Path("/dev/fuse").exists():
        stop = pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip
        stop("this test needs /dev/fuse and fusepy")
    source, mountpoint = tmp_path / "source", tmp_path / "gcs" / "bucket"
    source.mkdir()
    mountpoint.mkdir(parents=True)
    server = subprocess.Popen(
        [SYSTEM_PYTHON, root / "tests" / "bucket.py", source, mountpoint],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr
    try:
        while not mountpoint.is_mount():
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.05)
        yield mountpoint
    finally:
        server.terminate()  # this unmounts it
        server.communicate()
    assert not mountpoint.is_mount()


@pytest.fixture
def project(template: Path, bucket: Path) -> Command:
    """Run a module of the project; gs://bucket/… is in the mounted bucket."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{template / 'src'}:{template}",
        "GCS_MOUNT": str(bucket.parent),
    }

    def run(module: str, *arguments: object) -> str:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_model_is_trained_evaluated_and_served_without_renaming_folders(
    project: Command, template: Path, bucket: Path
) -> None:
    (bucket / "before").mkdir()
    with pytest.raises(PermissionError):
        (bucket / "before").rename(bucket / "after")
    (bucket / "before" / "file").write_text("content")
    (bucket / "before" / "file").rename(bucket / "file")
    assert (bucket / "file").read_text() == "content"

    find_csv("sample:digits", bucket)
    datasets = ["--train", "gs://bucket/train.parquet", "--test", "gs://bucket/test.parquet"]
    project("trainer.data", "--csv", "gs://bucket/digits.csv", "--label", "digit", *datasets)
    options = {"seed": 0, "threads": 1, "epochs": 12, "batch_size": 128, "learning_rate": 0.003}
    folders = ["--model-dir", "gs://bucket/model", "--checkpoint-dir", "gs://bucket/checkpoints"]
    for _ in range(2):  # the second time over the existing model, from the checkpoint
        trained = project(
            "trainer.train", *datasets[:2], *folders, "--hyperparameters", json.dumps(options)
        )
    assert "Resuming after epoch 12" in trained
    assert (bucket / "checkpoints" / "checkpoint.safetensors").is_file()
    assert not list(bucket.rglob("*.partial"))
    scores = ["--metrics-file", "gs://bucket/scores.json"]
    project("trainer.evaluate", "--model-dir", "gs://bucket/model", *datasets[2:], *scores)
    assert json.loads((bucket / "scores.json").read_text())["accuracy"] > 0.9

    command = [sys.executable, "-m", "predictor.server", "--port", "0"]
    served = {
        **os.environ,
        "PYTHONPATH": f"{template / 'src'}:{template}",
        "AIP_STORAGE_URI": str(bucket / "model"),
    }
    with subprocess.Popen(command, env=served, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        line = server.stderr.readline()
        address, _, body = line.strip().rpartition("try: curl ")[2].partition(" -d ")
        with urllib.request.urlopen(address, body.strip("'").encode()) as answer:
            assert len(json.load(answer)["predictions"]) == 1
        server.terminate()
        assert server.wait(30) == 0
