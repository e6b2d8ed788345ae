"""The pictures. Whether they tell their story, a person has to see; that nothing overlaps, these
tests do.
"""

import io
from itertools import combinations

import pytest
import timm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

import models  # noqa: F401, the sample's model
from sparsity_factory import prunable_weights
from trainer import plots


def texts(figure):
    """Every piece of text that is drawn, with its extent in pixels."""
    found, draw = [], Text.draw

    def record(text, renderer):
        if text.get_visible() and text.get_text().strip():
            found.append(text)
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        FigureCanvasAgg(figure).draw()
    return [(text.get_text(), text.get_window_extent()) for text in found]


def assert_readable(figure):
    found = texts(figure)
    assert found
    width, height = figure.bbox.size
    for text, box in found:
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -1, text
    for (one, first), (other, second) in combinations(found, 2):
        assert not first.padded(-1).overlaps(second), (one, other)
    picture = Image.open(io.BytesIO(plots.png(figure)))
    assert picture.size[0] == 960


def layers(model):
    return {
        name: (place % 9 + 1) / 10
        for place, name in enumerate(prunable_weights(timm.create_model(model)))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, count",
    [
        ("deit_sample_patch4_28", 24),
        ("deit_tiny_patch16_224", 48),
        ("cait_xxs24_224", 156),
        ("swin_tiny_patch4_window7_224", 51),
    ],
)
def test_pictures_of_layers_have_no_text_over_another(model, count):
    fractions = layers(model)
    assert len(fractions) == count
    assert_readable(plots.sparsity_bars(fractions, 0.65, "target, 65 %", f"{model}, lamp at 65 %"))
    drops = {
        (name, sparsity): value * sparsity
        for name, value in fractions.items()
        for sparsity in (0.5, 0.65, 0.9)
    }
    assert_readable(plots.sensitivity_map(drops, f"{model}, one layer pruned at a time"))


def test_there_is_a_bar_for_each_layer_in_the_colour_of_its_kind():
    figure = plots.sparsity_bars(layers("deit_tiny_patch16_224"), 0.65, "target", "title")
    bars = figure.axes[0].containers[0]
    assert len(bars) == 48
    assert [bar.get_height() for bar in bars][:3] == pytest.approx([10, 20, 30])
    assert len({bar.get_facecolor() for bar in bars}) == 4
    assert bars[0].get_facecolor() == bars[4].get_facecolor()


@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_the_training_is_drawn_by_epoch_with_its_reference_lines(epochs):
    lines = [
        {
            "epoch": epoch,
            "train_loss": 1.0,
            "test_loss": 0.5,
            "test_acc1": 90.0,
            "test_ema_acc1": 80.0,
            "test_ema_loss": 0.6,
            "train_lr": 5e-4,
        }
        for epoch in range(epochs)
    ]
    figure = plots.training_curves(
        lines, {"dense": 92.15, "pruned": 73.6}, "deit_sample_patch4_28, lamp at 65 %"
    )
    assert_readable(figure)
    labels = [text for text, _ in texts(figure)]
    assert "dense, 92.15 %" in labels
    assert "pruned, 73.60 %" in labels
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [epochs] * 3


@pytest.mark.parametrize("count", [1, 10, 20, 1000])
def test_classes_are_drawn_by_what_they_lost_all_by_name_or_those_that_lost_most(count):
    classes = {
        f"{number} a long name of a class": (90.0 - number % 30, 90.0 - number % 7)
        for number in range(count)
    }
    figure = plots.class_accuracies(classes, ("dense", "finetuned"), "deit_sample_patch4_28, lamp")
    assert_readable(figure)
    lost = sum(after < before for before, after in classes.values())
    assert f"{lost} of {count:,} classes lost accuracy" in figure._suptitle.get_text()

    *dots, lines = figure.axes
    assert len(dots) == (count > 20)
    shown = [label.get_text().split()[0] for label in lines.get_yticklabels()]
    changes = [classes[f"{number} a long name of a class"] for number in shown]
    gains = [after - before for before, after in changes]
    assert gains == sorted(after - before for before, after in classes.values())[: len(gains)]
    assert len(shown) == min(count, 10 if count > 20 else 20)
    assert [line.get_xdata()[-1] for line in lines.lines[2::3]] == [after for _, after in changes]
    for axes in dots:
        sizes = axes.collections[0].get_sizes()
        assert round(sizes.sum() / 10) == count
        assert axes.collections[0].get_offsets()[:, 1].min() == min(gains)


