"""The model card of an export: what it contains, the code that loads it, how it was trained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from tsugiki.common import __version__
from tsugiki.common.config.files import PATH_KEYS
from tsugiki.common.config.run import SITES, RunConfig
from tsugiki.common.data.pixels import Pixels
from tsugiki.common.data.shard import Shard
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.start import about_start
from tsugiki.common.tasks.decoding.templates import encode_prompts, prompt_text
from tsugiki.common.tasks.image_classification import MODEL_TYPE
from tsugiki.server.run.at_sites import results
from tsugiki.server.run.progress import shown

_FLOAT32_BYTES = 4
Kind = Literal["peft", "tsugiki", "merged"]
"""Form of an export: a PEFT directory, files of our own, or a whole model."""


CLASSIFIER_MODULES = ("1_Pooling", "3_Dense")
"""Folders of the modules that a pooled classifier has after its transformer, by sentence-transformers' own names."""


@dataclass(frozen=True)
class Export:
    """An export that is being made.

    Args:
        kind: its form.
        code: Python that loads it, from `loading_code`.
        base_name: public name of the base; may be empty for a whole model.
        base_folder: folder of the base on this machine.
        round: the round that left the adapter which is exported.
        lines: the lines of metrics.jsonl.
        has_effect: whether the adapter changes any output of the base.
        ended: whether the run has ended.
    """

    kind: Kind
    code: str
    base_name: str
    base_folder: Path
    round: int
    lines: Sequence[dict[str, Any]]
    has_effect: bool
    ended: bool = True


def is_sentence_transformer(graft: Graft) -> bool:
    """Return whether the task's network is a `SentenceTransformer` around the transformer."""
    return graft.base.network is not graft.base.transformer


def pools_for_classes(graft: Graft) -> bool:
    """Return whether the network is a `SentenceTransformer` whose outputs are the logits of classes."""
    return is_sentence_transformer(graft) and bool(graft.base.heads) and not graft.base.loss_heads


def loads_itself(graft: Graft, kind: Kind) -> bool:
    """Return whether `SentenceTransformer(folder)` loads an export of this kind, with nothing lost."""
    if not is_sentence_transformer(graft):
        return False
    # It loads a PEFT adapter in the base's type: an adapter of float32 on a base of 16 bits would be rounded.
    frozen = [value for value in graft.base.transformer.parameters() if not value.requires_grad]
    whole = all(value.dtype.itemsize == _FLOAT32_BYTES for value in frozen if value.is_floating_point())
    return kind == "merged" or (kind == "peft" and graft.method.loads_anywhere and whole)


def needs_tsugiki(graft: Graft, kind: Kind) -> bool:
    """Return whether an export of this kind needs this program: our own methods and networks do."""
    return kind == "tsugiki" or graft.base.transformer.config.model_type == MODEL_TYPE


def reads_pairs(graft: Graft) -> bool:
    """Return whether the task reads two texts as one sequence."""
    return bool(getattr(graft.task.settings, "pair", False))


def token_limit(graft: Graft) -> int:
    """Return the number of tokens at which the task cuts a text."""
    return int(min(graft.task.settings.max_length, graft.base.tokenizer.model_max_length))


Import = tuple[str, str]
"""A module, and the name that is imported from it; an empty name imports the module itself."""

Code = tuple[list[Import], list[str]]
"""Imports, and the lines that need them."""


def loading_code(graft: Graft, config: RunConfig, kind: Kind, base_folder: Path) -> str:
    """Return Python code that loads an export from the working folder and uses it.

    The code defines `model` and, for a model of texts without a tokenizer of its own, `tokenizer`. It imports Tsugiki
    only if no other library can load the export.

    Args:
        graft: the model and adapter that are exported.
        config: the run's settings.
        kind: the form of the export.
        base_folder: folder of the base on this machine.
    """
    imports, load = _load(graft, config, kind, base_folder)
    more, use = _use(graft)
    lines = [*_import_lines([*imports, *more]), "", 'folder = "."  # the one with this card', *load, *use]
    return "\n".join(lines) + "\n"


