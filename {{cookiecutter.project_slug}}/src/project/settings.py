"""The settings of project.yaml as one frozen model.

python -m project.settings             check project.yaml and its GPU jobs
python -m project.settings --schema    print the JSON schema that editors use
"""

import difflib
import json
import sys
from typing import Any, get_args, get_origin

from pydantic import ValidationError, model_validator

from core.config import read_project_file
from core.errors import UserError, run_command
from core.paths import PROJECT_FILE, project_root
from gcp.config import CloudSettings
from trainer.config import Data, Gate, Hyperparameters

UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's error types


class Settings(CloudSettings):
    """The whole of project.yaml."""

    description: str
    data: Data
    hyperparameters: Hyperparameters
    gate: Gate

    @model_validator(mode="after")
    def _batched(self) -> "Settings":
        if self.cloud.events.batch_window_minutes and not self.data.source.startswith("gs://"):
            raise ValueError(
                "cloud.events.batch_window_minutes: files can be gathered where each run trains on data.source in a bucket (gs://…); "
                f"it is '{self.data.source}'. Allowed here: 0"
            )
        return self


def load_settings(overrides: str | None = None) -> Settings:
    """Read and validate project.yaml, with the overrides of `read_project_file`."""
    document = read_project_file(overrides)
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        # Misspelt keys first: they are the reason why other keys are missing.
        details = sorted(error.errors(), key=lambda detail: detail["type"] not in UNKNOWN_KEY)
        rules = "\n".join(f"  {_explain(detail)}" for detail in details)
        raise UserError(f"{PROJECT_FILE} (with SET=…, if given):\n{rules}") from None


# Rules for keys whose regular expression would make a poor error message.
MEANT = {
    "name": "should be 3 to 20 of a-z, 0-9 and -; the first a letter, the last a letter or a digit",
    "alerts": "should be an e-mail address, such as you@example.com",
    "project": "should be a project's id, such as my-project-123: not its name, and not its number",
    "bucket": "should be a bucket's name alone, without gs://",
    "region": "should be a region, such as europe-west4",
    "id": "should be the repository's number, or the organisation's GUID; see docs/level-2.md of the template",
    "host": "should be an address such as https://gitlab.example.com",
    "ingest": "should be cron's five fields, such as '0 3 * * *'",
    "schedule": "should be cron's five fields, such as '0 4 * * 1', or empty",
    "billing_account": "should be like 01ABCD-23EF45-678901; `gcloud billing accounts list` shows it",
    "network": "should be like projects/PROJECT/global/networks/NAME",
    "subnetwork": "should be like projects/PROJECT/regions/REGION/subnetworks/NAME",
    "build_pool": "should be like projects/PROJECT/locations/REGION/workerPools/NAME",
    "key_ring": "should be like projects/PROJECT/locations/REGION/keyRings/NAME",
    "images": "should be like projects/PROJECT/locations/REGION/repositories/NAME",
    "registry": "should be an address such as localhost:5000/demo, without https://",
    "base_images": "should be an address such as mirror.example.com/docker, without https://",
    "terraform": "should be an address such as https://mirror.example.com/terraform/, with / at its end",
}
# The same for the values of a map, by the map's name.
MEANT_IN = {
    "keys": "should be like projects/PROJECT/locations/REGION/keyRings/RING/cryptoKeys/NAME",
    "buckets": "should be a bucket's name alone, without gs://",
    "accounts": "should be like NAME@PROJECT.iam.gserviceaccount.com",
}


def _explain(detail: Any) -> str:
    """Format one of pydantic's errors as KEY: RULE (VALUE)."""
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] in UNKNOWN_KEY:
        near = difflib.get_close_matches(str(detail["loc"][-1]), _keys(detail["loc"][:-1]), 1)
        return f"{path}: there is no such key" + (f"; did you mean '{near[0]}'?" if near else ".")
    if detail["type"] in ("missing", "missing_argument"):
        return f"{path}: is missing."
    rule = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if detail["type"] == "value_error":
        return f"{path}.{rule}." if path else f"{rule}."
    if detail["type"] == "string_pattern_mismatch":
        _, block, key = ["", "", *path.split(".")][-3:]
        rule = MEANT.get(key) or MEANT_IN.get(block) or rule
    if detail["type"] == "tuple_type":
        rule = "should be a list, such as [a, b]"
    quote = "; write it in quotes" if detail["type"] == "string_type" else ""
    return f"{path}: {rule} (it is {detail['input']!r}{quote})."


def _keys(location: tuple[Any, ...]) -> list[str]:
    """Return the keys that the block at this path may have."""
    block: Any = Settings
    for part in location:
        if get_origin(block) is dict:  # such as environments, whose keys are chosen by the user
            block = get_args(block)[1]
            continue
        field = getattr(block, "model_fields", {}).get(part)
        block = field.annotation if field else None
    return list(getattr(block, "model_fields", None) or getattr(block, "__dataclass_fields__", {}))


def schema() -> str:
    """Return the JSON schema of project.yaml for editors."""
    document = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **Settings.model_json_schema(),
    }
    return json.dumps(document, ensure_ascii=False) + "\n"


def check() -> None:
    """Check project.yaml, and that each GPU job in it exists."""
    folder = project_root() / "level_1_pipeline" / "gpu_jobs"
    jobs = sorted(path.stem for path in folder.glob("*.yaml"))
    for name in load_settings("").cloud.train.jobs:
        if name not in jobs:
            near = difflib.get_close_matches(name, jobs, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"available: {', '.join(jobs)}"
            raise UserError(f"cloud.train.jobs: unknown GPU job '{name}'; {hint}")


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["--schema"]:
        print(schema(), end="")
    else:
        check()


if __name__ == "__main__":
    run_command(main)
