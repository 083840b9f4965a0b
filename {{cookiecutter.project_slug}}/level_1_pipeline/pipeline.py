"""Define the pipeline: preprocess → train → evaluate → gate → register.

Each step is a plain function that calls the code of src/; `make_pipeline` turns it into a
component. The same definition runs locally (make level1), in containers and on Vertex AI; only the
images and the train step differ.
"""

from functools import partial
from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from level_1_pipeline.component import component

NAME = "train-and-register"

# A step imports inside its function, because kfp copies only the function's source.


def preprocess(
    csv: str,
    label: str,
    ignore: list,  # type: ignore[type-arg]
    categorical: list,  # type: ignore[type-arg]
    test_fraction: float,
    split_seed: int,
    train_data: Output[Dataset],
    test_data: Output[Dataset],
) -> None:
    """Check the CSV file and split it into training and test rows."""
    from pathlib import Path

    from core.paths import local_path
    from trainer.data import prepare

    summary = prepare(
        local_path(csv),
        label,
        Path(train_data.path),
        Path(test_data.path),
        ignore=ignore,
        categorical=categorical,
        test_fraction=test_fraction,
        split_seed=split_seed,
    )
    train_data.metadata["rows"], test_data.metadata["rows"] = (
        summary["train_rows"],
        summary["test_rows"],
    )


def train(hyperparameters: dict, train_data: Input[Dataset], model: Output[Model]) -> None:  # type: ignore[type-arg]
    """Train in this step and save the model."""
    from pathlib import Path

    from trainer.config import Hyperparameters
    from trainer.train import train as train_model

    options = Hyperparameters.from_parameter(hyperparameters)
    metrics = train_model(Path(train_data.path), Path(model.path), options)
    model.metadata["best_epoch"] = metrics["best_epoch"]


def vertex_train(
    hyperparameters: dict,  # type: ignore[type-arg]
    jobs: list,  # type: ignore[type-arg]
    pipeline_job: str,
    train_data: Input[Dataset],
    model: Output[Model],
) -> None:
    """Train in a custom training job and save the model; used on Vertex AI."""
    from gcp.training_job import pipeline_request, train
    from trainer.config import Hyperparameters

    # Parse here, so that an invalid value fails before a job is submitted.
    options = Hyperparameters.from_parameter(hyperparameters)
    args = ["--train", train_data.uri, "--hyperparameters", options.to_json()]
    model.metadata.update(train(pipeline_request(pipeline_job, jobs, args, model.uri)))


def evaluate(
    registry: str, test_data: Input[Dataset], model: Input[Model], scores: Output[Artifact]
) -> None:
    """Score the challenger and the champion on the same test rows."""
    from pathlib import Path

    from core.manifest import write_json
    from core.paths import local_path
    from core.registry import LocalRegistry
    from trainer.evaluate import answer, score, score_champion

    challenger = score(*answer(Path(model.path), Path(test_data.path)))
    champion = score_champion(LocalRegistry(local_path(registry)), Path(test_data.path))
    write_json(Path(scores.path), {"challenger": challenger, **champion})
    scores.metadata["accuracy"] = challenger["accuracy"]


def gate(
    metric: str,
    threshold: float,
    max_regression: float,
    register: bool,
    scores: Input[Artifact],
    decision: Output[Metrics],
) -> bool:
    """Decide whether to register the challenger; always False with register=False."""
    import json
    from pathlib import Path

    from core.manifest import write_json
    from trainer.gate import decide, only_tested

    result = decide(json.loads(Path(scores.path).read_text()), metric, threshold, max_regression)
    result = result if register else only_tested(result)
    write_json(Path(decision.path), result.to_json())
    decision.metadata.update(result.to_json())
    print(result.reason)
    return result.passed


def register(
    registry: str,
    run: str,
    serving: dict,  # type: ignore[type-arg]
    model: Input[Model],
    scores: Input[Artifact],
    decision: Input[Metrics],
    version: Output[Artifact],
) -> int:
    """Register and deploy the challenger, unless the champion has changed since the evaluation."""
    import json
    from pathlib import Path

    from core.manifest import write_json
    from gcp.deployment import deploy

    results = json.loads(Path(scores.path).read_text())
    reason = json.loads(Path(decision.path).read_text())["reason"]
    outcome = deploy(
        registry,
        Path(model.path),
        results["challenger"],
        run,
        reason,
        results["champion_version"],
        serving,
    )
    write_json(Path(version.path), outcome)
    version.metadata.update(outcome)
    return int(outcome["version"])


def make_pipeline(
    train_image: str = "train", deploy_image: str = "deploy", vertex_train_image: str = ""
) -> Any:
    """Return the pipeline, ready to run or to compile.

    Images are unused where steps run as local processes. With `vertex_train_image`, the train step
    submits a custom training job on Vertex AI; without it, it trains in the step.
    """
    step = partial(component, image=train_image)
    preprocess_step, evaluate_step, gate_step = step(preprocess), step(evaluate), step(gate)
    train_step = component(vertex_train, vertex_train_image) if vertex_train_image else step(train)
    register_step = component(register, deploy_image)

    @dsl.pipeline(name=NAME, description="preprocess, train, evaluate, gate, register")
    def train_and_register(
        csv: str,
        label: str,
        ignore: list,  # type: ignore[type-arg]
        categorical: list,  # type: ignore[type-arg]
        test_fraction: float,
        split_seed: int,
        hyperparameters: dict,  # type: ignore[type-arg]
        jobs: list,  # type: ignore[type-arg]
        metric: str,
        threshold: float,
        max_regression: float,
        registry: str,
        run: str,
        serving: dict,  # type: ignore[type-arg]
        register: bool = True,
    ) -> None:
        rows = preprocess_step(
            csv=csv,
            label=label,
            ignore=ignore,
            categorical=categorical,
            test_fraction=test_fraction,
            split_seed=split_seed,
        )
        # Only the train step on Vertex AI has these inputs; the local one trains in the step.
        vertex_only = (
            {"jobs": jobs, "pipeline_job": dsl.PIPELINE_JOB_RESOURCE_NAME_PLACEHOLDER}
            if vertex_train_image
            else {}
        )
        model = train_step(
            hyperparameters=hyperparameters, train_data=rows.outputs["train_data"], **vertex_only
        ).outputs["model"]
        scores = evaluate_step(
            registry=registry, test_data=rows.outputs["test_data"], model=model
        ).output
        passed = gate_step(
            metric=metric,
            threshold=threshold,
            max_regression=max_regression,
            register=register,
            scores=scores,
        )
        # kfp's local runner evaluates conditions only on a step's single unnamed output; on a named
        # output the condition is silently false.
        with dsl.If(passed.outputs["Output"] == True, name="the gate is open"):  # noqa: E712 (kfp reads the comparison)
            decision = passed.outputs["decision"]
            register_step(
                registry=registry,
                run=run,
                serving=serving,
                model=model,
                scores=scores,
                decision=decision,
            )

    return train_and_register
