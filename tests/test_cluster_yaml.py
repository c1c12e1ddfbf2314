"""The cluster launcher file, against Ray's own schema."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def cluster() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return content


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    broken = {**prepared, "no_such_field": 1}
    with pytest.raises(Exception, match="no_such_field"):
        validate_config(broken)


def test_nodes_run_the_locked_version_of_ray(cluster: dict[str, Any]) -> None:
    version = importlib.metadata.version("ray")
    images = [cluster["docker"]["image"], cluster["available_node_types"]["gpu-worker"]["docker"]["worker_image"]]
    assert all(image.startswith(f"rayproject/ray:{version}-py311") for image in images)
    assert f"\nray=={version} " in (REPOSITORY / "requirements.lock").read_text()


def test_head_is_a_cpu_and_workers_are_spot_gpus_that_come_and_go(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    worker = types["gpu-worker"]
    assert cluster["head_node_type"] == "head"
    assert worker["min_workers"] == 0
    assert worker["max_workers"] > 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_every_ray_command_uses_the_token_and_set_up_is_explicit(cluster: dict[str, Any]) -> None:
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in cluster[key]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all(line.startswith("RAY_AUTH_MODE=token ") for line in starts)
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("requirements.lock" in command for command in cluster["setup_commands"])
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert key in cluster
