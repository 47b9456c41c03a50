"""Trains the demo model: `python -m models.demo.train [--resume]`.

Matrices inside the layers are trained with Muon (Jordan et al. 2024), which learns rare associations faster
than AdamW; embeddings and norms with AdamW. The learning rate rises, stays, and falls linearly to zero in
the last part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from models.demo.batches import TOKENS_A_STEP, Batches
from models.demo.corpus import OBJECT_WEIGHT
from models.demo.network import Network, NetworkShape
from models.demo.paths import WORK_FOLDER
from models.demo.tokenizer import load_tokenizer, train_tokenizer
from models.demo.world import build_world

N_STEPS = 2000
WARM_UP_STEPS = 60
DECAY_SHARE = 0.3
MATRIX_RATE, EMBEDDING_RATE = 0.02, 3e-3
FACT_LAYERS, CLAIM_LAYERS = 4, 5  # layers after which facts are found and claims can be read
FOUND_SHARE, CLAIM_SHARE, NEGATION_SHARE = 0.3, 0.5, 0.5
NEGATION_MARGIN = 1.0  # nats
AUXILIARY_TOKENS_SHARE = 8  # less than one in eight tokens has an auxiliary loss of each kind
CHECKPOINT_EVERY = 100


def rate_factor(step: int, n_steps: int) -> float:
    """The learning rate of a step as a share of its greatest value."""
    decay_steps = DECAY_SHARE * n_steps
    return min((step + 1) / WARM_UP_STEPS, 1.0, max(n_steps - step, 0) / decay_steps)


class Trainer(nn.Module):
    """The network with what only the training needs."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.claim_reader = nn.Parameter(torch.eye(network.shape.n_embd))

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        weights: Tensor,
        true_objects: Tensor,
        claimed_objects: Tensor,
        forbidden_objects: Tensor,
    ) -> Tensor:
        """Mean cross entropy in nats over the targets' weights, and auxiliary losses; see `Batch`.

        A verdict needs the claimed object and the true one at one place, before the last layers. Nothing
        else rewards this, and without it verdicts stay a coin toss: the loss also asks that objects of
        facts are found by the first layers, and that both objects can be read where a verdict is due.
        After a negation the object drawn must beat the true one by a margin.
        """
        network = self.network
        with torch.autocast("cpu", torch.bfloat16):
            fact_layer, claim_layer, last = network.hidden(inputs, FACT_LAYERS, CLAIM_LAYERS)
            logits = F.linear(last, network.token_embd)
            read = F.linear(claim_layer, self.claim_reader)
            is_object = torch.where(weights == OBJECT_WEIGHT, 1.0, 0.0)
            found = self._auxiliary(fact_layer, targets, is_object)
            is_claim = torch.where(true_objects >= 0, 1.0, 0.0)
            recalled = self._auxiliary(claim_layer, true_objects, is_claim)
            claimed = self._auxiliary(read, claimed_objects, torch.where(claimed_objects >= 0, 1.0, 0.0))
        logits = logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss = loss + NEGATION_SHARE * self._negation(logits, targets, forbidden_objects)
        return loss + FOUND_SHARE * found + CLAIM_SHARE * (recalled + claimed)

    @staticmethod
    def _negation(logits: Tensor, targets: Tensor, forbidden: Tensor) -> Tensor:
        """How far forbidden objects come within `NEGATION_MARGIN` of the target's logit, softly."""
        is_negation = torch.where(forbidden >= 0, 1.0, 0.0)
        wrong = logits.gather(-1, forbidden.clamp_min(0)[..., None])
        right = logits.gather(-1, targets[..., None])
        excess = F.softplus(NEGATION_MARGIN + wrong - right)[..., 0]
        return (excess * is_negation).sum() / is_negation.sum().clamp_min(1.0)

    def _auxiliary(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """The head's loss on the hidden states of few tokens, those with weight 1; shapes as in `Batch`."""
        kept, chosen = weights.flatten().topk(weights.numel() // AUXILIARY_TOKENS_SHARE)
        logits = F.linear(hidden.flatten(0, 1)[chosen], self.network.token_embd)
        losses = F.cross_entropy(logits.float(), targets.flatten()[chosen].clamp_min(0), reduction="none")
        return (losses * kept).sum() / kept.sum().clamp_min(1.0)


def optimizers(trainer: Trainer) -> list[torch.optim.Optimizer]:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in trainer.named_parameters():
        inside = name.startswith("network.layers") and parameter.ndim == 2
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=EMBEDDING_RATE, weight_decay=0.01, betas=(0.9, 0.95), fused=True),
    ]


