"""Checkpoints of other projects, made up here from tiny models, fit timm's models."""

import argparse
import re
from pathlib import Path, PureWindowsPath

import pytest
import timm
import torch
from PIL import Image

from sparsity_factory import prunable_weights, unpack
from trainer.weights import adopt_sparsity, load_weights
from utils import UserError, load_checkpoint

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}
#: A model of each family whose files have names of their own.
MODELS = {
    "vit_small_patch16_224": TINY,
    "deit_tiny_distilled_patch16_224": TINY,
    "deit3_small_patch16_224": TINY,
    "cait_xxs24_224": TINY,
    "beit_base_patch16_224": TINY,
    "eva02_tiny_patch14_224": TINY,
    "vit_small_patch14_dinov2": TINY,
    "vit_small_patch14_reg4_dinov2": TINY,
    "xcit_nano_12_p16_224": TINY,
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)},
}
#: Others, whose files transformers writes.
OTHERS = {
    "vit_small_patch16_dinov3": TINY,
    "vit_small_plus_patch16_dinov3_qkvb": TINY,
    "swinv2_tiny_window8_256": {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)},
}


def build(name, seed=0, img_size=56, num_classes=5, **options):
    """A tiny model, each of its weights random."""
    torch.manual_seed(seed)
    if not name.startswith("xcit"):
        options["img_size"] = img_size
    options = {**(MODELS | OTHERS)[name], **options, "num_classes": num_classes}
    if name.startswith("swin"):
        options["window_size"] = img_size // 8
    model = timm.create_model(name, **options)
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not key.endswith("running_var"):
            value.normal_()
    return model.eval()


def logits(model, size=56):
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images)


def fitted(model, content, tmp_path, **options):
    """The model with the weights of a file of that content."""
    torch.save(content, tmp_path / "theirs.pth")
    checkpoint = load_checkpoint(str(tmp_path / "theirs.pth"))
    load_weights(model, checkpoint["model"], "theirs.pth", **options)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.module.", "module._orig_mod.module."])
def test_wrappers_are_taken_off_the_names(name, wrapper, tmp_path):
    theirs = build(name)
    content = {wrapper + key: value for key, value in theirs.state_dict().items()}
    ours = fitted(build(name, seed=1), {"state_dict": content}, tmp_path)
    assert torch.equal(logits(ours), logits(theirs))


def test_wrappers_amid_the_names_are_taken_off_too(tmp_path):
    theirs = build("vit_small_patch16_224")
    content = {
        re.sub(r"^blocks\.(\d+)\.", r"module.blocks.\1._orig_mod.module.", key): value
        for key, value in theirs.state_dict().items()
    }
    ours = fitted(build("vit_small_patch16_224", seed=1), content, tmp_path)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("key", ["model", "state_dict", "teacher", "model_ema", "state_dict_ema"])
def test_weights_are_found_where_their_authors_put_them(key, tmp_path):
    theirs = build("vit_small_patch16_224")
    ours = fitted(build("vit_small_patch16_224", 1), {key: theirs.state_dict()}, tmp_path)
    assert torch.equal(logits(ours), logits(theirs))


def test_both_the_weights_and_their_average_are_read(tmp_path):
    weights = {"a": torch.zeros(1)}
    average = {"module.a": torch.ones(1)}
    torch.save({"state_dict": weights, "state_dict_ema": average}, tmp_path / "c.pth")
    checkpoint = load_checkpoint(str(tmp_path / "c.pth"))
    assert checkpoint["model"]["a"] == 0 and checkpoint["model_ema"]["a"] == 1


def test_dino_gives_its_teacher_without_backbone_and_projection(tmp_path, capsys):
    theirs = build("vit_small_patch16_224", num_classes=0).state_dict()
    student = {"module.backbone." + key: value + 1 for key, value in theirs.items()}
    teacher = {"backbone." + key: value for key, value in theirs.items()}
    teacher |= {"head.mlp.0.weight": torch.ones(7, 24), "head.last_layer.weight_g": torch.ones(3)}
    content = {"student": student, "teacher": teacher, "epoch": 100}

    ours = fitted(build("vit_small_patch16_224", 1), content, tmp_path, new_heads=True)
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.items())
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "theirs.pth: head.mlp.0.weight, head.last_layer.weight_g left out: no part of the model",
        "theirs.pth: head.weight, head.bias made anew: not in the file",
    ]
    with pytest.raises(UserError, match="head.weight is missing.*expected a trained head"):
        fitted(build("vit_small_patch16_224", 1), content, tmp_path)


