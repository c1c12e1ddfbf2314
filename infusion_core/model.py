"""A model as a whole: its configuration, its parts, and its files.

A model is kept as `model.json` (the configuration) beside `model.safetensors` (prior, weights, statistics). Neither
format can carry code.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infusion_core.convolutional import ConvolutionalOperator, check_doubling
from infusion_core.errors import InfusionError
from infusion_core.gaussian import FactorialGaussian
from infusion_core.operator import MLPOperator, TransitionOperator
from infusion_core.schedule import InfusionMask, InfusionSchedule

Network = Literal["mlp", "convolutional"]
"""The operator's network: `MLPOperator` or `ConvolutionalOperator`."""

# Models that were saved before there was a choice have these.
_ABSENT_FROM_EARLY_MODELS = {"infusion_mask": "value", "network": "mlp"}

CONFIG_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that determines a model but its weights.

    Attributes:
        image_shape: height, width, channels.
        levels: number of grey levels of the pixels.
        num_steps: T, the number of steps of the chain.
        initial_rate: infusion rate α⁽⁰⁾ of the first state.
        rate_increment: ω, the growth of the infusion rate per step.
        target_variance: variance of the target component δ_x.
        infusion_mask: what is infused or not as a whole: each value, or all channels of a pixel.
        network: the operator's network, mlp or convolutional.
        hidden_sizes: widths of the operator's hidden layers; channels of them if it is convolutional.
        variance_scale: β of the operator's variance β · sigmoid + ε.
        variance_floor: ε. It caps every log-likelihood, which says nothing without it.
        prior_variance_offset: added to the prior's variances, as the authors' code does, so that pixels that never
            vary in the training set leave the prior with a width.

    Raises:
        InfusionError: a value is out of range.
    """

    image_shape: tuple[int, int, int]
    levels: int = 256
    num_steps: int = 15
    initial_rate: float = 0.0
    rate_increment: float = 0.01
    target_variance: float = 1e-4
    infusion_mask: InfusionMask = "value"
    network: Network = "mlp"
    hidden_sizes: tuple[int, ...] = (1200, 1200)
    variance_scale: float = 0.1
    variance_floor: float = 1e-4
    prior_variance_offset: float = 1e-5

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise InfusionError(f"image_shape is height, width and channels, all positive, not {self.image_shape}")
        if not 2 <= self.levels <= 256:
            raise InfusionError(f"levels is the number of grey levels, from 2 to 256, not {self.levels}")
        if self.network == "convolutional":
            check_doubling(self.state_shape, self.hidden_sizes)
        if min(self.hidden_sizes, default=0) < 1:
            raise InfusionError(f"hidden_sizes needs at least one width, all positive, not {self.hidden_sizes}")
        for name in ("variance_scale", "variance_floor"):
            if not getattr(self, name) > 0:
                raise InfusionError(f"{name} must be positive, not {getattr(self, name)}")
        if not self.prior_variance_offset >= 0:
            raise InfusionError(f"prior_variance_offset must not be negative, as {self.prior_variance_offset} is")
        _ = self.schedule

    @property
    def schedule(self) -> InfusionSchedule:
        """The infusion schedule; InfusionError where its rates leave [0, 1]."""
        return InfusionSchedule(
            num_steps=self.num_steps,
            initial_rate=self.initial_rate,
            rate_increment=self.rate_increment,
            target_variance=self.target_variance,
            mask=self.infusion_mask,
        )

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of a state: channels, height, width."""
        height, width, channels = self.image_shape
        return channels, height, width

    @property
    def dimensions(self) -> int:
        """D, the number of pixel values of an image."""
        return math.prod(self.image_shape)

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration as what JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Any) -> Self:
        """Returns the configuration that `to_json` was called on.

        Raises:
            InfusionError: a field is missing, unknown or out of range.
        """
        if not isinstance(fields, dict):
            raise InfusionError(f"not fields and their values but {fields!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise InfusionError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
        fields = {**_ABSENT_FROM_EARLY_MODELS, **fields}
        if missing := sorted(known - set(fields)):
            raise InfusionError(f"field {missing[0]!r} is missing")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        for name, hint in get_type_hints(cls).items():
            if not _is_of_type(values[name], hint):
                raise InfusionError(f"field {name!r} cannot be {fields[name]!r}")
        return cls(**values)


def _is_of_type(value: object, hint: object) -> bool:
    """Says whether a value read from JSON is what a field's type asks for."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    return type(value) is int or (hint is float and type(value) is float)


class InfusionModel(nn.Module):
    """Prior, transition operator and infusion schedule.

    Args:
        config: what to build.
        prior: p⁽⁰⁾ over states `(C, H, W)`; a standard Gaussian stands in for one that is loaded later.
        synchronise: whether several training workers normalise by their common moments; see `StepBatchNorm`.
    """

    prior_mean: Tensor
    prior_variance: Tensor

    def __init__(
        self, config: ModelConfig, prior: FactorialGaussian | None = None, *, synchronise: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        operator = MLPOperator if config.network == "mlp" else ConvolutionalOperator
        self.operator: TransitionOperator = operator(
            config.state_shape,
            config.num_steps,
            hidden_sizes=config.hidden_sizes,
            variance_scale=config.variance_scale,
            variance_floor=config.variance_floor,
            synchronise=synchronise,
        )
        mean = torch.zeros(config.state_shape) if prior is None else prior.mean
        variance = torch.ones(config.state_shape) if prior is None else prior.variance
        self.register_buffer("prior_mean", mean.clone())
        self.register_buffer("prior_variance", variance + config.prior_variance_offset)

    @property
    def prior(self) -> FactorialGaussian:
        """p⁽⁰⁾, on the model's device."""
        return FactorialGaussian(self.prior_mean, self.prior_variance)


def save_model(model: InfusionModel, folder: Path) -> None:
    """Writes the model's two files into an existing folder."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(model.config.to_json(), indent=2) + "\n")


def load_model(folder: Path, device: torch.device | str = "cpu") -> InfusionModel:
    """Reads a model that `save_model` wrote; it is returned in evaluation mode.

    Raises:
        InfusionError: a file is missing or damaged, or the weights do not fit the configuration; the message names the
            file, and the tensor where one is to blame.
    """
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    try:
        config = ModelConfig.from_json(json.loads(config_file.read_text()))
        tensors = load_file(weights_file)
    except FileNotFoundError as error:
        raise InfusionError(f"{error.filename or weights_file}: the model's file is missing") from error
    except SafetensorError as error:
        raise InfusionError(f"{weights_file}: not a safetensors file: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, InfusionError) as error:
        raise InfusionError(f"{config_file}: not a model's configuration: {error}") from error
    model = InfusionModel(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise InfusionError(f"{weights_file}: tensor {name!r} is missing, which {config_file.name} asks for")
        if name not in expected:
            raise InfusionError(f"{weights_file}: tensor {name!r} has no place in the model of {config_file.name}")
        if tensors[name].shape != expected[name].shape:
            raise InfusionError(
                f"{weights_file}: tensor {name!r} has shape {tuple(tensors[name].shape)}, "
                f"where {config_file.name} asks for {tuple(expected[name].shape)}"
            )
        if tensors[name].dtype != expected[name].dtype:
            raise InfusionError(
                f"{weights_file}: tensor {name!r} is of {tensors[name].dtype}, not of {expected[name].dtype}"
            )
    model.load_state_dict(tensors)
    return model.to(device).eval()