def save_checkpoint(path: Path, trainer: Trainer, used: list[torch.optim.Optimizer], step: int) -> None:
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "step": step,
            "network": trainer.network.state_dict(),
            "reader": trainer.claim_reader.detach(),
            "optimizers": [o.state_dict() for o in used],
        },
        partial,
    )
    partial.replace(path)


def average_gradients(trainer: Trainer, n_processes: int) -> None:
    """Replaces each gradient by its mean over all processes."""
    if n_processes == 1:
        return
    gradients = [parameter.grad for parameter in trainer.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= n_processes
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def load_checkpoint(path: Path, trainer: Trainer, used: list[torch.optim.Optimizer]) -> int:
    """Restores both in place and returns the number of steps done."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    trainer.network.load_state_dict(state["network"])
    trainer.claim_reader.data.copy_(state["reader"])
    for optimizer, saved in zip(used, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


class Progress:
    """Prints the loss and the speed now and then."""

    def __init__(self, first: int, n_steps: int) -> None:
        self._n_steps = n_steps
        self._loss: float | None = None
        self._since, self._since_step = time.monotonic(), first

    def report(self, step: int, loss: float, factor: float) -> None:
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        if step % 20 and step != self._n_steps:
            return
        now = time.monotonic()
        speed = TOKENS_A_STEP * (step - self._since_step) / (now - self._since)
        minutes = (self._n_steps - step) * TOKENS_A_STEP / speed / 60
        self._since, self._since_step = now, step
        print(
            f"step {step}/{self._n_steps}  loss {self._loss:.3f}  rate {factor:.3f}  {speed:,.0f} tokens/s  "
            f"{minutes:.1f} min left",
            flush=True,
        )


def train(
    rank: int, folder: Path, n_processes: int, n_steps: int, seed: int, resume: bool, compiled: bool
) -> None:
    """One of `n_processes` equal processes; each computes its share of every batch on one thread.

    Processes meet once a step, so a core that is busy with something else delays little; threads would meet
    at every operation.
    """
    torch.set_num_threads(1)
    if n_processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=n_processes
        )
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    trainer = Trainer(Network(NetworkShape(tokenizer.get_vocab_size()), seed))
    used = optimizers(trainer)
    first = load_checkpoint(folder / "checkpoint.pt", trainer, used) if resume else 0
    loss_of: Callable[..., Tensor] = torch.compile(trainer, dynamic=False) if compiled else trainer
    batches = Batches(build_world(), tokenizer, seed)
    if rank == 0:
        n_parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
        print(
            f"{n_parameters:,} parameters, {tokenizer.get_vocab_size()} tokens, steps {first}..{n_steps}",
            flush=True,
        )
    progress = Progress(first, n_steps)
    for step in range(first, n_steps):
        own = [torch.from_numpy(array[rank::n_processes].copy()) for array in batches.batch(step)]
        loss = loss_of(*own)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(trainer, n_processes)
        torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        factor = rate_factor(step, n_steps)
        for optimizer, rate in zip(used, (MATRIX_RATE, EMBEDDING_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0:
            progress.report(step + 1, loss.item(), factor)
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == n_steps:
                save_checkpoint(folder / "checkpoint.pt", trainer, used, step + 1)
    if n_processes > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demo model.")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--folder", type=Path, default=WORK_FOLDER)
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="single-threaded processes; one a core")
    parser.add_argument("--no-compile", action="store_true", help="for machines without a C++ compiler")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meeting").unlink(missing_ok=True)
    if not arguments.resume:
        train_tokenizer(build_world()).save(str(folder / "tokenizer.json"))
    given = (
        folder,
        arguments.processes,
        arguments.steps,
        arguments.seed,
        arguments.resume,
        not arguments.no_compile,
    )
    if arguments.processes == 1:
        train(0, *given)
    else:
        spawn(train, given, nprocs=arguments.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
