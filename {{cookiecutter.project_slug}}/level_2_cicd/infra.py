"""Terraform as `make` calls it: the state's bucket, the environment and the images are named, and mistakes told beforehand.

python -m level_2_cicd.infra plan | apply [--yes] | destroy [--yes]      the stack, which each push applies
python -m level_2_cicd.infra foundation [--plan] [--yes]                 what a person with the rights applies, once
python -m level_2_cicd.infra unlock --id ID [--foundation]               takes a lock away that a killed apply has left
python -m level_2_cicd.infra check                                       form and grammar, with no account and no state
python -m level_2_cicd.infra grants                                      every right that the foundation gives, and why

The state is in a bucket that the foundation makes. So the first `foundation` begins with a state on this machine, in
build/terraform/, and moves it there; cut off anywhere, the same command goes on.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError, run_command
from core.paths import project_root
from gcp import storage
from gcp.environment import Environment, resolve_environment
from level_2_cicd import submit_build
from project.settings import Settings, load_settings

FOLDER = Path("level_2_cicd/terraform")
WORK = Path("build/terraform")
IMAGES = Path("build/images.json")
CONFIG = Path("build/terraform.rc")
OVERRIDE = "backend_override.tf"  # Terraform reads it instead of the backend in versions.tf
OLDEST = (1, 9)
# What Terraform says of a lock in the bucket; one of a state on this machine ends with whoever holds it.
LOCKED = re.compile(r"Error acquiring the state lock.*?\bID:\s+(\S+)\W+Path:\s+gs://", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One of the two configurations, for one environment.

    Attributes:
        name: stack or foundation.
        root: the project's folder.
        mirror: the address that providers come from; empty: Terraform's own registry.
    """

    name: str
    environment: Environment
    root: Path
    mirror: str = ""

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.root / FOLDER / ("" if self.name == "stack" else self.name)

    @property
    def work(self) -> Path:
        """What Terraform keeps of it on this machine; one for each environment, so that they never mix."""
        return self.root / WORK / self.environment.environment / self.name

    @property
    def state(self) -> str:
        """The address of its state."""
        return f"gs://{self.environment.terraform_state}/{self.name}/default.tfstate"


# ── calling it ──────────────────────────────────────────────────────────────────────────────────────────────────────
def require() -> str:
    """See that Terraform is there, and new enough; returns its version.

    Raises:
        UserError: says how to get it.
    """
    how = "https://developer.hashicorp.com/terraform/install says how to get it. `make toolbox` makes an image that has it."
    if shutil.which("terraform") is None:
        raise UserError(f"terraform is not installed. {how}")
    done = subprocess.run(
        ["terraform", "version", "-json"], capture_output=True, text=True, check=False
    )
    try:
        found = str(json.loads(done.stdout)["terraform_version"])
    except (ValueError, KeyError):
        raise UserError(
            f"`terraform version` does not answer: {(done.stderr or done.stdout).strip()[:200]}"
        ) from None
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        raise UserError(
            f"terraform {found} is too old; it must be {'.'.join(map(str, OLDEST))} or newer. {how}"
        )
    return found


class Running:
    """Terraform, which is waited for whoever interrupts: cut off, it would lose the state of what it has just made.

    Ctrl-C reaches it by itself, and SIGTERM is handed on; it ends in an orderly way then, and so does this program.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.heard = 0

    def __call__(self, number: int, _: object) -> None:
        """The signals' handler."""
        self.heard = number
        if number == signal.SIGTERM and self.process:
            self.process.terminate()

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], quiet: bool
    ) -> tuple[int, str, str]:
        """Run it to its end; its exit code, with `quiet` what it prints, and its errors, which are shown as they come.

        Raises:
            KeyboardInterrupt, SystemExit: somebody interrupted.
        """
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            printing = subprocess.PIPE if quiet else None
            with subprocess.Popen(
                command,
                env=environment,
                stdout=printing,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
            ) as self.process:
                errors: list[str] = []
                showing = threading.Thread(target=show, args=(self.process.stderr, errors))
                showing.start()
                printed = self.process.stdout.read() if self.process.stdout else ""
                self.process.wait()
                showing.join()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.heard == signal.SIGINT:
            raise KeyboardInterrupt
        if self.heard:
            raise SystemExit(128 + self.heard)
        return self.process.returncode, printed, "".join(errors)


