"""The pictures that runs and sweeps leave. Each function returns a matplotlib Figure; `png` makes a
file of it.
"""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's colours, which people with every kind of colour vision tell apart.
PALETTE = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#000000",
    "#888888",
]
MARKERS = "osD^vPX*"
WIDTH = 8  # inches, at 120 pixels each: as wide as a README is shown
STYLE = {
    "figure.dpi": 120,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "image.cmap": "cividis",
}
# Characters of a legend that leaves enough room to the lines beside it; a longer one stands below
# them
BESIDE = 24
KINDS = ("qkv", "proj", "fc1", "fc2")  # always in the same colours


def png(figure: Figure) -> bytes:
    """The figure as a PNG file: the same bytes for the same figure."""
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def sparsity_bars(layers: Mapping[str, float], overall: float, label: str, title: str) -> Figure:
    """A bar for each layer in model order, coloured by its kind, with a gap between blocks.

    layers: weight name to the fraction that is pruned. overall: a fraction, drawn as a line that
    `label` names.
    """
    names, blocks = list(layers), _blocks(layers)
    kinds = [_kind(name) for name in names]
    colours = _colours(kinds)
    gaps = np.repeat(np.arange(len(blocks)), [len(members) for _, _, members in blocks])
    places = np.arange(len(names)) + 0.8 * gaps
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.bar(
            places,
            [100 * layers[name] for name in names],
            0.9,
            color=[colours[kind] for kind in kinds],
        )
        line = axes.axhline(
            100 * overall, color="black", linestyle="--", linewidth=1.2, label=label
        )
        centres = [
            places[[names.index(name) for name in members]].mean() for _, _, members in blocks
        ]
        _name_blocks(axes, centres, blocks)
        axes.grid(axis="x", visible=False)
        axes.set(
            ylim=(0, 100),
            xlim=(places[0] - 1, places[-1] + 1),
            ylabel="pruned, % of the layer's weights",
        )
        patches = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
        axes.legend(
            handles=[*patches, line], loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, ncols=6
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def training_curves(
    epochs: Sequence[Mapping[str, float]], reference: Mapping[str, float], title: str
) -> Figure:
    """Loss, accuracy and learning rate by epoch.

    epochs: the lines of log.txt. reference: top-1 accuracies in percent by name, drawn as lines.
    """
    marker = "o" if len(epochs) <= 20 else ""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 3), layout="constrained")
        loss, accuracy, rate = figure.subplots(1, 3)
        for axes, metric in ((loss, "loss"), (accuracy, "acc1")):
            for kind, name, colour in (
                ("train", "training", PALETTE[1]),
                ("test", "validation", PALETTE[0]),
                ("test_ema", "moving average", PALETTE[2]),
            ):
                if points := [
                    (line["epoch"], line[key])
                    for line in epochs
                    if (key := f"{kind}_{metric}") in line
                ]:
                    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
        for number, (name, value) in enumerate(reference.items()):
            style = ("--", ":", "-.")[number % 3]
            accuracy.axhline(
                value, color="black", linestyle=style, linewidth=1.2, label=f"{name}, {value:.2f} %"
            )
        points = [(line["epoch"], line["train_lr"]) for line in epochs if "train_lr" in line]
        rate.plot(*zip(*points, strict=True), color=PALETTE[3], marker=marker)
        rate.set(ylim=(0, None))
        rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axes, name in (
            (loss, "loss"),
            (accuracy, "top-1 accuracy, %"),
            (rate, "learning rate"),
        ):
            axes.set(title=name, xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        handles = {line.get_label(): line for axes in (loss, accuracy) for line in axes.lines}
        figure.legend(handles=handles.values(), loc="outside lower left", ncols=len(handles))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def sweep_lines(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, Sequence[float]]]]],
    dense: float | None,
    title: str,
    finetuned: str,
) -> Figure:
    """Top-1 accuracy against sparsity: a colour for each combination, one-shot dashed, finetuned
    solid.

    curves: the combination's name to kind (`one-shot`, `finetuned`) to points (sparsity, accuracies
    in percent of all seeds), by sparsity. The line goes through the means, and a band from the
    lowest to the highest. A single point is a marker. Where there are more curves than colours,
    those of the best mean accuracy are drawn, and the title says so.
    dense: the accuracy of the dense model, in percent. finetuned: what the legend says of the solid
    lines.
    """
    if len(curves) > len(PALETTE):
        best = sorted(curves, key=lambda name: _mean_accuracy(curves[name]), reverse=True)[
            : len(PALETTE)
        ]
        title += f", the {len(best)} of {len(curves)} combinations with the best mean accuracy"
        curves = {name: kinds for name, kinds in curves.items() if name in best}
    sparsities = sorted(
        {
            sparsity
            for kinds in curves.values()
            for points in kinds.values()
            for sparsity, _ in points
        }
    )
    with matplotlib.rc_context(STYLE):
        beside = max(map(len, curves)) <= BESIDE
        figure = Figure((WIDTH, 4.6 if beside else 6), layout="constrained")
        axes = figure.subplots()
        for number, kinds in enumerate(curves.values()):
            look = {
                "color": PALETTE[number % len(PALETTE)],
                "marker": MARKERS[number % len(MARKERS)],
            }
            for kind, points in kinds.items():
                x = [sparsity for sparsity, _ in points]
                axes.plot(
                    x,
                    [np.mean(values) for _, values in points],
                    **look,
                    linestyle="-" if kind == "finetuned" else "--",
                    linewidth=1.8 if kind == "finetuned" else 1.1,
                    markerfacecolor=look["color"] if kind == "finetuned" else "white",
                )
                lowest, highest = ([pick(values) for _, values in points] for pick in (min, max))
                axes.fill_between(x, lowest, highest, color=look["color"], alpha=0.25, linewidth=0)
                axes.vlines(x, lowest, highest, color=look["color"], linewidth=1)
        handles = [
            Line2D(
                [],
                [],
                color=PALETTE[number % len(PALETTE)],
                marker=MARKERS[number % len(MARKERS)],
                label=name,
            )
            for number, name in enumerate(curves)
        ]
        kinds = {kind for kinds in curves.values() for kind in kinds}
        if "finetuned" in kinds:
            handles.append(Line2D([], [], color="black", label=finetuned))
        if "one-shot" in kinds:
            handles.append(
                Line2D(
                    [],
                    [],
                    color="black",
                    linestyle="--",
                    linewidth=1.1,
                    label="right after pruning",
                )
            )
        if dense is not None:
            handles.append(
                axes.axhline(
                    dense,
                    color="black",
                    linestyle=":",
                    linewidth=1.2,
                    label=f"dense, {dense:.2f} %",
                )
            )
        # Twice as sparse, twice as far: the methods part where little is left.
        axes.set_xscale(
            "function",
            functions=(lambda s: -np.log2(np.maximum(1 - s, 1e-9)), lambda x: 1 - 2.0**-x),
        )
        axes.set_xticks(_thinned(sparsities))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
        axes.minorticks_off()
        axes.set_xlim(1 - (1 - sparsities[0]) * 2**0.15, 1 - (1 - sparsities[-1]) * 2**-0.15)
        axes.set(
            xlabel="pruned, % of the prunable weights (logarithmic in what is left)",
            ylabel="top-1 accuracy, %",
        )
        figure.legend(
            handles=handles,
            loc="outside right upper" if beside else "outside lower left",
            ncols=1 if beside else 2,
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def tradeoff_points(points: Mapping[str, tuple[float, Sequence[float]]], label: str) -> Figure:
    """Top-1 accuracy against speed: a marker for each model, with a line from its lowest to its
    highest accuracy.

    points: the model's name to how many times as fast it is, as `label` says, and its accuracies in
    percent. What stands before the last word of a name is its family: a family has one colour, and
    a line through its points.
    """
    families = defaultdict(list)
    for name, point in sorted(points.items(), key=lambda item: item[1][0]):
        families[name.rpartition(" ")[0] or name].append((name, *point))
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, (family, members) in enumerate(families.items()):
            look = {
                "color": PALETTE[number % len(PALETTE)],
                "marker": MARKERS[number % len(MARKERS)],
            }
            rates, means = zip(
                *((rate, np.mean(values)) for _, rate, values in members), strict=True
            )
            axes.plot(rates, means, **look, label=family)
            for name, rate, values in members:
                axes.vlines(rate, min(values), max(values), color=look["color"], linewidth=1)
                if name != family:
                    axes.annotate(
                        name.rpartition(" ")[2],
                        (rate, np.mean(values)),
                        xytext=(6, 6),
                        textcoords="offset points",
                        fontsize=9,
                    )
        axes.set(xlabel=label, ylabel="top-1 accuracy, %")
        axes.margins(0.1)
        axes.legend(loc="best")
    return figure


def sensitivity_map(drops: Mapping[tuple[str, float], float], title: str) -> Figure:
    """What pruning each layer alone costs, as a colour: a panel for each kind of layer, block by
    sparsity.

    drops: (weight name, sparsity) to the loss in top-1 accuracy, in points.
    """
    names = list(dict.fromkeys(name for name, _ in drops))
    sparsities = sorted({sparsity for _, sparsity in drops})
    blocks = _blocks(names)
    panels = defaultdict(lambda: np.full((len(sparsities), len(blocks)), np.nan))
    for column, (_, _, members) in enumerate(blocks):
        for name in members:
            for row, sparsity in enumerate(sparsities):
                panels[_path_in_block(name)][row, column] = drops.get((name, sparsity), np.nan)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(
            (WIDTH, 1.2 + len(panels) * (0.35 + 0.18 * len(sparsities))), layout="constrained"
        )
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        worst = max(max(drops.values()), 1e-3)
        for axes, (kind, values) in zip(rows, panels.items(), strict=True):
            image = axes.imshow(
                values, vmin=0, vmax=worst, aspect="auto", origin="lower", interpolation="nearest"
            )
            axes.set_yticks(
                range(len(sparsities)),
                [f"{100 * sparsity:g}" for sparsity in sparsities],
                fontsize=8,
            )
            axes.set_title(kind, fontsize=9)
            if len(blocks) <= 12:  # there is room for the figures
                for (row, column), drop in np.ndenumerate(values):
                    if not np.isnan(drop):
                        axes.text(
                            column,
                            row,
                            f"{round(drop, 1) + 0:.1f}",
                            ha="center",
                            va="center",
                            fontsize=8,
                            color="black" if drop > 0.6 * worst else "white",
                        )
            axes.set_facecolor("#eeeeee")
        _name_blocks(rows[-1], range(len(blocks)), blocks)
        figure.colorbar(
            image, ax=list(rows), label="top-1 accuracy lost, points", aspect=40, pad=0.01
        )
        figure.supylabel("pruned, % of the layer's weights", fontsize=10)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def level_map(levels: Mapping[str, tuple[str, float]], title: str) -> Figure:
    """The level of each layer, written on its share of kept weights as a colour: a row for each
    kind, block by block.

    levels: weight name to the text of its level and the fraction that it keeps.
    """
    blocks = _blocks(levels)
    kinds = list(dict.fromkeys(map(_path_in_block, levels)))
    kept = np.full((len(kinds), len(blocks)), np.nan)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure((WIDTH, 1.5 + 0.38 * len(kinds)), layout="constrained")
        axes = figure.subplots()
        for column, (_, _, members) in enumerate(blocks):
            for name in members:
                row = kinds.index(_path_in_block(name))
                text, kept[row, column] = levels[name]
                if len(blocks) <= 24:  # there is room for the texts
                    axes.text(
                        column,
                        row,
                        text,
                        ha="center",
                        va="center",
                        fontsize=8 if len(blocks) <= 12 else 5,
                        color="black" if kept[row, column] > 0.6 else "white",
                    )
        image = axes.imshow(100 * kept, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
        axes.set_facecolor("#eeeeee")
        _name_blocks(axes, range(len(blocks)), blocks)
        figure.colorbar(image, ax=axes, label="kept, %", aspect=12, pad=0.01)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


# ---- helpers, not exported ----


def _mean_accuracy(kinds: Mapping[str, Sequence[tuple[float, Sequence[float]]]]) -> float:
    """Of a curve's points, finetuned where it has been."""
    return float(
        np.mean([np.mean(values) for _, values in kinds.get("finetuned") or kinds["one-shot"]])
    )


def _blocks(names) -> list[tuple[str, str, list[str]]]:
    """The weights in runs of one block: what the block is in (`blocks`), its number, and its
    weights' names.
    """

    def block(name):
        parts = name.split(".")
        last = max((place for place, part in enumerate(parts) if part.isdigit()), default=-1)
        return ".".join(parts[: max(last, 0)]), parts[last] if last >= 0 else ""

    return [(*key, list(members)) for key, members in groupby(names, block)]


def _path_in_block(name: str) -> str:
    """`attn.qkv` of `blocks.0.attn.qkv.weight`."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(
        parts[max((place + 1 for place, part in enumerate(parts) if part.isdigit()), default=0) :]
    )


def _kind(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour for each kind of layer; beyond ten kinds some share the last."""
    found = dict.fromkeys(kinds)
    ordered = [kind for kind in KINDS if kind in found] + [
        kind for kind in found if kind not in KINDS
    ]
    fixed = dict(zip(KINDS, PALETTE, strict=False))
    others = iter([colour for colour in PALETTE if colour not in fixed.values()])
    return {kind: fixed.get(kind) or next(others, PALETTE[-1]) for kind in ordered}


def _name_blocks(axes, centres, blocks) -> None:
    """Ticks with the blocks' numbers and, where there are several lists of blocks, the names of
    these below.
    """
    every = -(-len(blocks) // 30)
    ticks = [
        (centre, number)
        for centre, (_, number, _) in list(zip(centres, blocks, strict=True))[::every]
    ]
    axes.set_xticks([centre for centre, _ in ticks], [number for _, number in ticks])
    axes.tick_params(axis="x", length=0)
    lists = [
        list(members)
        for _, members in groupby(zip(centres, blocks, strict=True), lambda item: item[1][0])
    ]
    if len(lists) == 1:
        axes.set_xlabel("block")
        return
    for number, members in enumerate(lists):
        middle = np.mean([centre for centre, _ in members])
        axes.annotate(
            members[0][1][0],
            (middle, 0),
            (0, -18 - 11 * (number % 2 if len(lists) > 2 else 0)),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
        )


def _thinned(sparsities: Sequence[float]) -> list[float]:
    """The ticks that have room between them, from the largest down."""
    kept = []
    for sparsity in reversed(sparsities):
        if not kept or np.log2((1 - sparsity) / (1 - kept[-1])) > 0.12:
            kept.append(sparsity)
    return kept[::-1]
