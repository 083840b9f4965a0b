"""A full disk, files not to be read, runs that are killed: what is left is whole or plainly not there."""

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
from core import manifest
from core.errors import UserError
from core.schema import Column, Schema
from trainer import data, export
from trainer.config import Hyperparameters
from trainer.model import Network
from trainer.train import train

pytestmark = pytest.mark.heavy

SOURCES = Path(data.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCES)}
NOBODY = 65534


def write_csv(path: Path, rows: int, kind: str) -> Path:
    """Rows of numbers and text; files of two kinds have no row in common."""
    columns = f"i AS number, i * i / 7 AS other, '{kind}' || i % 50 AS word, i % 3 AS label"
    duckdb.execute(
        f"COPY (SELECT {columns} FROM range({rows}) t(i)) TO '{path}' (FORMAT csv, HEADER)"
    )
    return path


def pair(folder: Path) -> tuple[Path, Path]:
    return folder / "train.parquet", folder / "test.parquet"


def prepare(path: Path, folder: Path) -> None:
    data.prepare(path, "label", *pair(folder))


def state(folder: Path) -> list[tuple[str, int] | None]:
    """Of both sides the hash of their CSV file and the number of rows; None where there is no file."""
    return [
        (data.read_origin(path)["sha256"], len(data.read_rows(path)["label"]))
        if path.exists()
        else None
        for path in pair(folder)
    ]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An old CSV file, whose rows are prepared, a new one, and the folder of the rows."""
    old, new = (
        write_csv(tmp_path / "old.csv", 3000, "old"),
        write_csv(tmp_path / "new.csv", 60_000, "new"),
    )
    prepare(old, tmp_path / "run")
    return old, new, tmp_path / "run"


def start_prepare(path: Path, folder: Path, before: str = "") -> subprocess.Popen[str]:
    """A process that has imported all, and prepares when it is sent a line; `before` is code to run first."""
    code = f"""
{before}
from pathlib import Path
from trainer import data
print("ready", flush=True)
input()
data.prepare(Path({str(path)!r}), "label", *map(Path, {[str(side) for side in pair(folder)]!r}))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, text=True, **pipes)
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def check_pair(files: tuple[Path, Path, Path], whole: dict[Path, list[Any]]) -> list[Any]:
    """After a kill: each file is whole, two of them belong together, and the next run works."""
    old, _, folder = files
    found = state(folder)
    for source in whole.values():
        if all(side in (None, expected) for side, expected in zip(found, source, strict=True)):
            break
    else:
        pytest.fail(f"{found} is neither of {whole}")
    prepare(old, folder)
    assert state(folder) == whole[old]
    assert sorted(path.name for path in folder.iterdir()) == ["test.parquet", "train.parquet"]
    return found


@pytest.fixture
def whole(files: tuple[Path, Path, Path]) -> dict[Path, list[Any]]:
    """What `state` says when nothing is disturbed, of both CSV files."""
    old, new, folder = files
    prepare(new, folder)
    of_new = state(folder)
    prepare(old, folder)
    return {old: state(folder), new: of_new}


def test_rows_are_whole_when_a_run_is_killed_at_any_moment(
    files: tuple[Path, Path, Path], whole: dict[Path, list[Any]]
) -> None:
    _, new, folder = files
    process, started = start_prepare(new, folder), time.monotonic()
    tell(process)
    assert process.wait() == 0
    duration = time.monotonic() - started
    assert state(folder) == whole[new]
    moments = random.Random(4)
    killed = 0
    for _ in range(20):
        process = start_prepare(new, folder)
        tell(process)
        time.sleep(moments.uniform(0, duration))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        check_pair(files, whole)
    assert killed >= 10  # some moments come when all is done


STEPS = """
import os, pathlib, signal
def watched(change):
    def wrapped(self, *args, **kwargs):
        if self.name.endswith(".parquet") or args and str(args[0]).endswith(".parquet"):
            count.append(0)
            if len(count) == {step}:
                os.kill(os.getpid(), signal.SIGKILL)
        return change(self, *args, **kwargs)
    return wrapped
count = []
for name in ("unlink", "replace", "rename"):
    setattr(pathlib.Path, name, watched(getattr(pathlib.Path, name)))
"""


def test_rows_are_whole_when_a_run_is_killed_before_each_change_of_a_name(
    files: tuple[Path, Path, Path], whole: dict[Path, list[Any]]
) -> None:
    _, new, folder = files
    left = []
    for step in range(1, 20):
        process = start_prepare(new, folder, STEPS.format(step=step))
        tell(process)
        if process.wait() == 0:
            break
        left.append(check_pair(files, whole))
    assert len(left) >= 3  # two files to put in the place of two others
    assert state(folder) == whole[new]


@pytest.fixture(scope="module")
def networks() -> dict[int, tuple[Network, Schema]]:
    """Two networks that differ in their schemas."""
    made = {}
    for size in (2, 3):
        schema = Schema(
            "label", tuple(Column(f"c{number}", "numeric") for number in range(size)), (0, 1)
        )
        made[size] = (Network(schema), schema)
    return made


