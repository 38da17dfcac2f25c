"""Sentence embeddings, against sentence-transformers and scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sentence_transformers.sentence_transformer import losses
from torch.nn.functional import cross_entropy

from tests.support.exports import to_fuse
from tests.support.tiny import tiny_sentence_transformer
from tsugiki.client.training.trainer import LocalRound, train
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard
from tsugiki.common.model import load as model
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.base import Encoded
from tsugiki.common.tasks.rows import TokenRows
from tsugiki.common.tasks.sentence_embedding import SentenceEmbedding, SentenceEmbeddingSettings, embed, recall_at
from tsugiki.common.wire.spec import unpack

TRIPLETS = Shard(
    {
        "anchor": ["the alpha clause", "beta", "a gamma clause on delta", "omega"],
        "positive": ["alpha", "a clause on beta", "gamma", "the omega party"],
        "negative": ["not alpha", "no beta", "delta", "sigma"],
    }
)
PAIRS = Shard({name: TRIPLETS.columns[name] for name in ("anchor", "positive")})
SCORED = Shard(
    {
        "sentence1": TRIPLETS.columns["anchor"],
        "sentence2": TRIPLETS.columns["negative"],
        "score": [5.0, 0.0, 2.5, 1.0],
    }
)


LABELLED = Shard(
    {
        "sentence1": TRIPLETS.columns["anchor"],
        "sentence2": TRIPLETS.columns["negative"],
        "label": [2, 0, 1, 1],
    }
)


def make(**settings):
    """Return the task."""
    return SentenceEmbedding(SentenceEmbeddingSettings(**settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny SentenceTransformer. Read only."""
    return tiny_sentence_transformer(tmp_path_factory.mktemp("st"))


@pytest.fixture(scope="module")
def base(folder):
    """It, loaded. Read only."""
    loaded = make().load(folder, torch.float32)
    loaded.network.eval()
    return loaded


def features(base, texts):
    """Return what sentence-transformers makes of texts itself."""
    return base.network.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")


@pytest.mark.parametrize("shard", [PAIRS, TRIPLETS], ids=["pairs", "triplets"])
@pytest.mark.parametrize("scale", [20.0, 3.0])
def test_multiple_negatives_is_the_librarys(base, shard, scale):
    """Catches: anchors and positives swapped; negatives dropped; the scale ignored; padding without its mask."""
    task = make(scale=scale)
    batch = task.batch(task.encode(shard, base), range(4), base)
    with torch.no_grad():
        ours = task.loss(base.network, batch)
        criterion = losses.MultipleNegativesRankingLoss(base.network, scale=scale)
        theirs = criterion([features(base, texts) for texts in shard.columns.values()], None)
        vectors = [torch.tensor(base.network.encode(texts)) for texts in shard.columns.values()]
    scores = scale * vectors[0] @ torch.cat(vectors[1:]).T
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert ours.item() == pytest.approx(torch.nn.functional.cross_entropy(scores, torch.arange(4)).item(), abs=1e-4)


def test_cosent_is_its_formula(base):
    """Catches: pairs of equal scores compared, the order the wrong way round, the scale left out."""
    task = make(loss="cosent", scale=3.0)
    first, second = ["good clause", "a", "bad party", "on"], ["good", "the party", "clause", "on"]
    scores = [1.0, 0.2, 0.2, 0.6]
    encoded = task.encode(Shard({"sentence1": first, "sentence2": second, "score": scores}), base)
    with torch.no_grad():
        ours = task.loss(base.network, task.batch(encoded, range(4), base)).item()
        vectors = [torch.tensor(base.network.encode(texts)) for texts in (first, second)]
        cosines = torch.nn.functional.cosine_similarity(*vectors)
    pairs = [(i, j) for i in range(4) for j in range(4) if scores[i] > scores[j]]
    wanted = math.log(1 + sum(math.exp(3.0 * (cosines[j] - cosines[i])) for i, j in pairs))
    assert len(pairs) == 5
    assert ours == pytest.approx(wanted, abs=1e-4)


