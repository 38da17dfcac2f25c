"""Prediction of next tokens: what is predicted, what is left out, and how it is averaged."""

import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.support.federation import run_tiny, tiny_config
from tests.support.tiny import MAX_TOKENS, tiny_bert, tiny_llama
from tsugiki.client.training.trainer import LocalRound, train
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard, read
from tsugiki.common.errors import DataError, ModelError
from tsugiki.common.files import read_lines
from tsugiki.common.model.load import load_graft
from tsugiki.common.settings import DataFormat
from tsugiki.common.tasks.base import Base, Encoded
from tsugiki.common.tasks.causal_lm import CausalLm, CausalLmSettings
from tsugiki.common.tasks.rows import TokenRows

TEXTS = ["good clause", "the bad clause number nine of a party", "a", "alpha beta gamma delta shall not", "on"]
ROWS = Shard({"text": TEXTS})
BOS, EOS = 1, 2


def make(**settings):
    """Return the task."""
    return CausalLm(CausalLmSettings(**settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny Llama whose padding is the token for the end. Read only."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def base(folder):
    """A loaded base. Read only."""
    loaded = make().load(folder, torch.float32)
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == EOS
    return loaded


def tiny_decoder(folder, ends=False):
    """Write a GPT-2 of 32 positions whose tokenizer knows neither that nor padding, and the end only if asked for."""
    words = ["<end>", "the", "a", "bad", "good", "clause", "party", "number", "nine"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": words[0]} if ends else {}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    torch.manual_seed(5)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), eos_token_id=0, bos_token_id=0, **sizes)).save_pretrained(folder)
    return folder


def told(base, tokens):
    """Return, for one row alone, the logarithm of the probability of each next token, and whether it was the first."""
    with torch.no_grad():
        logits = base.network(input_ids=torch.tensor([tokens])).logits[0].double()
    chances = logits.log_softmax(dim=1)
    following = tokens[1:]
    return [(chances[at, token].item(), logits[at].argmax().item() == token) for at, token in enumerate(following)]


class Oracle(torch.nn.Module):
    """Says for certain that the token at the same place, moved by `shift`, comes next."""

    def __init__(self, shift, certainty=50.0):
        super().__init__()
        self.shift, self.certainty = shift, torch.nn.Parameter(torch.tensor(certainty))

    def forward(self, input_ids, attention_mask, use_cache):
        """Return logits over 100 tokens."""
        following = torch.roll(input_ids, -self.shift, dims=1)
        return SimpleNamespace(logits=self.certainty * torch.nn.functional.one_hot(following, 100))


def measured(network, encoded, batch_size=64):
    """Return the metrics of a network that is no base."""
    tokenizer = SimpleNamespace(pad_token_id=EOS)
    with torch.no_grad():
        return make().evaluate(Base(network, network, tokenizer), encoded, batch_size)


def test_the_settings_and_columns():
    """Catches: a label asked of plain text; a best adapter chosen by the highest perplexity."""
    assert [(column.name, column.kind) for column in make().columns] == [("text", "text")]
    assert make().monitor == "loss"
    assert CausalLm.lower_is_better == {"loss", "perplexity"}
    assert not CausalLm.row_losses


def test_a_text_stands_between_its_first_and_last_token(base, tmp_path):
    """Catches: a model that never learns where texts end; a first token that no tokenizer has, as None."""
    encoded = make().encode(ROWS, base)
    tokens = base.tokenizer.convert_ids_to_tokens
    assert tokens(encoded.texts["text"][0]) == ["<s>", "good", "clause", "</s>"]
    assert len(encoded) == len(ROWS)
    assert encoded.notes == ()
    bare = make().load(tiny_llama(tmp_path, bos=False), torch.float32)
    assert bare.tokenizer.convert_ids_to_tokens(make().encode(ROWS, bare).texts["text"][0]) == [
        "good",
        "clause",
        "</s>",
    ]


def test_what_looks_like_a_special_token_is_text(base):
    """Catches: a site's text that ends in its middle, or begins twice."""
    encoded = make().encode(Shard({"text": ["good </s> clause <s>"]}), base)
    row = encoded.texts["text"][0]
    assert (row[0], row[-1]) == (BOS, EOS)
    assert not {BOS, EOS} & set(row[1:-1])
    assert base.tokenizer("good </s>", add_special_tokens=False)["input_ids"][-1] == EOS  # for the others it is one


@pytest.mark.parametrize(("words", "length", "cut"), [(6, 8, 0), (7, 8, 1), (8, 8, 1), (500, 8, 1)])
def test_texts_are_cut_and_counted(base, words, length, cut):
    """Catches: a limit off by one, a text that just fits counted, an end invented where a text was cut."""
    encoded = make(max_length=8).encode(Shard({"text": ["good", " ".join(["clause"] * words)]}), base)
    row = encoded.texts["text"][1]
    assert len(row) == length
    assert (row[-1] == EOS) == (not cut)
    assert encoded.notes == ((f"shard-texts-cut:{cut}",) if cut else ())
    assert encoded.take([0]).notes == encoded.first(1).notes == ()


def test_no_more_tokens_than_the_base_has_positions(base, tmp_path):
    """Catches: an IndexError in the embedding of positions, where the tokenizer does not know of a limit."""
    long = Shard({"text": ["clause " * 500]})
    assert len(make(max_length=4 * MAX_TOKENS).encode(long, base).texts["text"][0]) == MAX_TOKENS
    decoder = make().load(tiny_decoder(tmp_path, ends=True), torch.float32)
    encoded = make(max_length=4 * MAX_TOKENS).encode(long, decoder)
    assert len(encoded.texts["text"][0]) == decoder.tokenizer.model_max_length == 32
    with torch.no_grad():
        assert math.isfinite(make().loss(decoder.network, make().batch(encoded, [0], decoder)))


def test_each_token_is_compared_with_the_next():
    """Catches: no shift (a model that repeats what it reads would be perfect), and one in the wrong direction."""
    encoded = Encoded({"text": TokenRows.of([[BOS, 5, 6, 7, EOS], [BOS, 9, EOS]])})
    ahead, same, behind = (measured(Oracle(shift), encoded) for shift in (1, 0, -1))
    assert ahead["accuracy"] == 1.0
    assert ahead["loss"] < 1e-6
    assert ahead["perplexity"] == pytest.approx(1.0)
    assert same["accuracy"] == behind["accuracy"] == 0.0
    assert same["loss"] == pytest.approx(50.0)


def test_the_loss_is_the_mean_over_the_predicted_tokens(base):
    """Catches: a mean of rows' means, padding counted, the last token of a text left out because it is the padding."""
    task = make()
    encoded = task.encode(ROWS, base)
    batch = task.batch(encoded, range(len(ROWS)), base)
    chances = [chance for tokens in encoded.texts["text"].lists() for chance, _ in told(base, tokens)]
    assert len(chances) == sum(len(tokens) - 1 for tokens in encoded.texts["text"])
    with torch.no_grad():
        loss = task.loss(base.network, batch).item()
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        own = base.network(**read, labels=labels).loss.item()
    assert loss == pytest.approx(-sum(chances) / len(chances), rel=1e-5)
    assert loss == pytest.approx(own, rel=1e-5)
    by_padding_id = base.network(**read, labels=read["input_ids"].masked_fill(read["input_ids"] == EOS, -100)).loss
    assert abs(loss - by_padding_id.item()) > 1e-3


def test_padding_is_not_told_by_its_token(base):
    """Catches: the id of padding looked at: here tokens that are none have it."""
    task, rows = make(), [[BOS, EOS, EOS], [BOS, 9, EOS, EOS, EOS]]
    batch = task.batch(Encoded({"text": TokenRows.of(rows)}), [0, 1], base)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    chances = [chance for row in rows for chance, _ in told(base, row)]
    with torch.no_grad():
        assert task.loss(base.network, batch).item() == pytest.approx(-sum(chances) / 6, rel=1e-5)


# Prompts and completions

ASKED = Shard(
    {
        "prompt": ["say good", "name the party of the clause", "say on"],
        "input": ["", "alpha beta", " "],
        "completion": ["good", "the party alpha", "on on"],
    }
)


def instructed(base, shard=ASKED, **settings):
    """Return the task, and the encoded rows."""
    task = make(format="instruction", **settings)
    return task, task.encode(shard, base)


def test_the_completion_alone_is_predicted(base):
    """Catches: a loss over the prompt, over padding, or one place off; an answer that does not learn to end."""
    task, encoded = instructed(base)
    batch = task.batch(encoded, range(3), base)
    for row, (prompt, answer) in enumerate(zip(*[rows.lists() for rows in encoded.texts.values()], strict=True)):
        tokens, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        assert tokens[: len(prompt) + len(answer)] == prompt + answer
        assert answer[-1] == EOS
        told_at = [place for place, label in enumerate(labels) if label != -100]
        assert told_at == list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
        assert [labels[place] for place in told_at] == answer == [tokens[place + 1] for place in told_at]


def test_instructions_are_measured_by_their_answers(base):
    """Catches: perplexity over prompts, which are easy, or a mean over rows."""
    task, encoded = instructed(base)
    chances = []
    for prompt, answer in zip(*encoded.texts.values(), strict=True):
        chances += [chance for chance, _ in told(base, [*prompt, *answer])[len(prompt) - 1 :]]
    assert len(chances) == sum(map(len, encoded.texts["completion"]))
    with torch.no_grad():
        assert task.evaluate(base, encoded, 2)["loss"] == pytest.approx(-sum(chances) / len(chances), rel=1e-5)


def test_the_columns_of_instructions(base, tmp_path):
    """Catches: an input that every row must have; a prompt without an answer that is trained on."""
    columns = make(format="instruction").columns
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "say", "input": "", "completion": "good"}\n{"prompt": "a", "completion": "b"}\n')
    assert read(file, columns, DataFormat()).columns["input"] == ["", ""]
    file.write_text('{"prompt": "say", "completion": "good"}\n{"prompt": "say", "completion": " "}\n')
    with pytest.raises(DataError) as caught:
        read(file, columns, DataFormat())
    assert caught.value.code == "shard-empty-text"
    assert "completion" in caught.value.problem


def test_instructions_are_learned(tmp_path):
    """Catches: a format that the loop cannot train."""
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"prompt": "say {word}", "completion": "{word}"}}\n' for word in ("good", "bad") * 12))
    config = parse(
        {
            "run": {"rounds": 2, "output_dir": str(tmp_path / "runs")},
            "model": {"name": str(tiny_llama(tmp_path / "base"))},
            "task": {"name": "causal-lm", "format": "instruction", "max_length": 64},
            "train": {"learning_rate": 3e-2, "local_steps": 10, "threads": 1},
            "strategy": {"min_clients": 2},
            "evaluation": {"data": str(file)},
            "simulation": {"clients": 2, "data": str(file)},
        }
    )
    losses = [line["eval"]["loss"] for line in read_lines(run_tiny(config).folder / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]


# Packing


def test_packed_texts_lose_nothing_but_padding(base):
    """Catches: the last token of a block unpredicted, a text's first token predicted, a text in two batches."""
    padded, packed = make(max_length=8), make(max_length=8, packing=True)
    encoded = padded.encode(ROWS, base)
    rows = encoded.texts["text"].lists()
    batch = packed.batch(encoded, range(len(rows)), base)
    total = sum(map(len, rows))
    assert batch["input_ids"].shape == (-(-total // 8), 8)
    assert int(batch["attention_mask"].sum()) == total
    stream = batch["input_ids"].flatten()[:total].tolist()
    labels = batch["labels"].flatten().tolist()
    assert stream == [token for row in rows for token in row]
    assert labels[:total] == [label for row in rows for label in [*row[1:], -100]]
    assert set(labels[total:]) <= {-100}
    assert packed.batch(encoded, [0], base)["input_ids"].tolist() == [rows[0]]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_metrics_count_tokens_whatever_the_batches(base, batch_size):
    """Catches: means of batches averaged, a short row that weighs as much as a long one, accuracy over padding."""
    task = make()
    encoded = task.encode(ROWS, base)
    with torch.no_grad():
        found = task.evaluate(base, encoded, batch_size)
    rows = [told(base, tokens) for tokens in encoded.texts["text"].lists()]
    every = [answer for row in rows for answer in row]
    loss = -sum(chance for chance, _ in every) / len(every)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["accuracy"] == pytest.approx(sum(right for _, right in every) / len(every))
    by_row = -sum(sum(chance for chance, _ in row) / len(row) for row in rows) / len(rows)
    assert abs(by_row - loss) > 1e-3  # this case tells them apart


def test_a_row_does_not_depend_on_its_neighbours(base):
    """Catches: padding on the left, which moves positions; padding that is attended to."""
    task = make()
    encoded = task.encode(ROWS, base)
    with torch.no_grad():
        together = base.network(**task.batch(encoded, [1, 2], base)).logits
        alone = base.network(**task.batch(encoded, [2], base)).logits
    assert torch.allclose(together[1, : alone.shape[1]], alone[0], atol=1e-5)
    again = [task.batch(encoded, rows, base)["input_ids"].tolist() for rows in ([1, 2], [2, 1])]
    assert again[0] == again[1][::-1]


def test_a_perplexity_that_no_float_holds():
    """Catches: an OverflowError in the evaluation of a base that is far off."""
    found = measured(Oracle(0, certainty=5000.0), Encoded({"text": TokenRows.of([[BOS, 5, EOS]])}))
    assert found["loss"] == pytest.approx(5000.0)
    assert math.isfinite(found["perplexity"])


def test_rows_in_which_nothing_is_predicted(base):
    """Catches: a division by zero, whose NaN ends a site's round."""
    alone = Encoded({"text": TokenRows.of([[EOS]])})
    loss = make().loss(base.network, make().batch(alone, [0], base))
    assert loss.item() == 0.0
    loss.backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in base.network.parameters())
    base.network.zero_grad(set_to_none=True)
    assert measured(Oracle(1), alone)["loss"] == 0.0


def test_a_tokenizer_without_padding(tmp_path):
    """Catches: GPT-2, whose tokenizer has no token for padding."""
    decoder = make().load(tiny_decoder(tmp_path, ends=True), torch.float32)
    assert decoder.tokenizer.pad_token_id is None
    encoded = make().encode(Shard({"text": ["the bad clause", "good", "a party"]}), decoder)
    with torch.no_grad():
        first, second = (make().evaluate(decoder, encoded, size) for size in (1, 3))
    assert first == pytest.approx(second, rel=1e-5)


def no_head(folder):
    """Write the backbone alone."""
    tiny_llama(folder)
    network = make().load(folder, torch.float32).network
    network.config.tie_word_embeddings = False
    network.model.save_pretrained(folder)


def masked(folder):
    """Write an encoder that has its output layer."""
    tiny_llama(folder)
    config = BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (no_head, "no output layer"),
        (tiny_bert, "no output layer"),
        (masked, "what the model predicts before it"),
        (tiny_decoder, "no token for the end"),
    ],
)
def test_a_base_that_cannot_predict_is_refused(tmp_path, write, problem):
    """Catches: a random output layer that nobody trains; an encoder that reads what it is to predict."""
    torch.manual_seed(1)
    write(tmp_path)
    with pytest.raises(ModelError, match=problem) as caught:
        make().load(tmp_path, torch.float32)
    assert caught.value.code == "model-not-causal"


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_adapter_changes(tmp_path, tied):
    """Catches: an output layer, or the embedding that is the same, trained or exchanged along."""
    tiny_llama(tmp_path, tied=tied)
    settings = {
        "model": {"name": str(tmp_path)},
        "task": {"name": "causal-lm"},
        "adapter": {"method": "lora", "rank": 2},
        "train": {"learning_rate": 0.01, "local_steps": 3, "threads": 1, "device": "cpu"},
    }
    config = parse(settings)
    graft = load_graft(config, str(tmp_path), 1)
    assert all("lora_" in tensor.name for tensor in graft.spec.tensors)

    def frozen():
        named = graft.base.transformer.named_parameters()
        return {
            name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
            for name, value in named
            if "lora_" not in name
        }

    before, start = frozen(), graft.read()
    assert any("lm_head" in name for name in before) is not tied
    train(graft, graft.task.encode(ROWS, graft.base), config.train, LocalRound(1, "a", 1, 0.0, 1.0))
    assert frozen() == before
    assert (graft.read() != start).any()


