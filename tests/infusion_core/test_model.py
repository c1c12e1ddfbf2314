import dataclasses
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infusion_core.chain import sampling_trajectory
from infusion_core.errors import InfusionError
from infusion_core.gaussian import FactorialGaussian
from infusion_core.model import CONFIG_FILE, WEIGHTS_FILE, InfusionModel, ModelConfig, load_model, save_model
from infusion_core.noise import GeneratorNoise

# No field at its default, so that one that is lost is noticed.
CONFIG = ModelConfig(
    image_shape=(4, 3, 2),
    levels=17,
    num_steps=3,
    initial_rate=0.1,
    rate_increment=0.05,
    target_variance=2e-4,
    hidden_sizes=(6, 5),
    variance_scale=0.2,
    variance_floor=3e-4,
    prior_variance_offset=0.125,
)


def make_model(config: ModelConfig = CONFIG) -> InfusionModel:
    """Returns a model in which every number is its own, statistics included."""
    generator = torch.Generator().manual_seed(0)
    shape = config.state_shape
    prior = FactorialGaussian(torch.rand(shape, generator=generator), torch.rand(shape, generator=generator))
    model = InfusionModel(config, prior)
    with torch.no_grad():
        for name, tensor in model.operator.state_dict().items():
            values = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values.abs() + 0.1 if name.endswith("running_var") else values)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(make_model(), tmp_path)
    return tmp_path


def test_state_is_channels_first_and_the_prior_has_its_offset():
    shape = (2, 4, 3)
    assert CONFIG.state_shape == shape
    assert CONFIG.dimensions == 24
    mean, variance = torch.rand(shape), torch.rand(shape)
    model = InfusionModel(CONFIG, FactorialGaussian(mean, variance))
    assert torch.equal(model.prior.mean, mean)
    torch.testing.assert_close(model.prior.variance, variance + 0.125)
    assert model.operator(torch.rand(2, *shape), 1).mean.shape == (2, *shape)


def test_configuration_reaches_the_parts():
    model = make_model()
    assert model.schedule.rates == (0.1, 0.15, 0.2)
    assert model.schedule.target_variance == 2e-4
    assert [norm.weight.shape for norm in model.operator.norms] == [(3, 6), (3, 5)]
    with torch.no_grad():
        model.operator.head.weight.zero_()
        model.operator.head.bias.zero_()
    transition = model.operator(torch.rand(2, 2, 4, 3), 1)  # β · sigmoid(0) + ε
    torch.testing.assert_close(transition.variance, torch.full((2, 2, 4, 3), 0.1 + 3e-4))


def test_the_prior_is_not_trained():
    assert not any(name.startswith("prior") for name, _ in make_model().named_parameters())


def test_saved_and_loaded_model_has_the_same_bits(folder):
    model, loaded = make_model(), load_model(folder)
    assert loaded.config == model.config
    expected, state = model.state_dict(), loaded.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    assert torch.equal(loaded.prior.variance, model.prior.variance)  # the offset is not added a second time


def test_loaded_model_is_in_evaluation_mode_and_draws_the_same_samples(folder):
    model, loaded = make_model().eval(), load_model(folder)
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        drawn = [
            sampling_trajectory(m.prior, m.operator, 5, 4, GeneratorNoise.from_seed(1)).states for m in (model, loaded)
        ]
    assert torch.equal(*drawn)


def test_saving_does_not_disturb_the_model(tmp_path):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_files_are_json_and_safetensors_and_hold_no_code(folder, monkeypatch):
    # The safetensors layout by its specification: header length (u64, little endian), JSON header, then raw numbers.
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    fields = json.loads((folder / CONFIG_FILE).read_text())
    assert fields["image_shape"] == [4, 3, 2]
    assert set(fields) == {field.name for field in dataclasses.fields(ModelConfig)}
    content = (folder / WEIGHTS_FILE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert set(header) - {"__metadata__"} == set(make_model().state_dict())
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F32"}
    start, end = (8 + length + offset for offset in header["prior_mean"]["data_offsets"])
    assert content[start:end] == make_model().prior_mean.numpy().tobytes()

    def refuse(*args, **kwargs):
        raise AssertionError("a model is loaded without pickle")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, refuse)
    load_model(folder)


def rewrite_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def test_missing_tensor_is_named(folder):
    rewrite_weights(folder, lambda tensors: tensors.pop("operator.norms.1.running_var"))
    with pytest.raises(InfusionError, match=r"model\.safetensors: tensor 'operator.norms.1.running_var' is missing"):
        load_model(folder)