def test_cosine_similarity_is_the_librarys(base):
    """Catches: scores that are not brought to [0, 1]; columns swapped."""
    task = make(loss="cosine-similarity", score_max=5.0)
    batch = task.batch(task.encode(SCORED, base), range(4), base)
    first, second = SCORED.columns["sentence1"], SCORED.columns["sentence2"]
    target = torch.tensor(SCORED.columns["score"]) / 5.0
    with torch.no_grad():
        ours = task.loss(base.network, batch)
        theirs = losses.CosineSimilarityLoss(base.network)([features(base, first), features(base, second)], target)
        cosines = (torch.tensor(base.network.encode(first)) * torch.tensor(base.network.encode(second))).sum(dim=1)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert ours.item() == pytest.approx(((cosines - target) ** 2).mean().item(), abs=1e-5)


def with_head(folder, **settings):
    """Return a task with softmax-nli, its base and labelled pairs encoded."""
    task = make(loss="softmax-nli", **settings)
    torch.manual_seed(1)
    base = task.load(folder, torch.float32)
    base.network.eval()
    return task, base, task.encode(LABELLED, base)


@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_nli_is_the_librarys(tmp_path, normalize):
    """Catches: u and v swapped, a difference with its sign, vectors brought to length 1, classes in another order."""
    task, base, encoded = with_head(tiny_sentence_transformer(tmp_path, normalize=normalize))
    batch = task.batch(encoded, range(4), base)
    criterion = losses.SoftmaxLoss(base.network, 32, num_labels=3)
    head = base.transformer.get_submodule(base.heads[0])
    with torch.no_grad():
        criterion.classifier.weight.copy_(head.weight)
        criterion.classifier.bias.zero_()  # the paper's W has none
    ours = task.loss(base.network, batch)
    theirs = criterion([features(base, LABELLED.columns[name]) for name in ("sentence1", "sentence2")], batch["labels"])
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert task.evaluate(base, encoded, 3)["loss"] == pytest.approx(theirs.item(), abs=1e-5)
    ours.backward()
    mine = head.weight.grad.clone()
    theirs.backward()
    assert torch.allclose(mine, criterion.classifier.weight.grad, atol=1e-6)
    assert mine.abs().max() > 1e-3


def test_labelled_pairs_are_judged_by_their_classes(folder):
    """Catches: classes taken for scores; the head left out of the evaluation; scored pairs judged by accuracy."""
    task, base, encoded = with_head(folder)
    with torch.no_grad():
        vectors = [torch.tensor(base.network.encode(LABELLED.columns[name])) for name in ("sentence1", "sentence2")]
        triple = torch.cat([*vectors, (vectors[0] - vectors[1]).abs()], dim=1)
        predicted = (triple @ base.transformer.nli_head.weight.T).argmax(dim=1)
    found = task.evaluate(base, encoded, 3)
    assert set(found) == {"accuracy", "macro_f1", "loss"}
    assert found["accuracy"] == float((predicted.numpy() == encoded.targets).mean())
    assert set(task.evaluate(base, task.encode(SCORED, base), 3)) == {"pearson", "spearman"}
    assert set(task.evaluate(base, task.encode(TRIPLETS, base), 3)) == {"recall_at_1"}


def test_classes_have_names_or_numbers(folder):
    """Catches: a head for another number of classes than the labels; labels of losses that read none."""
    names = ["entailment", "neutral", "contradiction", "unknown"]
    assert make(loss="softmax-nli", labels=names).labels == tuple(names)
    assert make(loss="softmax-nli").labels == ("0", "1", "2")
    assert make(labels=names).labels == ()
    _, base, _ = with_head(folder, labels=names)
    assert base.transformer.nli_head.weight.shape == (4, 3 * 32)
    assert make().load(folder, torch.float32).heads == ()


