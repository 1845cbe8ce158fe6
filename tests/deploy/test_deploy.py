"""The deployment files: read as their tools read them, and run where the tool is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from lowbit.server.config import ServerConfig
from lowbit.server.metrics import Metrics, start_metrics_server
from lowbit.server.types import StepStats
from prometheus_client import CollectorRegistry

DEPLOY = Path(__file__).parents[2] / "deploy"


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_prometheus_scrapes_the_port_the_server_listens_on() -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]
    (target,) = scrape["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in compose()["services"]
    assert int(port) == ServerConfig().metrics_port


def test_the_kill_comes_after_the_drain() -> None:
    grace = compose()["services"]["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > ServerConfig().drain_grace_seconds


def test_the_dockerfile_copies_every_package_and_compose_names_its_targets() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert set(re.findall(r"^COPY (\w+) \1$", dockerfile, re.M)) == {
        "kernels",
        "proto",
        "quant",
        "server",
    }
    assert set(re.findall(r"^FROM \w+ AS (\w+)$", dockerfile, re.M)) >= {"cpu", "cuda"}
    assert compose()["services"]["server"]["build"]["target"] == "${LOWBIT_TARGET:-cpu}"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_configuration() -> None:
    command = ["promtool", "check", "config", str(DEPLOY / "prometheus.yml")]
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_blame_in_the_metrics() -> None:
    registry = Metrics(CollectorRegistry()).registry
    with start_metrics_server("127.0.0.1", 0, registry) as server:
        exposition = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read()
    command = ["promtool", "check", "metrics"]
    checked = subprocess.run(command, input=exposition, capture_output=True)
    assert checked.returncode == 0, checked.stderr.decode()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_a_real_prometheus_scrapes_the_metrics(tmp_path: Path) -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.observe_step(
        StepStats(
            num_running=3,
            num_waiting=1,
            kv_cache_usage_ratio=0.25,
            num_prompt_tokens=10,
            num_generation_tokens=3,
            num_preemptions=0,
        )
    )
    with start_metrics_server("127.0.0.1", 0, metrics.registry) as server:
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        config["global"]["scrape_interval"] = "1s"
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.port}"]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            "--web.listen-address=127.0.0.1:19097",
        ]
        prometheus = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert query_until_answered("lowbit_requests_running") == 3.0
            assert query_until_answered("lowbit_kv_cache_usage_ratio") == 0.25
        finally:
            prometheus.terminate()
            prometheus.wait(20)


def query_until_answered(expression: str) -> float:
    url = f"http://127.0.0.1:19097/api/v1/query?query={expression}"
    for _ in range(100):
        try:
            with urllib.request.urlopen(url) as response:
                result = json.load(response)["data"]["result"]
        except OSError:  # not listening yet
            result = []
        if result:
            return float(result[0]["value"][1])
        time.sleep(0.2)
    raise AssertionError(f"no answer for {expression}")
