"""Full configurations to start from: the paper's settings, and one for scikit-learn's digits.

A preset leaves open where the data lies and what the run is called; single fields are overridden on the command line.
"""

from dataclasses import replace

from infusion_core.model import ModelConfig
from pipeline.errors import UserError
from pipeline.training import TrainConfig


def mnist() -> TrainConfig:
    """The paper's MNIST model (Section 4): 2 × 1200 units, T = 15, rates growing by 0.01 from 0, Adam, batch 512."""
    return TrainConfig(
        model=ModelConfig(image_shape=(28, 28, 1), num_steps=15, initial_rate=0.0, rate_increment=0.01),
        epochs=1500,
        global_batch=512,
        learning_rate=1e-3,
        validate_every=1,
        figures_every=5,
        parzen_bandwidth=0.17,
    )


def tfd() -> TrainConfig:
    """The paper's Toronto Face Database model: as for MNIST, on 48 × 48 grey faces."""
    config = mnist()
    return replace(config, model=replace(config.model, image_shape=(48, 48, 1)), parzen_bandwidth=0.1)


def cifar10() -> TrainConfig:
    """The paper's CIFAR-10 model: the generator of Salimans et al. 2016, one mask for all channels of a pixel.

    Steps and rates are those of MNIST: what the paper has for these images has not been checked.
    """
    config = mnist()
    model = replace(
        config.model,
        image_shape=(32, 32, 3),
        infusion_mask="pixel",
        network="convolutional",
        hidden_sizes=(512, 256, 128),
    )
    # The paper judges colour images by the scores of their samples.
    return replace(config, model=model, parzen_bandwidth=None)


def celeba() -> TrainConfig:
    """The paper's CelebA model: as for CIFAR-10, with one more transposed convolution, on 64 × 64 images."""
    config = cifar10()
    return replace(config, model=replace(config.model, image_shape=(64, 64, 3), hidden_sizes=(512, 256, 128, 64)))


def digits() -> TrainConfig:
    """A model of scikit-learn's 8 × 8 digits that trains in less than a minute on two cores.

    Variance floor and target variance suit 17 grey levels, of which one is 0.06 wide, and are not the same: a wide
    target component costs the bound little at the steps before the last, where a narrow one costs it most. With so
    small a network, synchronising the normalisation would cost more than all else.
    """
    return TrainConfig(
        model=ModelConfig(
            image_shape=(8, 8, 1),
            levels=17,
            num_steps=8,
            initial_rate=0.0,
            rate_increment=0.1,
            target_variance=2e-2,
            hidden_sizes=(256, 256),
            variance_floor=1e-3,
        ),
        epochs=180,
        global_batch=256,
        learning_rate=2e-3,
        objective="reparametrised_lower_bound",
        denoising_epochs=50,
        synchronise_normalisation=False,
        validate_every=15,
        figures_every=60,
        parzen_bandwidth=0.2,
    )


PRESETS = {"mnist": mnist, "tfd": tfd, "cifar10": cifar10, "celeba": celeba, "digits": digits}


def preset(name: str) -> TrainConfig:
    """Returns the preset of that name.

    Raises:
        UserError: there is none; the message lists those that there are.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)} with --preset")
    return PRESETS[name]()