def test_a_federation_lowers_the_perplexity(tmp_path):
    """Catches: a task that trains alone and in no federation; the worst round kept as the best."""
    base = tiny_llama(tmp_path / "base")
    for name, numbers in (("train", range(40)), ("dev", range(40, 50))):
        lines = "".join(f"the {word} clause number {n}\n" for n in numbers for word in ("good", "bad"))
        (tmp_path / f"{name}.txt").write_text(lines)
        (tmp_path / f"{name}.csv").touch()
    config = tiny_config(
        tmp_path,
        model={"name": str(base)},
        task={"name": "causal-lm"},
        train={"local_steps": 10, "per_device_train_batch_size": 8},
        evaluation={"data": str(tmp_path / "dev.txt")},
        simulation={"data": str(tmp_path / "train.txt")},
    )
    summary = run_tiny(config).summary
    assert summary["after"]["perplexity"] < 0.9 * summary["before"]["perplexity"]
    assert summary["best_round"] == 2


def test_instructions_are_not_packed():
    """Catches: a setting that promises something and does nothing."""
    with pytest.raises(ValueError, match="packing"):
        make(format="instruction", packing=True)


def test_packed_rows_are_not_padded():
    """Catches: packed rows grouped by length, which saves nothing."""
    assert make().pads_rows
    assert not make(packing=True).pads_rows
