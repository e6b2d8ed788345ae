"""Which folder a run writes to: none that holds another run, unless it is told to."""

import signal
from argparse import Namespace

import pytest
import torch

import utils
from trainer.run_folder import newest_checkpoint, read_log, with_own_folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_of(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)["run"]


def test_a_new_run_in_a_folder_that_holds_one_is_refused_and_changes_nothing(
    run_main, tiny, tmp_path
):
    run_main(*tiny, "--output_dir", "out")
    before = contents(tmp_path / "out")
    error = run_main(*tiny, "--output_dir", "out", "--seed", "1", status=2)
    assert error == (
        "error: --output_dir out: holds a run; --resume auto continues it, --overwrite replaces it, "
        "or choose another folder\n"
    )
    assert contents(tmp_path / "out") == before

    # Neither does a checkpoint of another run go on there, nor one of the run that is replaced
    run_main(*tiny, "--output_dir", "other")
    longer = [*tiny, "--output_dir", "out", "--epochs", "2", "--resume"]
    error = run_main(*longer, "other/checkpoint.pth", status=2)
    assert "--output_dir out: holds another run than other/checkpoint.pth" in error
    error = run_main(*longer, "out/checkpoint.pth", "--overwrite", status=2)
    assert "--overwrite: out/checkpoint.pth is of the run" in error
    assert contents(tmp_path / "out") == before

    # A copy is of the same run
    (tmp_path / "out/checkpoint.pth").rename(tmp_path / "copy.pth")
    run_main(*longer, "copy.pth")
    assert run_of(tmp_path / "out") == read_log(tmp_path / "out")[0]["run"]


def test_a_replaced_run_is_never_resumed(run_main, tiny, tmp_path, stop_at):
    out = tmp_path / "out"
    run_main(*tiny, "--output_dir", "out", "--epochs", "2")
    first = run_of(out)

    # The mistake of a new run costs the old one nothing
    run_main(*tiny, "--output_dir", "out", "--overwrite", "--opt", "adamwx", status=2)
    assert run_of(out) == first

    stop_at(2)
    error = run_main(*tiny, "--output_dir", "out", "--overwrite", status=128 + signal.SIGTERM)
    assert "the same command, less --overwrite, and --resume out/checkpoint.pth" in error
    second = run_of(out)
    assert second != first and read_log(out) == []
    run_main(*tiny, "--output_dir", "out", "--resume", "auto")
    assert [(line["epoch"], line["run"]) for line in read_log(out)] == [(0, second)]
    assert run_of(out) == second


def test_resume_auto_passes_over_a_checkpoint_of_another_run_than_the_log(tmp_path, capfd):
    for name, run, epoch in (("checkpoint", "ours", 1), ("best_checkpoint", "theirs", 9)):
        content = {"model": {"a": torch.zeros(1)}, "run": run, "epoch": epoch}
        utils.save_checkpoint(content, tmp_path / f"{name}.pth")
    (tmp_path / "log.txt").write_text('{"epoch": 1, "run": "ours"}\n')
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint.pth")
    assert "best_checkpoint.pth: of another run than log.txt" in capfd.readouterr().out


def test_the_folder_of_a_preset_gets_a_number_and_a_resumed_run_stays_in_its_own(
    run_main, tiny, tmp_path
):
    (tmp_path / "preset.yaml").write_text("output_dir: out\n")
    preset = [*tiny, "--config", "preset.yaml"]
    run_main(*preset)
    assert "out holds a run; this one writes to out-2" in run_main(*preset)
    assert "out-2 holds a run; this one writes to out-3" in run_main(*preset)

    longer = [*preset, "--epochs", "2", "--resume"]
    assert "--resume auto: out-3/checkpoint.pth" in run_main(*longer, "auto")
    run_main(*longer, "out-2/checkpoint.pth")
    epochs = [len(read_log(tmp_path / name)) for name in ("out", "out-2", "out-3")]
    assert epochs == [1, 2, 2]

    # Asked for, it is replaced
    run_main(*preset, "--overwrite")
    assert not (tmp_path / "out-4").exists()


@pytest.mark.parametrize("args", [{"eval": True}, {"overwrite": True}, {"resume": "out/x.pth"}])
def test_what_begins_no_new_run_keeps_the_folder_of_a_preset(tmp_path, args):
    (tmp_path / "log.txt").touch()
    options = {"output_dir": str(tmp_path), "eval": False, "overwrite": False, "resume": ""}
    args = Namespace(**{**options, "default_folder": True, **args})
    assert with_own_folder(args).output_dir == str(tmp_path)
