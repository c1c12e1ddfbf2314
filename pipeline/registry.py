"""Looking up registered models: `infusion-<dataset>` in MLflow's registry, aliases `challenger` and `champion`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)

from pipeline.errors import UserError
from pipeline.tracking import TrackedRun, mlflow_errors

CHALLENGER = "challenger"
CHAMPION = "champion"

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class RegisteredModel:
    """A version of a registered model.

    Attributes:
        name: name of the registered model.
        version: number of the version.
        run_id: the MLflow run that trained it.
        tags: what was noted with it.
    """

    name: str
    version: str
    run_id: str
    tags: Mapping[str, str]

    @classmethod
    def of(cls, version: ModelVersion) -> Self:
        """Returns what MLflow describes."""
        return cls(version.name, str(version.version), version.run_id or "", version.tags)

    @property
    def uri(self) -> str:
        """The version's address, which no alias moves."""
        return f"models:/{self.name}/{self.version}"


def model_name(dataset_name: str) -> str:
    """Returns the name under which models of a data set are registered."""
    return f"infusion-{dataset_name}"


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
                return RegisteredModel.of(client.get_model_version_by_alias(match["name"], match["alias"]))
            return RegisteredModel.of(client.get_model_version(match["name"], match["version"]))
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
        return RegisteredModel.of(client.get_model_version(name, aliases[alias])) if alias in aliases else None


def create_version(name: str, run: TrackedRun, artifact: str, tags: Mapping[str, str]) -> RegisteredModel:
    """Registers a folder of a run's artifacts as the newest version of `name`, which is created if need be.

    Args:
        name: of the registered model.
        run: the run that the files were logged to; a job that was killed after this finds the run's version again.
        artifact: the folder, below the run's artifacts.
        tags: what is to be known of the version without loading it.
    """
    client = MlflowClient()
    with mlflow_errors(f"register a version of {name}"):
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        if earlier := client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'"):
            return RegisteredModel.of(earlier[0])
        source = f"{client.get_run(run.run_id).info.artifact_uri}/{artifact}"
        return RegisteredModel.of(client.create_model_version(name, source, run.run_id, tags=dict(tags)))


def set_alias(model: RegisteredModel, alias: str) -> None:
    """Points an alias at a version."""
    with mlflow_errors(f"set alias {alias} of {model.name}"):
        MlflowClient().set_registered_model_alias(model.name, alias, model.version)


def set_tags(model: RegisteredModel, tags: Mapping[str, str]) -> None:
    """Notes something with a version."""
    with mlflow_errors(f"tag {model.uri}"):
        for name, value in tags.items():
            MlflowClient().set_model_version_tag(model.name, model.version, name, value)
