"""Run Terraform for one environment of project.yaml.

python -m level_2_cicd.infra plan                           the stack, which each push applies
python -m level_2_cicd.infra apply [--yes]
python -m level_2_cicd.infra destroy [--yes]
python -m level_2_cicd.infra foundation [--plan] [--yes]    the foundation, applied once by an admin
python -m level_2_cicd.infra unlock --id ID [--foundation]  release the lock of a killed apply
python -m level_2_cicd.infra check                          fmt and validate; no account needed
python -m level_2_cicd.infra grants                         print the foundation's IAM roles

Rerun the same command after any failure.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from core.errors import UserError, run_command
from core.paths import project_root
from gcp import storage
from gcp.client import report
from gcp.endpoint import Endpoint, EndpointNotFound
from gcp.environment import Environment, resolve_environment
from gcp.lease import Lease
from gcp.model_registry import Serving
from level_1_pipeline import parameters
from level_2_cicd import submit_build
from project.settings import Settings, load_settings

FOLDER = Path("level_2_cicd/terraform")
IMAGES = Path("build/images.json")
OVERRIDE = "backend_override.tf"  # replaces the backend of versions.tf
OLDEST = (1, 9)
# Matches locks in the bucket only: the lock of a local state ends with its process.
LOCKED = re.compile(r"Error acquiring the state lock.*?\bID:\s+(\S+)\W+Path:\s+gs://", re.DOTALL)


@dataclass(frozen=True)
class RootModule:
    """A Terraform root module, `stack` or `foundation`, in one environment.

    `mirror` is the URL of a provider mirror; empty for Terraform's registry.
    """

    name: str
    root: Path
    environment: str
    bucket: str
    mirror: str

    @property
    def folder(self) -> Path:
        """Return the folder of the .tf files."""
        return self.root / FOLDER / ("" if self.name == "stack" else self.name)

    @property
    def data(self) -> Path:
        """Return the value of TF_DATA_DIR."""
        # One folder per environment, so that environments never mix.
        return self.root / "build/terraform" / self.environment / self.name

    @property
    def state(self) -> str:
        """Return the URI of the state."""
        return f"gs://{self.bucket}/{self.name}/default.tfstate"

    @property
    def variable(self) -> str:
        """Return the option that sets the environment."""
        return f"-var=environment={self.environment}"

    def backend(self) -> list[str]:
        """Return the options that select the state's bucket."""
        options = [f"-backend-config=bucket={self.bucket}", f"-backend-config=prefix={self.name}"]
        # In a rehearsal, Terraform needs the address of the fake of Cloud Storage as options.
        if server := os.environ.get("STORAGE_EMULATOR_HOST"):
            endpoint = f"{server.rstrip('/')}/storage/v1/"
            options.append(f"-backend-config=storage_custom_endpoint={endpoint}")
            options.append("-backend-config=access_token=none")
        return options

    def init(self) -> None:
        """Run `terraform init` with the state in its bucket."""
        # A killed `foundation` may have left the override, which selects a local state.
        (self.folder / OVERRIDE).unlink(missing_ok=True)
        self.run("init", "-reconfigure", "-input=false", *self.backend(), quiet=True)

    def run(self, command: str, *options: str, quiet: bool = False) -> str:
        """Run Terraform; with `quiet`, return its output and print it only on failure."""
        variables = {**os.environ, "TF_DATA_DIR": str(self.data), "TF_IN_AUTOMATION": "1"}
        # A configuration that the caller has set takes precedence over the mirror.
        if self.mirror and "TF_CLI_CONFIG_FILE" not in variables:
            variables["TF_CLI_CONFIG_FILE"] = str(self.write_mirror_config())
        color = [] if sys.stdout.isatty() and not quiet else ["-no-color"]
        words = ["terraform", f"-chdir={self.folder}", command, *color, *options]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            code, errors = run_to_end(words, variables, output if quiet else None)
            output.seek(0)
            text = output.read()
        if code:
            print(text, end="", file=sys.stderr)
            message = f"terraform {command} of the {self.name} failed; see its output above."
            if lock := LOCKED.search(errors):
                flag = " FOUNDATION=1" if self.name == "foundation" else ""
                message += (
                    " The state is locked by a running or a killed apply. If none is running, run: "
                    f"make unlock ID={lock[1]} ENVIRONMENT={self.environment}{flag}"
                )
            raise UserError(message)
        return text

    def write_mirror_config(self) -> Path:
        """Write the Terraform CLI configuration that installs providers from the mirror."""
        path = self.root / "build/terraform.rc"
        path.parent.mkdir(exist_ok=True)
        mirror = f"network_mirror {{\n    url = {json.dumps(self.mirror)}\n  }}"
        path.write_text(f"provider_installation {{\n  {mirror}\n}}\n", encoding="utf-8")
        return path


