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