def test_extra_tensor_is_named(folder):
    rewrite_weights(folder, lambda tensors: tensors.update(stowaway=torch.zeros(2)))
    with pytest.raises(InfusionError, match=r"model\.safetensors: tensor 'stowaway' has no place"):
        load_model(folder)


def test_tensor_of_another_shape_is_named_with_both_shapes(folder):
    rewrite_weights(folder, lambda tensors: tensors.update({"operator.head.bias": torch.zeros(7)}))
    with pytest.raises(InfusionError, match=r"model\.safetensors: tensor 'operator.head.bias' .*\(7,\).*\(48,\)"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_tensor_of_another_type_is_named(folder, dtype):
    # Converted silently, the model would not be the one that was saved.
    rewrite_weights(folder, lambda tensors: tensors.update({"prior_mean": tensors["prior_mean"].to(dtype)}))
    with pytest.raises(InfusionError, match=r"model\.safetensors: tensor 'prior_mean'.*float32"):
        load_model(folder)


@pytest.mark.parametrize(("field", "value"), [("num_steps", 4), ("hidden_sizes", [6, 6]), ("image_shape", [4, 4, 2])])
def test_configuration_of_another_model_is_refused(folder, field, value):
    fields = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(fields | {field: value}))
    with pytest.raises(InfusionError, match=r"model\.safetensors: tensor '.*' has shape .*, where model.json asks for"):
        load_model(folder)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-3], lambda b: b[:20], lambda b: b"\x80\x04" + b])
def test_damaged_weights_are_refused(folder, damage):
    file = folder / WEIGHTS_FILE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InfusionError, match=r"model\.safetensors: not a safetensors file"):
        load_model(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"image_shape": [4, 3', b"\xff\xfe\x00\x80", b"null", b"5", b"[]", b"[[1]]", b'"digits"', b"{}"],
)
def test_damaged_configuration_is_refused(folder, content):
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(InfusionError, match=r"model\.json: not a model's configuration"):
        load_model(folder)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(InfusionError, match=f"{file}: the model's file is missing"):
        load_model(folder)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InfusionError, match=r"nowhere/model\.json"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("levels", "256"),
        ("levels", 16.5),
        ("num_steps", 3.0),
        ("num_steps", True),
        ("num_steps", None),
        ("image_shape", 5),
        ("image_shape", [4.0, 3, 2]),
        ("image_shape", [4, 3]),
        ("hidden_sizes", "12"),
        ("hidden_sizes", [6.5, 5]),
        ("hidden_sizes", [[6], 5]),
        ("variance_floor", "small"),
        ("initial_rate", None),
        ("variance_scale", -1),
        ("rate_increment", 0.6),
    ],
)
def test_field_with_a_wrong_value_is_named_with_its_file(folder, field, value):
    fields = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(fields | {field: value}))
    name = {"rate_increment": "infusion rate"}.get(field, field)
    with pytest.raises(InfusionError, match=rf"model\.json: .*{name}"):
        load_model(folder)


def test_unknown_and_missing_fields_are_named(folder):
    fields = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(fields | {"dropout": 0.5}))
    with pytest.raises(InfusionError, match=r"model\.json: .*unknown field 'dropout'"):
        load_model(folder)
    del fields["variance_floor"]
    (folder / CONFIG_FILE).write_text(json.dumps(fields))
    with pytest.raises(InfusionError, match=r"model\.json: .*field 'variance_floor' is missing"):
        load_model(folder)


def test_configuration_survives_json():
    assert ModelConfig.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_shape": (28, 28)}, "image_shape"),
        ({"image_shape": (28, 0, 1)}, "image_shape"),
        ({"levels": 1}, "levels"),
        ({"levels": 257}, "levels"),
        ({"hidden_sizes": ()}, "hidden_sizes"),
        ({"hidden_sizes": (10, 0)}, "hidden_sizes"),
        ({"variance_scale": 0.0}, "variance_scale"),
        ({"variance_floor": 0.0}, "variance_floor"),
        ({"variance_floor": float("nan")}, "variance_floor"),
        ({"prior_variance_offset": -1e-9}, "prior_variance_offset"),
        ({"target_variance": 0.0}, "target component"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 102}, "at step 101 of 102"),
    ],
)
def test_values_out_of_range_are_refused_by_name(fields, message):
    with pytest.raises(InfusionError, match=message):
        ModelConfig(**{"image_shape": (28, 28, 1)} | fields)


def test_values_at_the_edge_of_their_range_are_accepted():
    config = ModelConfig(image_shape=(1, 1, 1), levels=2, num_steps=101, prior_variance_offset=0.0, hidden_sizes=(1,))
    assert config.schedule.rates[-1] == 1