def show(stream: Iterable[str], kept: list[str]) -> None:
    """Show lines as errors as they come, and keep them."""
    for line in stream:
        print(line, end="", file=sys.stderr, flush=True)
        kept.append(line)


def call(part: Part, *words: str, quiet: bool = False) -> str:
    """Run Terraform in a part's folder; with `quiet`, returns what it prints, and shows that only if it failed.

    Raises:
        UserError: it failed; its own words stand above.
    """
    environment = {
        **os.environ,
        "TF_DATA_DIR": str(part.work),
        "TF_IN_AUTOMATION": "1",
        **from_mirror(part),
    }
    plain = [] if sys.stdout.isatty() and not quiet else ["-no-color"]
    command = ["terraform", f"-chdir={part.folder}", words[0], *plain, *words[1:]]
    code, printed, errors = Running().run(command, environment, quiet)
    if code:
        print(printed, end="", file=sys.stderr)
        told = (
            f"terraform {words[0]} of the {part.name} failed; what it says above names the cause."
        )
        raise UserError(f"{told}{how_to_unlock(part, errors)}")
    return printed


def from_mirror(part: Part) -> dict[str, str]:
    """The variable that lets providers come from the mirror of project.yaml; a file that the environment names counts more."""
    if not part.mirror or os.environ.get("TF_CLI_CONFIG_FILE"):
        return {}
    path = part.root / CONFIG
    path.parent.mkdir(exist_ok=True)
    url = json.dumps(part.mirror)
    path.write_text(
        f"provider_installation {{\n  network_mirror {{\n    url = {url}\n  }}\n}}\n",
        encoding="utf-8",
    )
    return {"TF_CLI_CONFIG_FILE": str(path)}


def how_to_unlock(part: Part, errors: str) -> str:
    """What to type where a lock is why Terraform failed; otherwise nothing."""
    found = LOCKED.search(errors)
    if not found:
        return ""
    which = " FOUNDATION=1" if part.name == "foundation" else ""
    return (
        " The state is locked: by an apply that goes on, or by one that was killed. Where none goes on, type: "
        f"make unlock ID={found[1]} ENVIRONMENT={part.environment.environment}{which}"
    )


def variables(part: Part, *images: str) -> list[str]:
    """Options that name the environment, and the images where the part wants them."""
    return [
        f"-var=environment={part.environment.environment}",
        *(f"-var=images={text}" for text in images),
    ]


def start(part: Part) -> None:
    """Initialise, with the state in its bucket.

    Raises:
        UserError: the bucket is not there, or not yours to read.
    """
    (part.folder / OVERRIDE).unlink(missing_ok=True)  # what a killed `foundation` may have left
    call(part, "init", "-reconfigure", "-input=false", *backend(part), quiet=True)


def backend(part: Part) -> list[str]:
    """Options that name the state's bucket; STORAGE_EMULATOR_HOST names another server than Google's."""
    options = [
        f"-backend-config=bucket={part.environment.terraform_state}",
        f"-backend-config=prefix={part.name}",
    ]
    if server := os.environ.get("STORAGE_EMULATOR_HOST"):
        options += [
            f"-backend-config=storage_custom_endpoint={server.rstrip('/')}/storage/v1/",
            "-backend-config=access_token=none",
        ]
    return options


def approval(yes: bool) -> list[str]:
    """Whether Terraform asks before it changes something."""
    return ["-auto-approve", "-input=false", "-lock-timeout=20m"] if yes else []


