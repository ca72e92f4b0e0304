"""evaluation/intervals.py: intervals that contain the truth as often as they say.

Simulated classifiers: half of the variance of a seed's effect on a group's accuracy is common to
its groups; six in ten images are classified alike by equally accurate seeds, as in the miniature
benchmark.
"""

import numpy as np
import pytest
from conftest import slow

from evaluation.intervals import interval, worst_group

FOUR = (0.95, 0.90, 0.87, 0.86)
EQUAL = (0.90, 0.90, 0.90, 0.90)
ONE = (0.97, 0.96, 0.95, 0.86)  # one group is clearly the worst
SETTINGS = [(accuracies, seeds, std, images) for accuracies in (FOUR, EQUAL) for seeds in (3, 5, 10)
            for std in (0.02, 0.08) for images in (124, 850)]


def accuracies_of_seeds(rng, accuracies, seeds, std):
    """True accuracies: (seeds, groups)."""
    effects = rng.standard_normal((seeds, 1)) + rng.standard_normal((seeds, len(accuracies)))
    return np.clip(accuracies + std * effects / np.sqrt(2), 0, 1)


def truth(accuracies, std):
    return accuracies_of_seeds(np.random.default_rng(1), accuracies, 200_000, std).min(1).mean()


def simulated(rng, recipes, seeds, std, images):
    """The WorstGroup of each recipe, given by its groups' mean accuracies, on the same images."""
    groups = np.repeat(np.arange(len(recipes[0])), images)
    alike, shared = rng.random(len(groups)) < 0.6, rng.random(len(groups), dtype=np.float32)
    for accuracies in recipes:
        luck = np.where(alike, shared, rng.random((seeds, len(groups)), dtype=np.float32))
        correct = luck < accuracies_of_seeds(rng, accuracies, seeds, std)[:, groups]
        yield worst_group(correct, groups, [""] * seeds)


def rates(accuracies, seeds, std, images, draws):
    """Coverage of a recipe's interval, and how often two recipes that are the same are called
    different."""
    rng, true, covered, alarms = np.random.default_rng(0), truth(accuracies, std), 0, 0
    for _ in range(draws):
        one, other = simulated(rng, (accuracies, accuracies), seeds, std, images)
        low, high = interval(one)
        covered += low <= true <= high
        low, high = interval(one, other)
        alarms += low > 0 or high < 0
    return covered / draws, alarms / draws


def tolerance(share, draws):
    """Three standard errors of a share that is estimated from this many draws."""
    return 3 * np.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("setting", [(EQUAL, 5, 0.02, 124), (FOUR, 3, 0.08, 124)])
def test_an_interval_contains_the_truth_and_equal_recipes_are_rarely_called_different(setting):
    covered, alarms = rates(*setting, draws=500)
    assert covered >= 0.94 - tolerance(0.94, 500) and alarms <= 0.06 + tolerance(0.06, 500)


@slow
def test_intervals_keep_their_word_however_many_seeds_and_images_and_however_close_the_groups():
    found = np.array([rates(*setting, draws=500) for setting in SETTINGS])
    for setting, (covered, alarms) in zip(SETTINGS, found):
        assert (covered >= 0.94 - tolerance(0.94, 500)
                and alarms <= 0.06 + tolerance(0.06, 500)), setting
    assert found.mean(0)[0] >= 0.95 and found.mean(0)[1] <= 0.05


@slow
@pytest.mark.parametrize("seeds", [3, 10])
def test_a_recipe_with_equal_groups_is_not_called_worse_than_one_with_a_single_bad_group(seeds):
    """Both have the same true worst-group accuracy, but the least of four noisy numbers is lower
    than that of one."""
    equal = np.array(EQUAL) + truth(ONE, 0.02) - truth(EQUAL, 0.02)
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(500):
        low, high = interval(*simulated(rng, (equal, ONE), seeds, 0.02, 124))
        alarms += low > 0 or high < 0
    assert alarms / 500 <= 0.06 + tolerance(0.06, 500)


def test_the_interval_of_one_seed_in_one_group_is_that_of_a_share():
    correct = np.array([[True] * 700 + [False] * 300])
    assert interval(worst_group(correct, np.zeros(1000, int), ["0"])) == pytest.approx(
        (0.6716, 0.7284), abs=0.0005)


def test_a_spread_of_three_seeds_is_taken_with_the_t_quantile_of_two_degrees_of_freedom():
    """Every image is classified alike but for the seeds' means, so that images that seeds share
    add almost nothing."""
    rng = np.random.default_rng(0)
    correct = rng.random((3, 100_000)) < np.array([[0.4], [0.5], [0.6]])
    low, high = interval(worst_group(correct, np.zeros(100_000, int), ["0", "1", "2"]))
    assert (high - low) / 2 == pytest.approx(4.303 * 0.1 / np.sqrt(3), rel=0.05)


def test_seeds_of_a_run_count_as_one():
    correct = np.random.default_rng(0).random((4, 200)) < np.array([[0.9], [0.9], [0.6], [0.6]])
    groups = np.repeat((0, 1), 100)
    assert len(worst_group(correct, groups, ["a", "a", "b", "b"]).value) == 2
    low, high = interval(worst_group(correct, groups, ["a", "a", "b", "b"]))
    few, many = interval(worst_group(correct, groups, [""] * 4))
    assert high - low > many - few


@pytest.mark.parametrize("right", [0, 3])
def test_groups_of_few_images_that_are_all_classified_alike_are_not_certain(right):
    correct = np.tile(np.repeat([True, right > 0], (50, 3)), (3, 1))
    low, high = interval(worst_group(correct, np.repeat((0, 1), (50, 3)), [""] * 3))
    assert 0 <= low < high <= 1 and high - low > 0.2


def test_a_group_of_one_image_and_recipes_with_different_numbers_of_seeds_are_compared():
    rng, groups = np.random.default_rng(0), np.repeat((0, 1), (50, 1))
    one, three = (worst_group(rng.random((seeds, 51)) < 0.8, groups, [""] * seeds)
                  for seeds in (1, 3))
    assert -1 <= interval(one, three)[0] <= 0 <= interval(one, three)[1] <= 1
    assert interval(three, one) == pytest.approx(
        [-limit for limit in reversed(interval(one, three))])
