"""Layer paths (arXiv 2403.13187) as a plain loop over the layers of transformers' models, in torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from evojax_merge.models.paths import LayerPath


def torch_path_logits(
    models: Sequence[Any], tokens: np.ndarray, path: LayerPath, origins: Sequence[tuple[int, int]], folded: bool
) -> np.ndarray:
    """Return the logits float32 `[R, T, vocab]` of a layer path for rows int `[R, T]`.

    `origins`: the parent and the place in it of each layer that a path may name. The state is multiplied by a scale
    before each layer, which is the paper's form; `folded` divides what each layer adds by the product of the scales.
    """
    ends = models[path.embedding_parent]
    calls: list[Any] = []

    def remember(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(kwargs)

    with torch.no_grad():
        # What transformers hands to each layer: masks by kind of layer, rotary tables.
        by_layer: dict[tuple[int, int], dict[str, Any]] = {}
        for k, model in enumerate(models):
            for i, layer in enumerate(model.model.layers):
                calls.clear()
                handle = layer.register_forward_pre_hook(remember, with_kwargs=True)
                model(torch.tensor(tokens).long(), use_cache=False)
                handle.remove()
                by_layer[k, i] = dict(calls[0])
        x = ends.model.embed_tokens(torch.tensor(tokens).long())
        product = 1.0
        for m, scale in zip(path.layers, path.scales, strict=True):
            k, i = origins[m]
            kwargs = {key: value for key, value in by_layer[k, i].items() if key != "hidden_states"}
            product *= scale
            layer = models[k].model.layers[i]
            if folded:
                kept = {name: values.clone() for name, values in layer.state_dict().items()}
                for name, values in layer.named_parameters():
                    if "o_proj" in name or "down_proj" in name:
                        values.mul_(1 / product)
                x = _hidden(layer(x, **kwargs))
                layer.load_state_dict(kept)
            else:
                x = _hidden(layer(x * scale, **kwargs))
        return ends.lm_head(ends.model.norm(x)).numpy()


def _hidden(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def torch_likelihood_gradient(
    model: Any, scales: Sequence[float], texts: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[float, np.ndarray]:
    """Return the mean log-probability per token of targets after prompts, and its gradient by the scales float64 `[T]`.

    `model` has the layers of the path, one after the other. What each of them adds to the state is divided by the
    product of the scales so far.
    """
    parameters = torch.tensor(scales, dtype=torch.float64, requires_grad=True)
    factors = 1 / torch.cumprod(parameters, 0)
    weights = {
        name: values * factors[int(name.split(".")[2])] if "o_proj" in name or "down_proj" in name else values
        for name, values in model.named_parameters()
    }
    scores = []
    for prompt, target in texts:
        logits = functional_call(model, weights, (torch.tensor([[*prompt, *target]]),)).logits[0, len(prompt) - 1 : -1]
        scores.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(target)[:, None]).mean())
    value = torch.stack(scores).mean()
    (gradient,) = torch.autograd.grad(value, parameters)
    return value.item(), gradient.numpy()
