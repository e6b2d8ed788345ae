import json
from pathlib import Path

import pytest

from trainer.arguments import continued_args, get_args_parser, parse_args
from utils import UserError


def test_without_a_data_path_the_presets_of_the_sample_apply_and_flags_win():
    args = parse_args(["--lr", "0.25"])
    assert args.model == "deit_sample_patch4_28"
    assert args.input_size == 28
    assert args.lr == 0.25


def test_another_model_on_the_sample_has_deits_input_size():
    args = parse_args(["--model", "deit_tiny_patch16_224"])
    assert args.input_size == 224
    assert parse_args(["--model", "deit_tiny_patch16_224", "--input-size", "32"]).input_size == 32


def test_with_a_data_path_the_defaults_are_deits():
    args = vars(parse_args(["--data-path", "somewhere"]))
    reference = json.loads((Path(__file__).parent / "reference" / "deit_flags.json").read_text())
    differs = {"data_path", "device", "dist_eval", "num_workers"}
    for flag in reference:
        if flag["dest"] in args and flag["dest"] not in differs:
            assert args[flag["dest"]] == flag["default"], flag


def test_a_resumed_run_takes_everything_that_changes_results_from_its_checkpoint():
    first = "--data-path data --model vit_tiny_patch16_224 --input-size 64 --seed 7 --lr 0.25"
    first += " --mixup 0 --aa none --ThreeAugment --bce-loss --no-train-mode --batch-size 2"
    first += " --sync-bn --amp off --eval-every 2 --skip-bad-images 3 --model-kwargs depth=3"
    saved = vars(parse_args([*first.split(), "--output_dir", "out", "--num_workers", "1"]))
    resumed = parse_args(["--resume", "out/checkpoint.pth", "--mixup", "0.5", "--device", "cpu"])
    continued = vars(continued_args(resumed, saved, "out/checkpoint.pth"))

    different = {name for name in saved if continued[name] != saved[name]}
    of_this_start = {"resume", "device", "num_workers", "output_dir"}
    of_this_start |= {"given", "command", "default_folder"}
    assert different == of_this_start | {"mixup"}
    # The sample's defaults are not for other data
    assert continued["output_dir"] == "" and continued["num_workers"] > 0


def test_flags_are_spelt_as_in_deit():
    flags = get_args_parser().flags
    ours = {option for flag in flags for option in flag.options}
    reference = json.loads((Path(__file__).parent / "reference" / "deit_flags.json").read_text())
    known = {flag.name for flag in flags}
    for flag in reference:
        if flag["dest"] in known:
            assert set(flag["flags"]) <= ours


def test_off_in_a_config_needs_no_quotes(tmp_path):
    (tmp_path / "run.yaml").write_text("amp: off\n")
    assert parse_args(["--config", str(tmp_path / "run.yaml")]).amp == "off"


def test_a_config_replaces_defaults_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("batch-size: 8\nlr: 1e-3\nmodel_ema: false\nopt_betas: [0.8, 0.9]\nmixup: 0\n")
    args = parse_args(["--config", str(path), "--lr", "0.5", "--data-path", "x"])
    assert (args.batch_size, args.lr, args.model_ema, args.opt_betas, args.mixup) == (
        8,
        0.5,
        False,
        [0.8, 0.9],
        0.0,
    )
    # Over the presets of the sample too
    assert parse_args(["--config", str(path)]).batch_size == 8


@pytest.mark.parametrize(
    "content, message",
    [
        ("batch_size: many", "batch_size: expected a value of type int"),
        ("batch_sizes: 3", "batch_sizes: no such argument"),
        ("model_ema: 3", "model_ema: expected true or false"),
        ("amp: fp8", "amp: expected one of"),
        ("- a", "expected a mapping"),
        ("lr: [1, 2]", "lr: expected a value of type float"),
        ("config: other.yaml", "config: no such argument"),
        ("lr: !!python/name:os.system ''", "tag"),
    ],
)
def test_a_wrong_config_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        parse_args(["--config", str(path)])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_table_of_deits_arguments_is_in_step_with_the_parser_and_the_tests():
    tests = Path(__file__).parent
    rows = {}
    for line in (tests.parent / "docs" / "deit.md").read_text().splitlines():
        if line.startswith("| `--"):
            flags, meaning, default, test, _ = (
                cell.strip() for cell in line.strip("|").split(" | ")
            )
            for flag in flags.split(", "):
                rows[flag.strip("`")] = meaning, default, test.strip("`")
    parser = get_args_parser()
    reference = json.loads((tests / "reference" / "deit_flags.json").read_text())
    assert set(rows) == {flag for entry in reference for flag in entry["flags"]}
    flags = {option: flag for flag in parser.flags for option in flag.options}
    for flag, (meaning, default, test) in rows.items():
        file, name = test.split("::")
        assert f"def {name}(" in (tests / file).read_text(), test
        if not meaning.startswith("the opposite"):
            value = flags[flag].default
            words = {"True": "on", "False": "off", "None": "none", "": "none"}
            assert meaning == flags[flag].action.help, flag
            assert default == words.get(str(value), f"`{value}`"), flag
