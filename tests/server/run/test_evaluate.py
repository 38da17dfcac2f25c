import numpy as np
import pytest

from tests.support.federation import tiny_config
from tsugiki.common.data.columns import Column
from tsugiki.common.errors import ConfigError, DataError
from tsugiki.common.model.load import load_graft
from tsugiki.server.run.evaluate import evaluate_base, make_evaluator, read_evaluation


def loaded(config):
    """Return the shared graft of a tiny run."""
    return load_graft(config, config.model.name, config.run.seed)


def test_an_adapter_is_evaluated_whatever_the_model_holds(tmp_path):
    """Catches: the weights that a simulated site left in the shared model evaluated in the given ones' place."""
    config = tiny_config(tmp_path)
    graft = loaded(config)
    evaluate = make_evaluator(graft, config)
    moved = graft.initial + 0.5
    before, after = evaluate(graft.initial), evaluate(moved)
    assert before != after
    assert set(before) == {"accuracy", "macro_f1", "loss"}
    graft.write(moved)
    assert evaluate(graft.initial) == before


def test_without_a_file_there_is_no_evaluation(tmp_path):
    """Catches: an empty path opened."""
    config = tiny_config(tmp_path, evaluation={"data": ""})
    assert make_evaluator(loaded(config), config) is None


def test_a_wrong_file_is_refused_before_training(tmp_path):
    """Catches: a file that is first read after the first round."""
    config = tiny_config(tmp_path, evaluation={"data": str(tmp_path / "missing.csv")})
    with pytest.raises(DataError) as caught:
        make_evaluator(loaded(config), config)
    assert caught.value.code == "shard-missing"


def test_a_monitor_that_the_file_does_not_give_is_refused_before_training(tmp_path):
    """Catches: a KeyError after the first round, in a folder that can then neither start nor resume."""
    config = tiny_config(tmp_path, evaluation={"monitor": "eval_speed"})
    with pytest.raises(ConfigError, match=r"evaluation\.monitor = 'speed': must be one of accuracy, macro_f1, loss"):
        make_evaluator(loaded(config), config)


def test_the_untouched_base_does_not_depend_on_what_was_trained(tmp_path):
    """Catches: a trained head, or the adapter itself, left in what is called untouched."""
    config = tiny_config(tmp_path)
    graft = loaded(config)
    graft.write(graft.initial)
    before = evaluate_base(graft, config)
    graft.write(graft.initial + 0.5)
    assert evaluate_base(graft, config) == before
    assert make_evaluator(graft, config)(graft.initial) == before  # LoRA begins at the base's own outputs


class TwoForms:
    """A task that evaluates scored pairs or labelled texts."""

    labels = ("no", "yes")
    evaluation_columns = ((Column("text", "text"), Column("score", "score")), (Column("text", "text"),))


@pytest.mark.parametrize(
    ("content", "columns"), [("text,score\na,0.5\n", ["text", "score"]), ("text,other\na,1\n", ["text"])]
)
def test_the_first_form_whose_columns_are_there_is_read(tmp_path, content, columns):
    """Catches: a file of the second form refused, and one of the first read as the second."""
    config = tiny_config(tmp_path)
    (tmp_path / "eval.csv").write_text(content)
    assert list(read_evaluation(tmp_path / "eval.csv", TwoForms(), config).columns) == columns


def test_a_damaged_file_of_the_first_form_is_not_read_as_the_second(tmp_path):
    """Catches: every error of the first form swallowed: a file with a bad score would be evaluated without scores."""
    config = tiny_config(tmp_path)
    (tmp_path / "eval.csv").write_text("text,score\na,much\n")
    with pytest.raises(DataError) as caught:
        read_evaluation(tmp_path / "eval.csv", TwoForms(), config)
    assert caught.value.code == "shard-score"


def test_evaluation_changes_no_weights(tmp_path):
    """Catches: gradients or a training mode left on during evaluation."""
    config = tiny_config(tmp_path)
    graft = loaded(config)
    for value in graft.parameters:
        value.grad = None  # an earlier test may have trained the same graft
    make_evaluator(graft, config)(graft.initial)
    assert np.array_equal(graft.read(), graft.initial)
    assert not graft.base.network.training
    assert all(value.grad is None for value in graft.parameters)
