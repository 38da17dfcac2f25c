"""DP-SGD at a site, with Opacus: bounds what a run's uploads reveal about any one row of the site.

In each step every row is drawn by a coin of its own. The gradients of the drawn rows are clipped to `max_grad_norm` and
added up, Gaussian noise is added to the sum, and the sum is divided by the expected number of rows, not by the number
drawn. A step that drew no row is noise alone; it is taken, and counted. Neighbours differ in one row: one has it, the
other has it without any gradient. Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.

All randomness comes from the operating system, not from the run's seed, which the server knows. The noise is drawn by
ChaCha20 (`common/privacy/noise.py`) and added in float64; attacks on the lowest bits of floats (Mironov 2012) remain.
Rows and dropout are drawn by torch's generators, which are not cryptographic. Their whole state is filled, because the
one for CPUs keeps 32 bits of a seed, and 2^32 seeds can be tried. Dropout has to be secret because a row's place and
length decide which masks the others get: with known masks, neighbours differ by more than one clipped gradient.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from tsugiki.client.training import trainer
from tsugiki.client.training.trainer import LocalRound, Trained, Watch
from tsugiki.common.adapters.master import has_masters
from tsugiki.common.config.run import TrainSection
from tsugiki.common.errors import TrainingError, UsageError
from tsugiki.common.model.graft import Graft
from tsugiki.common.privacy.accounting import Release, calibrate
from tsugiki.common.privacy.noise import gaussian, noise_generator
from tsugiki.common.privacy.settings import ExamplePrivacySection
from tsugiki.common.rng import derive_seed, seed_everything
from tsugiki.common.tasks.base import Encoded

_MOST_NOISE = 1000.0  # the upper bound of [privacy.examples] noise_multiplier
_WORDS = 624  # of the Mersenne twister behind torch's CPU generator, 8 bytes each, from byte 24 of its state on


def train_protecting_rows(
    graft: Graft,
    encoded: Encoded,
    settings: TrainSection,
    local_round: LocalRound,
    examples: ExamplePrivacySection,
    watch: Watch = lambda step, steps, losses: None,
    insecure_seed: int = 0,
) -> Trained:
    """Train the graft's parameters in place by DP-SGD on one site's rows.

    FedProx's term is added after clipping and noise: it follows from the received and the noisy parameters alone, and
    so costs no privacy. A row whose gradient is not finite counts as one without gradient.

    The parameters are private, also after an exception. Loss and seconds are not, nor is the code `diverged`.

    Args:
        graft: the model; the drawn rows' gradients take rows * spec.size * 4 bytes.
        encoded: the rows, at least one.
        settings: of the loop; `max_grad_norm`, accumulation and `precision` do not apply, and batches have
            `per_device_train_batch_size` rows on average.
        local_round: which part of the run this is.
        examples: with a noise multiplier above 0.
        watch: called after each step; a step that drew no row has the loss of the step before.
        insecure_seed: tests only; above 0, all randomness follows from it and the run's seed, and hides nothing.

    Returns:
        Steps, mean loss over all drawn rows (0 if no row was drawn), seconds.

    Raises:
        TrainingError: `diverged`, the loss is not finite; `deadline`, the time is up; `examples-unsupported`.
        UsageError: Opacus is not installed.
    """
    check_supported(graft)
    import torch
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    started = time.perf_counter()
    rows = len(encoded)
    steps = trainer.steps_per_round(rows, settings)
    probability = sampling_probability(rows, settings)
    torch.set_num_threads(settings.threads)
    # All randomness is secret, unless a test has set a seed.
    site = local_round.site
    round_number = local_round.round_number
    seed = secrets.randbits(63)
    if insecure_seed:
        seed = derive_seed(local_round.seed, "train", site, round_number)
    seed_everything(seed)
    coins = torch.Generator().manual_seed(derive_seed(insecure_seed, "rows", site, round_number))
    if not insecure_seed:
        make_secret(torch.default_generator)  # of dropout on CPUs; other devices' generators use all 63 bits of a seed
        make_secret(coins)
    # Each row is drawn by a coin in each step, so that a step may have any number of rows.
    sampler = UniformWithReplacementSampler(num_samples=rows, sample_rate=probability, generator=coins, steps=steps)
    draw = noise_generator(insecure_seed, "examples", site, round_number)
    received = [value.detach().clone() for value in graft.parameters] if local_round.proximal_mu else []
    losses, drawn = torch.zeros(2, steps, device=graft.device)

    with row_gradients(graft):
        optimizer = _private(trainer.make_optimizer(graft, settings), examples, rows * probability, draw)
        optimizer.attach_step_hook(lambda _: trainer.add_proximal_term(graft, received, local_round.proximal_mu))
        for step, chosen in enumerate(sampler):
            trainer.set_learning_rate(optimizer, settings, local_round, step, steps)
            # Opacus clips and noises inside `optimizer.step`, whose hook adds FedProx's term.
            loss = backward(graft, encoded, chosen)
            losses[step] = losses[max(step - 1, 0)] if loss is None else loss
            drawn[step] = len(chosen)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            watch(step + 1, steps, losses)
            trainer.check_deadline(local_round, step + 1, steps, started)
    mean = float((losses * drawn).sum() / drawn.sum().clamp(min=1))
    return Trained(steps, trainer.finite(mean), time.perf_counter() - started)


def sampling_probability(rows: int, settings: TrainSection) -> float:
    """Return the probability of each row to be in a step, given the number of rows (coins are fair to 6e-8)."""
    return min(1.0, settings.per_device_train_batch_size / rows)


def release_of_round(rows: int, settings: TrainSection, examples: ExamplePrivacySection) -> tuple[Release, int]:
    """Return the release of one step about each row, and the number of steps in a round, given the number of rows."""
    release = Release("gaussian", examples.noise_multiplier, sampling_probability(rows, settings))
    return release, trainer.steps_per_round(rows, settings)


def calibrated(
    rows: int, settings: TrainSection, examples: ExamplePrivacySection, rounds: int
) -> ExamplePrivacySection:
    """Return the settings with a noise multiplier: their own, or the least that keeps the target over all rounds.

    Raises:
        TrainingError: `examples-unsupported`, no noise is enough.
    """
    if examples.noise_multiplier or not examples.target_epsilon:
        return examples
    release, count = release_of_round(rows, settings, examples)
    noise = _least_noise(release.sampling_probability, count * rounds, examples.target_epsilon, examples.delta)
    return examples.model_copy(update={"noise_multiplier": noise})


@lru_cache(maxsize=1024)
def _least_noise(probability: float, count: int, target_epsilon: float, delta: float) -> float:
    try:
        noise = calibrate(lambda noise: {Release("gaussian", noise, probability): count}, target_epsilon, delta)
    except ValueError:
        noise = math.inf
    if noise > _MOST_NOISE:
        raise _unsupported(f"epsilon {target_epsilon:g} over {count} steps", f"noise of at most {_MOST_NOISE:g} times")
    return noise


def check_supported(graft: Graft) -> None:
    """Check that the gradients of this model's rows can be computed one by one.

    Raises:
        TrainingError: `examples-unsupported`, they cannot.
        UsageError: Opacus is not installed.
    """
    if not graft.task.row_losses:
        raise _unsupported(f"the task {graft.task.name!r}", "a task whose loss is a mean over independent rows")
    if not graft.method.row_gradients:
        raise _unsupported(f"this kind of {graft.method.name!r} adapter", "one whose layers see rows one by one")
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    # In train mode, because only there a batch norm mixes rows.
    network = graft.base.network.train()
    mixing = any(isinstance(module, _BatchNorm) and module.training for module in network.modules())
    network.eval()
    if mixing:
        raise _unsupported("a batch norm that is not frozen", "layers that do not mix the rows of a batch")
    if _hooks().validate(network, strict=False):
        raise _unsupported("a trained layer with buffers", "layers that hold nothing but parameters")
    norms = [dict(one.named_parameters()) for one in network.modules() if isinstance(one, torch.nn.LayerNorm)]
    if any(norm.keys() == {"weight"} and norm["weight"].requires_grad for norm in norms):
        raise _unsupported("a trained layer norm without a bias", "norms that have one, or that are not trained")
    if any(value.dtype != torch.float32 for value in graft.parameters):
        raise _unsupported("trained numbers in half precision", "float32: noise is rounded away in others")
    if has_masters(network):
        raise _unsupported("trained layers that compute in half precision", 'model.dtype = "float32"')


@contextmanager
def row_gradients(graft: Graft) -> Iterator[None]:
    """Put the network into train mode, with Opacus's hooks, inside a `with` block; restore it afterwards."""
    network = graft.base.network
    hooks = None
    try:
        with warnings.catch_warnings():
            # The first trained layer may read frozen ones only: Opacus needs the gradient of its output, no more.
            warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed", UserWarning)
            hooks = _hooks()(network)
            network.train()
            yield
    finally:
        if hooks is not None:
            hooks.cleanup()
        for module in network.modules():  # Opacus leaves these behind; after an exception they hold the rows themselves
            for name in ("activations", "max_batch_len"):
                module.__dict__.pop(name, None)
        for value in graft.parameters:
            value.grad = None
            value.__dict__.pop("summed_grad", None)
        network.eval()