def _import_lines(imports: Sequence[Import]) -> list[str]:
    names: dict[str, list[str]] = {}
    for module, name in imports:
        names.setdefault(module, []).append(name)
    plain = [f"import {module}" for module in sorted(names) if names[module] == [""]]
    chosen = [module for module in sorted(names) if names[module] != [""]]
    return plain + [f"from {module} import {', '.join(sorted(names[module]))}" for module in chosen]


def _load(graft: Graft, config: RunConfig, kind: Kind, base_folder: Path) -> Code:
    """Return the code that loads an export."""
    if needs_tsugiki(graft, kind) and kind != "merged":
        return [("tsugiki", "")], ["model = tsugiki.load_adapter(folder)"]
    if is_sentence_transformer(graft):
        return _load_embedder(graft, config, kind)
    return _load_transformer(graft, config, kind, base_folder)


def _load_embedder(graft: Graft, config: RunConfig, kind: Kind) -> Code:
    """Return the code for a `SentenceTransformer`, from the export alone or from its base and the adapter."""
    type_ = f'model_kwargs={{"dtype": {json.dumps(config.model.dtype)}}}'
    imports = [("sentence_transformers", "SentenceTransformer")]
    if loads_itself(graft, kind):
        return imports, [f"model = SentenceTransformer(folder, {type_})"]
    base = json.dumps(config.model.exported_name)
    imports.append(("peft", "PeftModel"))
    if not pools_for_classes(graft):
        lines = [f"model = SentenceTransformer({base}, {type_})"]
        lines.append("model[0].model = PeftModel.from_pretrained(model[0].model, folder).eval()")
        return imports, lines
    imports += [("sentence_transformers.base.modules", "Dense"), ("sentence_transformers.base.modules", "Transformer")]
    imports.append(("sentence_transformers.sentence_transformer.modules", "Pooling"))
    pooling, dense = (json.dumps(f"/{place}") for place in CLASSIFIER_MODULES)
    return imports, [
        f"body = Transformer({base}, max_seq_length={token_limit(graft)}, {type_})",
        "body.model = PeftModel.from_pretrained(body.model, folder).eval()",
        f"modules = [body, Pooling.load(folder + {pooling}), Dense.load(folder + {dense})]",
        "model = SentenceTransformer(modules=modules)",
    ]


def _load_transformer(graft: Graft, config: RunConfig, kind: Kind, base_folder: Path) -> Code:
    """Return the code for a transformers model: a merged one, or the base with an adapter that PEFT loads."""
    auto = _auto_class(graft.base.transformer)
    imports = [("transformers", auto)]
    lines = []
    if needs_tsugiki(graft, kind):
        imports.append(("tsugiki.common.tasks.image_classification", "small_cnn"))
        lines.append("small_cnn()  # now transformers knows this network")
    source = "folder"
    settings: dict[str, Any] = {}
    if kind != "merged":  # the base does not have the task's settings, such as the number of classes
        source = json.dumps(config.model.exported_name)
        settings = _own_settings(graft, base_folder)
    arguments = [source, f"dtype={json.dumps(config.model.dtype)}"]
    arguments += [f"{name}={value!r}" for name, value in settings.items()]
    lines += [f"model = {auto}.from_pretrained(", *(f"    {argument}," for argument in arguments), ")"]
    if kind == "peft":
        imports.append(("peft", "PeftModel"))
        lines.append("model = PeftModel.from_pretrained(model, folder).eval()")
    return imports, lines


def _use(graft: Graft) -> Code:
    """Return the code that uses a loaded model."""
    if pools_for_classes(graft):
        return _use_for_classes(graft)
    if is_sentence_transformer(graft):
        return [], ['vectors = model.encode(["One text.", "Another one."])']
    if graft.base.pixels is not None:
        return _use_on_images(graft.base.pixels)
    return _use_on_texts(graft)


def _use_for_classes(graft: Graft) -> Code:
    """Return the code that asks a pooled classifier, whose vectors are logits, for the names of classes."""
    texts = '["One text.", "Another one."]'
    if reads_pairs(graft):
        texts = '[("One text.", "The other one.")]'
    return [], [
        f"logits = model.encode({texts})",
        f"names = {json.dumps(list(graft.task.labels), ensure_ascii=False)}",
        "labels = [names[number] for number in logits.argmax(axis=1)]",
    ]


