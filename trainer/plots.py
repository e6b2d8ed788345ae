"""Draws the pictures of runs and sweeps.

Each function returns a matplotlib Figure, and `png` makes a file of it.
"""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
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
# A legend of at most this many characters is put next to the lines, a longer one below them.
BESIDE = 24
LONGEST = 28  # characters of the name of a class
DASHED = {"linestyle": "--", "linewidth": 1.1}
KINDS = ("qkv", "proj", "fc1", "fc2")  # always in the same colours
# Of more classes than this, all are drawn as dots, and those that lost most by name.
MOST_CLASSES = 20
MOST_NAMED = 10
LOST = PALETTE[3]
GAINED = PALETTE[0]
EQUAL = PALETTE[8]


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
    names = list(layers)
    blocks = _blocks(layers)
    kinds = [_kind(name) for name in names]
    colours = _colours(kinds)

    # Every block is moved right by the gaps before it
    gaps = np.repeat(np.arange(len(blocks)), [len(members) for _, _, members in blocks])
    places = np.arange(len(names)) + 0.8 * gaps
    place_of = dict(zip(names, places, strict=True))
    centres = [np.mean([place_of[name] for name in members]) for _, _, members in blocks]

    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        percent = [100 * layers[name] for name in names]
        axes.bar(places, percent, 0.9, color=[colours[kind] for kind in kinds])
        line = axes.axhline(
            100 * overall, color="black", linestyle="--", linewidth=1.2, label=label
        )

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
    curves = (
        ("train", "training", PALETTE[1]),
        ("test", "validation", PALETTE[0]),
        ("test_ema", "moving average", PALETTE[2]),
    )

    def points_of(key: str) -> list[tuple[float, float]]:
        return [(line["epoch"], line[key]) for line in epochs if key in line]

    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 3), layout="constrained")
        loss, accuracy, rate = figure.subplots(1, 3)

        for axes, metric in ((loss, "loss"), (accuracy, "acc1")):
            for kind, name, colour in curves:
                if points := points_of(f"{kind}_{metric}"):
                    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
        for number, (name, value) in enumerate(reference.items()):
            style = ("--", ":", "-.")[number % 3]
            accuracy.axhline(
                value, color="black", linestyle=style, linewidth=1.2, label=f"{name}, {value:.2f} %"
            )

        rate.plot(*zip(*points_of("train_lr"), strict=True), color=PALETTE[3], marker=marker)
        rate.set(ylim=(0, None))
        rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

        titles = {loss: "loss", accuracy: "top-1 accuracy, %", rate: "learning rate"}
        for axes, name in titles.items():
            axes.set(title=name, xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))

        handles = {line.get_label(): line for axes in (loss, accuracy) for line in axes.lines}
        figure.legend(handles=handles.values(), loc="outside lower left", ncols=len(handles))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def class_accuracies(
    classes: Mapping[str, tuple[float, float]], names: tuple[str, str], title: str
) -> Figure:
    """The accuracy of each class with two models, the class that lost most at the top.

    Of many classes, all are drawn as dots, and those that lost most as lines from one accuracy to
    the other.

    classes: by title, the accuracies in percent before and after. names: of the two models.
    """
    lost = sum(after < before for before, after in classes.values())
    gained = sum(after > before for before, after in classes.values())
    title += f": {lost:,} of {len(classes):,} classes lost accuracy, {gained:,} gained"
    ranked = sorted(classes.items(), key=lambda item: item[1][1] - item[1][0])

    with matplotlib.rc_context(STYLE):
        if len(ranked) <= MOST_CLASSES:
            figure = Figure((WIDTH, 1.5 + 0.28 * len(ranked)), layout="constrained")
            _draw_class_lines(figure.subplots(), ranked)
        else:
            figure = Figure((WIDTH, 4.6), layout="constrained")
            dots, lines = figure.subplots(1, 2)
            _draw_class_dots(dots, classes.values(), names[0])
            _draw_class_lines(lines, ranked[:MOST_NAMED])
            lines.set_title(f"the {MOST_NAMED} that lost most")

        dot = {"color": "black", "marker": "o", "linestyle": ""}
        handles = [
            Line2D([], [], **dot, markerfacecolor="white", label=names[0]),
            Line2D([], [], **dot, label=names[1]),
            Line2D([], [], color=LOST, label="lost"),
            Line2D([], [], color=GAINED, label="gained"),
        ]
        figure.legend(handles=handles, loc="outside lower right", ncols=len(handles))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def sweep_lines(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, Sequence[float]]]]],
    dense: float | None,
    title: str,
    finetuned: str,
) -> Figure:
    """Top-1 accuracy against sparsity: a colour per combination, one-shot dashed, finetuned solid.

    A line goes through the means of the seeds, and a band from the lowest to the highest. If there
    are more curves than colours, the ones with the best mean accuracy are drawn, and the title says
    so.

    curves: the combination's name to kind (`one-shot`, `finetuned`) to points (sparsity, accuracies
        in percent of all seeds), in order of sparsity.
    dense: the accuracy of the dense model, in percent.
    finetuned: the legend of the solid lines.
    """
    if len(curves) > len(PALETTE):
        ranked = sorted(curves, key=lambda name: _mean_accuracy(curves[name]), reverse=True)
        best = ranked[: len(PALETTE)]
        title += f", the {len(best)} of {len(curves)} combinations with the best mean accuracy"
        curves = {name: kinds for name, kinds in curves.items() if name in best}
    all_points = [points for kinds in curves.values() for points in kinds.values()]
    sparsities = sorted({sparsity for points in all_points for sparsity, _ in points})

    with matplotlib.rc_context(STYLE):
        beside = max(map(len, curves)) <= BESIDE
        figure = Figure((WIDTH, 4.6 if beside else 6), layout="constrained")
        axes = figure.subplots()

        for number, kinds in enumerate(curves.values()):
            look = _look(number)
            for kind, points in kinds.items():
                x = [sparsity for sparsity, _ in points]
                means = [np.mean(values) for _, values in points]
                lowest = [min(values) for _, values in points]
                highest = [max(values) for _, values in points]

                solid = {"linestyle": "-", "linewidth": 1.8, "markerfacecolor": look["color"]}
                style = solid if kind == "finetuned" else {**DASHED, "markerfacecolor": "white"}
                axes.plot(x, means, **look, **style)
                axes.fill_between(x, lowest, highest, color=look["color"], alpha=0.25, linewidth=0)
                axes.vlines(x, lowest, highest, color=look["color"], linewidth=1)

        # The legend has a line for each combination and for each kind
        handles = [
            Line2D([], [], **_look(number), label=name) for number, name in enumerate(curves)
        ]
        kinds = {kind for kinds in curves.values() for kind in kinds}
        if "finetuned" in kinds:
            handles.append(Line2D([], [], color="black", label=finetuned))
        if "one-shot" in kinds:
            handles.append(Line2D([], [], color="black", **DASHED, label="right after pruning"))
        if dense is not None:
            label = f"dense, {dense:.2f} %"
            line = axes.axhline(dense, color="black", linestyle=":", linewidth=1.2, label=label)
            handles.append(line)

        # Each halving of the kept weights has the same width, since methods differ where few are
        # left
        axes.set_xscale("function", functions=(_halvings, _sparsity_after))
        axes.set_xticks(_thinned(sparsities))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
        axes.minorticks_off()
        axes.set_xlim(1 - (1 - sparsities[0]) * 2**0.15, 1 - (1 - sparsities[-1]) * 2**-0.15)
        axes.set(
            xlabel="pruned, % of the prunable weights (logarithmic in what is left)",
            ylabel="top-1 accuracy, %",
        )
        if beside:
            figure.legend(handles=handles, loc="outside right upper", ncols=1)
        else:
            figure.legend(handles=handles, loc="outside lower left", ncols=2)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def tradeoff_points(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Sequence[float]]]]],
    dense: float,
    speed: str,
    label: str,
) -> Figure:
    """What is kept against speed: panels side by side, with a line for each family of models.

    panels: by title, then by family: of each model its speed and its values, of which there may be
        several. dense: the value of the dense model, whose speed is 1. speed, label: what the
        speeds and the values are.
    """
    families = list(dict.fromkeys(family for panel in panels.values() for family in panel))
    # Names in yellow would be hard to read, and the dense model is black
    colours = [colour for colour in PALETTE if colour not in ("#F0E442", "#000000")]
    looks = {
        family: {**_look(number), "color": colours[number % len(colours)]}
        for number, family in enumerate(families)
    }

    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 4.2), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        row[0].set_ylabel(label)

        for axes, (title, panel) in zip(row, panels.items(), strict=True):
            axes.set(title=title, xlabel=speed)
            axes.axhline(dense, color="black", linestyle=":", linewidth=1.2)
            axes.axvline(1, color="black", linestyle=":", linewidth=1.2)
            axes.plot(1, dense, color="black", marker="*", markersize=9)

            for family, points in panel.items():
                look = looks[family]
                rates = [rate for rate, _ in points]
                means = [np.mean(values) for _, values in points]
                axes.plot(rates, means, **look, label=family)
                for rate, values in points:
                    axes.vlines(rate, min(values), max(values), color=look["color"], linewidth=1)

        # The panels share their heights, which are known once all points are drawn
        for axes, panel in zip(row, panels.values(), strict=True):
            ends = [
                (family, *points[-1], looks[family]["color"]) for family, points in panel.items()
            ]
            _name_ends(axes, [("dense", 1, [dense], "black"), *ends])
    return figure


