"""A project from the default answers, which the tests of the machinery read and copy."""

import atexit
import shutil
import tempfile
from pathlib import Path

from cookiecutter.main import cookiecutter

TEMPLATE = Path(__file__).resolve().parents[2]


def _generate() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="units-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = folder / "config.yaml"
    config.write_text(f"cookiecutters_dir: {folder}\nreplay_dir: {folder}\n", encoding="utf-8")
    return Path(
        cookiecutter(str(TEMPLATE), no_input=True, output_dir=str(folder), config_file=str(config))
    )


ROOT = _generate()
