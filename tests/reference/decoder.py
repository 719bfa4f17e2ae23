"""Parts of decoders in float64 NumPy, one sequence or one token at a time."""

from collections.abc import Mapping

import numpy as np
from scipy.special import erf


def toy_logits(tensors: Mapping[str, np.ndarray], tokens: np.ndarray, heads: int) -> np.ndarray:
    """Return the logits `[T, vocab]` of one sequence `[T]` by the toy architecture of test_architecture_seam.

    Attention and MLP read one layer norm side by side, as in GPT-J (Wang & Komatsuzaki 2021); learned positions; exact
    GELU; head and embedding are one matrix. `tensors` go by their names in the file.
    """
    weights = {name.removeprefix("transformer."): values.astype(np.float64) for name, values in tensors.items()}
    steps = len(tokens)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["wte.weight"][tokens] + weights["wpe.weight"][:steps]
    depth = len({name.split(".")[1] for name in weights if name.startswith("h.")})
    for i in range(depth):
        layer = f"h.{i}"
        normed = norm(x, f"{layer}.ln")
        q, k, v = (
            (normed @ weights[f"{layer}.attn.{name}.weight"].T).reshape(steps, heads, -1).transpose(1, 0, 2)
            for name in ("q", "k", "v")
        )
        raw = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        raw = np.where(np.tril(np.ones((steps, steps), bool)), raw, -np.inf)
        shares = np.exp(raw - raw.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True)) @ v
        up = normed @ weights[f"{layer}.mlp.fc.weight"].T + weights[f"{layer}.mlp.fc.bias"]
        up = up * 0.5 * (1 + erf(up / np.sqrt(2)))
        attention = mixed.transpose(1, 0, 2).reshape(steps, -1) @ weights[f"{layer}.attn.proj.weight"].T
        x = x + attention + up @ weights[f"{layer}.mlp.proj.weight"].T
    return norm(x, "ln_f") @ weights["wte.weight"].T


def expert_outputs(weights: Mapping[str, np.ndarray], x: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """Return what each token's experts give: `[N, A, H]` of tokens x `[N, H]` and their experts int `[N, A]`.

    Each expert is a SwiGLU (arXiv 2002.05202), `down (silu(gate x) * up x)`, with `gate` and `up` `[E, M, H]` and
    `down` `[E, H, M]`.
    """
    wide = {name: values.astype(np.float64) for name, values in weights.items()}
    outputs = np.zeros((*experts.shape, x.shape[1]))
    for n, a in np.ndindex(experts.shape):
        gate, up, down = (wide[name][experts[n, a]] for name in ("gate", "up", "down"))
        opened = gate @ x[n]
        outputs[n, a] = down @ (opened / (1 + np.exp(-opened)) * (up @ x[n]))
    return outputs


def clipped_expert_outputs(
    weights: Mapping[str, np.ndarray], x: np.ndarray, experts: np.ndarray, alpha: float, limit: float
) -> np.ndarray:
    """Return what each token's experts give, without the last bias: `[N, A, H]` of tokens x `[N, H]`.

    Each expert is gpt-oss's clipped SwiGLU, with `gate_up` `[E, H, 2M]`, whose columns are gate and input in turns,
    `gate_up_bias` `[E, 2M]` and `down` `[E, M, H]`.
    """
    wide = {name: values.astype(np.float64) for name, values in weights.items()}
    outputs = np.zeros((*experts.shape, x.shape[1]))
    for n, a in np.ndindex(experts.shape):
        both = x[n] @ wide["gate_up"][experts[n, a]] + wide["gate_up_bias"][experts[n, a]]
        gate, up = np.minimum(both[::2], limit), np.clip(both[1::2], -limit, limit)
        outputs[n, a] = ((up + 1) * gate / (1 + np.exp(-alpha * gate))) @ wide["down"][experts[n, a]]
    return outputs


def squared_expert_outputs(weights: Mapping[str, np.ndarray], x: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """Return what each token's experts give, `[N, A, H]`: each is an MLP of squared ReLUs without a gate."""
    outputs = np.zeros((*experts.shape, x.shape[1]))
    for n, a in np.ndindex(experts.shape):
        up, down = (weights[name][experts[n, a]].astype(np.float64) for name in ("up", "down"))
        outputs[n, a] = down @ np.maximum(up @ x[n], 0) ** 2
    return outputs