def backward(graft: Graft, encoded: Encoded, chosen: Sequence[int]) -> Any:
    """Set each parameter's `grad_sample`, shape (chosen rows, *parameter); return the rows' mean loss, or None."""
    if not chosen:
        for value in graft.parameters:
            value.grad_sample = value.new_zeros((0, *value.shape))
        return None
    import torch

    batch = graft.task.batch(encoded, chosen, graft.base)
    loss = graft.task.loss(graft.base.network, {name: tensor.to(graft.device) for name, tensor in batch.items()})
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    samples = [value.grad_sample for value in graft.parameters]
    if not all(isinstance(sample, torch.Tensor) and len(sample) == len(chosen) for sample in samples):
        raise _unsupported("a layer whose gradient is not there for each row", "layers that see rows one by one")
    norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples])  # of (parameters, rows)
    for sample in samples:
        sample[~norms.isfinite().all(dim=0)] = 0.0  # a clip factor of 0 would make it NaN
    return loss.detach()


def _private(optimizer: Any, examples: ExamplePrivacySection, expected_rows: float, draw: np.random.Generator) -> Any:
    """Return Opacus's optimiser around another one, with our noise."""
    import torch
    from opacus.optimizers import DPOptimizer

    class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is not typed
        def add_noise(self) -> None:
            for value in self.params:
                noise = gaussian(draw, self.noise_multiplier * self.max_grad_norm, tuple(value.shape))
                value.grad = (value.summed_grad.cpu().double() + torch.from_numpy(noise)).float().to(value.device)

    bounds = {"noise_multiplier": examples.noise_multiplier, "max_grad_norm": examples.max_grad_norm}
    return PrivateOptimizer(optimizer, expected_batch_size=expected_rows, **bounds)


def make_secret(generator: Any) -> None:
    """Fill the state of a `torch.Generator` for CPUs from the operating system: 19,968 bits."""
    generator.manual_seed(1)
    state = generator.get_state()
    words = state.numpy()[24 : 24 + 8 * _WORDS].view(np.uint64)
    if words[0] != 1:  # the seed
        raise RuntimeError("torch keeps the state of its generator in another place")
    words[:] = np.frombuffer(secrets.token_bytes(4 * _WORDS), np.uint32)
    generator.set_state(state)


def _hooks() -> Any:
    handlers = list(logging.root.handlers)
    try:
        from opacus.grad_sample import GradSampleHooks
    except ImportError as error:
        raise UsageError("[privacy.examples] needs Opacus", hint="pip install 'tsugiki[privacy]'") from error
    finally:
        logging.root.handlers[:] = handlers  # importing Opacus sets up logging for everyone
    return GradSampleHooks


def _unsupported(problem: str, expected: str) -> TrainingError:
    return TrainingError(f"[privacy.examples] cannot protect rows: {problem}", expected, code="examples-unsupported")
