"""Runs a compiled pipeline on this machine: python -m launcher.kfp_local PIPELINE.yaml ARGUMENTS.json ROOT

kfp prints all that its steps print; launcher.kfp_run starts this, reads that, and tells a person what matters.
"""

import json
import sys
from pathlib import Path

from kfp import components, local


def main() -> None:
    """Run every step as a process of its own, in this environment."""
    pipeline, arguments, root = sys.argv[1:]
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=root, raise_on_error=True)
    components.load_component_from_file(pipeline)(**json.loads(Path(arguments).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
