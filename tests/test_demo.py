"""`make demo` does what README.md says."""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_demo(root: Path, folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")
    }
    command = ["make", "demo", f"DEMO={folder}", f"PORT={port}"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_demo_runs_level_1_and_ends_with_a_prediction(root: Path, tmp_path: Path) -> None:
    with_docker = (
        bool(shutil.which("docker"))
        and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    )
    port = free_port()
    done = run_demo(root, tmp_path / "demo", port)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Registered: version 1; it is the champion." in done.stdout
    assert ("on sample:digits, in containers" in done.stdout) == with_docker
    champion = 2 if with_docker else 1
    assert f"Registered: version {champion}; it is the champion." in done.stdout
    assert "Gate: closed" in done.stdout
    assert f"The champion stays version {champion}." in done.stdout
    assert f"Asking the server at http://127.0.0.1:{port}, version {champion}." in done.stderr
    assert "██" in done.stdout
    assert re.search(r"Next: cd \S+digit-reader && make notebook", done.stdout)
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass  # the server has stopped
    shutil.rmtree(tmp_path / "demo")


def test_demo_without_docker_reports_the_skipped_step(root: Path) -> None:
    environment = {**os.environ, "DOCKER_HOST": "unix:///nowhere.sock"}
    command = ["make", "demo-containers", "PROJECT=not-looked-at"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("5/7  Skipped, because Docker is not running")


def test_demo_keeps_an_existing_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = run_demo(root, tmp_path, free_port())
    assert done.returncode == 2
    assert "make demo DEMO=" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_demo_reports_a_port_in_use_before_it_starts(root: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_demo(root, tmp_path / "demo", taken.getsockname()[1])
    assert done.returncode == 2
    assert "make demo PORT=" in done.stderr
    assert not (tmp_path / "demo").exists()
