"""The attentive probe: one learned query that attends to all tokens of a date, then a linear map.

As for image models whose latents are not pooled in training (Bardes et al. 2024, V-JEPA, section
4.1, there with a layer of a transformer). With a single query the projection of keys is part of the
query, and that of values part of the linear map.
"""

import copy
import math
from functools import partial

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from atmossl.probes.models import Predict

EPOCHS = 20
_BATCH_SIZE = 8
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.1


class AttentivePool(nn.Module):
    """A linear map of weighted means of tokens; the weights of each head are its attention.

    The query begins at 0, where every mean is that over the sphere. area: of every token.
    """

    def __init__(self, features: int, targets: int, area: Float[Tensor, "token"], heads: int = 4):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(heads, features))
        self.linear = nn.Linear(heads * features, targets)
        self.log_area = area.clamp_min(1e-6).log()

    def forward(self, tokens: Float[Tensor, "case token feature"]) -> Float[Tensor, "case target"]:
        scores = einsum(tokens, self.query, "case token f, head f -> case head token")
        scores = scores / math.sqrt(tokens.shape[-1]) + self.log_area
        pooled = einsum(scores.softmax(-1), tokens, "case head token, case token f -> case head f")
        return self.linear(rearrange(pooled, "case head f -> case (head f)"))


def fit_attentive(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    area: Float[np.ndarray, "token"],
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
) -> Predict:
    """Train on (tokens [case token feature], numbers [case target]) with AdamW, and keep the epoch
    with the least squared error on validation. Tokens and targets are scaled by the training
    cases' mean and spread."""
    tokens, targets = (torch.from_numpy(np.asarray(part, np.float32)) for part in train)
    centre, spread = tokens.mean((0, 1)), tokens.std((0, 1)).clamp_min(1e-6)
    mean, scale = targets.mean(0), targets.std(0).clamp_min(1e-12)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = AttentivePool(tokens.shape[-1], targets.shape[-1], torch.from_numpy(area).float())
    optimizer = torch.optim.AdamW(probe.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)

    def predict(by: AttentivePool, rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            scaled = (torch.from_numpy(np.asarray(rows, np.float32)) - centre) / spread
            return (by(scaled) * scale + mean).double().numpy()

    best, least = copy.deepcopy(probe), math.inf
    for _ in range(epochs):
        for part in torch.randperm(len(tokens), generator=generator).split(_BATCH_SIZE):
            predicted = probe((tokens[part] - centre) / spread)
            (predicted - (targets[part] - mean) / scale).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        error = float(((predict(probe, validation[0]) - validation[1]) ** 2).mean())
        if error < least:
            best, least = copy.deepcopy(probe), error
    return partial(predict, best)