# ── the stack ───────────────────────────────────────────────────────────────────────────────────────────────────────
def read_images(part: Part, needed: bool) -> str:
    """Container → image, as JSON: those of this machine's last `make images` for this environment, or of its last build.

    Raises:
        UserError: there are none, and they are needed.
    """
    if (part.root / IMAGES).is_file():
        text = (part.root / IMAGES).read_text(encoding="utf-8")
        if all(
            address.startswith(f"{part.environment.images}/")
            for address in json.loads(text).values()
        ):
            return text  # else it is another environment's
    found = storage.read(f"{part.environment.builds}/images.json")
    if found:
        return found[0].decode()
    if needed:
        raise UserError(
            f"{IMAGES} is not there, or is another environment's, so nobody knows which images are meant. "
            f"Type: make images ENVIRONMENT={part.environment.environment}"
        )
    return "{}"


def plan(part: Part) -> None:
    """Show what an apply would change."""
    require_state(part)
    images = read_images(part, needed=False)
    start(part)
    call(part, "plan", "-input=false", "-lock=false", *variables(part, images))


def apply(part: Part, yes: bool) -> None:
    """Make the stack what its files say."""
    require_state(part)
    images = read_images(part, needed=True)
    start(part)
    call(part, "apply", *approval(yes), *variables(part, images))


def unlock(part: Part, lock: str) -> None:
    """Take away the lock that an apply has left which was killed, so that the next one need not wait for it."""
    require_state(part)
    start(part)
    call(part, "force-unlock", "-force", lock)


def require_state(part: Part) -> None:
    """See that the foundation is there.

    Raises:
        UserError: it is not.
    """
    if os.environ.get("GOOGLE_IMPERSONATE_SERVICE_ACCOUNT"):
        return  # in a build Terraform reads the state as another account, and this program could not
    foundation = Part("foundation", part.environment, part.root)
    if read_state(foundation) is None:
        raise UserError(
            f"the foundation of {part.environment.environment} is not there yet: {foundation.state} is missing. "
            f"Who may grant rights in {part.environment.project} types once: make foundation ENVIRONMENT={part.environment.environment}"
        )


def destroy(part: Part, settings: Settings, yes: bool) -> None:
    """Show what is removed, ask, undeploy, destroy the stack, and tell what remains and may bill.

    Raises:
        UserError: the name that was typed is another; something could not be removed.
    """
    require_state(part)
    images = read_images(part, needed=False)
    start(part)
    path = part.work / "destroy.plan"
    call(part, "plan", "-destroy", "-input=false", f"-out={path}", *variables(part, images))
    if part.environment.promote_from or not yes:
        require_name(part.environment)
    undeploy(part.environment, settings)
    call(part, "apply", "-input=false", str(path))
    print(remains(part.environment, settings))


def require_name(where: Environment) -> None:
    """Ask for the project's id, before something is removed.

    Raises:
        UserError: another was typed, or nobody can be asked.
    """
    try:
        typed = input(
            f"\nThis removes what serves in {where.environment}. To go on, type the project's id, {where.project}: "
        )
    except EOFError:
        typed = ""
    if typed.strip() != where.project:
        raise UserError(f"'{typed.strip()}' is not {where.project}; nothing was changed.")


def undeploy(where: Environment, settings: Settings) -> None:
    """Take every model off the endpoint, which could not be removed otherwise; it is what bills most."""
    from gcp.endpoint import Endpoint, NotThere, tell
    from gcp.model_registry import Lease, Serving
    from level_1_pipeline import parameters

    try:
        endpoint = Endpoint(Serving.parse(parameters.serving(settings, where)))
    except NotThere:
        tell(f"there is no endpoint {where.name}, so nothing is deployed")
        return
    with Lease(where.registry, "destroy", tell):
        endpoint.settle(None)
    tell(f"nothing is deployed to {endpoint.name} any more")


