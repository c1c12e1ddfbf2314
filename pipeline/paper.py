"""What the paper and those that it compares with have published, to stand beside our own figures.

Sources: Bordes, Honari, Vincent (ICLR 2017, arXiv:1703.06975); Salimans et al. 2016 (arXiv:1606.03498).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published figure.

    Attributes:
        model: what was judged.
        figure: the figure as published.
    """

    model: str
    figure: str


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        title: what the table shows.
        data: name of the data set that the published figures are of.
        published: figures of others and of the paper.
        judges: the judges whose figures belong beside them.
        note: what must be known to compare them.
    """

    title: str
    data: str
    published: tuple[Published, ...]
    judges: tuple[str, ...]
    note: str


TABLES = (
    PaperTable(
        title="Table 1: Parzen-window estimate",
        data="mnist",
        published=(
            Published("deep Boltzmann machine", "138 ± 2"),
            Published("stacked contractive auto-encoder", "121 ± 1.6"),
            Published("deep generative stochastic network", "214 ± 1.1"),
            Published("diffusion", "220 ± 1.9"),
            Published("generative adversarial net", "225 ± 2"),
            Published("infusion training (the paper)", "312 ± 1.7"),
        ),
        judges=("parzen",),
        note="Published: 10,000 samples, σ = 0.17, test set of MNIST, nats per image. The estimate depends on σ.",
    ),
    PaperTable(
        title="Table 2: log-likelihood",
        data="mnist",
        published=(
            Published("infusion training, lower bound (the paper)", "1350.6"),
            Published("infusion training, importance sampling, k = 20,000 (the paper)", "1836.3"),
            Published("infusion training, isotropic output, importance sampling (the paper)", "413.3"),
        ),
        judges=(
            "gaussian",
            "lower_bound",
            "component_averaged_bound",
            "importance_sampling",
            "annealed_importance_sampling",
            "isotropic_lower_bound",
            "isotropic_importance_sampling",
            "table_2",
        ),
        note="Published: 1,000 test images of MNIST after 1500 epochs, nats per image. A variance floor caps every "
        "figure, and says what it is worth. Not all of the paper's rows are transcribed.",
    ),
    PaperTable(
        title="Table 3: scores of samples",
        data="cifar10",
        published=(
            Published("real data, Inception score (Salimans et al. 2016)", "11.24 ± 0.12"),
            Published("GAN without labels, Inception score (Salimans et al. 2016)", "4.36 ± 0.04"),
        ),
        judges=tuple(
            f"{features}_{score}"
            for features in ("classifier", "inception")
            for score in ("score", "frechet_distance", "kernel_distance", "precision", "recall")
        ),
        note="Published: CIFAR-10, with the Inception network of 2015. Scores by other features cannot be compared "
        "with these, only with those of real data by the same features. Not all of the paper's rows are transcribed.",
    ),
)
