"""What is registered of a model: a pyfunc that draws samples, made of safetensors, JSON and the code to read them.

It (`pipeline.sampler_model`) carries `infusion_core` with it, so that it can be loaded where this repository is not.
The jobs read its safetensors and JSON alone. Whoever may write to the registry can still put code of their own under a
model: load models of people you trust.
"""

import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import mlflow.pyfunc
import numpy as np
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

import infusion_core
from infusion_core.model import InfusionModel, load_model, save_model
from pipeline import registry
from pipeline.registry import RegisteredModel
from pipeline.tracking import TrackedRun, mlflow_errors

_ARTIFACT = "infusion_model"


def register(model: InfusionModel, name: str, run: TrackedRun, tags: Mapping[str, str]) -> RegisteredModel:
    """Registers a model as the newest version of `name` and points `challenger` at it.

    Args:
        model: with statistics estimated.
        name: of the registered model; it is created if need be.
        run: the run that trained it; the files go to its artifacts.
        tags: what is to be known of the model without loading it: its bounds, the data set that they are of.
    """
    with tempfile.TemporaryDirectory() as temporary:
        files, packed = Path(temporary) / _ARTIFACT, Path(temporary) / "model"
        files.mkdir()
        save_model(model, files)
        _pack(model, files, packed)
        with mlflow_errors(f"log the files of {name}"):
            MlflowClient().log_artifacts(run.run_id, str(packed), "model")
    registered = registry.create_version(name, run, "model", tags)
    registry.set_alias(registered, registry.CHALLENGER)
    return registered


def load(model: RegisteredModel) -> InfusionModel:
    """Downloads a registered model and returns it, in evaluation mode.

    Raises:
        UserError: its files cannot be had.
        InfusionError: its files are damaged.
    """
    with tempfile.TemporaryDirectory() as temporary, mlflow_errors(f"download {model.uri}"):
        folder = download_artifacts(artifact_uri=model.uri, dst_path=temporary)
        return load_model(Path(folder) / "artifacts" / _ARTIFACT)


def _pack(model: InfusionModel, files: Path, target: Path) -> None:
    """Writes the pyfunc that carries the model's files and the code to load them."""
    height, width, channels = model.config.image_shape
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "num_samples")]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, height, width, channels))]),
        params=ParamSchema(
            [
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("num_steps", DataType.long, 0),
                ParamSpec("last_step", DataType.string, "mean"),
            ]
        ),
    )
    with warnings.catch_warnings():
        # The signature is given; MLflow still warns that it could not be read off the type hints of `predict`.
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            target,
            python_model=str(Path(__file__).with_name("sampler_model.py")),
            artifacts={"model": str(files)},
            code_paths=[str(Path(infusion_core.__file__).parent)],
            signature=signature,
            pip_requirements=[
                f"{package}=={version(package)}" for package in ("mlflow", "numpy", "safetensors", "torch")
            ],
        )
