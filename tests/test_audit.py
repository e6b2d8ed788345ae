"""`--audit` shows the layers of a checkpoint, and finds weights that break its masks or pattern."""

import re

import pytest
import torch

from sparsity_factory import pack, unpack

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
    assert "holds no masks" in run_main("--audit", "dense/checkpoint.pth", status=2)


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
