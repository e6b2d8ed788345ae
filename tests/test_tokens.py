"""Merging of tokens: blocks against a plain definition with loops over one image, and its runs."""

import copy
import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from models import checkpoint_gradients
from sparsity_factory import multiply_adds
from trainer.tokens import all_tokens, merge_tokens
from utils import UserError

SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


def model_with(name="deit_tiny_patch16_224", **options):
    """A small model with random weights in float64, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **SHAPE, **options).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def by_definition(model, image, count):
    """The features of one image (tokens, width), each merged token once for each of its patches."""
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    members = [[place] for place in range(len(x))]

    for block in model.blocks:
        attention = block.attn
        y = block.norm1(x[None])
        q, k, v = attention.qkv(y)[0].view(len(x), 3, attention.num_heads, -1).permute(1, 2, 0, 3)
        heads = []
        for head in range(attention.num_heads):
            rows = []
            for query in q[head]:
                weights = (k[head] @ query * attention.scale).exp()
                weights = weights * torch.tensor([len(patches) for patches in members])
                rows.append(weights @ v[head] / weights.sum())
            heads.append(torch.stack(rows))
        x = x + block.ls1(attention.proj(torch.cat(heads, 1)))

        # The most similar partner of every second patch, and the most similar of these pairs
        keys = k.mean(0)
        pairs = []
        for one in range(prefix + 1, len(x), 2):
            cosines = {
                other: float(F.cosine_similarity(keys[one], keys[other], 0))
                for other in range(prefix, len(x), 2)
            }
            partner = max(cosines, key=cosines.get)
            pairs.append((cosines[partner], one, partner))
        into = {one: partner for _, one, partner in sorted(pairs, reverse=True)[:count]}

        # Every token with those that merge into it; second patches come before first ones
        order = [*range(prefix), *range(prefix + 1, len(x), 2), *range(prefix, len(x), 2)]
        rows, holders = [], []
        for place in order:
            if place in into:
                continue
            joined = [place, *(one for one, partner in into.items() if partner == place)]
            sizes = torch.tensor([float(len(members[one])) for one in joined])
            rows.append((sizes.double()[:, None] * x[joined]).sum(0) / sizes.sum())
            holders.append([patch for one in joined for patch in members[one]])
        x, members = torch.stack(rows), holders
        x = x + block.ls2(block.mlp(block.norm2(x[None])))[0]

    whole = x.new_zeros(sum(map(len, members)), x.shape[1])
    for row, patches in zip(x, members, strict=True):
        whole[patches] = row
    return model.norm(whole)


MODELS = {
    "class token": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers and layer scale": (
        "vit_small_patch16_224",
        {"reg_tokens": 3, "init_values": 0.5, "global_pool": "avg"},
    ),
    "no class token": ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_merging_follows_its_definition(kind, fused):
    name, options = MODELS[kind]
    model = model_with(name, **options)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([by_definition(model, image, 9) for image in images])
        merge_tokens(model, 9)
        for block in model.blocks:
            block.attn.fused_attn = fused
        torch.testing.assert_close(model.forward_features(images), expected)


def test_a_model_that_merges_keeps_its_parameters_and_a_copy_merges_as_well():
    model = model_with()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weights = copy.deepcopy(model.state_dict())
    whole = model(images)
    merge_tokens(model, 9)
    merged = model(images)

    found = model.state_dict()
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert not torch.allclose(merged, whole)
    assert torch.equal(copy.deepcopy(model)(images), merged)
    with all_tokens(model):
        assert torch.equal(model(images), whole)
    assert torch.equal(model(images), merged)


def test_gradient_checkpointing_leaves_the_gradients_of_merged_tokens_the_same():
    model = model_with()
    merge_tokens(model, 9)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def gradients():
        model.zero_grad()
        model(images).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    plain = gradients()
    checkpoint_gradients(model, "deit")
    assert all(map(torch.equal, gradients(), plain))


def test_gradients_of_merged_tokens_are_those_of_finite_differences():
    model = model_with()
    merge_tokens(model, 9)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    weight = model.blocks[0].attn.qkv.weight
    loss = model(images).square().sum()
    loss.backward()

    step = 1e-6 * torch.randn_like(weight)
    with torch.no_grad():
        weight += step
        after = model(images).square().sum()
        weight -= 2 * step
        before = model(images).square().sum()
    torch.testing.assert_close(after - before, 2 * (weight.grad * step).sum(), rtol=1e-4, atol=0)


def test_pairs_are_chosen_in_float32_under_autocast():
    model = model_with().float()
    merge_tokens(model, 9)
    images = torch.randn(2, 3, 32, 32)
    seen = []
    normalize = F.normalize
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(
            F, "normalize", lambda *args, **kw: seen.append(args[0]) or normalize(*args, **kw)
        )
        model(images)
    assert [keys.dtype for keys in seen] == [torch.float32] * 3


def test_each_layer_counts_the_tokens_that_it_computes():
    model = model_with()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    dense = multiply_adds(model, image)
    merge_tokens(model, 9)
    merged = multiply_adds(model, image)
    for number, tokens in enumerate((65, 56, 47)):  # 64 patches and the class token
        attention, mlp = f"blocks.{number}.attn.qkv.weight", f"blocks.{number}.mlp.fc1.weight"
        assert merged[attention] * 65 == dense[attention] * tokens
        assert merged[mlp] * 65 == dense[mlp] * (tokens - 9)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer is another architecture"),
        ("beit_base_patch16_224", {}, "Beit is another architecture"),
        ("cait_xxs24_224", {}, "Cait is another architecture"),
        (
            "vit_small_patch16_224",
            {"attn_layer": "diff"},
            "this VisionTransformer has DiffAttention",
        ),
        ("vit_base_patch32_plus_256", {"block_fn": None}, "ParallelScalingBlock"),
    ],
)
def test_a_model_whose_blocks_cannot_merge_is_refused(name, options, reason):
    if "block_fn" in options:
        options = {"block_fn": timm.models.vision_transformer.ParallelScalingBlock}
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    with pytest.raises(UserError, match=reason):
        merge_tokens(model, 2)


def test_as_many_tokens_merge_as_the_last_block_has_pairs():
    model = model_with()
    with pytest.raises(UserError, match="--tokens 17: expected at most 16, .* of 64"):
        merge_tokens(model, 17)
    merge_tokens(model, 16)
    sizes = []
    model.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    model(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert sizes == [(1, 1 + 64 - 3 * 16, 24)]


def read(path):
    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_a_run_is_resumed_and_evaluated_with_its_tokens(run_main, tiny):
    merging = [*tiny, "--tokens", "5", "--pruner", "lamp", "--sparsity", "0.5"]
    run_main(*merging, "--epochs", "2", "--output_dir", "whole")
    run_main(*merging, "--output_dir", "half")
    last = "half/checkpoint.pth"
    printed = run_main(*tiny, "--epochs", "2", "--resume", last, "--output_dir", "half")
    assert f"{last}: of a run with --tokens 5" in printed
    assert "Tokens: 5 merged in each of 6 blocks, 50 to 20" in printed

    whole, resumed = read("whole/checkpoint.pth"), read(last)
    for name, weight in whole["model"].items():
        assert torch.equal(resumed["model"][name], weight)
    with open("half/log.txt") as file:
        accuracy = json.loads(file.readlines()[-1])["test_acc1"]
    assert f"{accuracy:.2f} %" in run_main(*tiny, "--eval", "--resume", last)
    assert "Tokens" not in run_main(*tiny, "--eval", "--resume", last, "--tokens", "0")


@pytest.mark.slow
def test_tables_count_fewer_tokens_and_shrunk_models_merge_too(run_main, tiny):
    half = ["--pruner", "unif", "--sparsity", "0.5", "--pattern", "heads+neurons", "--shrink"]
    run_main(*tiny, *half, "--tokens", "5", "--output_dir", "out")
    with open("out/sparsity.csv") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    units = read("out/checkpoint.pth")["shape"]
    assert min(units[f"blocks.{number}.attn"] for number in range(6)) < 3
    first, last = rows["blocks.0.mlp.fc2.weight"], rows["blocks.5.mlp.fc2.weight"]
    assert first["multiply_adds_dense"] == last["multiply_adds_dense"] == str(50 * 96 * 384)
    for row, tokens in ((first, 45), (last, 20)):
        assert row["multiply_adds_sparse"] == str(tokens * int(row["kept"]))
    assert "- tokens: 5 merged in each block" in Path("out/summary.md").read_text()


@pytest.mark.slow
def test_calibration_sees_all_tokens(run_main, tiny):
    least_squares = ["--pruner", "unif", "--sparsity", "0.5", "--reconstruct", "least-squares"]
    pruned = [*tiny, *least_squares, "--score", "wanda", "--calibration-images", "8"]
    run_main(*pruned, "--lr", "0", "--min-lr", "0", "--warmup-lr", "0", "--output_dir", "whole")
    run_main(
        *pruned,
        "--lr",
        "0",
        "--min-lr",
        "0",
        "--warmup-lr",
        "0",
        "--output_dir",
        "merged",
        "--tokens",
        "5",
    )
    whole, merged = read("whole/checkpoint.pth")["model"], read("merged/checkpoint.pth")["model"]
    assert all(torch.equal(merged[name], weight) for name, weight in whole.items())


@pytest.mark.slow
def test_the_dense_teacher_keeps_all_tokens(run_main, tiny, monkeypatch):
    from trainer import builders

    teachers = []
    build = builders.DenseTeacherLoss
    monkeypatch.setattr(
        builders, "DenseTeacherLoss", lambda *args: teachers.append(args[1]) or build(*args)
    )
    run_main(*tiny, "--tokens", "5", "--dense-teacher", "1", "--output_dir", "out")
    run_main(*tiny, "--epochs", "2", "--resume", "out/checkpoint.pth")
    image = torch.randn(1, 3, 28, 28)
    dense = timm.create_model("deit_sample_patch4_28", pretrained=True).eval()
    for teacher in teachers:
        torch.testing.assert_close(teacher(image), dense(image))
    assert len(teachers) == 2
