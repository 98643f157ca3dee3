"""The measurement of evaluation: both ways agree on maps drawn for it, and the table is whole."""

import re

import numpy as np
import pytest

from bench.evaluation import draw, main, published_loop
from training.metrics import pro_per_image


@pytest.mark.parametrize("label_once", [False, True])
def test_the_published_loop_and_ours_give_the_same_per_image_pro(label_once):
    maps, masks = draw(anomalous=3, normal=1, size=64)
    assert not masks[3].any()
    pairs = zip(maps[:3].astype(np.float64), masks[:3], strict=True)
    expected = np.mean([published_loop(*pair, label_once=label_once) for pair in pairs])
    assert pro_per_image(maps, masks) == (pytest.approx(expected, abs=1e-12), 0)


def test_the_command_prints_a_table_with_the_ratios_of_its_own_times(capsys):
    assert main(["--images", "2", "--large", "4", "--size", "64"]) == 0
    printed = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()[2:6]]
    loop = float(rows[0][2])
    assert [row[1] for row in rows] == ["2"] * 4 and float(rows[0][3]) == 1
    for _, _, seconds, ratio in rows:
        assert float(ratio) == pytest.approx(loop / float(seconds), rel=0.02)
    peak, before = map(int, re.findall(r"(\d+) MB", printed))
    assert "Peak memory at 4 images" in printed and peak >= before > 0