def sensitivity_map(drops: Mapping[tuple[str, float], float], title: str) -> Figure:
    """The cost of pruning each layer alone, as a colour: a panel per kind, block by sparsity.

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
        height = 1.2 + len(panels) * (0.35 + 0.18 * len(sparsities))
        figure = Figure((WIDTH, height), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        worst = max(max(drops.values()), 1e-3)
        percent = [f"{100 * sparsity:g}" for sparsity in sparsities]

        for axes, (kind, values) in zip(rows, panels.items(), strict=True):
            image = axes.imshow(
                values, vmin=0, vmax=worst, aspect="auto", origin="lower", interpolation="nearest"
            )
            axes.set_yticks(range(len(sparsities)), percent, fontsize=8)
            axes.set_title(kind, fontsize=9)
            if len(blocks) <= 12:  # there is room for numbers
                for place, drop in np.ndenumerate(values):
                    if not np.isnan(drop):
                        # + 0 makes -0.0 a 0.0
                        text = f"{round(drop, 1) + 0:.1f}"
                        _write(axes, place, text, 8, on_bright=drop > 0.6 * worst)
            axes.set_facecolor("#eeeeee")

        _name_blocks(rows[-1], range(len(blocks)), blocks)
        figure.colorbar(
            image, ax=list(rows), label="top-1 accuracy lost, points", aspect=40, pad=0.01
        )
        figure.supylabel("pruned, % of the layer's weights", fontsize=10)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def level_map(levels: Mapping[str, tuple[str, float]], title: str) -> Figure:
    """The level of each layer, on a colour for the share of weights that it keeps.

    A row for each kind of layer, a column for each block.

    levels: weight name to the text of its level and the fraction that it keeps.
    """
    blocks = _blocks(levels)
    kinds = list(dict.fromkeys(map(_path_in_block, levels)))
    kept = np.full((len(kinds), len(blocks)), np.nan)
    size = 8 if len(blocks) <= 12 else 5

    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure((WIDTH, 1.5 + 0.38 * len(kinds)), layout="constrained")
        axes = figure.subplots()

        for column, (_, _, members) in enumerate(blocks):
            for name in members:
                row = kinds.index(_path_in_block(name))
                text, share = levels[name]
                kept[row, column] = share
                if len(blocks) <= 24:  # there is room for texts
                    _write(axes, (row, column), text, size, on_bright=share > 0.6)

        image = axes.imshow(100 * kept, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
        axes.set_facecolor("#eeeeee")
        _name_blocks(axes, range(len(blocks)), blocks)
        figure.colorbar(image, ax=axes, label="kept, %", aspect=12, pad=0.01)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


# ---- helpers, not exported ----


def _change_colour(before: float, after: float) -> str:
    """The colour of a class that lost accuracy, gained some, or neither."""
    return LOST if after < before else GAINED if after > before else EQUAL


def _draw_class_lines(axes, classes: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """A line for each class from one accuracy to the other, the first at the top."""
    for place, (_, (before, after)) in enumerate(classes):
        colour = _change_colour(before, after)
        axes.plot([before, after], [place, place], color=colour, linewidth=2.4, zorder=2)
        axes.plot(before, place, "o", color=colour, markerfacecolor="white", zorder=3)
        axes.plot(after, place, "o", color=colour, zorder=3)

    titles = [
        title if len(title) <= LONGEST else f"{title[: LONGEST - 3]}..." for title, _ in classes
    ]
    axes.set_yticks(range(len(classes)), titles, fontsize=9)
    axes.set(ylim=(len(classes) - 0.5, -0.5), xlabel="top-1 accuracy, %", ylabel="class")
    axes.tick_params(axis="y", length=0)


def _draw_class_dots(axes, accuracies: Iterable[tuple[float, float]], name: str) -> None:
    """A dot for each accuracy before and change of it, as large as the number of its classes."""
    points = [(before, after - before) for before, after in accuracies]
    places, counts = np.unique(np.round(points, 2), axis=0, return_counts=True)
    colours = [_change_colour(0, change) for _, change in places]
    axes.scatter(*places.T, s=10 * counts, c=colours, alpha=0.7, linewidth=0, zorder=2)
    axes.axhline(0, color="black", linewidth=1, zorder=1)
    axes.set(xlabel=f"top-1 accuracy, {name}, %", ylabel="change, points")
    axes.set_title(f"all {len(points):,} classes, larger dots for several")


def _look(number: int) -> dict[str, str]:
    """Colour and marker of a curve."""
    return {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}


def _name_ends(axes, ends: Sequence[tuple[str, float, Sequence[float], str]]) -> None:
    """Writes names right of a panel, each with a thin line from its point.

    ends: name, x, the values whose mean is y, and colour.
    """
    low, high = axes.get_ylim()
    apart = 0.055 * (high - low)
    place = high + apart

    # From the top down: each at its height or below the one before, with room for all that follow
    ordered = sorted(ends, key=lambda end: -np.mean(end[2]))
    for following, (name, x, values, colour) in zip(
        reversed(range(len(ends))), ordered, strict=True
    ):
        y = np.mean(values)
        place = max(min(y, place - apart), low + apart * following)
        side = axes.get_yaxis_transform()
        axes.text(1.04, place, name, transform=side, color=colour, fontsize=9, va="center")
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6}
        axes.annotate("", (x, y), (1.03, place), textcoords=side, arrowprops=line)


def _write(axes, place: tuple[int, int], text: str, size: int, on_bright: bool) -> None:
    """Writes a text into the cell (row, column) of an image."""
    row, column = place
    colour = "black" if on_bright else "white"
    axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _halvings(sparsity):
    """How often the weights have been halved."""
    return -np.log2(np.maximum(1 - sparsity, 1e-9))


def _sparsity_after(halvings):
    return 1 - 2.0**-halvings


def _mean_accuracy(kinds: Mapping[str, Sequence[tuple[float, Sequence[float]]]]) -> float:
    """The mean accuracy of a curve, after finetuning if there was any."""
    points = kinds.get("finetuned") or kinds["one-shot"]
    return float(np.mean([np.mean(values) for _, values in points]))


def _blocks(names) -> list[tuple[str, str, list[str]]]:
    """The weights by block: (list of blocks such as `blocks`, its number, its weights' names)."""

    def block(name):
        parts = name.split(".")
        last = _last_number(parts)
        if last < 0:
            return "", ""
        return ".".join(parts[:last]), parts[last]

    return [(*key, list(members)) for key, members in groupby(names, block)]


def _path_in_block(name: str) -> str:
    """`attn.qkv` of `blocks.0.attn.qkv.weight`."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[_last_number(parts) + 1 :])


def _last_number(parts: Sequence[str]) -> int:
    """The index of the last part that is a number, or -1."""
    return max((place for place, part in enumerate(parts) if part.isdigit()), default=-1)


def _kind(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour for each kind of layer; if there are too many, some share the last colour."""
    found = dict.fromkeys(kinds)
    ordered = [kind for kind in KINDS if kind in found]
    ordered += [kind for kind in found if kind not in KINDS]

    fixed = dict(zip(KINDS, PALETTE, strict=False))
    others = iter([colour for colour in PALETTE if colour not in fixed.values()])
    return {kind: fixed.get(kind) or next(others, PALETTE[-1]) for kind in ordered}


def _name_blocks(axes, centres, blocks) -> None:
    """Ticks with the numbers of blocks, and below them the names of lists if there are several."""
    every = -(-len(blocks) // 30)
    numbers = [number for _, number, _ in blocks]
    axes.set_xticks(list(centres)[::every], numbers[::every])
    axes.tick_params(axis="x", length=0)

    placed = [(name, centre) for centre, (name, _, _) in zip(centres, blocks, strict=True)]
    lists = [(name, list(members)) for name, members in groupby(placed, lambda pair: pair[0])]
    if len(lists) == 1:
        axes.set_xlabel("block")
        return

    # More than two names are put on two lines in turn, so that they do not overlap
    lines = 2 if len(lists) > 2 else 1
    for number, (name, members) in enumerate(lists):
        middle = np.mean([centre for _, centre in members])
        axes.annotate(
            name,
            (middle, 0),
            (0, -18 - 11 * (number % lines)),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
        )


def _thinned(sparsities: Sequence[float]) -> list[float]:
    """The ticks that have room between them, the largest first among them."""
    kept = []
    for sparsity in reversed(sparsities):
        if not kept or np.log2((1 - sparsity) / (1 - kept[-1])) > 0.12:
            kept.append(sparsity)
    return kept[::-1]
