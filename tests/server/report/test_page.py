"""The report: it says what the files say, escapes what strangers wrote, and loads nothing."""

import json
import re
from html.parser import HTMLParser

import jinja2
import pytest

from tests.support.processes import ROOT
from tests.support.runs import BASELINES, accepted, line, run_folder, start, usual, voided
from tsugiki.common.errors import StorageError
from tsugiki.server.report import tables
from tsugiki.server.report.figures import metric_curve
from tsugiki.server.report.page import write_report
from tsugiki.server.report.run_files import baseline_curves, read_run, worst_site

HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Collects what a browser would see: elements with their attributes, and text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read_page(folder):
    """Write the report and return it, parsed."""
    return Page(write_report(folder).read_text("utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with everything in it, reported."""
    folder = usual(tmp_path_factory.mktemp("whole") / "run", BASELINES)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(whole):
    """The report of that run, parsed."""
    return Page((whole / "report.html").read_text("utf-8"))


def test_the_story_is_told_in_the_words_of_the_files(page):
    """Catches: the last round reported as the best, voided attempts counted as rounds, sites of one round only."""
    text = page.text
    assert "3 sites trained one lora adapter for sequence-classification in 2 rounds" in text
    assert "accuracy went from 0.5 before training to 0.8 (+0.3), best after round 1" in text
    assert "1 attempt at a round was voided" in text
    assert "1,234 parameters and 20 of the task's head, 1.0 kB to each site" in text


def test_an_audit_by_attack_is_on_the_page(tmp_path):
    """Catches: an audit that nobody reads, because the report leaves it out."""
    folder = run_folder(tmp_path / "run", [start(accuracy=0.5)], privacy={"mode": "none", "plan_sha256": "ab"})
    ledger = {"adversary": "release", "claimed": 8.0, "found": {"largest": 1.3}, "control": {"largest": 5.6}}
    body = {"plan_sha256": "ab", "trials": 4500, "runs": 5, "confidence": 0.99, "delta": 1e-5}
    assert "an attacker found" not in read_page(folder).text
    (folder / "privacy_audit.json").write_text(json.dumps(body | {"ledgers": [ledger | {"holds": True}]}))
    assert "claimed 8.0; an attacker found at least 1.3" in read_page(folder).text


@pytest.mark.parametrize("missing", ["metrics.jsonl", "summary.json"])
def test_a_run_that_has_not_begun_is_refused(tmp_path, missing):
    """Catches: an empty report for a folder without a run; one without a summary needs what a run writes at first."""
    folder = usual(tmp_path / "run")
    (folder / missing).unlink()
    with pytest.raises(StorageError) as caught:
        write_report(folder)
    assert caught.value.code == "run-missing"
    assert not (folder / "report.html").exists()


def test_equal_runs_give_equal_bytes_whatever_matplotlib_is_set_to(tmp_path, whole):
    """Catches: a date, a random id or the order of a set in the page; figures that follow the user's matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        again = write_report(usual(tmp_path / "run", BASELINES)).read_bytes()
        assert matplotlib.rcParams["font.size"] == 30
    assert again == (whole / "report.html").read_bytes()


def test_the_page_loads_nothing_and_runs_nothing(page):
    """Catches: a style sheet, font, image or script from elsewhere."""
    links = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data", "action")
    ]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "img", "object", "base", "form"}
    assert "@import" not in page.text
    assert "url(h" not in page.text


def test_no_two_figures_share_an_id(whole, page):
    """Catches: a figure that draws another one's markers or is clipped by its frame."""
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len([tag for tag, _ in page.elements if tag == "svg"]) > 5
    assert len(ids) == len(set(ids))
    html = (whole / "report.html").read_text("utf-8")
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', html))
    assert used
    assert used <= set(ids)


def test_what_strangers_wrote_is_escaped_everywhere(tmp_path):
    """Catches: a site name, reason, detail, metric, configuration or label that becomes an element of the page."""
    rejected = {HOSTILE: {"reason": HOSTILE, "detail": HOSTILE}}
    hostile = line(1, good=(), eval={"accuracy": 0.6, HOSTILE: 0.1})
    hostile |= {"cohort": [HOSTILE, "$\\broken$"], "rejected": rejected, "accepted": {"$\\broken$": accepted()}}
    hostile["sites_eval"] = {HOSTILE: {"accuracy": 0.1, HOSTILE: 0.2, "rows": 1}}
    folder = run_folder(tmp_path / "run", [start(accuracy=0.5), hostile], {"local": {HOSTILE: {HOSTILE: 1.0}}})
    with (folder / "config.toml").open("a") as file:
        file.write(f"# {HOSTILE}\n")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"name": HOSTILE, "method": HOSTILE, "device": HOSTILE}))
    page = read_page(folder)
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) >= 8


def test_a_name_cannot_leave_its_attribute(tmp_path):
    """Catches: quotation marks that are not escaped where a metric's name becomes the label of a figure."""
    metric = """x" onclick="a()' onload='b()"""
    lines = [start(accuracy=0.5, **{metric: 0.5}), line(1, eval={"accuracy": 0.6, metric: 0.6})]
    page = read_page(run_folder(tmp_path / "run", lines, monitor=metric))
    labels = [attributes["aria-label"] for _, attributes in page.elements if "aria-label" in attributes]
    assert f"{metric}, by which the best round was chosen" in labels
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_the_page_names_what_it_does_not_escape():
    """Catches: a second value that the template trusts; escaping switched off in a part of it."""
    template = (ROOT / "server/report/report.html.j2").read_text("utf-8")
    assert re.findall(r"(\S+)\s*\|\s*safe\b", template) == ["figure.svg"]
    assert "autoescape" not in template