def _use_on_texts(graft: Graft) -> Code:
    limit = f"truncation=True, max_length={token_limit(graft)}"
    if any(column.name == "prompt" for column in graft.task.columns):
        texts = _prompt(graft)
    elif reads_pairs(graft):
        texts = '"One text.", "The other one."'
    else:
        texts = '"One text."'
    use = [
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'logits = model(**tokenizer({texts}, {limit}, return_tensors="pt")).logits',
    ]
    return [("transformers", "AutoTokenizer")], use


def _use_on_images(pixels: Pixels) -> Code:
    shape = ", ".join(map(str, (1, pixels.channels, *pixels.size)))
    mean = f"torch.tensor({list(pixels.mean)}).reshape(-1, 1, 1)"
    std = f"torch.tensor({list(pixels.std)}).reshape(-1, 1, 1)"
    use = [
        f"images = torch.zeros({shape})  # bytes from 0 to 255: rows, channels, height, width",
        f"mean, std = {mean}, {std}",
        f"logits = model(pixel_values=((images * {pixels.scale!r} - mean) / std).to(model.dtype)).logits",
    ]
    return [("torch", "")], use


def _prompt(graft: Graft) -> str:
    """Return the tokenizer's first arguments for a prompt in the template that the adapter was trained with."""
    tokenizer = graft.base.tokenizer
    template = graft.task.settings.template
    prompt = "One prompt."
    tokens = encode_prompts(Shard({"prompt": [prompt]}), tokenizer, template)[0]
    text = prompt_text(prompt, tokenizer, template)
    # The card must show a call that gives the same tokens as training, with or without the special tokens.
    ways = [(text, True), (text, False), (f"{tokenizer.bos_token}{text}", False)]
    same = [way for way in ways if tokenizer(way[0], add_special_tokens=way[1])["input_ids"] == tokens]
    text, added = (same or ways)[0]
    return f"{json.dumps(text)}, add_special_tokens={added}"


def _auto_class(transformer: Any) -> str:
    """Return the name of the Auto class that loads models like this one."""
    plain = getattr(transformer, "get_base_model", lambda: transformer)()
    matched = re.search(r"For[A-Z]\w+$", type(plain).__name__)
    if plain.main_input_name == "pixel_values":  # our own network as well
        return "AutoModelForImageClassification"
    if matched is None and plain.can_generate():  # GPT2LMHeadModel
        return "AutoModelForCausalLM"
    return f"AutoModel{matched.group()}" if matched else "AutoModel"


def _own_settings(graft: Graft, base_folder: Path) -> dict[str, Any]:
    """Return the settings of the model's configuration that the task adds to the base's own."""
    from transformers import AutoConfig

    settings: dict[str, Any] = {}
    labels = graft.task.labels
    if labels:  # the base may have a head for other classes, which the adapter replaces
        settings["num_labels"] = len(labels)
        settings["ignore_mismatched_sizes"] = True
    if labels != tuple(map(str, range(len(labels)))):
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
    own = graft.base.transformer.config
    base = AutoConfig.from_pretrained(base_folder)
    if graft.base.heads and not labels and own.num_labels != base.num_labels:
        settings["num_labels"] = own.num_labels  # a head without classes: a score
    if graft.base.tokenizer is not None and base.pad_token_id != own.pad_token_id:
        settings["pad_token_id"] = own.pad_token_id
    return settings


def card(graft: Graft, config: RunConfig, export: Export) -> str:
    """Return the README.md of an export: front matter for the hub, and a page for people."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=export.base_name or None,
        library_name=_library(graft, export.kind),
        pipeline_tag=graft.task.pipeline_tag,
        tags=["tsugiki", "federated-learning", config.adapter.method],
    )
    settings = _settings(config, graft.method.exported_settings(), export)
    sections = (_head(config, export), _training(graft, config, export), _metrics(graft, config, export), settings)
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(sections)


def _library(graft: Graft, kind: Kind) -> str:
    """Return the hub's name for the library that loads an export."""
    if needs_tsugiki(graft, kind):
        return "tsugiki"
    if loads_itself(graft, kind):
        return "sentence-transformers"
    return "transformers" if kind == "merged" else "peft"


