"""Baselines that refit the last layer on val: DFR and SELF. Each changes model.last_layer.

Both take the model, val (see classifiers.network.Images), its features (N, D), a seed, and what
else they need by name; both return the chosen worst-group accuracy on the half of val that they
choose by.
"""

import copy
import itertools

from common import stage
from common.files import InputError

np = stage.lazy("numpy")
torch = stage.lazy("torch")


def halves(count, rng):
    """Two random halves of range(count): one to learn from, one to choose settings by."""
    return np.split(rng.permutation(count), [count // 2])


def worst_group(correct, group):
    """The worst accuracy of a group; correct: (N,) bool, group: (N,)."""
    return min(correct[group == g].mean() for g in np.unique(group))


def deep_feature_reweighting(model, val, features, seed, **unused):
    """DFR (Kirichenko et al. 2023, section 5): the last layer anew, on balanced parts of val.

    L1 logistic regression on standardised features; its strength is chosen on the other half of
    val, and the layer is the mean of 20 fits, as in the authors' code.
    """
    features = features.cpu().numpy()
    y, group = val.y.numpy(), val.group.numpy()
    rng = np.random.default_rng(stage.seed_of(seed, "dfr"))

    def balanced(indices):
        parts = [rng.permutation(indices[group[indices] == g]) for g in np.unique(group[indices])]
        return np.concatenate([part[:min(map(len, parts))] for part in parts])

    half, other = halves(len(y), rng)
    if not set(y[half]) == set(y[other]) == set(y):
        raise InputError("--data", "has too few val images: one half of them lacks a class",
                         "add some")

    def score(layer):
        weight, bias = layer
        correct = (features[other] @ weight.T + bias).argmax(1) == y[other]
        return worst_group(correct, group[other])

    scores = {}
    for strength in (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01):
        chosen = balanced(half)
        scores[strength] = score(sparse_layer(features[chosen], y[chosen], strength))
    strength, layers = max(scores, key=scores.get), []
    for _ in range(20):
        chosen = balanced(np.arange(len(y)))
        layers.append(sparse_layer(features[chosen], y[chosen], strength))
    weights, biases = zip(*layers)
    with torch.no_grad():
        model.last_layer.weight.copy_(torch.from_numpy(np.mean(weights, axis=0)))
        model.last_layer.bias.copy_(torch.from_numpy(np.mean(biases, axis=0)))
    return scores[strength]


def sparse_layer(features, y, strength):
    """(weight (C, D), bias (C,)) of L1 logistic regressions, one against the rest."""
    from sklearn.linear_model import LogisticRegression  # takes seconds to import
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    layers = OneVsRestClassifier(LogisticRegression(l1_ratio=1, C=strength, solver="liblinear",
                                                    random_state=0))
    layers.fit(scaler.transform(features), y)
    weight = np.concatenate([one.coef_ for one in layers.estimators_]) / scaler.scale_
    bias = np.concatenate([one.intercept_ for one in layers.estimators_]) - weight @ scaler.mean_
    if len(layers.classes_) == 2:  # one regression separates two classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def early_stop_disagreement(model, val, features, seed, history, points, batch, weight_decay):
    """SELF (LaBonte et al. 2023): the layer is tuned where predictions changed most in training.

    As in the authors' code (tmlabonte/last-layer-retraining, 40612d4): the points are chosen from
    one half of val without any label; class-balanced batches of them tune ERM's layer for 250
    steps; the number of points, the learning rate and the early epoch (10, 20 or 50 % of all) are
    those with the best worst group on the other half, which alone needs group labels. Ours: images
    are not augmented, and the backbone's batch statistics are frozen.

    history: class probabilities (N, C) on val after each epoch; points: numbers to choose from.
    """
    best = -1.0
    half, other = halves(len(val.y), np.random.default_rng(stage.seed_of(seed, "self")))
    rates, shares = (1e-4, 1e-3, 1e-2), (0.1, 0.2, 0.5)
    for count, rate, share in itertools.product(points, rates, shares):
        early = history[max(round(share * len(history)), 1) - 1]
        chosen = half[disagreeing(early[half], history[-1][half], count).numpy()]
        rng = torch.Generator().manual_seed(stage.seed_of(seed, "self", count, rate, share))
        layer = tuned(model.last_layer, features[chosen], val.y[chosen], rate, batch, weight_decay,
                      rng)
        correct = layer(features[other]).argmax(1).cpu() == val.y[other]
        score = worst_group(correct.numpy(), val.group[other].numpy())
        if score >= best:  # of equals the last, as in the authors' code
            best, kept = score, layer
    model.last_layer = kept
    return best


def disagreeing(early, final, points):
    """The rows, at most `points`, with the largest KL(early || final) of probabilities (N, C)."""
    final = final.clamp(min=torch.finfo(final.dtype).tiny)  # log 0 would make the divergence NaN
    divergence = torch.nn.functional.kl_div(final.log(), early, reduction="none").mean(1)
    return divergence.topk(min(points, len(divergence))).indices


def tuned(layer, features, y, rate, batch, weight_decay, rng, steps=250):
    """A copy of the layer, trained on class-balanced batches of features (N, D), y (N,).

    SGD without momentum: the authors' code sets one, but where torch does not read it.
    """
    from classifiers.network import equally_often

    layer, batches = copy.deepcopy(layer), []
    optimizer = torch.optim.SGD(layer.parameters(), rate, weight_decay=weight_decay)
    while len(batches) < steps:
        batches += equally_often(y, rng).split(batch)
    for chosen in batches[:steps]:
        target = y[chosen].to(features.device)
        loss = torch.nn.functional.cross_entropy(layer(features[chosen]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer
