"""What a run leaves to look at, and what it shows while it goes on."""

import csv
import re
import signal
import sys

import pytest
import torch
from PIL import Image

from sparsity_factory import unpack
from trainer.results import FILES, SPARSITY_CSV, SPARSITY_PNG, SPARSITY_YAML, SUMMARY, TRAINING_PNG

pytestmark = pytest.mark.slow

LAMP = ["--pruner", "lamp", "--sparsity", "0.65"]


def kept(folder):
    with open(folder / SPARSITY_CSV, encoding="utf-8") as file:
        return {row["layer"]: int(row["kept"]) for row in csv.DictReader(file)}


def test_a_run_leaves_its_tables_pictures_and_a_summary_with_its_figures(run_main, tiny, tmp_path):
    output = run_main(*tiny, *LAMP, "--output_dir", "out")
    masks = unpack(torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)["masks"])
    table = kept(tmp_path / "out")
    assert all(table[name] == int(mask.sum()) for name, mask in masks.items())
    assert table["prunable weights"] == 232243
    for name in (SPARSITY_PNG, TRAINING_PNG):
        assert Image.open(tmp_path / "out" / name).size[0] == 960
        assert (tmp_path / "out" / name).stat().st_size < 150_000
    summary = (tmp_path / "out" / SUMMARY).read_text()
    for name, value in re.findall(r"(dense|pruned|finetuned) ([\d.]+) %", output):
        assert f"| {name} | {value} % |" in summary
    assert "python main.py --data-set FASHION" in summary
    assert "| of these prunable | 663,552 | 232,243 | 35.0% |" in summary
    assert f"torch {torch.__version__}" in summary
    assert all(f"({name})" in summary for name in (SPARSITY_PNG, TRAINING_PNG))
    assert re.search(r"Written to out: .*sparsity.csv.*training.png", output)


def test_the_allocation_given_back_unedited_keeps_the_same_numbers_and_edited_others(
    run_main, tiny, tmp_path
):
    run_main(*tiny, *LAMP, "--eval", "--output_dir", "first")
    custom = [*tiny, "--eval", "--pruner", "custom", "--custom-config"]
    run_main(*custom, f"first/{SPARSITY_YAML}", "--output_dir", "second")
    assert kept(tmp_path / "second") == kept(tmp_path / "first")
    text = (tmp_path / "first" / SPARSITY_YAML).read_text()
    (tmp_path / "edited.yaml").write_text(
        re.sub("(blocks.0.attn.qkv.weight): .*", r"\1: dense", text)
    )
    run_main(*custom, "edited.yaml", "--output_dir", "third")
    assert kept(tmp_path / "third")["blocks.0.attn.qkv.weight"] == 27648


def test_an_interrupted_run_leaves_the_same_as_an_undisturbed_one(
    run_main, tiny, tmp_path, stop_at
):
    recipe = [*tiny, *LAMP, "--epochs", "2", "--output_dir", "out", "--resume", "auto"]
    run_main(*recipe)
    names = FILES
    whole = {name: (tmp_path / "out" / name).read_bytes() for name in names}
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    stop_at(4, signal.SIGTERM)
    run_main(*recipe, status=143)
    run_main(*recipe)

    def without_speed(content: bytes) -> bytes:
        assert b"\n- speed: " in content
        return re.sub(rb"speed: [\d,.]+", b"", content)

    summary = whole.pop(SUMMARY)
    for name, content in whole.items():
        assert (tmp_path / "out" / name).read_bytes() == content, name
    for _ in range(2):
        assert without_speed((tmp_path / "out" / SUMMARY).read_bytes()) == without_speed(summary)
        run_main(*recipe)  # killed after its last checkpoint, it only has to write the summary


