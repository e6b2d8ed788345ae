import re

import pytest
import timm
import torch
from timm.models.mlp_mixer import ResBlock
from torch import nn

from models import (
    ATTENTION_ONLY,
    PARAMETER_KINDS,
    build_model,
    norm_parameters,
    timm_call,
    timm_name,
    train_only,
    trained_share,
)
from trainer.weights import load_weights, resize_pos_embed
from utils import UserError

TINY = {"embed_dim": 24, "depth": 1, "num_heads": 2}


def test_the_sample_model_comes_with_weights_through_timm():
    weights = timm.create_model("deit_sample_patch4_28", pretrained=True).state_dict()
    again = build_model("deit_sample_patch4_28", 10, 28, pretrained=True).state_dict()
    fresh = build_model("deit_sample_patch4_28", 10, 28).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["head.weight"], fresh["head.weight"])


def test_another_number_of_classes_starts_with_a_fresh_head():
    model = build_model("deit_sample_patch4_28", 3, 28, pretrained=True)
    assert model.head.weight.shape == (3, 96)


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("deit_smal_patch16_224", 224, "did you mean deit_small_patch16_224"),
        ("xyz", 224, "list_models"),
        ("deit_tiny_patch16_224", 8, "--input-size 8"),
        ("swin_tiny_patch4_window7_224", 1, "--input-size 1"),
    ],
)
def test_a_model_that_cannot_be_built_is_told_in_one_line(name, size, message):
    with pytest.raises(UserError, match=message) as error:
        build_model(name, 10, size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("meta", [True, False], ids=["on meta", "not on meta"])
def test_the_size_is_checked_on_the_meta_device_if_the_architecture_runs_there(meta, monkeypatch):
    create = timm.create_model
    devices = []

    def noting(*args, **kwargs):
        devices.append(torch.get_default_device().type)
        if devices[-1] == "meta" and not meta:
            raise NotImplementedError
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", noting)
    torch.manual_seed(0)
    model = build_model("deit_sample_patch4_28", 10, 28)
    assert devices == (["meta", "cpu"] if meta else ["meta", "cpu", "cpu"])

    # The random numbers are those of timm alone
    torch.manual_seed(0)
    for name, weight in create("deit_sample_patch4_28").state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_arguments_of_the_architecture_make_another_shape():
    model = build_model(
        "deit_sample_patch4_28",
        10,
        28,
        assignments=["embed_dim=64", "num_heads=2", "act_layer=relu"],
    )
    assert model.blocks[0].attn.num_heads == 2 and model.head.in_features == 64
    assert isinstance(model.blocks[0].mlp.act, torch.nn.ReLU)
    name, arguments = timm_call("deit_sample_patch4_28", 10, 28, ["depth=2"])
    assert len(timm.create_model(name, **arguments).blocks) == 2


@pytest.mark.parametrize(
    "wrong", ["depth", "depth=", "=2", "checkpoint_path=weights.pth", "num_classes=3"]
)
def test_what_is_no_argument_of_the_architecture_is_told(wrong):
    with pytest.raises(UserError, match=f"--model-kwargs {wrong}: expected KEY=VALUE"):
        build_model("deit_sample_patch4_28", 10, 28, assignments=[wrong])


@pytest.mark.parametrize(
    "name, tokens",
    [
        ("deit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("deit3_small_patch16_224", 0),
    ],
)
def test_weights_of_another_resolution_keep_their_tokens_and_bend_their_grid(name, tokens):
    small = timm.create_model(name, img_size=64, num_classes=10, **TINY)
    large = timm.create_model(name, img_size=96, num_classes=10, **TINY)
    load_weights(large, small.state_dict(), "small.pth", resizes=True)
    assert torch.equal(large.pos_embed[:, :tokens], small.pos_embed[:, :tokens])
    assert large.pos_embed.shape[1] == 36 + tokens


def test_a_resized_position_embedding_keeps_rows_and_columns_where_they_were():
    # Grows along a row, the same in every row
    ramp = torch.arange(6.0).repeat(6, 1).reshape(1, 36, 1)
    resized = resize_pos_embed(ramp, 144, num_tokens=0).reshape(12, 12)
    assert torch.allclose(resized, resized[0].expand(12, 12), atol=1e-5)
    assert torch.allclose(resized[0, 2:10], torch.arange(2, 10) / 2 - 0.25, atol=0.1)


def test_the_head_of_another_number_of_classes_is_dropped():
    old = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, **TINY)
    new = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, **TINY)
    fresh = new.head_dist.weight.clone()
    load_weights(new, old.state_dict(), "old.pth", new_heads=True)
    assert torch.equal(fresh, new.head_dist.weight)
    assert torch.equal(new.cls_token, old.cls_token)


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded():
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10, **TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for change, message in (
        ({"pos_embed": torch.zeros(1)}, "pos_embed"),
        ({"extra": torch.zeros(1)}, "extra"),
    ):
        weights = {name: value + 1 for name, value in before.items()} | change
        with pytest.raises(UserError, match=message):
            load_weights(model, weights, "x.pth")
    with pytest.raises(UserError, match="cls_token is missing"):
        load_weights(
            model, {name: value for name, value in before.items() if name != "cls_token"}, "x.pth"
        )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_attn_only_trains_attention_position_embedding_and_head():
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10, **TINY)
    train_only(model, ATTENTION_ONLY)
    assert trained(model) == {
        "pos_embed",
        "head.weight",
        "head.bias",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.qkv.bias",
        "blocks.0.attn.proj.weight",
        "blocks.0.attn.proj.bias",
    }