@pytest.mark.parametrize("method", ADAPTERS.names())
def test_the_head_goes_with_every_method(folder, tmp_path, method):
    """Catches: a head that is not exchanged, frozen, adapted itself, or counted as part of the base."""
    model.grafts.clear()
    small = {"lora": {"rank": 2}, "vera": {"rank": 8}, "houlsby": {"bottleneck": 4}}
    virtual = {"num_virtual_tokens": 4} if method in ("prompt", "p-tuning", "prefix") else {}
    fused = {"adapters": list(to_fuse(tmp_path, folder))} if method == "fusion" else {}
    raw = {
        "task": {"name": "sentence-embedding", "loss": "softmax-nli", "max_length": 16},
        "adapter": {"method": method, **small.get(method, {}), **virtual, **fused},
        "train": {"device": "cpu", "threads": 1, "local_steps": 15, "learning_rate": 0.02, "warmup_ratio": 0.0},
    }
    config = parse(raw)
    graft = load_graft(config, str(folder), 1)
    plain = load_graft(parse({**raw, "task": {"name": "sentence-embedding"}}), str(folder), 1)
    assert graft.spec.base_fingerprint == plain.spec.base_fingerprint
    assert graft.spec.parameters("head") == 9 * 32
    assert graft.spec.parameters("adapter") == plain.spec.parameters("adapter")
    bare = make().load(folder, torch.float32).network.eval()
    case = SentenceEmbedding.extra_cases()["softmax"]
    encoded = graft.task.encode(Shard(case.rows), graft.base)
    before = graft.task.evaluate(graft.base, encoded, 8)["loss"]
    received = graft.read()
    train(graft, encoded, config.train, LocalRound(1, "site-0", 1, 0.0, 1.0))
    moved = unpack(graft.read() - received, graft.spec)
    assert all(value.any() for value in moved.values())
    assert graft.task.evaluate(graft.base, encoded, 8)["loss"] < before
    with graft.adapter_disabled():
        assert np.allclose(graft.base.network.encode("the alpha clause"), bare.encode("the alpha clause"), atol=1e-6)
    headless = graft.method.without_heads(graft.base.transformer)
    assert not [name for name, _ in headless.named_modules() if "nli_head" in name]
    assert [name for name in moved if "nli_head" in name]


@pytest.mark.parametrize(
    ("settings", "names", "monitor"),
    [
        ({}, ["anchor", "positive", "negative"], "recall_at_1"),
        ({"recall_at": 3}, ["anchor", "positive", "negative"], "recall_at_3"),
        ({"loss": "cosine-similarity"}, ["sentence1", "sentence2", "score"], "spearman"),
        ({"loss": "cosent"}, ["sentence1", "sentence2", "score"], "spearman"),
        ({"loss": "softmax-nli"}, ["sentence1", "sentence2", "label"], "accuracy"),
    ],
)
def test_columns_and_monitor(settings, names, monitor):
    """Catches: triplets asked of a file of scored pairs; a monitor that evaluate does not return."""
    task = make(**settings)
    assert [column.name for column in task.columns] == names
    assert task.monitor == monitor
    assert [column.required for column in task.columns] == [True, True, names[2] != "negative"]
    forms = task.evaluation_columns
    assert len(forms) == (3 if names[2] == "label" else 2)
    assert forms[0] == task.columns
    assert {form[2].name for form in forms} >= {"score", "negative"}


@pytest.mark.parametrize(
    ("setting", "longest"), [({"max_length": 8}, 8), ({"max_length": 40}, 40), ({"max_length": 500}, 48)]
)
def test_encode_cuts_at_the_smaller_limit(base, setting, longest):
    """Catches: more tokens than the base has positions, or than it was trained with."""
    encoded = make(**setting).encode(Shard({"anchor": ["clause " * 99], "positive": ["a"]}), base)
    assert len(encoded.texts["anchor"][0]) == longest
    assert base.tokenizer.convert_ids_to_tokens(encoded.texts["positive"][0]) == ["[CLS]", "a", "[SEP]"]
    assert encoded.targets is None


def test_encode_divides_the_scores(base):
    """Catches: scores of 5 compared with cosines of 1."""
    encoded = make(loss="cosine-similarity", score_max=5.0).encode(SCORED, base)
    assert encoded.targets.tolist() == pytest.approx([1.0, 0.0, 0.5, 0.2])
    assert encoded.targets.dtype == np.float32
    assert list(encoded.texts) == ["sentence1", "sentence2"]


