"""Clients trained together against the same clients one after the other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_cnn
from tsugiki.client.prepare import SiteRun
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training.cohort import asked_clients, train_openly, train_protecting_clients
from tsugiki.client.training.job import Job
from tsugiki.client.training.vectorised import can_train_together, train_together
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.data.images import write_idx
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.wire.messages import TrainRequest

ROWS, CLIENTS = 60, 7


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny network, and images of two classes for it."""
    folder = tmp_path_factory.mktemp("images")
    images = np.random.default_rng(1).integers(0, 255, (ROWS, 12, 12)).astype(np.uint8)
    name = write_idx(folder, "train", images, [row % 2 for row in range(ROWS)])
    return str(tiny_cnn(folder / "cnn")), str(folder / name)


def job(files, wanted="", deadline_s=1e9, **sections):
    """Return a gateway's job; sections override settings."""
    (base, data), adapter = files, sections.get("adapter", {})
    train = {"learning_rate": 0.1, "per_device_train_batch_size": 4, "threads": 1, "optimizer": "sgd"}
    config = parse(
        {
            "model": {"name": base},
            "task": {"name": "image-classification", "num_labels": 2},
            "adapter": adapter if adapter.get("method") == "ia3" else {"rank": 2, **adapter},
            "train": {**train, **sections.get("train", {})},
            "strategy": {"min_clients": CLIENTS, **sections.get("strategy", {})},
            "privacy": sections.get("privacy", {}),
            "simulation": {"clients": CLIENTS, "clients_per_site": CLIENTS, "data": data, "partition": "dirichlet"}
            | {"min_rows": 1, **sections.get("simulation", {})},
        }
    )
    site = simulated_sites(config)[0]
    run = SiteRun.open(site, config)
    graft = run.graft
    request = TrainRequest(config.for_sites(), 2, graft.spec.sha256, 0.25, 0.5, deadline_s, "nonce", wanted)
    clients = asked_clients(site.name, run.rows_of_clients(), wanted)
    start = graft.initial + np.float32(0.01)  # LoRA's B is zero at first, and A would not move
    encoded = run.train_rows()
    tail = graft.task.tail(graft.base, encoded)
    return Job(graft, encoded, clients, config, request, start, lambda *_: None, tail=lambda: tail)


def one_by_one(work):
    """Return the same job where nothing can be trained together."""
    return Job(
        *(getattr(work, name) for name in ("graft", "encoded", "clients", "config", "request", "received", "watch"))
    )


CASES = {
    "sgd": {"train": {"local_steps": 4}},
    "momentum": {"train": {"local_steps": 4, "momentum": 0.9, "weight_decay": 0.1}},
    "adamw": {"train": {"local_steps": 4, "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1}},
    "head": {"train": {"local_steps": 4, "head_learning_rate": 0.4, "weight_decay": 0.1}},
    "epochs": {"train": {"local_epochs": 2}},
    "no clipping": {"train": {"local_steps": 3, "max_grad_norm": 0.0}},
    "proximal": {"train": {"local_steps": 4}, "strategy": {"name": "fedprox", "proximal_mu": 0.5}},
    "A frozen": {"train": {"local_steps": 4}, "adapter": {"freeze_a": "yes"}},
    "dora": {"train": {"local_steps": 4}, "adapter": {"use_dora": True}},
    "vera": {"train": {"local_steps": 4, "learning_rate": 5.0}, "adapter": {"method": "vera"}},
    "ia3": {"train": {"local_steps": 4}, "adapter": {"method": "ia3"}},
}


@pytest.mark.parametrize("case", CASES)
def test_together_is_one_by_one(files, case):
    """Catches: other rows, a mean over filled-up batches, gradients clipped over all clients at once, other names."""
    work = job(files, **CASES[case])
    groups = {
        name: one
        for group in train_together(work, work.tail())
        for name, one in zip(group.names, group.updates, strict=True)
    }
    assert set(groups) == set(work.clients)
    assert len({len(rows) for rows in work.clients.values()}) > 2
    for name in work.clients:
        single = one_by_one(work)
        alone = Job(**{**vars(single), "clients": {name: work.clients[name]}})
        update, _, _ = train_openly(alone)
        assert np.abs(update).max() > 1e-4
        difference = np.abs(update - groups[name])
        if case == "adamw":  # divides a gradient by its own size: rounding in one near Adam's 1e-8 moves it like any
            assert np.linalg.norm(difference) < 0.1 * np.linalg.norm(update)
        else:
            assert difference.max() < 1e-5


def test_the_mean_and_the_loss_are_the_same(files):
    """Catches: clients that weigh alike whatever their rows; a loss of the last step in place of the mean."""
    work = job(files, train={"local_epochs": 1})
    (together, seen, rows), (alone, known, same) = train_openly(work), train_openly(one_by_one(work))
    assert rows == same == ROWS
    assert np.abs(together - alone).max() < 1e-5
    assert seen.loss == pytest.approx(known.loss, abs=1e-5)
    assert seen.steps == known.steps


@pytest.mark.parametrize("mode", ["central", "distributed"])
def test_the_protected_sum_is_the_same(files, mode):
    """Catches: clients clipped together; a client left out of the sum."""
    noise = {"mode": mode, "noise_multiplier": 1e-9, "clip_norm": 0.05, "delta": 1e-3}
    more = CLIENTS + 1  # a gateway may not know all noise of a sum, so that another site has a client, too
    sections = {"strategy": {"min_clients": more}, "simulation": {"clients": more}}
    work = job(files, privacy=noise, train={"local_steps": 2}, **sections)
    plan = make_plan(work.config, work.graft.spec.size)
    together = train_protecting_clients(work, plan).levels
    alone = train_protecting_clients(one_by_one(work), plan).levels
    assert np.abs(together - alone).max() <= 2 * CLIENTS  # rounding may move each client by a level
    assert np.abs(together).max() > 1000


def test_only_asked_clients_train(files):
    """Catches: the whole gateway trained when three of its clients were sampled."""
    work = job(files, "0,3,5", train={"local_steps": 1})
    names = [name for group in train_together(work, work.tail()) for name in group.names]
    assert sorted(names) == ["site-0/0", "site-0/3", "site-0/5"]


def test_features_are_those_of_the_frozen_trunk(files):
    """Catches: features that carry a gradient, or of rows in another order."""
    work = job(files)
    tail = work.tail()
    assert not tail.features.requires_grad
    batch = work.graft.task.batch(work.encoded, range(ROWS), work.graft.base)
    with torch.no_grad():
        direct = work.graft.base.network(pixel_values=batch["pixel_values"]).logits
        assert torch.allclose(tail.module(tail.features), direct, atol=1e-6)


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"dropout": 0.1}},
        {"train": {"gradient_accumulation_steps": 2}},
        {"privacy": {"examples": {"noise_multiplier": 1.0}}},
        {"strategy": {"name": "rolora"}},
        {"train": {"precision": "bf16"}},
    ],
    ids=["dropout", "accumulation", "examples", "rolora", "bf16"],
)
def test_what_would_differ_is_trained_one_by_one(files, sections):
    """Catches: dropout that is the same for all clients; DP-SGD that is silently left out; a frozen factor trained."""
    assert not can_train_together(job(files, **sections))
    assert can_train_together(job(files))
    assert not can_train_together(replace(job(files), rank=1))
    assert not can_train_together(replace(job(files), class_shares=(0.5, 0.5)))
    narrow = changed(job(files).config, {"model.dtype": "bfloat16"})
    assert not can_train_together(replace(job(files), config=narrow))
