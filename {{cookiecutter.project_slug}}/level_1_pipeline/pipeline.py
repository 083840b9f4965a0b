"""The pipeline: preprocess → train → evaluate → gate → register.

Each step is a plain function, made a component by `make_pipeline`, and calls the code of src/. The same definition runs
on this machine (make level1), in containers and in the cloud; only the images, and the train and register steps, differ.

A step's function must stand on its own: kfp copies its text, so imports are inside it.
"""

from functools import partial
from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from level_1_pipeline import component

NAME = "train-and-register"


def preprocess(
    csv: str,
    label: str,
    ignore: list,  # type: ignore[type-arg]
    categorical: list,  # type: ignore[type-arg]
    test_share: float,
    split_seed: int,
    train_data: Output[Dataset],
    test_data: Output[Dataset],
) -> None:
    """Check the CSV file and split it into rows to train on and rows to test on."""
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
        test_share=test_share,
        split_seed=split_seed,
    )
    train_data.metadata["rows"], test_data.metadata["rows"] = (
        summary["train_rows"],
        summary["test_rows"],
    )


def train(hyperparameters: dict, train_data: Input[Dataset], model: Output[Model]) -> None:  # type: ignore[type-arg]
    """Train on this step's own machine and save the model."""
    from pathlib import Path

    from trainer.config import Hyperparameters
    from trainer.train import train as train_model

    options = Hyperparameters.from_parameter(hyperparameters)
    metrics = train_model(Path(train_data.path), Path(model.path), options)
    model.metadata["best_epoch"] = metrics["best_epoch"]


def evaluate(
    registry: str, test_data: Input[Dataset], model: Input[Model], scores: Output[Artifact]
) -> None:
    """Score the challenger, and the champion if there is one, on the same test rows."""
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
    margin: float,
    register: bool,
    scores: Input[Artifact],
    decision: Output[Metrics],
) -> bool:
    """Good enough to be served? The reason goes into `decision`; a run that does not register answers no, whatever it finds."""
    import json
    from pathlib import Path

    from core.manifest import write_json
    from trainer.gate import decide, only_tested

    decided = decide(json.loads(Path(scores.path).read_text()), metric, threshold, margin)
    decided = decided if register else only_tested(decided)
    write_json(Path(decision.path), decided.to_json())
    decision.metadata.update(decided.to_json())
    print(decided.reason)
    return decided.passed


def register(
    registry: str,
    run: str,
    serving: dict,  # type: ignore[type-arg]
    model: Input[Model],
    scores: Input[Artifact],
    decision: Input[Metrics],
    version: Output[Artifact],
) -> int:
    """Register the challenger, and deploy it: make it the champion unless another run was faster."""
    import json
    from pathlib import Path

    from core.manifest import write_json
    from gcp.deployment import deploy

    measured = json.loads(Path(scores.path).read_text())
    reason = json.loads(Path(decision.path).read_text())["reason"]
    outcome = deploy(
        registry,
        Path(model.path),
        measured["challenger"],
        run,
        reason,
        measured["champion_version"],
        serving,
    )
    write_json(Path(version.path), outcome)
    version.metadata.update(outcome)
    return int(outcome["version"])


def make_pipeline(
    train_image: str = "train",
    deploy_image: str = "deploy",
    train_step: Any = None,
) -> Any:
    """The pipeline, ready to run or to compile.

    Args:
        train_image, deploy_image: the images that the steps run in; not used where steps are processes of this machine.
        train_step: a component that takes the place of the one here; the cloud's rents a machine for one of the pipeline's
            `jobs`, and asks for the pipeline run's own name, of which the one here knows nothing.
    """
    step = partial(component.component, image=train_image)
    preprocess_step, evaluate_step, gate_step = (
        step(preprocess),
        step(evaluate),
        step(gate),
    )
    train_step = train_step or step(train)
    register_step = step(register, image=deploy_image)

    @dsl.pipeline(name=NAME, description="preprocess, train, evaluate, gate, register")
    def train_and_register(
        csv: str,
        label: str,
        ignore: list,  # type: ignore[type-arg]
        categorical: list,  # type: ignore[type-arg]
        test_share: float,
        split_seed: int,
        hyperparameters: dict,  # type: ignore[type-arg]
        jobs: list,  # type: ignore[type-arg]
        metric: str,
        threshold: float,
        margin: float,
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
            test_share=test_share,
            split_seed=split_seed,
        )
        for_cloud = {"jobs": jobs, "pipeline_job": dsl.PIPELINE_JOB_RESOURCE_NAME_PLACEHOLDER}
        rented = {
            name: value
            for name, value in for_cloud.items()
            if name in train_step.component_spec.inputs
        }
        model = train_step(
            hyperparameters=hyperparameters, train_data=rows.outputs["train_data"], **rented
        ).outputs["model"]
        scores = evaluate_step(
            registry=registry, test_data=rows.outputs["test_data"], model=model
        ).output
        passed = gate_step(
            metric=metric, threshold=threshold, margin=margin, register=register, scores=scores
        )
        # On this machine kfp runs a condition only on a step's sole, unnamed value: see docs/gotchas.md of the template.
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
