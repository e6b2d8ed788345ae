"""What a search leaves: the custom YAML, a table, a picture, and a page with all of it."""

import csv
import io
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import utils
from sparsity_factory import Kept
from sparsity_factory.time_table import TimeTable
from utils import Compute

from . import plots
from .search_bench import Bench
from .search_space import Prices, Space


class Found(NamedTuple):
    """What a search found.

    chosen: by part, the text of its choice. table: of a budget of time, the times of all choices.
    timed: with it a line on the dense and the pruned model as measured in the end.
    """

    space: Space
    chosen: Mapping[str, str]
    prices: Prices
    bench: Bench
    table: TimeTable | None = None
    timed: str = ""


def write_results(options, model: str, found: Found, compute: Compute) -> None:
    """search.yaml, search.csv, search.png, and search.md with all of it; prints what was found.

    With a budget of time also times.csv, the time and the loss of every choice.
    """
    space, chosen = found.space, found.chosen
    kept = space.rows(chosen)
    text = in_words(options, kept, found.prices.reached(chosen))
    page = [
        f"# {model}, levels under a budget",
        f"    {options.command}",
        f"{text}, by `{options.measure}`.",
        found.timed,
        f"    {command_to_use(options, found)}",
        search_table(found),
        "![The level of each layer](search.png)",
        f"- versions: {utils.versions(compute.device)}",
    ]
    files = {
        "search.csv": search_csv(found).encode(),
        "search.png": picture(found, f"{model}, {text}"),
        "search.md": "\n\n".join(filter(None, page)).encode(),
        "search.yaml": space.yaml(chosen, f"{options.command}\n{text}").encode(),
    }
    if found.table:
        files["times.csv"] = times_csv(found).encode()

    for name, content in files.items():
        found.bench.record.folder.write(name, content)
    print(f"{text}: written to {options.output_dir}: {', '.join(sorted(files))}")


def command_to_use(options, found: Found) -> str:
    """The command that prunes with the levels that were found."""
    path = str(Path(options.output_dir, "search.yaml"))
    pruning = ["--pruner", "custom", "--custom-config", path]
    if found.bench.score != "magnitude":
        pruning += ["--score", found.bench.score]
    if found.space.units(found.chosen):
        pruning.append("--shrink")
    pruning += ["--reconstruct", options.reconstruct]
    return shlex.join(["python", "main.py", *options.others, *pruning])


def in_words(options, kept: Kept, reached: float) -> str:
    """What the levels that were found keep."""
    weights = f"{1 - kept.prunable.sparsity:.2%} of the weights kept"
    if options.budget_of == "weights":
        return weights
    of = {"macs": "the multiply-adds", "latency": "the time"}[options.budget_of]
    return f"{reached:.2%} of {of} and {weights}"


def search_csv(found: Found) -> str:
    """A line for each layer: its level, what it keeps, and its loss at every level.

    With a budget of time the part of a layer has the losses.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    losses = [] if found.table else [f"loss at {text}" for text in found.space.texts]
    writer.writerow(["layer", "shape", "level", "kept", "total", *losses])
    for row, level in _rows(found):
        shape = "x".join(map(str, row.shape))
        losses = [] if found.table else _losses(found, row.name, "{:.6g}")
        writer.writerow([row.name, shape, level, row.kept, row.total, *losses])
    return table.getvalue()


def times_csv(found: Found) -> str:
    """A line for each part and choice: whether it was chosen, its seconds and its loss."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["part", "choice", "chosen", "seconds", "loss"])
    for part, times in found.table.parts.items():
        for text, seconds in times.items():
            chosen = int(found.chosen[part] == text)
            loss = f"{found.bench.losses[part][text]:.6g}"
            writer.writerow([part, text, chosen, f"{seconds:.3g}", loss])
    writer.writerow(["rest", "", "", f"{found.table.rest:.3g}", ""])
    return table.getvalue()


def search_table(found: Found) -> str:
    """The choices in Markdown: of each layer with its losses, or of each part with its time."""
    if found.table:
        return _table_of_times(found)

    losses = " | ".join(f"loss at {text}" for text in found.space.texts)
    lines = [
        f"| layer | level | kept | {losses} |",
        "| --- | --- | ---: |" + " ---: |" * len(found.space.texts),
    ]
    for row, level in _rows(found):
        losses = " | ".join(_losses(found, row.name, "{:.3g}"))
        lines.append(f"| `{row.name}` | {level} | {1 - row.sparsity:.2%} | {losses} |")
    return "\n".join(lines)


def picture(found: Found, title: str) -> bytes:
    """The level of each layer and the share that it keeps, as a PNG."""
    shares = {
        row.name: (level.removeprefix("block:"), 1 - row.sparsity) for row, level in _rows(found)
    }
    return plots.png(plots.level_map(shares, title))


# ---- helpers, not exported ----


def _rows(found: Found):
    """Each layer with the text of its level, or of what its block keeps."""
    texts = {}
    for part in found.space.parts:
        chosen = found.chosen[part.name]
        choice = found.space.choices[part.name][chosen]
        texts |= choice.levels or dict.fromkeys(part.weights, chosen)
    return [(row, texts.get(row.name, "dense")) for row in found.space.rows(found.chosen).layers]


def _table_of_times(found: Found) -> str:
    lines = ["| part | choice | dense, ms | ms | loss |", "| --- | --- | ---: | ---: | ---: |"]
    for part, text in found.chosen.items():
        before = f"{1000 * found.table.dense[part]:.3g}"
        after = f"{1000 * found.table.parts[part][text]:.3g}"
        loss = f"{found.bench.losses[part][text]:.3g}"
        lines.append(f"| `{part}` | {text} | {before} | {after} | {loss} |")
    rest = f"{1000 * found.table.rest:.3g}"
    return "\n".join([*lines, f"| the rest | | {rest} | {rest} | |"])


def _losses(found: Found, name: str, form: str) -> list[str]:
    """The loss of a layer at every level of the search; empty if it does not have that level."""
    losses = [found.bench.losses[name].get(text) for text in found.space.texts]
    return ["" if loss is None else form.format(loss) for loss in losses]
