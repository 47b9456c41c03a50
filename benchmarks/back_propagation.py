"""ROME's way to an edit's change, for comparison: exact gradients in float32, by torch, and Adam."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.torch_llama import TorchLlama
from edge_runtime.engine.engine import Engine
from edge_runtime.personalize.objective import Objective, Point
from edge_runtime.personalize.search import State

Doubles = NDArray[np.float64]


class BackPropagation:
    """The gradient of the very objective that the forward-only search has, on dequantized weights."""

    def __init__(self, engine: Engine) -> None:
        self._model = TorchLlama(engine.gguf, engine.hyperparameters)
        self._prepared: tuple[Objective, _Batch] | None = None

    def gradient(self, objective: Objective, point: Point, step: int) -> Doubles:
        """As `Estimator.gradient`."""
        if self._prepared is None or self._prepared[0] is not objective:
            self._prepared = objective, _Batch(self._model, objective)
        delta = torch.tensor(point.delta, dtype=torch.float32, requires_grad=True)
        loss = self._prepared[1].loss(delta) + objective.decay * delta.square().sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        found: Doubles = gradient.double().numpy()
        return found


class _Batch:
    """All contexts of an objective, padded to one length."""

    def __init__(self, model: TorchLlama, objective: Objective) -> None:
        probes = objective.probes
        contexts = probes.contexts
        self._model, self._layer = model, probes.layer
        longest = max(len(context.tokens) for context in contexts) - 1
        tokens = torch.zeros(len(contexts), longest, dtype=torch.long)
        self._readout = torch.zeros(len(contexts), longest, 1)
        for number, (context, readout) in enumerate(zip(contexts, probes.readouts, strict=True)):
            end = len(context.tokens) - 1
            tokens[number, :end] = torch.tensor(context.tokens[:-1])
            self._readout[number, context.subject_end : end, 0] = torch.from_numpy(readout)
        places = [(i, j) for i, c in enumerate(contexts) for j in range(c.n_prompt - 1, len(c.tokens) - 1)]
        self._rows = torch.tensor([row for row, _ in places])
        self._columns = torch.tensor([column for _, column in places])
        self._targets = torch.tensor([contexts[i].tokens[j + 1] for i, j in places])
        lengths = np.array([len(contexts[i].targets) for i, _ in places])
        row_weights = objective.weights[[i for i, _ in places]] / lengths
        self._weights = torch.tensor(row_weights, dtype=torch.float32)
        self._says = torch.tensor(objective.says[[i for i, _ in places]])
        with torch.no_grad():
            x = model.embedded(tokens)
            for layer in range(self._layer + 1):
                x, _ = model.layer(layer, x)
            self._start = x
            self._before = self._log_probabilities(torch.zeros(x.shape[-1]))

    def _log_probabilities(self, delta: Tensor) -> Tensor:
        x = self._start + self._readout * delta
        for layer in range(self._layer + 1, self._model.hyperparameters.n_layers):
            x, _ = self._model.layer(layer, x)
        return torch.log_softmax(self._model.logits(x[self._rows, self._columns]), dim=-1)

    def loss(self, delta: Tensor) -> Tensor:
        after = self._log_probabilities(delta)
        likelihood = -after.gather(1, self._targets[:, None])[:, 0]
        divergence = (self._before.exp() * (self._before - after)).sum(dim=-1)
        return (torch.where(self._says, likelihood, divergence) * self._weights).sum()


@dataclass(slots=True)
class Adam:
    """Adam [1412.6980] as a search's rule, with the usual constants.

    Attributes:
        rate: of each component, in units of the objective's scale over the root of the width.
    """

    rate: float = 0.1
    _mean: Doubles = field(default_factory=lambda: np.zeros(0))
    _square: Doubles = field(default_factory=lambda: np.zeros(0))

    def __call__(self, objective: Objective, state: State, gradient: Doubles) -> State:
        """As `Rule`."""
        if not state.step:
            self._mean, self._square = np.zeros_like(gradient), np.zeros_like(gradient)
        self._mean = 0.9 * self._mean + 0.1 * gradient
        self._square = 0.999 * self._square + 0.001 * gradient**2
        number = state.step + 1
        mean, square = self._mean / (1 - 0.9**number), self._square / (1 - 0.999**number)
        rate = self.rate * objective.scale / np.sqrt(len(gradient))
        delta = state.point.delta - rate * mean / (np.sqrt(square) + 1e-12)
        return replace(state, point=objective.points(delta[None])[0])
