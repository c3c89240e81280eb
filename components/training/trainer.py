"""One optimizer step per batch, and all that training needs to go on from where it was."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, grad

from components.training.algorithms.learner import Batch, Learner


class Trainer:
    """Lowers a learner's loss by Adam (Kingma and Ba 2015)."""

    def __init__(self, learner: Learner, learning_rate: float, compiled: bool = False) -> None:
        """`compiled`: make loss and gradients machine code at the first step. That needs batches of one shape, and a
        loss that asks no value which way to go."""
        self.learner = learner
        self.call: Callable[[Batch], tuple[Tensor, Tensor, Tensor]] = learner
        """The learner, or what calls it and averages gradients over the workers; a compiled one is not called."""
        self.counts: Tensor | None = None
        """How often the loss counts in the mean over workers, a scalar; None: once."""
        self.average: Callable[[list[Tensor]], Sequence[Tensor]] = list
        """Of a compiled learner's gradients, those over all workers."""
        # What learns by counting has no weights to step. Fused: one pass over the weights, where a step of a small
        # network is mostly the calls that it makes.
        self._weights: list[Tensor] = list(learner.network.parameters())
        self._on_gpu = any(weight.is_cuda for weight in self._weights)
        self.optimizer = torch.optim.Adam(self._weights, lr=learning_rate, fused=True) if self._weights else None
        self._gradients = compile_gradients(learner) if compiled else None

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Update the network; returns what people watch of the loss, a scalar, and the logged actions' scores, [B]."""
        if self._gradients:
            gradients, (scores, watched) = self._gradients(batch)
            for weight, gradient in zip(self._weights, self.average(gradients), strict=True):
                weight.grad = gradient
        else:
            loss, scores, watched = self.call(batch)
            if self.optimizer:
                for weight in self._weights:
                    weight.grad = None
                loss.backward(self.counts)  # type: ignore[no-untyped-call]
        if self.optimizer:
            self._descend(self.optimizer)
        self.learner.follow()
        return watched, scores

    def _descend(self, optimizer: torch.optim.Adam) -> None:
        known = [state for weight in self._weights if (state := optimizer.state.get(weight))]
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        if len(known) < len(self._weights) or len(gradients) < len(self._weights):
            optimizer.step()
            return
        # The operators that `step` calls, without what is around them: that takes a tenth of a small network's step.
        group = optimizer.param_groups[0]
        first, second, steps = ([state[name] for state in known] for name in ("exp_avg", "exp_avg_sq", "step"))
        with torch.no_grad():
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                self._weights, gradients, first, second, [], steps, amsgrad=False, maximize=False, weight_decay=0.0,
                lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
            )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Weights, those that follow them, the optimizer's state and the random numbers', by name."""
        moments = self.optimizer.state_dict()["state"] if self.optimizer else {}
        return {
            **{f"learner.{name}": value.contiguous() for name, value in self.learner.state_dict().items()},
            **{f"optimizer.{i}.{name}": value for i, values in moments.items() for name, value in values.items()},
            "random": torch.get_rng_state(),
            **({"random_cuda": torch.cuda.get_rng_state()} if self._on_gpu else {}),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave; raises `KeyError` or `ValueError` where it is that of another training."""
        learner = {name.removeprefix("learner."): value for name, value in state.items() if name.startswith("learner.")}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, i, moment = name.split(".")
                moments.setdefault(int(i), {})[moment] = value
        # To be known before anything is taken over.
        if {k: v.shape for k, v in learner.items()} != {k: v.shape for k, v in self.learner.state_dict().items()}:
            raise ValueError("it is of another network")
        random = state["random"]
        self.learner.load_state_dict(learner)
        if self.optimizer:
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        torch.set_rng_state(random)
        if self._on_gpu and "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"])


Gradients = Callable[[Batch], tuple[list[Tensor], tuple[Tensor, Tensor]]]


def compile_gradients(learner: Learner) -> Gradients:
    """Batch -> gradients of the loss by the network's weights, and what the learner returns beside it: one graph of
    machine code.

    Compiled apart, as torch does with a module and its way back, a small step is mostly what lies between the two.
    """
    names = [f"network.{name}" for name, _ in learner.network.named_parameters()]

    def loss(weights: list[Tensor], batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        found, *beside = functional_call(learner, dict(zip(names, weights, strict=True)), (batch,))
        return found, tuple(beside)

    # Of weights that want gradients, torch would make ready for gradients of gradients.
    weights = [weight.detach() for weight in learner.network.parameters()]
    # Kernels are called without Python between them; for a GPU's, that would take CUDA's own headers.
    options: dict[str, str | int | bool | Callable[..., object]] = {"cpp_wrapper": weights[0].device.type == "cpu"}
    graph = torch.compile(grad(loss, has_aux=True), fullgraph=True, dynamic=False, options=options)

    def gradients(batch: Batch) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        with torch.no_grad():
            found: tuple[list[Tensor], tuple[Tensor, Tensor]] = graph(weights, batch)
        return found

    return gradients


def missing_to_compile() -> str:
    """What compiling takes that is not here, if anything."""
    if not shutil.which(compiler := os.environ.get("CXX", "g++")):
        return f"C++ compiler {compiler}"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"{header} (Debian has it in python3-dev)"
