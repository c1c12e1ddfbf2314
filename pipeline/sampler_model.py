"""The registered model as MLflow loads it: a pyfunc whose `predict` draws samples.

This file is stored with every registered model and run when one is loaded, beside a copy of `infusion_core`; it is not
imported by the pipeline. Weights and configuration are safetensors and JSON.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import torch

from infusion_core.model import load_model
from infusion_core.sampling import sample_batches


class InfusionSampler(mlflow.pyfunc.PythonModel):  # type: ignore[misc,name-defined]
    """Draws images from an infusion model."""

    def load_context(self, context: Any) -> None:
        """Reads the model's files."""
        self.model = load_model(Path(context.artifacts["model"]))

    def predict(
        self,
        context: Any,  # noqa: ARG002 - the interface is MLflow's
        model_input: Any,
        params: dict[str, Any] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Draws `num_samples` images for every row of `model_input`.

        Args:
            context: MLflow's.
            model_input: a table with the column `num_samples`.
            params: `seed`; `num_steps`, 0 for as many as in training; `last_step`, `mean` or `sample`.

        Returns:
            float32 array in [0, 1] of shape `(sum of num_samples, height, width, channels)`.
        """
        settings = {"seed": 0, "num_steps": 0, "last_step": "mean", **(params or {})}
        batches = sample_batches(
            self.model,
            int(model_input["num_samples"].sum()),
            settings["seed"],
            num_steps=settings["num_steps"] or None,
            last_step=settings["last_step"],
        )
        images = torch.cat(list(batches))
        return images.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()


mlflow.models.set_model(InfusionSampler())
