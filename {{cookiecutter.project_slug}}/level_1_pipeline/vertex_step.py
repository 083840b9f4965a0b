"""The pipeline's train step in the cloud: it rents a machine for the training, where the laptop's step trains by itself."""

from typing import Any

from kfp.dsl import Dataset, Input, Model, Output

from level_1_pipeline import component as kfp_component


def vertex_train(
    hyperparameters: dict,  # type: ignore[type-arg]
    jobs: list,  # type: ignore[type-arg]
    pipeline_job: str,
    train_data: Input[Dataset],
    model: Output[Model],
) -> None:
    """Train on a rented machine and save the model."""
    from gcp.training_job import of_pipeline, train
    from trainer.config import Hyperparameters

    options = Hyperparameters.from_parameter(
        hyperparameters
    )  # a mistake is told before anything is rented
    args = ["--train", train_data.uri, "--hyperparameters", options.to_json()]
    model.metadata.update(train(of_pipeline(pipeline_job, jobs, args, model.uri)))


def component(image: str) -> Any:
    """The step, in the image of vertex_train_container."""
    return kfp_component.component(vertex_train, image)