def test_mae_leaves_its_decoder_out(tmp_path, capsys):
    theirs = build("vit_small_patch16_224", num_classes=0).state_dict()
    rest = {
        name: torch.ones(3) for name in ("mask_token", "decoder_pos_embed", "decoder_norm.bias")
    }
    ours = build("vit_small_patch16_224", 1)
    fitted(ours, {"model": theirs | rest}, tmp_path, new_heads=True)
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.items())
    assert "mask_token, decoder_pos_embed and 1 more left out" in capsys.readouterr().out


def test_beits_last_norm_becomes_that_of_the_pooled_tokens_and_that_is_said(tmp_path, capsys):
    theirs = {
        key.replace("fc_norm.", "norm."): value
        for key, value in build("beit_base_patch16_224", num_classes=0).state_dict().items()
    }
    theirs |= {"mask_token": torch.ones(1, 1, 24), "lm_head.weight": torch.ones(99, 24)}
    ours = fitted(build("beit_base_patch16_224", 1), {"model": theirs}, tmp_path, new_heads=True)
    assert torch.equal(ours.fc_norm.weight, theirs["norm.weight"])
    output = capsys.readouterr().out
    assert "norm is taken as fc_norm" in output
    assert "mask_token, lm_head.weight left out" in output


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_head_for_other_classes_is_made_anew_and_said(name, tmp_path, capsys):
    theirs = build(name, num_classes=9)
    ours = fitted(build(name, 1), theirs.state_dict(), tmp_path, new_heads=True)
    assert "made anew: 9 classes in the file, 5 here" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"head\S*weight is \(9, 24\)|is \(9,"):
        fitted(ours, theirs.state_dict(), tmp_path)


def test_a_backbone_that_lacks_a_weight_or_has_more_is_an_error(tmp_path):
    deeper = build("vit_small_patch16_224", depth=3).state_dict()
    weights = build("vit_small_patch16_224").state_dict()
    ours = build("vit_small_patch16_224", 1)
    with pytest.raises(UserError, match="blocks.2.norm1.weight is not in the model"):
        fitted(ours, deeper, tmp_path, new_heads=True, resizes=True)
    del weights["blocks.1.norm2.bias"]
    with pytest.raises(UserError, match="blocks.1.norm2.bias is missing"):
        fitted(ours, weights, tmp_path, new_heads=True, resizes=True)


def official_swin(weights):
    """The names of Swin's authors: downsampling ends a stage, and buffers are stored."""
    out = {}
    for key, value in weights.items():
        key = re.sub(r"layers\.1\.downsample", "layers.0.downsample", key)
        out[key.replace("head.fc.", "head.")] = value
    out["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    return out


def official_dinov2(weights):
    """The names of DINOv2's authors: registers, whose class token has a position of its own."""
    out = dict(weights, mask_token=torch.zeros(1, 24))
    if "reg_token" in out:
        out["register_tokens"] = out.pop("reg_token")
        position = torch.ones(1, 1, 24)
        out["cls_token"] = out["cls_token"] - position
        out["pos_embed"] = torch.cat([position, out["pos_embed"]], dim=1)
    return out


OFFICIAL = {
    "swin_tiny_patch4_window7_224": official_swin,
    "vit_small_patch14_dinov2": official_dinov2,
    "vit_small_patch14_reg4_dinov2": official_dinov2,
    "deit3_small_patch16_224": lambda weights: {
        re.sub(r"ls([12])\.gamma", r"gamma_\1", key): value for key, value in weights.items()
    },
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_of_the_authors_are_timms(name, tmp_path, capsys):
    theirs = build(name)
    ours = fitted(build(name, 1), {"model": OFFICIAL[name](theirs.state_dict())}, tmp_path)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)
    assert "resized" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "vit_small_patch14_dinov2"]
)
def test_positions_of_another_size_are_resized_and_said(name, tmp_path, capsys):
    size = 112
    theirs = build(name)
    theirs = OFFICIAL.get(name, dict)(theirs.state_dict())
    ours = build(name, 1, img_size=size)
    fitted(ours, {"model": theirs}, tmp_path, resizes=True)
    assert logits(ours, size).isfinite().all()
    assert re.search(r"(pos_embed|position_bias_table).* resized \(", capsys.readouterr().out)
    with pytest.raises(UserError, match="does not fit the model"):
        fitted(ours, {"model": theirs}, tmp_path)


