"""What the tests of the pipeline have in common."""

import uuid
from collections.abc import Mapping

import pytest
import torch

from infusion_core.model import InfusionModel, ModelConfig
from pipeline import model_package, tracking
from pipeline.manifest import Manifest
from pipeline.registry import RegisteredModel
from pipeline.training import training_gaussian


@pytest.fixture(scope="session")
def digits(staged_digits: str) -> tuple[str, Manifest]:
    """The address and the manifest of the staged digits."""
    return staged_digits, Manifest.load(staged_digits)


@pytest.fixture(scope="session")
def registered_digits(client_env: Mapping[str, str], digits: tuple[str, Manifest]) -> RegisteredModel:
    """A registered model of the digits that was never trained."""
    manifest = digits[1]
    config = ModelConfig(image_shape=(8, 8, 1), levels=17, num_steps=3, rate_increment=0.1, hidden_sizes=(16,))
    torch.manual_seed(0)
    model = InfusionModel(config, training_gaussian(manifest)).eval()
    name = f"infusion-{uuid.uuid4().hex[:8]}"
    tags = {"dataset_fingerprint": manifest.origin.fingerprint, "best_epoch": "1"}
    with tracking.owned_run("tests", name, params={}, tags={}) as run:
        return model_package.register(model, name, run, tags)