def remains(where: Environment, settings: Settings) -> str:
    """What `make destroy` leaves, why, and how to be rid of it."""
    buckets = ", ".join(
        sorted({root.split("/")[2] for root in (where.pipeline_root, where.storage, where.data)})
    )
    foundation = "accounts, rights, topics, APIs: nothing bills. terraform destroys it where its protections are taken out"
    lines = {
        "models": f"cost nothing; to look at them: gcloud ai models list --project={where.project} --region={where.region}",
        "buckets": f"{buckets}, by the gigabyte: gcloud storage rm gs://BUCKET --recursive",
        "images": f"{where.images}, by the gigabyte: gcloud artifacts repositories list --project={where.project}",
        "state": f"gs://{where.terraform_state}: needed to destroy the foundation",
        **(
            {"keys": "each a few cents a month; Google never removes a key ring"}
            if where.key
            else {}
        ),
        **(
            {"network": "its way to Google's APIs bills by the hour; it goes with the foundation"}
            if makes_network(where, settings)
            else {}
        ),
        "foundation": foundation,
    }
    told = "\n".join(f"  {name:<12}{text}" for name, text in lines.items())
    return f"""
What remains in {where.project}, because it holds what you made, or because it costs nothing or little:
{told}
Nothing that is left runs by itself."""


def makes_network(where: Environment, settings: Settings) -> bool:
    """Whether the foundation has made a network."""
    return (
        settings.cloud.private
        and not settings.cloud.environments[where.environment].existing.network
    )


# ── the foundation ──────────────────────────────────────────────────────────────────────────────────────────────────
def foundation(part: Part, plan_only: bool, yes: bool) -> None:
    """Apply the foundation, or show what that would change.

    Raises:
        UserError: the apply failed; where it has made the state's bucket, the state is there all the same.
    """
    local = part.work.with_suffix(".tfstate")
    if is_moved(part, local):
        start(part)
        change_foundation(part, plan_only, yes)
        return
    failed: UserError | None = None
    with local_state(part, local):
        call(part, "init", "-reconfigure", "-input=false", quiet=True)
        try:
            change_foundation(part, plan_only, yes)
        except UserError as error:
            failed = error
    if not plan_only and (not failed or (holds_state(local) and has_bucket(part))):
        move(part, local)
    if failed:
        raise failed


def move(part: Part, local: Path) -> None:
    """Bring the state into its bucket."""
    call(part, "init", "-migrate-state", "-force-copy", "-input=false", *backend(part), quiet=True)
    put_aside(local)
    print(f"The state is in {part.state} from now on.")


def holds_state(local: Path) -> bool:
    """Whether there is a state on this machine; Terraform makes an empty file to lock it."""
    return local.is_file() and bool(local.stat().st_size)


def has_bucket(part: Part) -> bool:
    """Whether the state's bucket is there already, as far as can be told."""
    try:
        storage.read(part.state)
    except UserError:
        return False
    return True


def is_moved(part: Part, local: Path) -> bool:
    """Whether the state is in the bucket; what was cut off after the move is ended here.

    Raises:
        UserError: there is one there and another one here.
    """
    there = read_state(part)
    if there is None or not holds_state(local):
        return there is not None
    if lineage(there) != lineage(local.read_bytes()):
        raise UserError(
            f"{part.state} and {local} are two states that know nothing of each other, as when two people begin. The one in the "
            f"bucket counts: look into the other one, move it away, and type the same again."
        )
    put_aside(local)
    return True


def lineage(state: bytes) -> str:
    """What all versions of one state have in common; empty when it cannot be read."""
    try:
        return str(json.loads(state)["lineage"])
    except (ValueError, KeyError, TypeError):
        return ""


def put_aside(local: Path) -> None:
    """Keep a state that is in the bucket now under another name."""
    local.replace(local.with_suffix(".moved"))


def change_foundation(part: Part, plan_only: bool, yes: bool) -> None:
    """Plan or apply, with the state where it is."""
    words = ["plan", "-input=false", "-lock=false"] if plan_only else ["apply", *approval(yes)]
    call(part, *words, *variables(part))