def test_a_value_that_the_template_misses_is_an_error(whole, monkeypatch):
    """Catches: an empty place on the page where the data and the template use different names."""
    monkeypatch.setattr(tables, "sections", lambda run: [object()])
    with pytest.raises(jinja2.UndefinedError):
        write_report(whole)


def test_letters_that_hide_others_are_replaced(tmp_path):
    """Catches: a right-to-left mark in a name that turns a table's line around; a glyph that the font lacks."""
    name = "a\u202eb\u5200"
    page = read_page(run_folder(tmp_path / "run", [line(1, good=(name,))]))
    assert "\u202e" not in page.text
    assert "a?b\u5200" in page.text


def test_extreme_numbers_do_not_break_the_page(tmp_path):
    """Catches: an axis that overflows at a loss of 1e308, or a label of NaN that stops the report."""
    lines = [start(accuracy=0.5, loss=float("inf")), line(1, eval={"accuracy": float("nan"), "loss": float("nan")})]
    lines[1]["accepted"]["a"] |= {"loss": 1e308, "seconds": float("inf")}
    lines[1]["train_loss"] = float("inf")
    baselines = {"untouched": {"accuracy": float("inf")}, "centralised": {"accuracy": 0.9}}
    assert "1e+308" in read_page(run_folder(tmp_path / "run", lines, baselines)).text


def test_a_run_without_rounds(tmp_path):
    """Catches: figures of nothing, and a claim that something was trained."""
    page = read_page(run_folder(tmp_path / "run", [start(accuracy=0.5)], stopped="interrupted"))
    assert "No round was completed" in page.text
    assert "Replies" not in page.text


def test_only_voided_attempts(tmp_path):
    """Catches: an axis over rounds that were never completed, or a mean over no site."""
    lines = [voided(1) | {"train_loss": None}, line(1, good=(), bad={"a": "slow"}, voided=True, attempt=1)]
    text = read_page(run_folder(tmp_path / "run", lines)).text
    assert "No round was completed" in text
    assert "2 attempts at rounds were voided" in text


def test_a_run_without_evaluation(tmp_path):
    """Catches: a before and after that nobody measured."""
    folder = run_folder(tmp_path / "run", [line(1), line(2)])
    page = read_page(folder)
    assert "There was no evaluation" in page.text
    assert "best" not in page.text.replace("best adapter", "")


def test_a_hundred_sites(tmp_path):
    """Catches: a cell for every site, which nobody can read; an open table of a hundred lines; a site left out."""
    names = [f"site-{number:03d}" for number in range(100)]
    page = read_page(run_folder(tmp_path / "run", [line(number, good=names) for number in range(1, 4)]))
    assert "Replies by round" in page.text
    assert "Replies by site" not in page.text
    assert "100 sites" in page.text
    assert all(name in page.text for name in names)


def test_many_rounds_stay_small(tmp_path):
    """Catches: a path for every bar of a long run."""
    folder = run_folder(tmp_path / "run", [line(number) for number in range(1, 301)])
    assert write_report(folder).read_text("utf-8").count("<path") < 1000


def test_baselines_are_in_figures_and_tables(page):
    """Catches: baselines that are read and then not shown."""
    assert page.text.count("local-only, mean") == 3
    assert "local-only, mean: 0.7\n" in page.text


def test_a_baselines_way_is_drawn(tmp_path):
    """Catches: a curve that is measured and drawn as a line at its end; points at the rounds of another run."""
    lines = [line(number) for number in range(1, 5)]
    way = [{"round": float(number), "accuracy": 0.9 - number / 10} for number in (0, 2, 4)]
    baselines = {"centralised": {"accuracy": 0.5}, "curves": {"centralised": way}}
    run = read_run(run_folder(tmp_path / "run", lines, baselines))
    assert baseline_curves(run, "accuracy") == {"centralised": [(0.0, 0.9), (2.0, 0.7), (4.0, 0.5)]}
    assert baseline_curves(run, "f1") == {}
    ways = baseline_curves(run, "accuracy")
    drawn = [metric_curve("accuracy", {0: 0.0}, None, {"centralised": 0.5}, curves) for curves in (ways, {})]
    assert drawn[0] != drawn[1]


def test_the_worst_site_is_named(page):
    """Catches: the largest loss called the best, and the row count taken for a metric."""
    values = {"a": {"rows": 1, "loss": 0.9, "accuracy": 0.9}, "b": {"rows": 2, "loss": 0.1, "accuracy": 0.2}}
    assert worst_site(values, "accuracy") == ("b", "accuracy", 0.2)
    assert worst_site(values, "loss") == ("a", "loss", 0.9)
    assert worst_site(values, "other") == ("b", "accuracy", 0.2)
    assert worst_site({"a": {"rows": 1}}, "accuracy") is None
    assert "Worst after round 1: b, accuracy 0.6" in page.text
