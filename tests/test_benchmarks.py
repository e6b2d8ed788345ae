"""The figures of benchmarks that are no times."""

import sys
from pathlib import Path

import pytest

from utils import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def latency(monkeypatch):
    """benchmarks/latency.py, as it imports its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "latency", raising=False)
    import latency

    return latency


def table(printed: str) -> dict[str, dict[str, str]]:
    """The rows by kind, and their cells by heading; of one batch size."""
    heading, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:]] for line in printed.splitlines()
    )
    return {row[2]: dict(zip(heading, row, strict=False)) for row in rows}


@pytest.mark.parametrize("shrink", [[], ["--shrink"]], ids=["masked", "shrunk"])
def test_latency_takes_pruned_units_out_and_tells_what_is_left(
    run_main, tiny, latency, capfd, shrink
):
    run_main(
        *tiny,
        "--pruner",
        "unif",
        "--pattern",
        "heads+neurons",
        "--budget",
        "macs",
        "--sparsity",
        "0.5",
        *shrink,
        "--output_dir",
        "run",
    )
    capfd.readouterr()
    assert (
        latency.main(
            [
                "run/checkpoint.pth",
                "--batch-sizes",
                "1",
                "--seconds",
                "0",
                "--amp",
                "off",
                "--data-set",
                "FASHION",
                "--data-path",
                tiny[3],
            ]
        )
        == 0
    )
    rows = table(capfd.readouterr().out)
    assert float(rows["dense"]["times"]) == 1
    left = float(rows["pruned"]["M multiply-adds"]) / float(rows["dense"]["M multiply-adds"])
    # The patch embedding and the classifier stay
    assert left == pytest.approx(0.52, abs=0.02)
    assert float(rows["pruned"]["file, MiB"]) < 0.65 * float(rows["dense"]["file, MiB"])


def test_latency_says_in_one_line_what_is_no_checkpoint(latency):
    with pytest.raises(UserError, match="README.md: not a checkpoint"):
        latency.main([str(ROOT / "README.md")])


@pytest.fixture
def tradeoff(monkeypatch, tmp_path):
    """benchmarks/tradeoff.py, with a folder of its own and times that are measured in no time."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tradeoff

    monkeypatch.setattr(tradeoff, "OUTPUT", tmp_path / "tradeoff")
    monkeypatch.setattr(tradeoff, "SECONDS", 0)
    return tradeoff


def test_ways_to_be_faster_have_arguments_of_the_main_program(tradeoff):
    from trainer.arguments import parse_args

    ways = tradeoff.WAYS
    names = [name for name in tradeoff.names() if name[0] != tradeoff.SEARCHED]  # needs its YAML
    parsed = {name: parse_args(ways[name[0]][name[1]]) for name in names}
    assert {args.model for args in parsed.values()} == {"deit_sample_patch4_28"}
    assert parsed["block:4x1", "90%"].pattern == "block:4x1"
    assert parsed["block:4x1", "90%"].sparsity == 0.9
    assert len({tradeoff.folder_of(name, 0) for name in parsed}) == len(parsed)

    # DeiT-Small's models have the arguments that differ
    assert tradeoff.LARGE_LABELS.keys() <= {label for _, label in parsed}


@pytest.mark.slow
def test_what_was_trained_is_measured_with_its_accuracies_and_nothing_is_trained(
    tradeoff, run_main, tiny, capfd, monkeypatch
):
    """On tiny runs, and with a tiny model for DeiT-Small."""
    zeros = ["--pruner", "unif", "--sparsity", "0.75"]
    half = ["--pruner", "unif", "--sparsity", "0.5"]
    units = [*half, "--pattern", "heads+neurons", "--budget", "macs", "--shrink"]
    tokens = ["--pruner", "unif", "--sparsity", "0", "--tokens", "7"]
    ways = {"zeros": {"75%": zeros, "85%": zeros}, "units": {"50%": units}, "tokens": {"7": tokens}}
    monkeypatch.setattr(tradeoff, "WAYS", ways)
    monkeypatch.setattr(tradeoff, "LARGE", "test_vit")
    monkeypatch.setattr(tradeoff, "BATCHES", (1, 2))
    monkeypatch.setattr(tradeoff, "train", None)

    for way, label in tradeoff.names():
        if label == "85%":  # not trained
            continue
        folder = tradeoff.folder_of((way, label), 0)
        printed = run_main(*tiny, *ways[way][label], "--output_dir", folder)
        (folder / "printed.txt").write_text(printed)

    tradeoff.main(None)
    sample, large = capfd.readouterr().out.split("\n\n")
    assert (tradeoff.OUTPUT / "tradeoff.png").exists()
    assert (tradeoff.OUTPUT / "tradeoff_deit_small.png").exists()

    left = {}
    for line in sample.splitlines()[2:]:
        way, label, share, *_, final = [cell.strip() for cell in line.split("|")[1:-1]]
        left[way, label] = int(share.removesuffix("%"))
        assert 0 <= float(final) <= 100
    assert left.keys() == {("dense", ""), ("zeros", "75%"), ("units", "50%"), ("tokens", "7")}
    # Attention products, the patch embedding and the classifier stay
    assert 25 < left["zeros", "75%"] < 45
    assert 45 < left["units", "50%"] < 55
    assert 40 < left["tokens", "7"] < 60
    assert "| zeros | 85% | " in large


@pytest.mark.slow
def test_the_report_of_a_gpu_has_training_and_kernels(monkeypatch, tmp_path):
    """On the CPU and a tiny model, as far as that goes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    flags = "--device cpu --amp off --models test_vit --kinds plain --batch-size 2 --steps 1"
    assert gpu.main([*flags.split(), "--output", str(tmp_path / "new" / "gpu.md")]) == 0
    report = (tmp_path / "new" / "gpu.md").read_text()
    assert "On cpu in float32; Python " in report
    rows = [line.split(" | ")[0].strip("| ") for line in report.splitlines() if "test_vit" in line]
    assert rows == ["test_vit, plain", "test_vit, `2:4`", "test_vit, `block:64x64` at 75%"]