def test_batch_takes_the_rows_asked_for_in_that_order(base):
    """Catches: positives of other rows than the anchors'; a text that is left out."""
    task = make()
    encoded = task.encode(TRIPLETS, base)
    batch = task.batch(encoded, [3, 0], base)
    assert {name.split(".")[0] for name in batch} == {"anchor", "positive", "negative"}
    for name, texts in encoded.texts.items():
        ids, mask = batch[f"{name}.input_ids"], batch[f"{name}.attention_mask"]
        assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == texts.take([3, 0]).lists()
    scored = make(loss="cosine-similarity")
    assert scored.batch(scored.encode(SCORED, base), [2, 0], base)["labels"].tolist() == [2.5, 5.0]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_embed_gives_the_librarys_vectors(base, batch_size):
    """Catches: vectors in the order of lengths; pooling over padding; vectors that are not of length 1."""
    texts = TRIPLETS.columns["anchor"]
    vectors = embed(base, {"anchor": TokenRows.of(base.tokenizer(texts)["input_ids"])}, batch_size)["anchor"]
    assert vectors.dtype == np.float32
    assert np.allclose(vectors, base.network.encode(texts), atol=1e-6)


def test_embed_normalises_for_a_base_that_does_not(tmp_path):
    """Catches: inner products taken for cosines."""
    base = make().load(tiny_sentence_transformer(tmp_path, normalize=False), torch.float32)
    texts = TRIPLETS.columns["anchor"]
    assert np.linalg.norm(base.network.encode(texts), axis=1).max() > 1.5
    vectors = embed(base, {"anchor": TokenRows.of(base.tokenizer(texts)["input_ids"])}, 2)["anchor"]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-6)


@pytest.fixture
def shapes(base):
    """Return the shapes of the token ids that the network is given, in order."""
    seen = []
    hook = base.network.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0]["input_ids"].shape)))
    yield seen
    hook.remove()


def test_equal_texts_are_embedded_once(base, shapes):
    """Catches: the anchor of three pairs embedded three times; a text that gets the vector of another."""
    columns = {"sentence1": ["alpha", "alpha", "the beta clause"], "sentence2": ["omega", "alpha", "omega beta alpha"]}
    tokens = {name: TokenRows.of(base.tokenizer(texts)["input_ids"]) for name, texts in columns.items()}
    vectors = embed(base, tokens, 2)
    assert sum(rows for rows, _ in shapes) == 4
    assert list(vectors) == list(columns)
    for name, texts in columns.items():
        assert np.allclose(vectors[name], base.network.encode(texts), atol=1e-6)


def test_training_embeds_texts_of_like_length_together(base, shapes):
    """Catches: all texts of a batch padded to the longest; vectors that end at another row or column than their own."""
    long = "the clause on omega and sigma and kappa and theta"
    rows = Shard({"anchor": ["alpha", long], "positive": [long, "beta"], "negative": ["gamma", "the delta clause"]})
    task = make()
    loss = task.loss(base.network, task.batch(task.encode(rows, base), [1, 0], base))
    assert shapes == sorted(shapes, reverse=True)
    assert len(shapes) == 3
    assert len({tokens for _, tokens in shapes}) == 3
    vectors = {name: torch.tensor(base.network.encode([texts[1], texts[0]])) for name, texts in rows.columns.items()}
    cosines = 20 * vectors["anchor"] @ torch.cat([vectors["positive"], vectors["negative"]]).T
    assert loss.item() == pytest.approx(cross_entropy(cosines, torch.tensor([0, 1])).item(), abs=1e-4)


