import pytest
import torch

from pipeline.devices import local_device
from pipeline.errors import UserError


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device(False) == torch.device("cpu")
    with pytest.raises(UserError, match="--use-gpu: the job's process has no GPU"):
        local_device(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert local_device(True) == torch.device("cuda")
