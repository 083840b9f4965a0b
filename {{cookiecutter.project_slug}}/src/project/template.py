"""make link: says the command that links this project to the template that it was made from.

python -m project.template https://… or /path/to/clone

A project that cookiecutter made does not know its template's address; cruft needs it, and the answers, for an update.
"""

import argparse
import json
import re
import shlex
from pathlib import Path

from core.errors import UserError, run_command
from project.settings import load_settings


def link_command(address: str) -> str:
    """The command, ready for a shell: it names the commit and the answers that project.yaml holds.

    Raises:
        UserError: the address is a folder that is not there, or project.yaml holds no commit that the template can know.
    """
    if not re.search(r"[:@]", address) and not Path(address).expanduser().is_dir():
        raise UserError(
            f"TEMPLATE={address}: there is no such folder. An address begins with https:// or git@."
        )
    template = load_settings("").template
    if not re.fullmatch("[0-9a-f]{40}", template.commit):
        raise UserError(
            f"template.commit in project.yaml is '{template.commit}', which is no commit: the template was edited, or no "
            "repository, when this project was made. Write the commit that comes nearest there (40 characters, from "
            "`git log` in the template), commit project.yaml, and try again."
        )
    answers = json.dumps(template.answers, ensure_ascii=False)
    return shlex.join(
        [
            "cruft",
            "link",
            address,
            "--no-input",
            "--checkout",
            template.commit,
            "--extra-context",
            answers,
        ]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m project.template", description=__doc__.splitlines()[0]
    )
    parser.add_argument("address", help="of the template's repository, or the folder of a clone")
    print(link_command(parser.parse_args().address))


if __name__ == "__main__":
    run_command(main)
