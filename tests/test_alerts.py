"""The alert rules fire when they should and not else, by Prometheus' own tool."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.metrics import Metrics

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docker" / "prometheus"
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]


def test_the_rules_fire_as_their_tests_say() -> None:
    if not shutil.which("promtool"):
        pytest.skip("no promtool is installed: apt-get install prometheus")

    done = subprocess.run(
        ["promtool", "test", "rules", FOLDER / "alerts_test.yml"], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_is_tested_and_its_remedy_told(rule: dict[str, str]) -> None:
    assert f"alertname: {rule['alert']}\n" in (FOLDER / "alerts_test.yml").read_text()
    assert f"| `{rule['alert']}` |" in (ROOT / "docs" / "operations.md").read_text()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_asks_for_metrics_that_there_are(rule: dict[str, str]) -> None:
    told = {name for family in Metrics().registry.collect() for name in names(family)}

    for name in re.findall(r"skrd4ad_\w+", rule["expr"]):
        assert name in told


def names(family) -> set[str]:
    """As Prometheus has them."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for suffix in suffixes.get(family.type, ("",))}


def test_prometheus_reads_the_rules() -> None:
    assert yaml.safe_load((FOLDER / "prometheus.yml").read_text())["rule_files"] == ["alerts.yml"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    mounted = compose["services"]["prometheus"]["volumes"]
    assert "./docker/prometheus/alerts.yml:/etc/prometheus/alerts.yml:ro" in mounted