def require() -> str:
    """Return the version of Terraform; fail if it is missing or too old."""
    how = (
        "See https://developer.hashicorp.com/terraform/install, or use the image that `make "
        "toolbox` builds."
    )
    if shutil.which("terraform") is None:
        raise UserError(f"terraform is not installed. {how}")
    result = subprocess.run(
        ["terraform", "version", "-json"], capture_output=True, text=True, check=False
    )
    try:
        version = str(json.loads(result.stdout)["terraform_version"])
    except (ValueError, KeyError):
        text = (result.stderr or result.stdout).strip()[:200]
        raise UserError(f"invalid output of `terraform version -json`: {text}") from None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"terraform {version} is too old; it must be {oldest} or newer. {how}")
    return version


def run_to_end(
    command: Sequence[str], variables: Mapping[str, str], output: IO[str] | None
) -> tuple[int, str]:
    """Run Terraform to its end even when interrupted; return exit code and stderr.

    stdout goes to `output`, or to the terminal if None; stderr always goes to the terminal too.
    """
    # Killing Terraform would lose the state of what it has just created. It stops by itself after
    # a signal: Ctrl-C in a terminal reaches it directly, SIGTERM is forwarded.
    received: list[int] = []
    processes: list[subprocess.Popen[str]] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        for process in processes:
            if number == signal.SIGTERM:
                process.terminate()

    handlers = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    errors = []
    try:
        with subprocess.Popen(
            command,
            env=variables,
            stdout=output,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        ) as process:
            processes.append(process)
            # Print lines as they arrive, because an apply takes minutes.
            for line in process.stderr or []:
                print(line, end="", file=sys.stderr, flush=True)
                errors.append(line)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    # Exit as if the signal had ended this program.
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise SystemExit(128 + received[0])
    return process.returncode, "".join(errors)


def approval(yes: bool) -> list[str]:
    """Return the options of an apply without a prompt."""
    # The lock timeout lets a build wait for a running apply.
    return ["-auto-approve", "-input=false", "-lock-timeout=20m"] if yes else []


# ── stack ─────────────────────────────────────────────────────────────────────────────────────
def read_images(root: Path, environment: Environment) -> str | None:
    """Return container → image as JSON, from the last local `make images` or the last build."""
    if (root / IMAGES).is_file():
        text = (root / IMAGES).read_text(encoding="utf-8")
        # The file may come from another environment.
        if all(image.startswith(f"{environment.images}/") for image in json.loads(text).values()):
            return text
    content = storage.read(f"{environment.builds}/images.json")
    return content[0].decode() if content else None


def require_foundation(foundation: RootModule, project: str) -> None:
    """Fail unless the foundation has a state."""
    if os.environ.get("GOOGLE_IMPERSONATE_SERVICE_ACCOUNT"):
        return  # in a build, only the impersonated account has permission to read the state
    if read_state(foundation) is None:
        raise UserError(
            f"the foundation of {foundation.environment} is missing: no {foundation.state}. An "
            f"admin of {project} runs once: make foundation ENVIRONMENT={foundation.environment}"
        )


def change_stack(
    what: str, stack: RootModule, environment: Environment, settings: Settings, yes: bool
) -> None:
    """Plan, apply or destroy the stack."""
    images = read_images(stack.root, environment)
    if images is None and what == "apply":
        raise UserError(
            f"{IMAGES} is missing, or of another environment. "
            f"Run: make images ENVIRONMENT={stack.environment}"
        )
    # A plan also works before the first build, without images.
    variables = [stack.variable, f"-var=images={images or '{}'}"]
    stack.init()
    if what == "plan":
        stack.run("plan", "-input=false", "-lock=false", *variables)
    elif what == "apply":
        stack.run("apply", *approval(yes), *variables)
    else:
        # Apply the plan that was shown. Undeploy in between, only after the confirmation.
        path = stack.data / "destroy.plan"
        stack.run("plan", "-destroy", "-input=false", f"-out={path}", *variables)
        if environment.promote_from or not yes:
            confirm_project(environment)
        undeploy(environment, settings)
        stack.run("apply", "-input=false", str(path))
        print(describe_remains(environment, settings))


