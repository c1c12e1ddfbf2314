"""Registered models: `infusion-<dataset>` in MLflow's registry, with the aliases `challenger` and `champion`.

What is registered is a pyfunc (`pipeline.sampler_model`) that carries `infusion_core` with it, so that it can be loaded
where this repository is not. Its files are safetensors and JSON, and the jobs read these alone. Whoever may write to
the registry can still put code of their own under a model: load models of people you trust.
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow.pyfunc
import numpy as np
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

import infusion_core
from infusion_core.model import InfusionModel, load_model, save_model
from pipeline.errors import UserError
from pipeline.tracking import TrackedRun, mlflow_errors

CHALLENGER = "challenger"
CHAMPION = "champion"

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")
_ARTIFACT = "infusion_model"


@dataclass(frozen=True)
class RegisteredModel:
    """A version of a registered model.

    Attributes:
        name: name of the registered model.
        version: number of the version.
        run_id: the MLflow run that trained it.
        tags: what was noted with it (see `register`).
    """

    name: str
    version: str
    run_id: str
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        """The version's address, which no alias moves."""
        return f"models:/{self.name}/{self.version}"


def model_name(dataset_name: str) -> str:
    """Returns the name under which models of a data set are registered."""
    return f"infusion-{dataset_name}"


def register(model: InfusionModel, name: str, run: TrackedRun, tags: Mapping[str, str]) -> RegisteredModel:
    """Registers a model as the newest version of `name` and points `challenger` at it.

    Args:
        model: with statistics estimated.
        name: of the registered model; it is created if need be.
        run: the run that trained it; the files go to its artifacts.
        tags: what is to be known of the model without loading it: its bounds, the data set that they are of.
    """
    client = MlflowClient()
    with tempfile.TemporaryDirectory() as temporary:
        files, packed = Path(temporary) / _ARTIFACT, Path(temporary) / "model"
        files.mkdir()
        save_model(model, files)
        _pack(model, files, packed)
        with mlflow_errors(f"register a version of {name}"):
            client.log_artifacts(run.run_id, str(packed), "model")
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                    raise
            source = f"{client.get_run(run.run_id).info.artifact_uri}/model"
            version = client.create_model_version(name, source, run.run_id, tags=dict(tags))
            client.set_registered_model_alias(name, CHALLENGER, version.version)
    return _registered(version)


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
    mlflow.pyfunc.save_model(
        target,
        python_model=str(Path(__file__).with_name("sampler_model.py")),
        artifacts={"model": str(files)},
        code_paths=[str(Path(infusion_core.__file__).parent)],
        signature=signature,
        pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "numpy", "safetensors", "torch")],
    )


def find(uri: str) -> RegisteredModel:
    """Looks a model up in the registry.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        UserError: the address is not of that form, or the registry has no such model.
    """
    match = _MODEL_URI.fullmatch(uri)
    if match is None:
        raise UserError(f"{uri} is not a model's address; write models:/NAME@ALIAS or models:/NAME/VERSION")
    client = MlflowClient()
    with mlflow_errors(f"look up {uri}"):
        try:
            if match["alias"]:
                return _registered(client.get_model_version_by_alias(match["name"], match["alias"]))
            return _registered(client.get_model_version(match["name"], match["version"]))
        except MlflowException as error:
            if error.error_code not in (
                ErrorCode.Name(RESOURCE_DOES_NOT_EXIST),
                ErrorCode.Name(INVALID_PARAMETER_VALUE),
            ):
                raise
            known = sorted(model.name for model in client.search_registered_models())
            raise UserError(f"the registry has no model {uri}; registered are: {', '.join(known) or 'none'}") from error


def find_alias(name: str, alias: str) -> RegisteredModel | None:
    """Returns the version that an alias of a registered model points at, if any.

    Raises:
        UserError: there is no registered model of that name.
    """
    client = MlflowClient()
    with mlflow_errors(f"look up {name}"):
        try:
            aliases = client.get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            raise UserError(f"the registry has no model named {name!r}; jobs.train registers one") from error
        return _registered(client.get_model_version(name, aliases[alias])) if alias in aliases else None


def load(model: RegisteredModel) -> InfusionModel:
    """Downloads a registered model and returns it, in evaluation mode.

    Raises:
        UserError: its files cannot be had.
        InfusionError: its files are damaged.
    """
    with tempfile.TemporaryDirectory() as temporary, mlflow_errors(f"download {model.uri}"):
        folder = download_artifacts(artifact_uri=model.uri, dst_path=temporary)
        return load_model(Path(folder) / "artifacts" / _ARTIFACT)


def set_alias(model: RegisteredModel, alias: str) -> None:
    """Points an alias at a version."""
    with mlflow_errors(f"set alias {alias} of {model.name}"):
        MlflowClient().set_registered_model_alias(model.name, alias, model.version)


def set_tags(model: RegisteredModel, tags: Mapping[str, str]) -> None:
    """Notes something with a version."""
    with mlflow_errors(f"tag {model.uri}"):
        for name, value in tags.items():
            MlflowClient().set_model_version_tag(model.name, model.version, name, value)


def _registered(version: ModelVersion) -> RegisteredModel:
    return RegisteredModel(version.name, str(version.version), version.run_id or "", version.tags)
