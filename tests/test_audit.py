"""`--audit` shows the layers of a checkpoint, and finds weights that break its masks or pattern."""

import re

import pytest
import torch
from test_units import model_of

from sparsity_factory import Masks, compute_masks, pack, shrink, unpack

pytestmark = pytest.mark.slow


def test_audit_shows_the_layers_of_a_file_and_finds_weights_that_do_not_obey(
    run_main, tiny, tmp_path
):
    (tmp_path / "c.yaml").write_text(
        "sparsity:\n  mode: nxm\n  level: {default: 2:4, blocks.0.*: dense}\n"
    )
    run_main(*tiny, "--pruner", "custom", "--custom-config", "c.yaml", "--output_dir", "out")
    output = run_main("--audit", "out/checkpoint.pth")
    assert re.search(r"blocks\.1\.attn\.qkv\.weight +288 x 96 +13,824 +27,648 +50\.00%", output)

    # Pruned weights that are not zero
    checkpoint = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    weight = checkpoint["model"]["blocks.2.mlp.fc1.weight"]
    weight[weight == 0] = 1
    torch.save(checkpoint, "changed.pth")
    assert "blocks.2.mlp.fc1.weight: 18432 of its pruned weights are not zero" in run_main(
        "--audit", "changed.pth", status=1
    )
    assert "not zero" in run_main(*tiny, "--eval", "--resume", "changed.pth", status=2)

    # Other masks: two others of a group, then all four of it
    checkpoint = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    checkpoint["masks"]["blocks.3.mlp.fc1.weight"]["bits"][0] ^= 0b11110000
    checkpoint["model"]["blocks.3.mlp.fc1.weight"].zero_()
    checkpoint["model_ema"]["blocks.3.mlp.fc1.weight"].zero_()
    torch.save(checkpoint, "regrouped.pth")
    run_main("--audit", "regrouped.pth")  # still two of the four
    checkpoint["masks"]["blocks.3.mlp.fc1.weight"]["bits"][0] |= 0b11110000
    torch.save(checkpoint, "changed.pth")
    assert "a group of 4 does not keep 2" in run_main("--audit", "changed.pth", status=1)

    run_main(*tiny, "--output_dir", "dense", "--no-pretrained")
    assert "holds no masks" in run_main("--audit", "dense/checkpoint.pth")


def test_a_transposable_mask_is_kept_audited_and_reported_as_n_of_m(run_main, tiny, tmp_path):
    run_main(
        *tiny,
        "--pattern",
        "2:4t",
        "--reconstruct",
        "obs",
        "--calibration-images",
        "16",
        "--prune-schedule",
        "gradual",
        "--prune-every",
        "1",
        "--prune-end",
        "0.5",
        "--output_dir",
        "out",
    )

    checkpoint = torch.load("out/checkpoint.pth", weights_only=True)
    masks = unpack(checkpoint["masks"])
    for name, mask in masks.items():
        assert (mask.reshape(-1, 4).sum(1) == 2).all() and (mask.T.reshape(-1, 4).sum(1) == 2).all()
        assert not checkpoint["model"][name][~mask].any()
    assert "blocks.0.attn.qkv.weight: [2, 4]" in (tmp_path / "out/sparsity.yaml").read_text()
    run_main("--audit", "out/checkpoint.pth")

    # Groups along the inputs hold, groups along the outputs do not
    name, mask = next(iter(masks.items()))
    masks[name] = torch.tensor([True, True, False, False]).repeat(len(mask), mask.shape[1] // 4)
    torch.save(
        {
            **checkpoint,
            "masks": pack(masks),
            "model": {**checkpoint["model"], name: torch.zeros(mask.shape)},
            "pruning": {**checkpoint["pruning"], "masks": pack(masks)},
        },
        "rows.pth",
    )
    assert "a group of 4 does not keep 2" in run_main("--audit", "rows.pth", status=1)


def test_audit_does_not_claim_a_target_that_a_schedule_has_not_reached(
    run_main, tiny, tmp_path, stop_at
):
    stop_at(2)
    run_main(
        *tiny,
        "--pattern",
        "2:4",
        "--prune-schedule",
        "gradual",
        "--prune-every",
        "1",
        "--prune-end",
        "1",
        "--epochs",
        "2",
        "--output_dir",
        "out",
        status=143,
    )

    assert "has not reached the target yet" in run_main("--audit", "out/checkpoint.pth")


def test_audit_finds_masks_of_another_pattern_and_of_another_sparsity(
    run_main, tiny, tmp_path, caplog
):
    run_main(*tiny, "--pruner", "unif", "--sparsity", "0.5", "--output_dir", "out")
    checkpoint = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    output = run_main("--audit", "out/checkpoint.pth")
    assert "pattern and sparsity are those of the recipe" in output

    for changes, message in [
        ({"pattern": "row"}, "its rows keep"),
        ({"pattern": "x:4"}, "its groups of 4 keep 0 to 4 weights"),
        ({"pattern": "block:4x4"}, "pruned in part"),
        ({"pattern": "neurons"}, "blocks.0.attn.qkv.weight: has no neurons, and is pruned"),
        ({"sparsity": 0.7}, "a sparsity of 0.5000; expected 0.7"),
    ]:
        recipe = {**checkpoint["pruner"], **changes}
        pruning = {**checkpoint["pruning"], "recipe": recipe}
        torch.save({**checkpoint, "pruner": recipe, "pruning": pruning}, "changed.pth")
        assert message in run_main("--audit", "changed.pth", status=1)
    run_main(*tiny, "--eval", "--resume", "changed.pth")  # it still loads
    assert "a sparsity of 0.5000; expected 0.7" in caplog.text


def test_audit_of_any_file_counts_zeros_and_says_what_they_obey(run_main, tmp_path):
    model = model_of()
    Masks(model, compute_masks(model, "unif", pattern="2:4"))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "foreign.pth")
    output = run_main("--audit", "foreign.pth", "--expect", "2:4", "0.5", "--expect", "x:4")
    assert re.search(r"blocks\.0\.attn\.qkv\.weight +72 x 24 +864 +1,728 +50\.00% +2:4\n", output)
    assert "head.weight" not in output and "patch_embed" not in output
    assert "--shrink would take nothing out" in output
    assert output.count(" holds\n") == 3

    # One weight too many
    model.blocks[0].mlp.fc1.weight.data[0] = 1
    torch.save(model.state_dict(), "more.pth")
    run_main("--audit", "more.pth")
    error = run_main("--audit", "more.pth", "--expect", "2:4", status=1)
    assert error == (
        "error: more.pth: --expect 2:4 does not hold: blocks.0.mlp.fc1.weight: a group of 4 keeps "
        "more than 2\n"
    )
    error = run_main("--audit", "more.pth", "--expect", "0.8", status=1)
    assert "--expect 0.8 does not hold: the sparsity is 0.49" in error


def test_audit_says_what_shrink_would_take_out(run_main, tmp_path):
    model = model_of()
    masks = compute_masks(model, "unif", 0.4, pattern="heads+neurons")
    Masks(model, masks)
    torch.save(model.state_dict(), tmp_path / "zeros.pth")
    output = run_main("--audit", "zeros.pth", "--expect", "heads+neurons", "0.4")

    before, after = (
        sum(parameter.numel() for parameter in each.parameters())
        for each in (model, shrink(model, masks))
    )
    assert f"3 heads and 80 neurons: {before - after:,} of {before:,} weights" in output