def read_state(part: Part) -> bytes | None:
    """The state in the bucket; None if there is none, or no bucket yet.

    Raises:
        UserError: it cannot be read.
    """
    try:
        found = storage.read(part.state)
    except UserError as error:
        if "bucket does not exist" in str(error):
            return None
        raise
    return found[0] if found else None


@contextmanager
def local_state(part: Part, state: Path) -> Iterator[None]:
    """Keep the state on this machine for a while."""
    state.parent.mkdir(parents=True, exist_ok=True)
    override = part.folder / OVERRIDE
    override.write_text(
        f'terraform {{\n  backend "local" {{\n    path = {json.dumps(str(state))}\n  }}\n}}\n',
        encoding="utf-8",
    )
    try:
        yield
    finally:
        override.unlink(missing_ok=True)


def grants(part: Part) -> None:
    """Every right that the foundation gives, as a table."""
    print(table(plan_of(part)["planned_values"]["outputs"]["grants"]["value"]))


def plan_of(part: Part) -> dict[str, Any]:
    """The foundation's plan, as JSON, from a state on this machine that is empty: what it makes, not what it changes."""
    path = part.work / "grants.plan"
    with local_state(part, part.work.with_suffix(".none")):
        call(part, "init", "-reconfigure", "-input=false", quiet=True)
        call(
            part,
            "plan",
            "-input=false",
            "-lock=false",
            f"-out={path}",
            *variables(part),
            quiet=True,
        )
        document: dict[str, Any] = json.loads(call(part, "show", "-json", str(path), quiet=True))
    path.unlink()
    return document


def table(granted: Sequence[dict[str, str]]) -> str:
    """The rights as a table of Markdown."""
    rows = [
        (
            grant["who"],
            f"`{grant['role']}`",
            grant["on"] + (f", below `{grant['only']}`" if grant["only"] else ""),
            grant["why"],
        )
        for grant in granted
    ]
    lines = [("account", "role", "on", "why"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ── form and grammar ────────────────────────────────────────────────────────────────────────────────────────────────
def check(root: Path, mirror: str) -> None:
    """What can be told with no account: the files' form, and that they fit the providers' own definitions.

    Raises:
        UserError: something does not.
    """
    where = Environment(
        "check", "", "", "", "", "", "", "", "", "", by_hand=False
    )  # its grammar is the same for each
    for part in (Part("foundation", where, root, mirror), Part("stack", where, root, mirror)):
        call(part, "fmt", "-check", "-diff", *(["-recursive"] if part.name == "stack" else []))
        call(part, "init", "-backend=false", "-input=false", quiet=True)
        call(part, "validate")


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────────────
def main() -> None:
    """What was asked for.

    Raises:
        UserError: project.yaml names no project, or one bucket made by hand; Terraform is missing, or fails.
    """
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.infra", description="Terraform for one environment."
    )
    parser.add_argument(
        "what", choices=["plan", "apply", "destroy", "unlock", "foundation", "check", "grants"]
    )
    parser.add_argument(
        "--plan", action="store_true", help="with foundation: show what would change"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before something is changed")
    parser.add_argument("--id", default="", help="with unlock: the lock, as Terraform names it")
    parser.add_argument(
        "--foundation", action="store_true", help="with unlock: the foundation's, not the stack's"
    )
    asked = parser.parse_args()
    require()
    root, settings = project_root(), load_settings()
    mirror = settings.cloud.mirrors.terraform
    if asked.what == "check":
        check(root, mirror)
        return
    where = resolve_environment(settings)
    submit_build.level_2(where)
    stack, base = Part("stack", where, root, mirror), Part("foundation", where, root, mirror)
    if asked.what == "foundation":
        foundation(base, asked.plan, asked.yes)
    elif asked.what == "grants":
        grants(base)
    elif asked.what == "destroy":
        destroy(stack, settings, asked.yes)
    elif asked.what == "apply":
        apply(stack, asked.yes)
    elif asked.what == "unlock":
        unlock(base if asked.foundation else stack, asked.id)
    else:
        plan(stack)


if __name__ == "__main__":
    run_command(main)