def confirm_project(environment: Environment) -> None:
    """Prompt for the project's ID before removing anything."""
    # Without a terminal there is no confirmation: EOF counts as an empty answer.
    try:
        text = input(
            f"\nThis removes the endpoint of {environment.environment}. "
            f"Type the project's ID, {environment.project}, to continue: "
        ).strip()
    except EOFError:
        text = ""
    if text != environment.project:
        raise UserError(f"'{text}' is not {environment.project}; nothing was changed.")


def undeploy(environment: Environment, settings: Settings) -> None:
    """Undeploy all models from the endpoint."""
    # Deployed models cost most, and an endpoint with models cannot be destroyed.
    try:
        endpoint = Endpoint(Serving.parse(parameters.serving(settings, environment)))
    except EndpointNotFound:
        report(f"no endpoint {environment.name}: nothing to undeploy")
        return
    # The lease allows one deployment at a time, so no model is deployed meanwhile.
    with Lease(environment.registry, "destroy"):
        endpoint.settle(None)
    report(f"undeployed all models of {endpoint.name}")


def describe_remains(environment: Environment, settings: Settings) -> str:
    """Return a table of what `make destroy` keeps, why, and how to delete it."""
    project, region = environment.project, environment.region
    roots = (environment.pipeline_root, environment.storage, environment.data)
    buckets = ", ".join(sorted({root.split("/")[2] for root in roots}))
    existing = settings.cloud.environments[environment.environment].existing
    lines = {
        "models": f"free; gcloud ai models list --project={project} --region={region}",
        "buckets": f"billed by size; gcloud storage rm gs://BUCKET --recursive: {buckets}",
        "images": f"billed by size; {environment.images}",
        "state": f"gs://{environment.terraform_state}: needed to destroy the foundation",
        "keys": "some cents a month each; Google never deletes a key ring",
        "network": "its Private Service Connect endpoint is billed by the hour",
        "foundation": "accounts, IAM, topics: free; remove prevent_destroy, then terraform destroy",
    }
    if not environment.key:
        del lines["keys"]
    if not settings.cloud.private or existing.network:
        del lines["network"]
    table = "\n".join(f"  {name:<12}{text}" for name, text in lines.items())
    return f"\nWhat remains in {project}; nothing of it runs by itself:\n{table}"


# ── foundation ────────────────────────────────────────────────────────────────────────────────
def apply_foundation(module: RootModule, plan_only: bool, yes: bool) -> None:
    """Apply or plan the foundation; the first apply moves the state to the bucket."""
    # The foundation creates the bucket of its own state and the bucket's encryption key, so the
    # first apply keeps the state in build/terraform/ and moves it afterwards.
    words = ["plan", "-input=false", "-lock=false"] if plan_only else ["apply", *approval(yes)]
    local = module.data.with_suffix(".tfstate")
    state = read_state(module)
    if state is not None:
        set_aside(local, state, module.state)
        module.init()
        module.run(*words, module.variable)
        return
    failure: UserError | None = None
    with local_state(module, local):
        module.run("init", "-reconfigure", "-input=false", quiet=True)
        try:
            module.run(*words, module.variable)
        except UserError as error:
            failure = error
    # Move the state after a failed apply too, if the bucket exists: others can then continue.
    if not plan_only and (not failure or (has_content(local) and bucket_exists(module))):
        options = ("-migrate-state", "-force-copy", "-input=false")
        module.run("init", *options, *module.backend(), quiet=True)
        local.replace(local.with_suffix(".moved"))
        print(f"The state is now in {module.state}.")
    if failure:
        raise failure


def has_content(local: Path) -> bool:
    """Return whether a local state exists and is not empty."""
    # Terraform creates an empty file to lock a local state.
    return local.is_file() and bool(local.stat().st_size)


def read_state(module: RootModule) -> bytes | None:
    """Read the state in the bucket; None if the object or the bucket is missing."""
    try:
        content = storage.read(module.state)
    except UserError as error:
        if "bucket does not exist" in str(error):
            return None
        raise
    return content[0] if content else None


def bucket_exists(module: RootModule) -> bool:
    """Return whether the state's bucket exists and is readable."""
    with suppress(UserError):
        storage.read(module.state)
        return True
    return False


