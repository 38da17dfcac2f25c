"""The pieces that all settings are made of."""

import pytest
from pydantic import TypeAdapter, ValidationError

from tsugiki.common.settings import (
    AdapterSettings,
    Columns,
    DataFormat,
    Name,
    Names,
    Section,
    StrategySettings,
    TaskSettings,
)

NAME, NAMES, COLUMNS = (TypeAdapter(kind) for kind in (Name, Names, Columns))


@pytest.mark.parametrize("name", ["a", "0", "run-1", "sst2.v1_b", "a" * 64])
def test_names_that_are_taken(name):
    """Catches: a pattern too narrow for everyday names."""
    assert NAME.validate_python(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "-a", "_a", "CON", "a b", "a\n", "\x1b[31m", "ä", "a" * 65, "a" * 300],
)
def test_names_that_would_leave_the_folder_or_forge_a_log_line(name):
    """Catches: path separators, dots in front, control characters and upper case (CON, and macOS's one case)."""
    with pytest.raises(ValidationError):
        NAME.validate_python(name)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("query", ("query",)),
        (" query , value,, ", ("query", "value")),
        (["query", "a, b"], ("query", "a, b")),
        (("query",), ("query",)),
        ('["query", "a, b"]', ("query", "a, b")),
        ("[]", ()),
    ],
)
def test_names_from_text(text, names):
    """Catches: empty names; a name with a comma cut in two when it comes as JSON."""
    assert NAMES.validate_python(text) == names


@pytest.mark.parametrize("wrong", [3, {"a": 1}, [1, 2], '[1, "a"]', "[query", '["a'])
def test_what_is_no_list_of_names(wrong):
    """Catches: numbers taken for names; broken JSON that raises something else than a validation error."""
    with pytest.raises(ValidationError):
        NAMES.validate_python(wrong, strict=True)


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("", {}),
        ("text=sentence, label = 2", {"text": "sentence", "label": 2}),
        ({"text": "sentence", "label": 2}, {"text": "sentence", "label": 2}),
        ('{"text": "a, b", "label": "2"}', {"text": "a, b", "label": "2"}),
        ("text=a=b", {"text": "a=b"}),
    ],
)
def test_columns_from_text(text, columns):
    """Catches: a number of a column taken for its name, and the other way round."""
    assert COLUMNS.validate_python(text) == columns


@pytest.mark.parametrize("wrong", [3, ["text"], {"text": 1.5}, {"text": True}, '{"text": null}', "{text"])
def test_what_is_no_mapping_of_columns(wrong):
    """Catches: values that later code would take for a column."""
    with pytest.raises(ValidationError):
        COLUMNS.validate_python(wrong, strict=True)


def test_sections_are_frozen_and_strict():
    """Catches: a setting changed under way; unknown keys let through; "0.5" taken for 0.5; NaN in range."""
    settings = StrategySettings(name="fedavg")
    with pytest.raises(ValidationError, match="frozen"):
        settings.min_clients = 1
    for wrong in (
        {"min_client": 1},
        {"fraction_train": "0.5"},
        {"max_update_norm": float("nan")},
        {"min_clients": 2.0},
    ):
        with pytest.raises(ValidationError):
            StrategySettings(name="fedavg", **wrong)
    with pytest.raises(ValidationError):
        StrategySettings(name="fedavg", max_update_norm=float("inf"))


@pytest.mark.parametrize("base", [DataFormat, TaskSettings, AdapterSettings, StrategySettings])
def test_every_setting_is_described(base):
    """Catches: a setting without the sentence that `tsugiki config init` writes beside it."""
    assert issubclass(base, Section)
    assert base.model_fields
    assert all(field.description for field in base.model_fields.values())


@pytest.mark.parametrize(
    ("written", "meant"),
    [(0, 0), (3, 3), ("3", 3), (["acme", "bolt"], ("acme", "bolt")), ("acme, bolt", ("acme", "bolt"))],
)
def test_sites_to_start_with_are_a_number_or_names(written, meant):
    """Catches: a list that Flower's run config carries as text, and a number taken for a name."""
    settings = StrategySettings(name="fedavg", start_with=written)
    assert settings.start_with == meant
    assert settings.sites_at_start == (meant if isinstance(meant, int) else len(meant))


@pytest.mark.parametrize("wrong", [-1, True, 1.5, [], ["a", "a"], ["../a"], [1], "", {"a": 1}])
def test_what_is_no_choice_of_sites(wrong):
    """Catches: a site that is counted twice, or a name that no site can have, waited for in vain."""
    with pytest.raises(ValidationError, match="a number of sites"):
        StrategySettings(name="fedavg", start_with=wrong)


@pytest.mark.parametrize(("written", "right"), [("auto", True), (0, True), (5.5, True), (-1, False), ("x", False)])
def test_a_wait_is_a_number_of_seconds_or_auto(written, right):
    """Catches: a negative wait, and a word that is taken for "auto"."""
    if right:
        assert StrategySettings(name="fedavg", grace_s=written).grace_s == written
    else:
        with pytest.raises(ValidationError, match="seconds"):
            StrategySettings(name="fedavg", grace_s=written)