def transformers_names(weights, kind):
    """A state dict with the names that transformers gives ViT, DeiT and Dinov2."""
    names = [
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^cls_token", "embeddings.cls_token"),
        (r"^dist_token", "embeddings.distillation_token"),
        (r"^blocks\.", "encoder.layer."),
        (r"attn\.proj", "attention.output.dense"),
        (r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),
        (r"^norm\.", "layernorm."),
    ]
    if kind != "dinov2":
        names += [
            (r"\.norm1\.", ".layernorm_before."),
            (r"\.norm2\.", ".layernorm_after."),
            (r"mlp\.fc1", "intermediate.dense"),
            (r"mlp\.fc2", "output.dense"),
        ]
    out = {f"{kind}.embeddings.mask_token": torch.zeros(1, 1, 24)}
    for key, value in weights.items():
        if key.startswith("head"):
            head = "cls_classifier." if kind == "deit" else "classifier."
            key = key.replace("head_dist.", "distillation_classifier.").replace("head.", head)
            out[key] = value
            continue
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        if "attn.qkv" not in key:
            out[f"{kind}.{key}"] = value
            continue
        for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
            out[f"{kind}.{key.replace('attn.qkv', f'attention.attention.{part}')}"] = rows.clone()
    return out


@pytest.mark.parametrize(
    "name, kind",
    [
        ("vit_small_patch16_224", "vit"),
        ("deit_tiny_distilled_patch16_224", "deit"),
        ("vit_small_patch14_dinov2", "dinov2"),
    ],
)
def test_names_of_transformers_are_timms(name, kind, tmp_path):
    theirs = build(name)
    ours = fitted(build(name, 1), transformers_names(theirs.state_dict(), kind), tmp_path)
    assert torch.equal(logits(ours), logits(theirs))


#: How transformers' conversion scripts name the parts of a model, from timm's names.
BEIT_NAMES = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^cls_token", "embeddings.cls_token"),
    (r"^blocks\.", "encoder.layer."),
    (r"attn\.proj", "attention.output.dense"),
    (r"attn\.relative", "attention.attention.relative_position_bias.relative"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"gamma_", "lambda_"),
    (r"^fc_norm\.", "pooler.layernorm."),
)
SWIN_NAMES = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^patch_embed\.norm", "embeddings.norm"),
    # timm has a downsampling at the start of a stage, the others at its end
    (r"^layers\.1\.downsample", "layers.0.downsample"),
    (r"^layers\.", "encoder.layers."),
    (r"attn\.proj", "attention.output.dense"),
    (r"attn\.cpb_mlp", "attention.self.continuous_position_bias_mlp"),
    (r"attn\.(relative|logit)", r"attention.self.\1"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"^norm\.", "layernorm."),
)
DINOV3_NAMES = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
    (r"^cls_token", "embeddings.cls_token"),
    (r"^reg_token", "embeddings.register_tokens"),
    (r"^blocks\.", "layer."),
    (r"attn\.proj", "attention.o_proj"),
    (r"mlp\.fc1_g", "mlp.gate_proj"),
    (r"mlp\.fc1(_x)?\.", "mlp.up_proj."),
    (r"mlp\.fc2", "mlp.down_proj"),
    (r"gamma_([12])$", r"layer_scale\1.lambda1"),
)


def named(weights, names, prefix, attention, parts):
    """A state dict with the names of transformers; query, key and value are apart.

    attention: the module that has them, by the names `parts`.
    """
    out = {}
    for key, value in weights.items():
        if key.startswith("head."):
            out[f"classifier.{key.rpartition('.')[2]}"] = value
            continue
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        key = prefix + key
        if "attn.qkv" in key:
            for part, rows in zip(parts, value.chunk(3), strict=True):
                out[key.replace("attn.qkv", f"{attention}.{part}")] = rows.clone()
        elif key.endswith("_bias"):
            part = parts[0 if key.endswith("q_bias") else 2]
            out[f"{key[: -len('attn.q_bias')]}{attention}.{part}.bias"] = value
        else:
            out[key] = value
    return out


