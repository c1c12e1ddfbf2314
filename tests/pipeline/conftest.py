"""A staged data set that is small, real and local."""

import pytest

from pipeline import sources
from pipeline.manifest import Manifest
from pipeline.staging import stage


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    """The address and the manifest of scikit-learn's digits, staged in a folder."""
    folder = str(tmp_path_factory.mktemp("staged") / "digits")
    stage(sources.digits(), folder)
    return folder, Manifest.load(folder)
