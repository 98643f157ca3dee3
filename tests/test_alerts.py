"""The alert rules fire when they should and not else; by Prometheus' own tool."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.metrics import Metrics

ROOT = Path(__file__).parent.parent
RULES = ROOT / "docker" / "prometheus" / "alerts.yml"