def test_a_model_is_whole_when_its_saving_is_killed_at_any_moment(
    networks: dict[int, tuple[Network, Schema]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The export works in a folder of its own and returns bytes; here it need not be done twenty times.
    monkeypatch.setattr(export, "to_onnx", lambda network, columns: bytes(columns * 300_000))
    fork = multiprocessing.get_context("fork")

    def save(size: int) -> None:
        export.save(tmp_path, *networks[size], {"columns": size}, {})

    started = time.monotonic()
    save(2)
    duration = time.monotonic() - started
    moments = random.Random(4)
    for _ in range(20):
        process = fork.Process(target=save, args=(3,))
        process.start()
        time.sleep(moments.uniform(0, 2 * duration))
        process.kill()
        process.join()
        try:
            columns = len(manifest.read(tmp_path)["schema"]["columns"])
        except UserError as error:
            assert "holds no saved model" in str(error)
        else:
            assert json.loads((tmp_path / export.METRICS).read_text()) == {"columns": columns}
        save(2)
        assert len(export.load(tmp_path)[1].columns) == 2


def test_a_half_written_manifest_is_in_nobodys_way(
    networks: dict[int, tuple[Network, Schema]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "to_onnx", lambda network, columns: b"network")
    (tmp_path / "model.json.partial").write_text("{")  # what a killed run may leave
    export.save(tmp_path, *networks[2], {}, {})
    assert export.load(tmp_path)[1] == networks[2][1]


def run_with_small_disk(code: str, limit: int) -> subprocess.CompletedProcess[str]:
    """Run a command's main function; no file may grow beyond `limit` bytes, as if the disk were full."""

    def shrink() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = f"from pathlib import Path\nfrom core.errors import run_command\n{code}"
    # -B: compiled modules are files too
    return subprocess.run(
        [sys.executable, "-B", "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=shrink,
    )


def check_told(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert os.strerror(errno.EFBIG) in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("limit", [0, 200_000])
def test_a_full_disk_keeps_the_old_rows(
    limit: int, files: tuple[Path, Path, Path], whole: dict[Path, list[Any]]
) -> None:
    old, new, folder = files
    paths = [str(path) for path in (new, *pair(folder))]
    code = f"from trainer import data\nsource, *sides = map(Path, {paths!r})\n"
    done = run_with_small_disk(
        code + "run_command(lambda: data.prepare(source, 'label', *sides))", limit
    )
    check_told(done)
    assert "MB are needed" in done.stderr
    assert state(folder) == whole[old]
    assert len(list(folder.iterdir())) == 2
    prepare(new, folder)
    assert state(folder) == whole[new]


def test_a_full_disk_leaves_no_half_sample(tmp_path: Path) -> None:
    call = f"data.find_csv('sample:wine', Path({str(tmp_path)!r}))"
    check_told(run_with_small_disk(f"from trainer import data\nrun_command(lambda: {call})", 5000))
    assert not list(tmp_path.iterdir())
    assert data.find_csv("sample:wine", tmp_path).stat().st_size > 5000


def test_a_full_disk_leaves_no_half_model(files: tuple[Path, Path, Path]) -> None:
    _, _, folder = files
    options = Hyperparameters(seed=0, threads=1, epochs=1, batch_size=64, learning_rate=0.01)
    code = f"""
from trainer.train import train
from trainer.config import Hyperparameters
options = Hyperparameters.from_json({options.to_json()!r})
folder = Path({str(folder)!r})
run_command(lambda: train(folder / "train.parquet", folder / "model", options))
"""
    done = run_with_small_disk(code, 3000)
    check_told(done)
    with pytest.raises(UserError, match="holds no saved model"):
        export.load(folder / "model")
    train(folder / "train.parquet", folder / "model", options)
    export.load(folder / "model")


@contextmanager
def somebody_else() -> Iterator[None]:
    """Root may read and write anything, so it becomes somebody else for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may write into."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def forbid_reading(path: Path) -> None:
    path.chmod(0)


def forbid_folder(path: Path) -> None:
    closed = path.parent / "closed"
    closed.mkdir()
    path.rename(closed / path.name)
    path.symlink_to(closed / path.name)
    closed.chmod(0)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "not to be read": (forbid_reading, r"any\.csv cannot be read: Permission denied.*ls -l"),
    "in a closed folder": (forbid_folder, r"any\.csv cannot be read: Permission denied"),
    "a folder": (become_folder, r"any\.csv is a folder.*data\.source"),
    "a pipe": (become_pipe, r"any\.csv is no ordinary file.*data\.source"),
    "not there": (lambda path: path.unlink(), r"there is no file .*any\.csv.*data\.source"),
    "output not to be written": (
        lambda path: path.parent.chmod(0o555),
        r"written to .*Permission denied",
    ),
    "output below a file": (lambda path: (path.parent / "out").touch(), r"written to .*out"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_files_that_cannot_be_used_are_told(case: str, open_folder: Path) -> None:
    spoil, message = SPOILT[case]
    path = write_csv(open_folder / "any.csv", 30, "x")
    path.chmod(0o644)
    spoil(path)
    with somebody_else(), pytest.raises(UserError, match=message):
        prepare(path, open_folder / "out")
    assert not list(open_folder.glob("out/*"))
    open_folder.chmod(0o777)


@pytest.mark.parametrize("step", ["is_test", "sha256"])
def test_a_file_that_vanishes_is_told(
    step: str,
    files: tuple[Path, Path, Path],
    whole: dict[Path, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new, folder = files
    real = getattr(data, step)

    def vanish(*arguments: Any) -> Any:
        new.unlink()
        return real(*arguments)

    monkeypatch.setattr(data, step, vanish)
    with pytest.raises(UserError, match=r"new\.csv vanished while it was read"):
        prepare(new, folder)
    assert state(folder) == whole[old]
    assert len(list(folder.iterdir())) == 2


def test_damaged_rows_are_told(files: tuple[Path, Path, Path]) -> None:
    _, _, folder = files
    path, _ = pair(folder)
    content = path.read_bytes()
    for part in (b"", content[: len(content) // 2]):
        path.write_bytes(part)
        with pytest.raises(UserError, match=r"train\.parquet is damaged .*trainer\.data"):
            data.read_rows(path)
