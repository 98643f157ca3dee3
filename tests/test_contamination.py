"""Samples that are no normal parts are suspected, and clean ones hardly ever."""

from collections.abc import Callable

import numpy as np
import pytest

from service.contamination import SIGNIFICANT, examine

TAILS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "gamma": lambda rng, n: rng.gamma(3.0, 0.1, n),
    "log-normal": lambda rng, n: rng.lognormal(-2.0, 0.2, n),
    "normal": lambda rng, n: np.abs(rng.normal(0.3, 0.03, n)),
    "power law, the heaviest allowed": lambda rng, n: 0.1 * (1 + rng.pareto(2.0, n)),
}


def by_hand(scores: list[float]) -> tuple[float, int]:
    """The definition in loops: the smallest corrected p-value, and the number above its gap."""
    logs = sorted((np.log(score) for score in scores), reverse=True)
    gaps = max(8, len(scores) // 5)
    scaled = [(i + 1) * (logs[i] - logs[i + 1]) for i in range(gaps)]
    found = []
    for i in range(gaps // 2):
        share = scaled[i] / sum(scaled[i:])
        found.append(((1 - share) ** (gaps - i - 1) * (i + 1) * (i + 2), i + 1))
    p_value, above = min(found)
    return min(1.0, p_value), above


@pytest.mark.parametrize("samples", [9, 19, 50, 137])
def test_it_is_what_the_definition_says(samples: int) -> None:
    rng = np.random.default_rng(samples)
    for _ in range(20):
        scores = rng.lognormal(-2.0, 0.3, samples)
        tail = examine(scores)
        p_value, above = by_hand(scores.tolist())
        assert tail.p_value == pytest.approx(p_value)
        assert tail.above == above


@pytest.mark.parametrize("samples", [19, 99, 500])
@pytest.mark.parametrize("kind", TAILS)
def test_clean_samples_are_suspected_no_more_often_than_is_stated(kind: str, samples: int) -> None:
    rng = np.random.default_rng(2)
    draws = 2000

    suspected = sum(examine(TAILS[kind](rng, samples)).suspects > 0 for _ in range(draws))

    error = np.sqrt(SIGNIFICANT * (1 - SIGNIFICANT) / draws)
    assert suspected / draws <= SIGNIFICANT + 4 * error


@pytest.mark.parametrize("defects", [1, 3, 10])
def test_defects_that_stand_apart_are_suspected_and_counted(defects: int) -> None:
    rng = np.random.default_rng(3)
    counted = []
    for _ in range(100):
        normal = rng.lognormal(-2.0, 0.2, 200 - defects)
        apart = normal.max() * rng.uniform(3.0, 3.5, defects)
        counted.append(examine(np.concatenate([normal, apart])).suspects)

    assert np.mean(np.array(counted) == defects) >= 0.9


def test_suspects_are_told_apart_whatever_the_scores_scale() -> None:
    rng = np.random.default_rng(4)
    scores = np.append(rng.gamma(3.0, 0.1, 99), 30.0)

    assert examine(scores).p_value == pytest.approx(examine(1e-3 * scores).p_value)
    assert examine(scores).suspects == examine(1e-3 * scores).suspects == 1


@pytest.mark.parametrize("samples", [0, 1, 8])
def test_too_few_samples_tell_nothing(samples: int) -> None:
    tail = examine(np.append(np.full(samples, 0.1), 9.0)[:samples])

    assert (tail.p_value, tail.suspects) == (None, 0)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_scores_suspect_nobody(value: float) -> None:
    tail = examine(np.full(50, value))

    assert (tail.p_value, tail.suspects) == (1.0, 0)


def test_a_lone_defect_among_equal_scores_is_suspected() -> None:
    assert examine(np.append(np.full(50, 0.25), 0.5)).suspects == 1
