"""What the paper and those that it compares with have published, to stand beside our own figures.

Sources: Bordes, Honari, Vincent (ICLR 2017, arXiv:1703.06975); Goodfellow et al. 2014 (arXiv:1406.2661); Li, Swersky,
Zemel 2015 (arXiv:1502.02761); Sohl-Dickstein et al. 2015 (arXiv:1503.03585); Salimans et al. 2016 (arXiv:1606.03498);
Wu et al. 2016 (arXiv:1611.04273).

The paper's own figures have not been checked against its text, and are marked so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


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


OPTIMAL_RATES: Mapping[int, float] = MappingProxyType({1: 0.3, 5: 0.1})
"""The infusion rates with the highest bounds on MNIST by number of steps T (Table 4 of the paper, unchecked)."""

TABLES = (
    PaperTable(
        title="Table 1: Parzen-window estimate",
        data="mnist",
        published=(
            Published("deep belief network", "138 ± 2"),
            Published("stacked contractive auto-encoder", "121 ± 1.6"),
            Published("deep generative stochastic network", "214 ± 1.1"),
            Published("diffusion", "220 ± 1.9"),
            Published("generative adversarial net", "225 ± 2"),
            Published("generative moment matching network with auto-encoder", "282 ± 2"),
            Published("infusion training (the paper, unchecked)", "312 ± 1.7"),
        ),
        judges=("parzen",),
        note="Published: 10,000 samples, test set of MNIST, nats per image; σ = 0.17 in the paper, the "
        "others' are their own. The estimate depends on σ.",
    ),
    PaperTable(
        title="Table 2: log-likelihood",
        data="mnist",
        published=(
            Published("VAE, 50 latent dimensions, AIS (Wu et al. 2016)", "991.435 ± 6.477"),
            Published("GAN, 50 latent dimensions, AIS (Wu et al. 2016)", "627.297 ± 8.813"),
            Published("GMMN, 50 latent dimensions, AIS (Wu et al. 2016)", "593.472 ± 8.591"),
            Published("VAE, 10 latent dimensions, AIS (Wu et al. 2016)", "705.375 ± 7.411"),
            Published("GAN, 10 latent dimensions, AIS (Wu et al. 2016)", "328.772 ± 5.538"),
            Published("GMMN, 10 latent dimensions, AIS (Wu et al. 2016)", "346.679 ± 5.860"),
            Published("infusion training, lower bound (the paper, unchecked)", "1350"),
            Published("infusion training, importance sampling, k = 20,000 (the paper, unchecked)", "1836"),
            Published("infusion training, isotropic output, importance sampling (the paper, unchecked)", "413.3"),
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
        note="Published: 1,000 test images of MNIST, nats per image; the paper's after 1500 epochs. The models of "
        "Wu et al. have one variance for all pixels: of the paper's rows only the isotropic one compares with them. "
        "A variance floor caps every other figure, and says what it is worth. Figures for training images are not "
        "transcribed.",
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
