"""Images judged by one worker or several, at once or with an interruption: always the same figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
from ray.exceptions import RayActorError

from infusion_core.model import InfusionModel, ModelConfig
from pipeline.image_judges import AnnealingJudge, BoundJudge, ImportanceJudge
from pipeline.image_judging import Figures, ImageJudge, Judging
from pipeline.manifest import Manifest
from pipeline.shards import load_rows
from pipeline.training import training_gaussian

Digits = tuple[str, Manifest]


@pytest.fixture(scope="module")
def model(digits: Digits) -> InfusionModel:
    torch.manual_seed(0)
    config = ModelConfig(image_shape=(8, 8, 1), levels=17, num_steps=3, rate_increment=0.1, hidden_sizes=(16,))
    return InfusionModel(config, training_gaussian(digits[1])).eval()


@pytest.mark.parametrize(
    "judge",
    [
        BoundJudge(3),
        ImportanceJudge(3, (1, 20)),
        AnnealingJudge(3, 10),
    ],
)
def test_figures_do_not_depend_on_the_number_of_workers(
    ray_cluster: str, client_env: Mapping[str, str], digits: Digits, model: InfusionModel, judge: ImageJudge
) -> None:
    alone = Judging(model, "model", *digits).run("test", judge, "test", 110)
    with Judging(model, "model", *digits, num_workers=2) as judging:
        shared = judging.run("test", judge, "test", 110)
    assert alone.keys() == shared.keys()
    for name, figure in alone.items():
        assert len(figure) == 110
        assert torch.equal(figure, shared[name])


def test_workers_serve_one_judge_after_the_other_and_end(
    ray_cluster: str, client_env: Mapping[str, str], digits: Digits, model: InfusionModel
) -> None:
    with Judging(model, "model", *digits, num_workers=2) as judging:
        judging.run("test", BoundJudge(3), "test", 110)
        workers = list(judging._actors)
        judging.run("test", BoundJudge(4), "test", 110)
        assert judging._actors == workers
    assert len(workers) == 2
    for worker in workers:
        with pytest.raises(RayActorError):
            ray.get(worker.judge.remote(BoundJudge(3), "test", 0, 0, 10))


@dataclass(frozen=True)
class FirstPixel:
    """Gives images' first pixels; notes which units it judged in a file; stops at a unit."""

    log: str
    images_per_unit: int = 30

    def judge(self, model: InfusionModel, images: torch.Tensor, unit: int) -> Figures:
        file = Path(self.log)
        if unit == 2 and not file.with_suffix(".stopped").exists():
            file.with_suffix(".stopped").touch()
            raise KeyboardInterrupt
        with file.open("a") as log:
            log.write(f"{unit} ")
        return {"pixel": images[:, 0, 3, 3].double(), "unit": torch.full((len(images),), unit)}


def test_interrupted_work_goes_on_where_it_was(digits: Digits, model: InfusionModel, tmp_path: Path) -> None:
    judge = FirstPixel(str(tmp_path / "log"))
    judging = Judging(model, "model", *digits, partial_results=str(tmp_path / "partial"))
    with pytest.raises(KeyboardInterrupt):
        judging.run("test", judge, "test", 130)
    figures = judging.run("test", judge, "test", 130)
    assert (tmp_path / "log").read_text() == "0 1 2 3 4 "
    assert torch.equal(figures["pixel"], load_rows(*digits, "test", 0, 130)[:, 0, 3, 3].double())
    assert figures["unit"].tolist() == [row // 30 for row in range(130)]
    # Another model, split or number of images is other work.
    Judging(model, "other", *digits, partial_results=str(tmp_path / "partial")).run("test", judge, "test", 20)
    judging.run("test", judge, "valid", 20)
    judging.run("test", judge, "test", 20)
    assert (tmp_path / "log").read_text() == "0 1 2 3 4 0 0 0 "


def test_a_split_smaller_than_asked_is_judged_whole(digits: Digits, model: InfusionModel) -> None:
    figures = Judging(model, "model", *digits).run("test", BoundJudge(0), "test", 10_000)
    assert len(figures["prior"]) == 250