def unit(*vectors):
    """Return rows of length 1."""
    rows = np.array(vectors, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_recall_counts_the_share_of_own_candidates():
    """Catches: k candidates too many or too few; the candidates' rows taken for the anchors'."""
    anchors = unit([1, 0], [0, 1], [1, 1], [-1, 0])
    candidates = unit([1, 0.1], [1, 1], [0.05, 1], [-1, 0.1])  # own ranks: 1, 2, 3, 1
    assert [recall_at(k, anchors, candidates) for k in (1, 2, 3, 4)] == [0.5, 0.75, 1.0, 1.0]
    more = np.concatenate([candidates, unit([1, 0], [0, 1])])  # own ranks: 2, 3, 3, 1
    assert [recall_at(k, anchors, more) for k in (1, 2, 3)] == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("dimensions", [4, 16, 384])
@pytest.mark.parametrize("count", [2, 3, 5, 24, 37])
def test_equal_vectors_earn_nothing(count, dimensions):
    """Catches: ties won by position; equal columns told apart by the rounding of a matrix product."""
    generator = np.random.default_rng(count)
    collapsed = np.tile(unit(generator.normal(size=dimensions)), (count, 1))
    assert recall_at(1, collapsed, collapsed) == 0.0
    assert recall_at(count, collapsed, collapsed) == 1.0
    anchors = unit(*generator.normal(size=(count, dimensions)))
    assert recall_at(1, anchors, np.concatenate([anchors, anchors])) == 0.0
    assert recall_at(2, anchors, np.concatenate([anchors, anchors])) == 1.0


def test_evaluate_searches_among_positives_and_negatives(base):
    """Catches: negatives that are no candidates; the anchors themselves among them."""
    vectors = {name: base.network.encode(texts) for name, texts in TRIPLETS.columns.items()}
    for k in (1, 2):
        task = make(recall_at=k)
        pool = np.concatenate([vectors["positive"], vectors["negative"]])
        expected = recall_at(k, vectors["anchor"], pool)
        assert task.evaluate(base, task.encode(TRIPLETS, base), 3) == {f"recall_at_{k}": expected}
    without = task.evaluate(base, task.encode(PAIRS, base), 3)
    assert without == {"recall_at_2": recall_at(2, vectors["anchor"], vectors["positive"])}
    trap = Shard({"anchor": ["alpha"], "positive": ["omega"], "negative": ["alpha"]})
    assert make().evaluate(base, make().encode(trap, base), 1) == {"recall_at_1": 0.0}


@pytest.mark.parametrize("settings", [{"loss": "cosine-similarity", "score_max": 5.0}, {}])
def test_correlations_are_scipys(base, settings):
    """Catches: Spearman of values that are no ranks; scored pairs judged by recall because the loss is another."""
    task = make(**settings)
    first, second = (base.network.encode(SCORED.columns[name]) for name in ("sentence1", "sentence2"))
    cosines, scores = (first * second).sum(axis=1), SCORED.columns["score"]
    found = task.evaluate(base, task.encode(SCORED, base), 2)
    assert set(found) == {"pearson", "spearman"}
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(cosines, scores).statistic, abs=1e-4)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(cosines, scores).statistic)
    assert found["pearson"] == pytest.approx(np.corrcoef(cosines, scores)[0, 1], abs=1e-4)


def test_graft_keeps_the_pooling(base, folder):
    """Catches: a transformer set under another attribute, which sentence-transformers ignores without a word."""
    fresh = make().load(folder, torch.float32)
    other = make().load(folder, torch.float32).transformer
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.mul_(-1)
    make().put_in_place(fresh, other)
    assert fresh.transformer is other
    assert fresh.network[0].model is other
    assert not np.allclose(fresh.network.encode("alpha"), base.network.encode("alpha"), atol=1e-3)
    assert [type(module).__name__ for module in fresh.network] == ["Transformer", "Pooling", "Normalize"]


def test_length_is_the_rows(base):
    """Catches: the number of text columns."""
    assert len(make().encode(TRIPLETS, base)) == 4
    assert len(Encoded({"anchor": TokenRows.of([])})) == 0


@pytest.mark.parametrize(
    ("loss", "compares"),
    [("multiple-negatives", True), ("cosent", True), ("cosine-similarity", False), ("softmax-nli", False)],
)
def test_which_losses_compare_the_rows_of_a_batch(loss, compares):
    """Catches: in-batch negatives of one length, which are easier; grouping refused where rows are independent."""
    assert make(loss=loss).compares_rows is compares