def _head(config: RunConfig, export: Export) -> str:
    base = f"`{export.base_name}`" if export.base_name else "a base model"
    merged = ", merged into it" if export.kind == "merged" else ""
    what = f"A {config.adapter.method} adapter for {base}{merged}"
    warning = ""
    if not export.has_effect:
        nothing = "The adapter changes nothing: the outputs are exactly those of the base"
        warning = f" **{nothing}, with this head where it has one.**"
    return f"""# {config.run.name}

{what}, trained with Tsugiki on data that stayed at its sites.{warning}

## Load it

```python
{export.code}```

When this was exported, a fresh process ran the code above and found the outputs of the run's own model.
"""


def _training(graft: Graft, config: RunConfig, export: Export) -> str:
    lines = [line for line in export.lines if not line.get("voided")]
    rounds = max((line["round"] for line in lines), default=0)
    sites = {site for line in lines for site in line.get("accepted", {})}
    done = "" if export.ended else f" of {config.run.rounds}, the run has not ended"
    rows = {
        "task": config.task.name,
        "adapter": config.adapter.method,
        "parameters of the adapter": f"{graft.spec.parameters('adapter'):,}",
        "parameters of the head": f"{graft.spec.parameters('head'):,}",
        **_start(config),
        "rounds": f"{rounds}{done}; this is the adapter after round {export.round}",
        "sites": f"{len(sites)}",
        "strategy": config.strategy.name,
        "privacy": config.privacy.mode,
        **_taken(graft),
        "Tsugiki": __version__,
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"## How it was trained\n\n| | |\n|---|---|\n{table}"


def _start(config: RunConfig) -> dict[str, str]:
    start = about_start(config)
    return {"starts from": f"{start['start_from']}, values {start['start_sha256']}"} if start else {}


def _taken(graft: Graft) -> dict[str, str]:
    """Return what the task's settings took on this base where they are "auto"."""
    settings = graft.task.settings.model_dump()
    return {name.replace("_", " "): value for name, value in graft.base.constants.items() if name in settings}


def _metrics(graft: Graft, config: RunConfig, export: Export) -> str:
    """Return what was measured, on the operator's rows and at the sites, which the card does not name."""
    lines = [line for line in export.lines if not line.get("voided")]
    found = results(lines, export.round, config.metric, config.metric in graft.task.lower_is_better)
    after = found["after"]
    if not after:
        return "## Metrics\n\nThis adapter was not evaluated on held-out data.\n"
    before = found["before"] or {}
    rows = "".join(f"| {name} | {shown(before.get(name))} | {shown(value)} |\n" for name, value in after.items())
    head = f"| metric | after round {found['before_round']} | after round {export.round} |\n|---|---|---|\n"
    return f"## Metrics\n\n{_measured_on(after, found['at_sites'])}\n\n{head}{rows}"


def _measured_on(after: Mapping[str, float], at_sites: Mapping[str, Any] | None) -> str:
    """Return on which rows the metrics of the best adapter were measured."""
    told = []
    if any(not name.startswith(SITES) for name in after):
        told.append("On the operator's held-out data.")
    if at_sites is not None:
        count = len(at_sites["compared"] or at_sites["evaluated"])
        told.append(f"`{SITES}` stands before weighted means over {count} sites, each on evaluation rows of its own.")
        if worst := at_sites["worst"]:
            told.append(f"The worst site has {worst['metric']} {shown(worst['value'])}.")
    return " ".join(told)


def _settings(config: RunConfig, adapter: dict[str, Any], export: Export) -> str:
    """Return the run's settings without the operator's own paths."""
    task = config.task.resolved(lambda name: "").model_dump(mode="json")
    body = config.model_dump(mode="json") | {"task": task, "adapter": adapter}
    for dotted in PATH_KEYS:
        section, key = dotted.split(".")
        body[section].pop(key, None)
    body["model"] |= {"name": export.base_name, "public_name": export.base_name}
    return f"## Settings\n\n```toml\n{tomli_w.dumps(body)}```\n"
