"""Item response theory: from the scores of earlier candidates, how hard each example is and how well it tells
candidates apart.

The model is the two-parameter logistic one, in several dimensions: a candidate of ability t in R^K is expected to score
sigmoid(a . t + d) on an example of slopes a in R^K (its discrimination) and intercept d (how easy it is). It is fitted
to the candidates' scores by joint maximum a posteriori, with a Newton step for all examples and for all candidates in
turn. MERGE3 (arXiv 2502.10436) has such a model of merges.

Scores that are not 0 or 1, such as log-probabilities, are mapped to [0, 1] by the range that they have in their task,
and the same likelihood is then a quasi-likelihood (the fractional logit of Papke and Wooldridge, 1996): the mean of a
score is modelled, and its variance is the binomial one times a number for each example, the dispersion.

Letters: R candidates whose scores are known, N examples, K dimensions of ability.
"""

from dataclasses import dataclass

import numpy as np

# Dimensions of ability. Merges of a few experts differ along a few lines.
DIMENSIONS = 2
# Newton steps, each for all examples and then for all candidates. The last ones change a prediction by little.
STEPS = 12
# No parameter moves further in a step: far from its maximum the likelihood is not quadratic.
LONGEST_STEP = 1.0
# Normal priors: slopes around 1 in the first dimension and around 0 in the others, intercepts and abilities around 0.
SLOPE_SD, INTERCEPT_SD, ABILITY_SD = 1.0, 3.0, 1.0
# The weight of a task's dispersion beside an example's own, in candidates.
DISPERSION_PRIOR = 8
# Dispersions are taken to be no less: with none, an ability would be known exactly.
LEAST_DISPERSION = 1e-4


@dataclass(frozen=True)
class ItemModel:
    """Examples as the items of a test. items: float64[N, K + 1], each one's slopes and, last, its intercept; abilities:
    float64[R, K], of the candidates that the model was fitted to; scale: float64[N], the range of scores that responses
    from 0 to 1 stand for; dispersion: float64[N], the variance of the responses over the binomial one."""

    items: np.ndarray
    abilities: np.ndarray
    scale: np.ndarray
    dispersion: np.ndarray


def fit_item_model(scores: np.ndarray, task_of: np.ndarray) -> ItemModel:
    """The item model of the scores float[R, N] of one candidate or more; task_of: int[N], the task of each example."""
    # The lowest score in each example's task, and the distance of the highest from it; 1 where all are the same.
    low, scale = np.zeros(len(task_of)), np.ones(len(task_of))
    for task in np.unique(task_of):
        of_task = scores[:, task_of == task]
        low[task_of == task] = of_task.min()
        scale[task_of == task] = float(of_task.max()) - float(of_task.min()) or 1.0
    responses = (scores - low) / scale
    # The fit begins at the principal components of the responses, the first one upwards.
    vectors, _, loadings = np.linalg.svd(responses - responses.mean(axis=0), full_matrices=False)
    count = min(DIMENSIONS, vectors.shape[1])
    signs = np.where(loadings[:count].sum(axis=1) < 0, -1.0, 1.0)
    abilities = np.zeros((len(responses), DIMENSIONS))
    abilities[:, :count] = vectors[:, :count] * signs * np.sqrt(len(responses)) * ABILITY_SD
    # Half a candidate more with score 1, and half a one with score 0, keep the logits finite.
    mean = (responses.sum(axis=0) + 0.5) / (len(responses) + 1)
    items = np.zeros((len(task_of), DIMENSIONS + 1))
    items[:, -1] = np.log(mean / (1 - mean))
    prior = np.eye(1, DIMENSIONS + 1)[0]
    precision = np.array([*[SLOPE_SD**-2] * DIMENSIONS, INTERCEPT_SD**-2])
    for _ in range(STEPS):
        dispersion = _dispersion(responses, expected_responses(items, abilities), task_of)
        inputs = np.column_stack([abilities, np.ones(len(abilities))])
        weights = np.broadcast_to((1 / dispersion)[:, None], responses.T.shape)
        items = _newton_step(responses.T, weights, inputs, items, prior, precision)
        abilities = _newton_step(
            responses, np.broadcast_to(1 / dispersion, responses.shape), items[:, :-1], abilities,
            np.zeros(DIMENSIONS), np.full(DIMENSIONS, ABILITY_SD**-2), items[:, -1],
        )  # fmt: skip
    return ItemModel(items, abilities, scale, dispersion)


def expected_responses(items: np.ndarray, abilities: np.ndarray) -> np.ndarray:
    """float64[R, N]: expected responses in [0, 1] to items float64[N, K + 1] with abilities float64[R, K]."""
    return sigmoid(abilities @ items[:, :-1].T + items[:, -1])


def predicted_spread(model: ItemModel) -> np.ndarray:
    """The predicted standard deviation, float64[N], of the scores on each example between candidates like those that
    the model was fitted to: that of the expected scores, and that of scores around them."""
    expected = expected_responses(model.items, model.abilities)
    around = model.dispersion * (expected * (1 - expected)).mean(axis=0)
    return model.scale * np.sqrt(expected.var(axis=0) + around)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _dispersion(responses: np.ndarray, expected: np.ndarray, task_of: np.ndarray) -> np.ndarray:
    """The dispersion of each example, float64[N]: the responses' squared distance from the expected ones over the
    binomial variance, with DISPERSION_PRIOR further candidates that have the dispersion of the task."""
    squared, binomial = ((responses - expected) ** 2).sum(axis=0), (expected * (1 - expected)).sum(axis=0)
    of_task = (np.bincount(task_of, squared) / np.maximum(np.bincount(task_of, binomial), 1e-300))[task_of]
    prior = DISPERSION_PRIOR / len(responses) * binomial
    return np.maximum((squared + prior * of_task) / (binomial + prior), LEAST_DISPERSION)


def _newton_step(
    responses: np.ndarray,
    weights: np.ndarray,
    inputs: np.ndarray,
    parameters: np.ndarray,
    prior: np.ndarray,
    precision: np.ndarray,
    offsets: np.ndarray | float = 0.0,
) -> np.ndarray:
    """A Newton step of E logistic regressions with O observations and J inputs each: the parameters float64[E, J] of
    the responses and their weights float64[E, O], the inputs float64[O, J], the offsets float64[O], and normal priors
    of the means and the precisions float64[J]."""
    expected = sigmoid(parameters @ inputs.T + offsets)
    gradient = (weights * (responses - expected)) @ inputs - precision * (parameters - prior)
    products = (inputs[:, :, None] * inputs[:, None, :]).reshape(len(inputs), -1)
    information = (weights * expected * (1 - expected)) @ products
    hessian = information.reshape(len(parameters), *2 * inputs.shape[1:]) + np.diag(precision)
    step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
    return parameters + np.clip(step, -LONGEST_STEP, LONGEST_STEP)