def test_an_evaluation_does_not_touch_the_results_of_a_training_run(run_main, tiny, tmp_path):
    run_main(*tiny, *LAMP, "--output_dir", "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    output = run_main(*tiny, "--eval", "--resume", "out/checkpoint.pth", "--output_dir", "out")
    assert "are not written" in output
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_dense_run_leaves_no_table_of_sparsity_not_even_an_earlier_one(run_main, tiny, tmp_path):
    run_main(*tiny, *LAMP, "--eval", "--output_dir", "out")
    run_main(*tiny, "--output_dir", "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {TRAINING_PNG, SUMMARY} <= names
    assert not {SPARSITY_CSV, SPARSITY_YAML, SPARSITY_PNG} & names
    assert "dense" in (tmp_path / "out" / SUMMARY).read_text()


def test_lines_come_as_often_as_asked_for(run_main, tiny):
    assert run_main(*tiny, "--print-freq", "1").count("Epoch: [0]  [") == 3
    assert run_main(*tiny).count("Epoch: [0]  [") == 2  # the first and the last of three


def test_quiet_prints_the_accuracies_and_nothing_else(run_main, tiny):
    output = run_main(*tiny, *LAMP, "--quiet", "--output_dir", "out")
    assert re.fullmatch(
        r"Top-1 accuracy: dense [\d.]+ %, pruned [\d.]+ %, finetuned [\d.]+ %\n", output
    )


def test_a_terminal_shows_bars_and_a_line_for_each_epoch(run_main, tiny, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output = run_main(*tiny, *LAMP, "--epochs", "2")
    assert re.search(r"Epoch: \[0\]: +\d+%.*/3 \[.*batch", output)
    lines = re.findall(
        r"^.*?(epoch \d: training loss [\d.]+, validation loss [\d.]+, top-1 [\d.]+ %, moving average "
        r"[\d.]+ %, learning rate [\de.-]+, [\d,]+ images/s)$",
        output.replace("\r", "\n"),
        re.M,
    )
    assert len(lines) == 2
    assert "eta:" not in output
    assert "Arguments" not in output


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_clear_line(
    run_main, tiny, tmp_path, monkeypatch, package
):
    monkeypatch.setitem(sys.modules, package, None)
    error = run_main(*tiny, f"--{package}", "--output_dir", "out", status=2)
    assert (
        error
        == f"error: --{package}: the package {package} is not installed; pip install {package}\n"
    )
    assert not (tmp_path / "out").exists()


def test_tensorboard_gets_numbers_layers_and_pictures(run_main, tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = run_main(*tiny, *LAMP, "--epochs", "2", "--output_dir", "out", "--tensorboard")
    events = EventAccumulator(str(tmp_path / "out/tensorboard"), {"images": 0})
    events.Reload()
    accuracy = events.Scalars("test/acc1")
    assert [event.step for event in accuracy] == [0, 1]
    assert f"finetuned {accuracy[-1].value:.2f} %" in output
    assert events.Scalars("train/lr")[0].value == pytest.approx(5e-4 * 16 / 512)
    assert events.Scalars("images_per_second")[0].value > 0
    assert events.Scalars("test_ema/acc1")
    assert events.Scalars("sparsity/prunable weights")[0].value == pytest.approx(0.65, abs=1e-5)
    assert (
        len([name for name in events.Tags()["scalars"] if name.startswith("sparsity/blocks.")])
        == 24
    )
    assert f"pruned {events.Scalars('accuracy/pruned')[0].value:.2f} %" in output
    assert set(events.Tags()["images"]) == {"sparsity", "training", "classes"}


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB that begin anew after
    7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # the rest of a block has no room for a header
            place += 2**15 - place % 2**15
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def test_wandb_gets_numbers_layers_and_pictures(run_main, tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = run_main(*tiny, *LAMP, "--output_dir", "out", "--wandb")
    (file,) = (tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb")
    values = {}
    for record in wandb_records(file):
        values |= {
            item.key or "/".join(item.nested_key): item.value_json for item in record.history.item
        }
    assert f"finetuned {float(values['test/acc1']):.2f} %" in output
    assert float(values["sparsity/prunable weights"]) == pytest.approx(0.65, abs=1e-5)
    assert len([name for name in values if name.startswith("sparsity/blocks.")]) == 24
    for name in ("sparsity", "training", "classes"):
        assert list((tmp_path / "out").glob(f"wandb/offline-run-*/files/media/images/{name}_*.png"))


def test_layers_that_keep_no_weight_are_named(run_main, tiny):
    few = ["--eval", "--pruner", "glob", "--score", "random", "--sparsity"]
    assert "No weight is kept" not in run_main(*tiny, *few, "0.9")
    output = run_main(*tiny, *few, "0.99999")
    line = next(line for line in output.splitlines() if line.startswith("No weight is kept of "))
    empty = [
        row.split()[0]
        for row in output.splitlines()
        if row.endswith("100.00%") and row.split()[-3] == "0"
    ]
    assert line.removeprefix("No weight is kept of ").split(":")[0].split(", ") == empty
