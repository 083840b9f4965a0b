"""make doctor: what is there, what is missing, how to get it."""

import subprocess
import sys

import pytest
from project import doctor


def test_it_runs_without_any_package():
    done = subprocess.run(
        [sys.executable, "-I", "-S", doctor.__file__, "python"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_named_with_the_way_to_get_it(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert doctor.report() is False  # git and make are needed
    out = capsys.readouterr().out
    assert "✗ git" in out
    assert "· docker" in out  # not needed for level 0
    assert "get it: " in out
    assert [line for line in out.splitlines() if line.startswith("Level")] == list(doctor.LEVELS)


def test_an_engine_that_does_not_answer_is_there(monkeypatch, capsys, tmp_path):
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    doctor.report()
    assert (
        f"docker       does not respond: runs the steps as containers\n      {doctor.START_DOCKER}"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("platform_name", "release", "expected"),
    [
        ("darwin", "24.0", "macos"),
        ("linux", "6.1.0", "linux"),
        ("linux", "5.15-microsoft-standard-WSL2", "wsl"),
    ],
)
def test_the_advice_fits_the_system(monkeypatch, platform_name, release, expected):
    monkeypatch.setattr(sys, "platform", platform_name)
    monkeypatch.setattr(doctor.platform, "release", lambda: release)
    assert doctor.system() == expected
    for check in doctor.CHECKS:
        assert check.get[expected]


def test_an_old_python_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    monkeypatch.setattr(sys, "argv", ["doctor.py", "python"])
    with pytest.raises(SystemExit) as left:
        doctor.main()
    assert left.value.code == 2
    assert "Python 3.11 or newer is needed, this is 3.9.1" in capsys.readouterr().err