def test_a_sweep_has_a_line_for_each_pruner_and_kind_and_shows_the_spread():
    points = [(0.5, [90.0, 91.0, 92.0]), (0.9, [80.0, 82.0, 84.0]), (0.91, [79.0, 79.5])]
    curves = {
        name: {"one-shot": [(0.5, [80.0]), (0.9, [20.0])], "finetuned": points}
        for name in ("lamp", "erk")
    }
    curves["a.yaml"] = {"one-shot": [(0.7, [50.0])]}
    figure = plots.sweep_lines(
        curves, 92.15, "model", "finetuned for 2 epochs,\nmean and range of 3 seeds"
    )
    assert_readable(figure)
    axes = figure.axes[0]
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[80, 20], [91, 82, 79.25]]
    assert [line.get_linestyle() for line in axes.lines[:2]] == ["--", "-"]
    assert axes.collections[2].get_paths()[0].get_extents().y1 == 92
    assert len(axes.lines) == 6


@pytest.mark.parametrize(
    "choices", ["", ", magnitude, block:16x16, one-shot"], ids=["short", "long"]
)
def test_a_sweep_of_many_combinations_draws_the_nine_best(choices):
    curves = {
        f"pruner{number}{choices}": {
            "one-shot": [(0.5, [99.0])],
            "finetuned": [(0.5, [40.0 + number, 50.0])],
        }
        for number in (3, 11, 1, 2, 4, 5, 6, 7, 8, 9, 10)
    }
    figure = plots.sweep_lines(curves, 92.15, "deit_sample_patch4_28", "finetuned for 2 epochs")
    assert_readable(figure)
    labels = [text for text, _ in texts(figure)]
    assert [name for name in curves if name not in labels] == [
        f"pruner1{choices}",
        f"pruner2{choices}",
    ]
    assert "deit_sample_patch4_28, the 9 of 11 combinations with the best mean accuracy" in labels


def test_the_same_figure_gives_the_same_bytes():
    assert (
        len(
            {
                plots.png(plots.sparsity_bars(layers("deit_sample_patch4_28"), 0.5, "x", "y"))
                for _ in range(2)
            }
        )
        == 1
    )


def test_each_level_stands_at_its_block_and_kind():
    figure = plots.level_map(
        {
            "blocks.0.attn.qkv.weight": ("2:4", 0.5),
            "blocks.1.attn.qkv.weight": ("dense", 1.0),
            "blocks.1.mlp.fc1.weight": ("1:4", 0.25),
        },
        "levels",
    )
    axes = figure.axes[0]
    assert {(*text.get_position(), text.get_text()) for text in axes.texts} == {
        (0, 0, "2:4"),
        (1, 0, "dense"),
        (1, 1, "1:4"),
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attn.qkv", "mlp.fc1"]
    assert axes.images[0].get_array()[:, 1].tolist() == [100, 25]
    assert axes.images[0].get_clim() == (0, 100)


def test_models_are_drawn_where_their_speed_and_mean_accuracy_are_with_a_line_through_a_family():
    panels = {
        "batch 1": {"zeros": [(1.2, [89.0]), (1.1, [88.0])], "smaller": [(1.4, [89.5])]},
        "batch 64": {"zeros": [(1.5, [89.0]), (2.0, [87.0, 89.0])], "smaller": [(2.5, [89.5])]},
    }
    figure = plots.tradeoff_points(panels, 90.0, "times as fast", "top-1 accuracy, %")

    for axes, (title, panel) in zip(figure.axes, panels.items(), strict=True):
        assert axes.get_title(loc="left") == title
        drawn = {line.get_label(): [*map(tuple, line.get_xydata())] for line in axes.lines}
        assert drawn["smaller"] == [(rate, *values) for rate, values in panel["smaller"]]
        assert {text.get_text() for text in axes.texts} - {""} == {"dense", *panel}
    assert drawn["zeros"] == [(1.5, 89.0), (2.0, 88.0)]


def test_the_names_of_families_do_not_overlap_when_their_last_points_do():
    panel = {f"family {number}": [(1.5, [89.0 + number / 1000])] for number in range(7)}
    assert_readable(plots.tradeoff_points({"batch 1": panel}, 89.0, "times as fast", "top-1"))
