"""95 % confidence intervals of worst-group accuracies, and of the difference between two recipes.

Estimated is the mean, over training seeds, of a classifier's true worst-group accuracy: the least
of its groups' shares of correct predictions among all images that the groups' test images are a
sample of. An interval covers other seeds (or other runs, if there are several: the seeds of one
share its diffusion models) and other test images.

Every seed is tested on the same images, as readers read the same cases in a study of radiologists.
The t interval of such studies (Obuchowski and Rockette 1995, with the degrees of freedom of Hillis
2007) adds the variance of the mean over seeds and the variance from images that seeds have in
common. Its centre is uncertain, too: the least of several noisy accuracies is too low on average,
the more so the closer the groups are. Accuracy in the group that is worst on other images is too
high on average. The lower limit is taken from the former and the upper limit from the latter.
"""

from typing import NamedTuple

from common import stage

np = stage.lazy("numpy")

FOLDS = 5


class WorstGroup(NamedTuple):
    """Worst-group accuracy of a recipe's replicates: its seeds or, if there are several, runs."""

    value: "np.ndarray"  # (replicates,): as measured
    low: "np.ndarray"  # (replicates,): not too high on average
    high: "np.ndarray"  # (replicates,): not too low on average
    errors: "np.ndarray"  # (replicates, images): what each adds to low's error; squares: variance


def worst_group(correct, groups, runs):
    """The WorstGroup of a recipe.

    correct: (seeds, images) bool; groups: (images,) int from 0 on; runs: of each seed.
    """
    value = group_accuracies(correct, groups).min(1)
    high = np.maximum(value, cross_fitted(correct, groups))
    # One correct and one wrong prediction more in each group (Agresti and Coull 1998 add two) keep
    # a group of few images from being certain because all of them, or none, are correct.
    numbers = np.unique(groups)
    groups = np.concatenate([groups, numbers, numbers])
    added = (len(correct), len(numbers))
    correct = np.hstack([correct, np.ones(added), np.zeros(added)])
    accuracies = group_accuracies(correct, groups)
    low = np.minimum(value, accuracies.min(1))
    members = groups == accuracies.argmin(1)[:, None]  # (seeds, images): of the seed's worst group
    errors = members * (correct - accuracies.min(1)[:, None]) / members.sum(1)[:, None]
    if len(set(runs)) > 1:
        shares = np.array([[other == run for other in runs] for run in sorted(set(runs))], float)
        shares /= shares.sum(1, keepdims=True)
        return WorstGroup(*(shares @ part for part in (value, low, high, errors)))
    return WorstGroup(value, low, high, errors)


def group_accuracies(correct, groups):
    """(seeds, groups) float."""
    members = groups[:, None] == np.unique(groups)
    return correct @ members.astype(float) / members.sum(0)


def cross_fitted(correct, groups):
    """Accuracy in the group that is worst on the other folds' images, mean over folds: (seeds,)."""
    members = groups[:, None] == np.unique(groups)  # (images, groups)
    folds = min(FOLDS, members.sum(0).min())
    if folds < 2:
        return group_accuracies(correct, groups).min(1)
    place = (members.cumsum(0) - 1)[np.arange(len(groups)), groups]  # of an image within its group
    cells = (groups * folds + place % folds)[:, None] == np.arange(members.shape[1] * folds)
    sizes = cells.sum(0).reshape(-1, folds)
    right = (correct @ cells.astype(float)).reshape(-1, *sizes.shape)  # (seeds, groups, folds)
    elsewhere = (right.sum(2, keepdims=True) - right) / (sizes.sum(1, keepdims=True) - sizes)
    worst = elsewhere.argmin(1, keepdims=True)
    return np.take_along_axis(right / sizes, worst, axis=1).mean((1, 2))


def interval(recipe, reference=None):
    """(low, high) of a WorstGroup or, with a reference on the same images, of the difference.

    The seeds of two recipes are taken to be independent: they share initial weights, which makes
    the interval too wide, if anything. A recipe with one replicate adds no variance of seeds: the
    interval covers test images only.
    """
    from scipy.special import stdtrit  # quantiles of Student's t; takes a moment to import

    low, high = recipe.low.mean(), recipe.high.mean()
    errors, parts = recipe.errors.mean(0), [recipe]
    if reference:
        low, high = low - reference.high.mean(), high - reference.low.mean()
        errors, parts = errors - reference.errors.mean(0), [recipe, reference]
    several = [part for part in parts if len(part.value) > 1]
    of_seeds = [part.value.var(ddof=1) / len(part.value) for part in several]
    # The spread of seeds holds the noise of images that differs between them: not to count twice.
    counted = sum(part.errors.var(0, ddof=1).sum() / len(part.errors) for part in several)
    variance = max((errors ** 2).sum() - counted, 0) + sum(of_seeds)
    spread = sum(of ** 2 / (len(part.value) - 1) for of, part in zip(of_seeds, several))
    degrees = variance ** 2 / spread if spread else float("inf")
    half = stdtrit(degrees, 0.975) * variance ** 0.5
    floor = -1 if reference else 0
    return float(max(floor, low - half)), float(min(1, high + half))