def set_aside(local: Path, state: bytes, uri: str) -> None:
    """Rename a local copy of the state in the bucket, left by an interrupted move."""
    if not has_content(local):
        return
    lineages = []  # the ID that all versions of a state share
    for content in (state, local.read_bytes()):
        with suppress(ValueError, KeyError, TypeError):
            lineages.append(json.loads(content)["lineage"])
    if len(lineages) < 2 or lineages[0] != lineages[1]:
        raise UserError(
            f"{uri} and {local} are unrelated states (different lineage): two people may have run "
            "`make foundation`. The bucket's state counts: check the local one, move it away, and "
            "run the same command again."
        )
    local.replace(local.with_suffix(".moved"))


@contextmanager
def local_state(module: RootModule, state: Path) -> Iterator[None]:
    """Keep the state in a local file inside the context."""
    # The override file replaces the backend without changing versions.tf.
    state.parent.mkdir(parents=True, exist_ok=True)
    override = module.folder / OVERRIDE
    backend = f'backend "local" {{\n    path = {json.dumps(str(state))}\n  }}'
    override.write_text(f"terraform {{\n  {backend}\n}}\n", encoding="utf-8")
    try:
        yield
    finally:
        override.unlink(missing_ok=True)


def read_grants(module: RootModule) -> list[dict[str, str]]:
    """Plan the foundation from an empty state and return its output `grants`."""
    # A local state that does not exist: all grants are planned as new.
    path = module.data / "grants.plan"
    with local_state(module, module.data.with_suffix(".none")):
        module.run("init", "-reconfigure", "-input=false", quiet=True)
        options = ("-input=false", "-lock=false", f"-out={path}", module.variable)
        module.run("plan", *options, quiet=True)
        document = json.loads(module.run("show", "-json", str(path), quiet=True))
    path.unlink()
    grants: list[dict[str, str]] = document["planned_values"]["outputs"]["grants"]["value"]
    return grants


def table(grants: Sequence[dict[str, str]]) -> str:
    """Format grants as a Markdown table."""
    lines = ["| account | role | on | why |", "| --- | --- | --- | --- |"]
    for grant in grants:
        on = grant["on"] + (f", below `{grant['only']}`" if grant["only"] else "")
        lines.append(f"| {grant['who']} | `{grant['role']}` | {on} | {grant['why']} |")
    return "\n".join(lines)


# ── command line ──────────────────────────────────────────────────────────────────────────────
def check(root: Path, mirror: str) -> None:
    """Check the format of the .tf files and validate them against the providers' schemas."""
    # The stack's folder also contains the tests: format it recursively.
    for name, recursive in (("foundation", []), ("stack", ["-recursive"])):
        module = RootModule(name, root, "check", "", mirror)
        module.run("fmt", "-check", "-diff", *recursive)
        module.run("init", "-backend=false", "-input=false", quiet=True)
        module.run("validate")


def main() -> None:
    """Run the Terraform command for the selected environment."""
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.infra", description="Terraform for one environment."
    )
    parser.add_argument(
        "what", choices=["plan", "apply", "destroy", "unlock", "foundation", "check", "grants"]
    )
    parser.add_argument("--plan", action="store_true", help="with foundation: show the changes")
    parser.add_argument("--yes", action="store_true", help="apply or destroy without a prompt")
    parser.add_argument("--id", default="", help="with unlock: the lock's ID, from the error")
    parser.add_argument("--foundation", action="store_true", help="with unlock: the foundation's")
    options = parser.parse_args()
    require()
    root, settings = project_root(), load_settings()
    mirror = settings.cloud.mirrors.terraform
    if options.what == "check":
        check(root, mirror)
        return
    environment = resolve_environment(settings)
    submit_build.require_level_2(environment)
    where = (root, environment.environment, environment.terraform_state, mirror)
    stack, foundation = RootModule("stack", *where), RootModule("foundation", *where)
    if options.what == "foundation":
        apply_foundation(foundation, options.plan, options.yes)
    elif options.what == "grants":
        print(table(read_grants(foundation)))
    else:
        require_foundation(foundation, environment.project)
        if options.what == "unlock":
            module = foundation if options.foundation else stack
            module.init()
            module.run("force-unlock", "-force", options.id)
        else:
            change_stack(options.what, stack, environment, settings, options.yes)


if __name__ == "__main__":
    run_command(main)
