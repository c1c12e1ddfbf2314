"""What the tests of the pipeline have in common."""

import pytest

from pipeline.manifest import Manifest


@pytest.fixture(scope="session")
def digits(staged_digits: str) -> tuple[str, Manifest]:
    """The address and the manifest of the staged digits."""
    return staged_digits, Manifest.load(staged_digits)