#: The parameters of each kind in a distilled DeiT of one block; those with a slash are outside it.
OF_DEIT = {
    "norms": [
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
        "/norm.weight",
        "/norm.bias",
    ],
    "biases": [
        *("norm1.bias", "norm2.bias", "/norm.bias", "attn.qkv.bias", "attn.proj.bias"),
        *(
            "mlp.fc1.bias",
            "mlp.fc2.bias",
            "/patch_embed.proj.bias",
            "/head.bias",
            "/head_dist.bias",
        ),
    ],
    "head": ["/head.weight", "/head.bias", "/head_dist.weight", "/head_dist.bias"],
    "tokens": ["/cls_token", "/dist_token"],
    "positions": ["/pos_embed"],
    "patches": ["/patch_embed.proj.weight", "/patch_embed.proj.bias"],
    "attention": [
        f"attn.{layer}.{part}" for layer in ("qkv", "proj") for part in ("weight", "bias")
    ],
}


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        *(("deit_tiny_distilled_patch16_224", kind, names) for kind, names in OF_DEIT.items()),
        ("deit3_small_patch16_224", "layerscale", ["ls1.gamma", "ls2.gamma"]),
        ("beit_base_patch16_224", "layerscale", ["gamma_1", "gamma_2"]),
        ("beit_base_patch16_224", "positions", ["attn.relative_position_bias_table"]),
    ],
)
def test_a_kind_of_parameters_is_found_by_the_names_of_each_architecture(name, kind, expected):
    model = timm.create_model(name, num_classes=10, **TINY)
    train_only(model, [kind])
    assert trained(model) == {
        each[1:] if each.startswith("/") else f"blocks.0.{each}" for each in expected
    }


def test_kinds_of_parameters_add_up():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, **TINY)
    train_only(model, ["norms", "tokens"])
    both = {*norm_parameters(model), "cls_token", "dist_token"}
    assert trained(model) == both
    total = sum(parameter.numel() for parameter in model.parameters())
    count = sum(model.get_parameter(name).numel() for name in both)
    assert trained_share(model).startswith(f"{count:,} of {total:,} parameters are trained")