@pytest.mark.parametrize(
    "name, names, prefix, attention",
    [
        ("beit_base_patch16_224", BEIT_NAMES, "beit.", "attention.attention"),
        ("swin_tiny_patch4_window7_224", SWIN_NAMES, "swin.", "attention.self"),
        ("swinv2_tiny_window8_256", SWIN_NAMES, "swinv2.", "attention.self"),
        ("vit_small_patch16_dinov3", DINOV3_NAMES, "", "attention"),
        ("vit_small_plus_patch16_dinov3_qkvb", DINOV3_NAMES, "", "attention"),
    ],
)
def test_names_of_transformers_newer_models_are_timms(name, names, prefix, attention, tmp_path):
    is_dinov3 = names is DINOV3_NAMES
    options = {"img_size": 64, "num_classes": 0} if is_dinov3 else {}
    parts = ("q_proj", "k_proj", "v_proj") if is_dinov3 else ("query", "key", "value")
    theirs = build(name, **options)
    weights = named(theirs.state_dict(), names, prefix, attention, parts)
    assert not weights.keys() & theirs.state_dict().keys() - {"norm.weight", "norm.bias"}

    ours = fitted(build(name, 1, **options), weights, tmp_path)
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())


def test_zero_biases_of_dinov3_are_left_out_and_others_are_an_error(tmp_path):
    name = "vit_small_patch16_dinov3"
    theirs = build(name, img_size=64, num_classes=0)
    parts = ("q_proj", "k_proj", "v_proj")
    weights = named(theirs.state_dict(), DINOV3_NAMES, "", "attention", parts)
    for block in range(2):
        for part in ("q_proj", "v_proj"):
            weights[f"layer.{block}.attention.{part}.bias"] = torch.zeros(24)
    ours = fitted(build(name, 1, img_size=64, num_classes=0), weights, tmp_path)
    assert torch.equal(logits(ours, 64), logits(theirs, 64))

    weights["layer.1.attention.q_proj.bias"][3] = 1
    with pytest.raises(UserError, match="q_bias is not in the model"):
        fitted(ours, weights, tmp_path)


def test_a_small_file_of_large_tensors_is_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(1).expand(2**30)}}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="larger than what is stored"):
        load_checkpoint(str(tmp_path / "c.pth"))


def pruned_names(weights, masks, kind):
    """A state dict as torch.nn.utils.prune, its successor and apex write it."""
    out = dict(weights)
    for name, mask in masks.items():
        module, _, parameter = name.rpartition(".")
        if kind == "prune":
            out[f"{name}_orig"] = out.pop(name)
            out[f"{name}_mask"] = mask.float()
        elif kind == "parametrize":
            out[f"{module}.parametrizations.{parameter}.original"] = out.pop(name)
            out[f"{module}.parametrizations.{parameter}.0.mask"] = mask
        else:
            out[f"{module}.__{parameter}_mma_mask"] = mask
            out[f"{module}.__{parameter}_mma_pruned_p"] = torch.zeros(1)
    return out


def random_masks(model):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(weight.shape, generator=generator) < 0.3
        for name, weight in prunable_weights(model).items()
    }


@pytest.mark.parametrize("kind", ["prune", "parametrize", "apex"])
@pytest.mark.parametrize("of", ["timm", "transformers"])
def test_masks_of_other_projects_become_ours(kind, of, tmp_path):
    theirs = build("vit_small_patch16_224")
    masks = random_masks(theirs)
    weights = theirs.state_dict()
    if of == "transformers":
        marks = {name: value.float() for name, value in masks.items()}
        masks = {
            name: value.bool()
            for name, value in transformers_names(marks, "vit").items()
            if "mask_token" not in name
        }
        weights = transformers_names(weights, "vit")
    torch.save({"model": pruned_names(weights, masks, kind)}, tmp_path / "theirs.pth")

    checkpoint = load_checkpoint(str(tmp_path / "theirs.pth"))
    ours = build("vit_small_patch16_224", 1)
    load_weights(ours, checkpoint["model"], "theirs.pth")
    adopt_sparsity(ours, checkpoint, "theirs.pth", keep_zeros=False)

    found = unpack(checkpoint["masks"])
    assert found.keys() == random_masks(theirs).keys()
    for name, mask in random_masks(theirs).items():
        assert torch.equal(found[name], mask)
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name) * mask)


