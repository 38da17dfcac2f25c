"""What every task and adapter method promises on bases of 16 bits, and under bfloat16 autocast."""

from functools import cache

import numpy as np
import pytest
import torch

from tests.contract.test_adapters import PAIRS, run
from tests.support.federation import run_tiny, tiny_config
from tests.support.tiny import tiny_base
from tsugiki.client.training.dp_sgd import check_supported
from tsugiki.client.training.trainer import LocalRound, train
from tsugiki.client.training.update import make_update
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.config.parse import changed
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import TrainingError
from tsugiki.common.files import read_lines
from tsugiki.common.model import load as model
from tsugiki.common.model.device import computing
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks import TASKS
from tsugiki.common.tasks.base import Generation
from tsugiki.common.tasks.sequence_classification import SequenceClassification
from tsugiki.common.wire.spec import unpack
from tsugiki.server.predict import predict

FORMS = [(task, form) for task in TASKS.names() for form in ("", *TASKS.get(task).extra_cases())]

LOSS_BOUND = 0.02
"""Largest relative difference of a tiny case's loss from that in float32; bfloat16 rounds to 0.4 %."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by the kind of model, each written once."""
    return cache(lambda model_type: tiny_base(tmp_path_factory.mktemp("base"), model_type))


@pytest.fixture(autouse=True)
def no_graft_is_left():
    """Every test starts without a loaded base."""
    model.grafts.clear()


def case_of(task, form):
    """Return the tiny case of a task, or one of its further forms."""
    kind = TASKS.get(task)
    return kind.extra_cases()[form] if form else kind.test_case()


def load(bases, task, method, form="", **changes):
    """Return a run of a tiny case with some settings changed, its graft and its rows."""
    case = case_of(task, form)
    folder = bases(case.model_type)
    config = changed(run(folder, task, method, form), changes)
    model.grafts.clear()
    graft = load_graft(config, str(folder), config.run.seed)
    return config, graft, graft.task.encode(Shard(case.rows), graft.base)


def step(config, graft, encoded, **settings):
    """Train from the initial adapter; return the update and the loop's outcome."""
    graft.write(graft.initial)
    local_round = LocalRound(1, "site-0", 1, 0.0, 1.0)
    trained = train(graft, encoded, config.train.model_copy(update=settings), local_round)
    return make_update(graft.read(), graft.initial), trained


def test_there_are_forms_and_pairs():
    """Catches: tests below that pass because they loop over nothing."""
    assert {task for task, _ in FORMS} == set(TASKS.names()) != set()
    assert {method for _, method in PAIRS} == set(ADAPTERS.names())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("task", "method"), PAIRS)
def test_what_is_trained_is_float32(bases, task, method, dtype):
    """Catches: a head, module, norm or bias in 16 bits, where small steps are lost and AdamW divides by zero."""
    config, graft, encoded = load(bases, task, method, **{"model.dtype": dtype})
    assert {value.dtype for value in graft.parameters} == {torch.float32}
    frozen = [value for value in graft.base.network.parameters() if not value.requires_grad]
    assert getattr(torch, dtype) in {value.dtype for value in frozen}
    graft.write(graft.initial)
    assert not make_update(graft.read(), graft.initial).any()
    update, _ = step(config, graft, encoded, local_steps=1, learning_rate=1e-6)
    changes = [np.abs(value).max() for value in unpack(update, graft.spec).values()]
    assert 1e-7 < max(changes) < 1e-5
    with torch.no_grad():
        metrics = graft.task.evaluate(graft.base, encoded, 8)
    assert all(map(np.isfinite, metrics.values()))
    update, trained = step(config, graft, encoded, local_steps=3)
    assert np.isfinite(update).all()
    assert np.isfinite(trained.loss)


@pytest.mark.parametrize(("task", "form"), FORMS)
def test_the_loss_under_autocast_is_near_that_in_float32(bases, monkeypatch, task, form):
    """Catches: cosines rounded before they are scaled; a batch whose cast weights leave the loss without gradient."""
    monkeypatch.setattr("tsugiki.common.model.device.has_bf16", lambda device: True)  # emulated where it is not there
    config, graft, encoded = load(bases, task, "lora", form)
    plain, exact = step(config, graft, encoded, local_steps=1)
    update, rounded = step(config, graft, encoded, local_steps=1, precision="bf16")
    assert rounded.loss == pytest.approx(exact.loss, rel=LOSS_BOUND, abs=1e-3)
    assert update.tobytes() != plain.tobytes()
    moved = {name: bool(value.any()) for name, value in unpack(plain, graft.spec).items()}
    assert {name: bool(value.any()) for name, value in unpack(update, graft.spec).items()} == moved


def test_evaluation_under_autocast_is_another_and_near(bases, monkeypatch):
    """Catches: a context that does nothing."""
    monkeypatch.setattr("tsugiki.common.model.device.has_bf16", lambda device: True)
    config, graft, encoded = load(bases, "sequence-classification", "lora")
    losses = {}
    for precision in ("float32", "bf16"):
        chosen = config.train.model_copy(update={"precision": precision})
        with torch.no_grad(), computing(chosen, "cpu"):
            losses[precision] = graft.task.evaluate(graft.base, encoded, 8)["loss"]
    assert losses["bf16"] != losses["float32"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=LOSS_BOUND)


def test_rows_are_protected_in_float32_only(bases):
    """Catches: gradients of rows that are clipped after they were rounded to 8 bits."""
    pytest.importorskip("opacus", reason="Opacus, of the extra [privacy], is not installed")
    _, graft, _ = load(bases, "sequence-classification", "lora", **{"model.dtype": "bfloat16"})
    with pytest.raises(TrainingError, match="half precision"):
        check_supported(graft)
    _, graft, _ = load(bases, "sequence-classification", "lora")
    check_supported(graft)


def test_both_pairs_of_flora_are_float32(bases):
    """Catches: the pair that holds what the rounds have learned, rounded to 16 bits in every round."""
    changes = {"model.dtype": "bfloat16", "strategy": {"name": "flora"}, "adapter.merged_rank": 2}
    config, graft, encoded = load(bases, "sequence-classification", "lora", **changes)
    assert graft.spec.parameters("merged")
    assert {value.dtype for value in graft.parameters} == {torch.float32}
    assert step(config, graft, encoded, local_steps=1)[0].any()


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_everything_of_a_run_computes_in_its_precision(tmp_path, monkeypatch, precision):
    """Catches: a run that trains in bfloat16 and evaluates, validates or predicts in float32."""
    monkeypatch.setattr("tsugiki.common.model.device.has_bf16", lambda device: True)
    seen = {}
    for name in ("loss", "evaluate", "predict"):
        own = getattr(SequenceClassification, name)

        def spy(self, *args, own=own, name=name):
            seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return own(self, *args)

        monkeypatch.setattr(SequenceClassification, name, spy)
    settings = {"precision": precision, "device": "cpu", "validate_every_steps": 1}
    kept = {"evaluation": {"at_sites": True}, "simulation": {"evaluation_fraction": 0.25}}
    config = tiny_config(tmp_path, train=settings, run={"rounds": 1}, **kept)
    done = run_tiny(config)
    assert predict(done.folder, ["the good clause"], None, Generation())
    assert seen == {name: {precision == "bf16"} for name in ("loss", "evaluate", "predict")}
    hello = [line for line in read_lines(done.folder / "audit.jsonl") if line["event"] == "hello"]
    assert {line["precision"] for line in hello} == {precision}