def test_norms_of_all_architectures_are_norms_and_scales_of_layers_are_found_in_resmlp():
    kinds = (nn.BatchNorm1d, timm.layers.RmsNorm, timm.layers.LayerNorm2d)
    model = nn.Sequential(nn.Linear(4, 4), *(kind(4) for kind in kinds), ResBlock(4, 4))
    assert norm_parameters(model) == [
        *("1.weight", "1.bias", "2.weight", "3.weight", "3.bias"),
        *("4.norm1.alpha", "4.norm1.beta", "4.norm2.alpha", "4.norm2.beta"),
    ]
    assert PARAMETER_KINDS["layerscale"](model) == ["4.ls1", "4.ls2"]


def test_a_list_of_kinds_that_trains_nothing_is_refused_and_freezes_nothing():
    model = timm.create_model("deit_tiny_patch16_224", num_classes=0, **TINY)
    with pytest.raises(UserError, match="--train-only layerscale,head: the model has no such"):
        train_only(model, ["layerscale", "head"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_deit_iii_is_known_by_its_authors_names_and_weights():
    model = build_model("deit_small_patch16_LS", 5, 32)
    theirs = {
        re.sub(r"ls([12])\.gamma", r"gamma_\1", name): torch.full_like(value, 0.5)
        for name, value in model.state_dict().items()
    }
    assert "blocks.3.gamma_2" in theirs
    load_weights(model, theirs, "deit_3_small_224_1k.pth")
    assert (model.blocks[3].ls2.gamma == 0.5).all()


@pytest.mark.parametrize(
    "theirs, timms",
    [
        ("deit_huge_patch14_LS", "deit3_huge_patch14_224"),
        ("cait_M48", "cait_m48_448"),
        ("cait_S24_224", "cait_s24_224"),
        ("cait_XXS36", "cait_xxs36_384"),
        ("deit_small_patch16_224", "deit_small_patch16_224"),
    ],
)
def test_names_of_deits_repository_are_timms(theirs, timms):
    assert timm_name(theirs) == timms
    assert timm.is_model(timms)


def test_finetuning_at_384_takes_a_checkpoint_of_224(tmp_path):
    old = timm.create_model("deit_tiny_patch16_224", num_classes=10, **TINY)
    new = timm.create_model("deit_tiny_patch16_224", num_classes=10, img_size=384, **TINY)
    load_weights(new, old.state_dict(), "deit_tiny.pth", resizes=True)
    assert new(torch.zeros(1, 3, 384, 384)).shape == (1, 10)
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])


@pytest.mark.parametrize(
    "name, options",
    [
        ("cait_xxs24_224", {"embed_dim": 24, "depth": 1, "num_heads": 2}),
        ("deit3_small_patch16_224", TINY),
        ("beit_base_patch16_224", TINY),
    ],
)
def test_a_model_takes_its_own_weights_and_those_of_another_size(name, options):
    small = timm.create_model(name, img_size=64, num_classes=10, **options)
    load_weights(
        timm.create_model(name, img_size=64, num_classes=10, **options), small.state_dict(), "x.pth"
    )
    if getattr(small, "pos_embed", None) is not None:
        large = timm.create_model(name, img_size=96, num_classes=10, **options)
        load_weights(large, small.state_dict(), "x.pth", resizes=True)


def test_pretrained_weights_that_cannot_be_had_are_told_in_one_line_with_what_to_do(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="--finetune FILE.*--no-pretrained") as error:
        build_model("deit_tiny_patch16_224", 10, 224, pretrained=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ghostnet_050", "hrnet_w18_small", "repvit_m1_0"])
def test_an_architecture_without_drop_path_is_built_unless_drop_path_is_asked_for(name):
    model = build_model(name, 3, 64, flag="--teacher-model")
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(UserError, match=f"--model {name} cannot be built.*drop_path_rate"):
        build_model(name, 3, 64, drop_path=0.1)
