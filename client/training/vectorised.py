"""Train many clients at once: the same steps as `client/training/trainer.py`, on parameters stacked over clients.

It is possible if all that is trained is at the end of the network (`tsugiki.common.tasks.base.Tail`): the frozen
trunk's features are computed once and kept, and a batch of clients is one batched matrix product. The results are those
of training one client after the other, to rounding; tests compare them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tsugiki.client.training.job import ClientUpdates, Job
from tsugiki.client.training.trainer import (
    batches,
    grouping_lengths,
    optimizer_over,
    set_learning_rate,
    steps_per_round,
)
from tsugiki.common.tasks.base import Tail
from tsugiki.common.wire.spec import unpack

if TYPE_CHECKING:
    import torch

CHUNK_CLIENTS = 500
"""Clients that are trained together. More would take more memory and be no faster."""


def can_train_together(job: Job) -> bool:
    """Return whether the job's settings allow it: no randomness inside the network, and a plain backward pass.

    A last layer alone is too small to gain from bfloat16, so under bf16 clients are trained one after the other.
    """
    settings = job.config.train
    adapter = job.config.adapter
    return (
        len(job.clients) > 1
        and getattr(adapter, "dropout", 0.0) == 0.0
        and settings.gradient_accumulation_steps == 1
        and settings.precision != "bf16"
        and job.config.model.dtype == "float32"
        and not settings.persist_optimizer
        and not settings.divergence_factor
        and not job.config.privacy.examples.enabled
        and not job.rank
        and not job.class_shares
        and job.part == job.graft.spec
    )


def train_together(job: Job, tail: Tail) -> Iterator[ClientUpdates]:
    """Yield the updates of all clients, `CHUNK_CLIENTS` at a time."""
    import torch

    torch.set_num_threads(job.config.train.threads)
    stack = _Stack.of(job, tail)
    # A batch of clients takes the same number of steps; clients without rows take none.
    by_steps: dict[int, list[str]] = {}
    for name, rows in job.clients.items():
        by_steps.setdefault(steps_per_round(len(rows), job.config.train) if rows else 0, []).append(name)
    for steps, names in sorted(by_steps.items()):
        for start in range(0, len(names), CHUNK_CLIENTS):
            chunk = names[start : start + CHUNK_CLIENTS]
            if steps:
                yield stack.train(chunk, steps)
            else:
                yield ClientUpdates(chunk, np.zeros((len(chunk), job.graft.spec.size)), np.zeros(len(chunk)), 0)


@dataclass(frozen=True)
class _Stack:
    """The values that all chunks use.

    Args:
        job: of the round.
        tail: the trainable end of the network, with the features of all rows.
        received: the received values of the trained parameters, by their names inside the tail.
        targets: of all rows, shape (rows,).
    """

    job: Job
    tail: Tail
    received: dict[str, torch.Tensor]
    targets: torch.Tensor

    @classmethod
    def of(cls, job: Job, tail: Tail) -> _Stack:
        import torch

        device = tail.features.device
        # The spec has whole names of parameters; the tail knows them without its own name.
        prefix = next(
            f"{name}." for name, module in job.graft.base.transformer.named_modules() if module is tail.module
        )
        tensors = {
            name.removeprefix(prefix): torch.from_numpy(np.array(value)).to(device)
            for name, value in unpack(job.received, job.graft.spec).items()
        }
        return cls(job, tail, tensors, torch.from_numpy(job.encoded.targets).to(device))

    def train(self, names: list[str], steps: int) -> ClientUpdates:
        """Return the updates of these clients after this number of steps each."""
        import torch

        settings = self.job.config.train
        local_round = self.job.local_round(names[0], self.job.request.deadline_s)  # its schedule is that of all
        stacked = {
            name: value.expand(len(names), *value.shape).clone().requires_grad_()
            for name, value in self.received.items()
        }
        optimizer = _optimizer(stacked, self.job)
        # Each client has the batches that it would have if it trained alone.
        rows, weights = self._batches(names, steps)
        losses = torch.zeros(len(names), dtype=torch.float64)
        for step in range(steps):
            set_learning_rate(optimizer, settings, local_round, step, steps)
            loss = self._losses(stacked, rows[step], weights[step])
            loss.sum().backward()  # type: ignore[no-untyped-call]  # torch's own
            losses += loss.detach().cpu() / steps
            self._shape_gradients(stacked, local_round.proximal_mu, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return ClientUpdates(names, self._updates(stacked, len(names)), losses.numpy(), steps * len(names))

    def _updates(self, stacked: dict[str, torch.Tensor], clients: int) -> npt.NDArray[np.float64]:
        """Return local minus received values in float64, shape (clients, size), in the order of the spec."""
        updates = np.empty((clients, self.job.graft.spec.size))
        start = 0
        for name, received in self.received.items():
            local = stacked[name].detach().cpu().numpy().reshape(clients, -1)
            there = updates[:, start : start + local.shape[1]]
            np.subtract(local, received.cpu().numpy().reshape(-1), out=there, dtype=np.float64)
            start += local.shape[1]
        return updates

    def _batches(self, names: Sequence[str], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return row numbers and their weights, both of shape (steps, clients, batch); short batches are filled up."""
        import torch

        settings = self.job.config.train
        width = min(settings.per_device_train_batch_size, max(len(self.job.clients[name]) for name in names))
        rows = np.zeros((steps, len(names), width), np.int64)
        weights = np.zeros((steps, len(names), width), np.float32)
        lengths = grouping_lengths(self.job.graft.task, self.job.encoded, settings)
        for client, name in enumerate(names):
            own = np.asarray(self.job.clients[name])
            rows[:, client, :] = own[0]  # fills short batches; the client's own row, since 0 times infinity is no 0
            own_lengths = None if lengths is None else lengths[own]
            stream = batches(len(own), settings, self.job.local_round(name, 0.0), steps, own_lengths)
            for step, batch in enumerate(islice(stream, steps)):
                rows[step, client, : len(batch)] = own[batch]
                weights[step, client, : len(batch)] = 1 / len(batch)
        device = self.tail.features.device
        return torch.from_numpy(rows).to(device), torch.from_numpy(weights).to(device)

    def _losses(self, stacked: dict[str, torch.Tensor], rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return each client's mean loss, shape (clients,): the gradient of their sum is every client's own."""
        import torch
        from torch.func import functional_call

        def of_client(values: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = functional_call(self.tail.module, values, (features,))
            return logits

        logits = torch.func.vmap(of_client)(stacked, self.tail.features[rows]).float()
        losses = self.tail.losses(logits.flatten(0, 1), self.targets[rows].flatten())
        return (losses.reshape(rows.shape) * weights).sum(dim=1)

    def _shape_gradients(self, stacked: dict[str, torch.Tensor], mu: float, max_norm: float) -> None:
        """Add each client's proximal term, and clip each client's gradient, as the local loop does."""
        import torch

        for name, value in stacked.items():
            assert value.grad is not None  # noqa: S101  # for the type checker
            if mu:
                value.grad.add_(value.detach() - self.received[name], alpha=mu)
        if not max_norm:
            return
        gradients = [value.grad for value in stacked.values() if value.grad is not None]
        squares = torch.stack([one.flatten(1).square().sum(dim=1) for one in gradients])
        factor = (max_norm / (squares.sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for one in gradients:
            one.mul_(factor.reshape(-1, *[1] * (one.ndim - 1)))


def _optimizer(stacked: dict[str, Any], job: Job) -> Any:
    """Return an optimiser over stacked parameters, with the groups of the trainer's `make_optimizer`."""
    tensors = zip(job.graft.spec.tensors, stacked.values(), strict=True)
    # A stacked parameter has one dimension more: the client.
    values = [(tensor.part == "head", value.ndim > 2, value) for tensor, value in tensors]
    return optimizer_over(values, job.config.train)