def test_audit_reads_the_masks_of_other_projects(tmp_path, run_main):
    model = build("vit_small_patch16_224")
    content = pruned_names(model.state_dict(), random_masks(model), "prune")
    torch.save({"model": content}, tmp_path / "theirs.pth")
    output = run_main("--audit", "theirs.pth")
    assert "holds masks of another project" in output
    assert re.search(r"blocks\.0\.attn\.qkv\.weight +72 x 24 .* (69|70|71)\.\d\d%", output)


@pytest.mark.slow
def test_zeros_without_masks_are_said_and_kept_if_asked(tiny, tmp_path, run_main):
    model = timm.create_model("deit_sample_patch4_28", pretrained=True)
    masks = random_masks(model)
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    torch.save(model.state_dict(), tmp_path / "sparse.pth")

    def zeros(file):
        weights = torch.load(tmp_path / file, weights_only=True)["model"]
        return sum(int((weights[name] == 0).sum()) for name in masks)

    before = sum(int((~mask).sum()) for mask in masks.values())
    output = run_main(*tiny, "--finetune", "sparse.pth", "--output_dir", "lost")
    line = r"sparse.pth: (69|70)\.\d% of the prunable weights are zero, but the file has no masks"
    assert re.search(line, output)
    assert zeros("lost/checkpoint.pth") < 0.1 * before

    run_main(*tiny, "--finetune", "sparse.pth", "--keep-zeros", "--output_dir", "kept")
    assert zeros("kept/checkpoint.pth") == before
    run_main("--audit", "kept/checkpoint.pth")
    run_main(*tiny, "--resume", "kept/checkpoint.pth", "--epochs", "2", "--output_dir", "kept")
    assert zeros("kept/checkpoint.pth") == before


@pytest.mark.slow
def test_a_checkpoint_of_ours_tells_its_model_and_its_classes(tmp_path, run_main):
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for copy in range(2):
                Image.new("RGB", (28, 28), (90 * number, 9, 9)).save(folder / f"{copy}.png")
    shape = ["--model-kwargs", "depth=1", "embed_dim=12", "num_heads=2"]
    common = ["--data-path", "data", "--num_workers", "0", "--amp", "off", "--batch-size", "2"]
    common += ["--no-repeated-aug"]
    model = ["--model", "deit_tiny_patch16_224", "--input-size", "32", "--no-pretrained", *shape]
    run_main(*common, *model, "--epochs", "1", "--output_dir", "out")
    checkpoint = torch.load("out/checkpoint.pth", weights_only=True)
    assert checkpoint["classes"] == {"cat": 0, "dog": 1}
    output = run_main(*common, "--resume", "out/checkpoint.pth", "--eval")
    assert "out/checkpoint.pth: of deit_tiny_patch16_224, for images of 32 pixels" in output

    sample = [*common, "--model", "deit_sample_patch4_28", "--input-size", "28"]
    assert "have no head for 2 classes" in run_main(*sample, "--eval", status=2)

    for split in ("train", "val"):
        (tmp_path / "data" / split / "dog").rename(tmp_path / "data" / split / "cow")
    line = "its classes are not those of the data: number 1 is dog there, cow here"
    assert line in run_main(*common, "--resume", "out/checkpoint.pth", "--eval", status=2)
    finetune = [*common, "--finetune", "out/checkpoint.pth"]
    assert line in run_main(*finetune, "--epochs", "1")

    (tmp_path / "data/train/ox").mkdir()
    Image.new("RGB", (28, 28)).save(tmp_path / "data/train/ox/0.png")
    error = run_main(*finetune, "--eval", status=2)
    assert error.startswith("error: out/checkpoint.pth: ")


def test_paths_among_the_arguments_are_read(tmp_path):
    args = argparse.Namespace(output_dir=Path("out"), job=PureWindowsPath("c:/x"))
    torch.save({"model": {"a": torch.ones(1)}, "args": args}, tmp_path / "c.pth")
    assert load_checkpoint(str(tmp_path / "c.pth"))["args"].output_dir == Path("out")
