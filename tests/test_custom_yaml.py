"""Reading and checking the YAML of the `custom` pruner."""

import logging
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from models import build_model
from sparsity_factory import (
    PruningError,
    Recipe,
    check_masks,
    compute_masks,
    prunable_weights,
    shrink,
)
from sparsity_factory.custom_yaml import MAX_BYTES, resolve_levels
from sparsity_factory.shrink import masks_of_the_rest

SHAPES = {
    "blocks.0.qkv.weight": (6, 8),
    "blocks.0.proj.weight": (4, 8),
    "blocks.1.qkv.weight": (6, 12),
}
QKV0, PROJ0, QKV1 = SHAPES
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def levels(level, mode="nxm"):
    return resolve_levels({"sparsity": {"mode": mode, "level": level}}, SHAPES)


def from_text(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return resolve_levels(path, SHAPES)


# ---- what is understood ----


@pytest.mark.parametrize(
    ("name", "file", "giga"),
    [
        ("deit_small_patch16_224", "deit_small_elsa_1.96g", 1.963),
        ("deit_base_patch16_224", "deit_base_elsa_6.88g", 6.874),
        ("deit_base_patch16_224", "deit_base_elsa_6.01g", 6.002),
    ],
)
def test_elsas_levels_take_the_multiply_adds_that_they_are_named_after(name, file, giga):
    with torch.device("meta"):
        model = timm.create_model(name)
    weights = prunable_weights(model)
    tokens, width = model.pos_embed.shape[1:]
    others = len(model.blocks) * 2 * tokens**2 * width + (tokens - 1) * width * 768 + width * 1000
    shapes = {key: weight.shape for key, weight in weights.items()}
    levels = resolve_levels(CONFIGS[0].with_name(f"{file}.yaml"), shapes)
    kept = {
        key: weight.numel()
        if isinstance(levels[key], int)
        else weight.numel() * levels[key][0] // levels[key][1]
        for key, weight in weights.items()
    }
    assert (tokens * sum(kept.values()) + others) / 1e9 == pytest.approx(giga, abs=0.001)


def test_every_config_of_the_repository_fits_deit_small():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    shapes = {name: weight.shape for name, weight in prunable_weights(model).items()}
    assert len(CONFIGS) >= 3
    assert [path.name for path in CONFIGS if path.name.startswith("deit_base")] == [
        "deit_base_elsa_6.01g.yaml",
        "deit_base_elsa_6.88g.yaml",
    ]
    resolved = {path.name: list(resolve_levels(path, shapes).items()) for path in CONFIGS}
    assert resolved["deit_small_nxm.yaml"] == [(name, (2, 4)) for name in shapes]
    assert resolved["deit_small_uniform.yaml"] == [
        (name, shape.numel() // 2) for name, shape in shapes.items()
    ]
    by_name = dict(resolved["deit_small_by_name.yaml"])
    assert by_name["blocks.0.mlp.fc2.weight"] == shapes["blocks.0.mlp.fc2.weight"].numel()
    assert by_name["blocks.5.mlp.fc2.weight"] == (1, 4)
    assert by_name["blocks.5.mlp.fc1.weight"] == (2, 4)


@pytest.mark.parametrize("mode", ["nxm", "unstructured"])
@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ([2, 4], (2, 4)),
        ((1, 4), (1, 4)),
        ("2:4", (2, 4)),
        (" 1 : 2 ", (1, 2)),
        (124, (2, 4)),  # what PyYAML makes of an unquoted 2:4
        (64, (1, 4)),
        ([4, 4], (4, 4)),
        ([4, 1], (3, 4)),  # the oldest form: group size, number pruned
        ("dense", 48),
        (0, 48),
        (0.25, 36),
        (0.99, 0),  # 48 - round(47.52)
    ],
)
def test_a_level_of_either_form_is_understood_in_either_mode(mode, entry, expected):
    assert levels([entry, "dense", "dense"], mode)[QKV0] == expected


@pytest.mark.parametrize("written", ["2:4", "'2:4'", "[2, 4]", "2:04"])
@pytest.mark.parametrize(
    "layout", ["\n    - {0}\n    - {0}\n    - {0}", " [{0}, {0}, {0}]", " {{default: {0}}}"]
)
def test_two_of_four_is_understood_however_yaml_writes_it(tmp_path, written, layout):
    text = "sparsity:\n  mode: nxm\n  level:" + layout.format(written)
    assert from_text(tmp_path, text) == dict.fromkeys(SHAPES, (2, 4))


def test_later_patterns_win_and_the_default_stands_behind_them_wherever_it_is_written():
    level = {"blocks.*": [1, 4], "*.proj": "dense", "blocks.1.qkv.weight": 0.5, "default": [2, 4]}
    assert levels(level) == {QKV0: (1, 4), PROJ0: 32, QKV1: 36}


def test_the_oldest_form_is_announced_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert levels([[4, 2], [4, 3], [2, 4]]) == {QKV0: (2, 4), PROJ0: (1, 4), QKV1: (2, 4)}
    assert [record.getMessage() for record in caplog.records] == [
        "custom_config: level[0]: [4, 2] is read as group size and number pruned, so 2:4 (as 1 "
        "more)"
    ]


# ---- what is refused, with the file, the entry and the expectation ----


@pytest.mark.parametrize("mode", ["nxm", "unstructured"])
@pytest.mark.parametrize(
    "entry",
    [1, 1.0, 1.5, -0.1, 59, 120, 121, float("nan"), float("inf"), True, None, "sparse", "4:2", "0:4", "2:4:8", "-1:4",
     "2:", [], [2], [0, 4], [-1, 4], [4, -2], [2, 4, 8], [2.0, 4], [True, 4], ["2", "4"], [[2, 4]], {"n": 2},
     pytest.param(10**5000, id="huge")],
)  # fmt: skip
def test_a_level_of_no_known_form_is_an_error_that_names_the_entry(mode, entry):
    with pytest.raises(PruningError, match=r"^custom_config: level\[1\] .*expected \[n, m\]"):
        levels([[2, 4], entry, [2, 4]], mode)
    with pytest.raises(PruningError, match=r"^custom_config: level '\*\.proj' .*expected \[n, m\]"):
        levels({"default": [2, 4], "*.proj": entry}, mode)


@pytest.mark.parametrize(
    ("level", "message"),
    [
        ([[2, 4]] * 2, f"2 entries: expected 3, .*{QKV0}, {PROJ0}, {QKV1}"),
        ([], "0 entries: expected 3"),
        ([[2, 4], [2, 4], [3, 8]], rf"level\[2\] is 3:8: .*divides the 12 inputs of {QKV1}"),
        ({"default": "1:8"}, f"level 'default' is 1:8: .*12 inputs of {QKV1}"),
        (
            {"default": [2, 4], "*.fc3": "dense"},
            r"'\*\.fc3' matches no prunable weight: .*blocks.0.qkv.weight",
        ),
        ({"blocks.0.*": [2, 4]}, f"says nothing of {QKV1}"),
        ({}, f"says nothing of {QKV0}"),
        ({"default": [2, 4], 3: "dense"}, "key 3: expected a pattern"),
        ({"default": [2, 4], None: "dense"}, "key None: expected a pattern"),
        (0.5, "level is 0.5: expected a list, or a mapping"),
        ("dense", "level is 'dense'"),
        (None, "level is None"),
    ],
)
def test_a_wrong_level_section_is_an_error_that_says_what_was_expected(level, message):
    with pytest.raises(PruningError, match=f"^custom_config: .*{message}"):
        levels(level)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "it lacks sparsity"),
        ({"sparsity": 0.5}, "sparsity is 0.5: expected a mapping"),
        ({"sparsity": {"mode": "nxm"}}, "sparsity lacks level"),
        ({"sparsity": {"level": []}}, "sparsity lacks mode"),
        ({"sparsity": {"mode": "n:m", "level": []}}, "mode is 'n:m': expected nxm or unstructured"),
        ({"sparsity": {"mode": ["nxm"], "level": []}}, "mode is "),
        (
            {"sparsity": {"mode": "nxm", "level": [], "levels": []}},
            "unknown key 'levels' in sparsity",
        ),
        ({"sparsity": {"mode": "nxm", "level": []}, "seed": 1}, "unknown key 'seed'"),
    ],
)
def test_a_wrong_outline_is_an_error_that_names_the_key(config, message):
    with pytest.raises(PruningError, match=f"^custom_config: .*{message}"):
        resolve_levels(config, SHAPES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- 1\n- 2\n", "the file is .*expected a mapping"),
        ("just words", "expected a mapping"),
        ("sparsity: [1, 2", "line 1: not valid YAML"),
        ("a: 1\n\tb: 2", "line 2: not valid YAML"),
        ("sparsity: {mode: nxm, mode: nxm}", "line 1: .*key 'mode' twice"),
        (
            "sparsity:\n  mode: nxm\n  level: {default: dense,\n    default: 0.5}",
            "line 4: .*key 'default' twice",
        ),
        ("sparsity: !!python/object/apply:os.system [ls]", "line 1: tag .*python"),
        ("sparsity: !!str x", "line 1: tag"),
        ("a: &a [1]\nb: *a", "line 1: anchor 'a'"),
        ("a: *b", "line 1: anchor 'b'"),
        ("[" * 100_000, "at most 8 nested levels"),
        ("--- {}\n--- {}\n", "not valid YAML"),
        ("sparsity: 2024-13-45", "not valid YAML"),
        ("sparsity: 0b_", "not valid YAML"),
        ("sparsity: =", "not valid YAML"),
        ("? [1, 2]\n: 3", "not valid YAML"),
        (b"sparsity: \xff\xfe", "expected UTF-8"),
        ("sparsity: \x07", "not valid YAML"),
        (b"#" * (MAX_BYTES + 1), "at most 256 KiB"),
    ],
)
def test_a_file_that_is_no_plain_yaml_is_a_one_line_error_that_names_it(tmp_path, text, message):
    with pytest.raises(PruningError, match=f"c.yaml: .*{message}") as error:
        from_text(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["missing.yaml", ".", "nul\0.yaml", "two\nlines.yaml", 3, None, [1]]
)
def test_a_source_that_cannot_be_read_is_a_one_line_error(tmp_path, source):
    with pytest.raises(PruningError) as error:
        resolve_levels(str(tmp_path / source) if isinstance(source, str) else source, SHAPES)
    assert "\n" not in str(error.value)


# ---- anything at all is either understood or refused ----

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("dense")
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=examples(200))
@given(anything | anything.map(lambda level: {"sparsity": {"mode": "nxm", "level": level}}))
def test_any_structure_is_understood_or_refused_in_one_line(config):
    try:
        resolve_levels(config, SHAPES)
    except PruningError as error:
        assert len(str(error).splitlines()) == 1


GOOD = yaml.safe_dump(
    {"sparsity": {"mode": "nxm", "level": {"default": [2, 4], "*.proj": "1:4"}}}
).encode()


@settings(max_examples=examples(200))
@given(st.data())
def test_any_bytes_are_understood_or_refused_in_one_line(tmp_path_factory, data):
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(GOOD)), st.integers(0, len(GOOD)))))
    yaml_like = st.text("[]{}:,&*!|>-?#%@\"'\n\t 0129.abx~<=", max_size=12).map(str.encode)
    text = GOOD[:start] + data.draw(st.binary(max_size=8) | yaml_like) + GOOD[stop:]
    try:
        from_text(tmp_path_factory.getbasetemp(), text)
    except PruningError as error:
        assert len(str(error).splitlines()) == 1


# ---- blocks of weights, heads and neurons ----


def sample():
    torch.manual_seed(0)
    return build_model("deit_sample_patch4_28", 10, 28)


def test_layers_keep_their_share_of_blocks_and_blocks_their_largest_units():
    model = sample()
    level = {"default": "dense", "blocks.1.*": "block:4x1 0.7"}
    units = {"blocks.0.attn": 2, "blocks.[23].mlp": 96}
    config = {"sparsity": {"mode": "unstructured", "level": level, "units": units}}
    masks = compute_masks(model, "custom", custom_config=config)
    assert list(masks) == [name for name, _ in model.named_parameters() if name in masks]

    fc1 = model.blocks[1].mlp.fc1.weight
    blocks = fc1.detach().abs().unflatten(0, (-1, 4)).sum(1)
    kept = masks["blocks.1.mlp.fc1.weight"].unflatten(0, (-1, 4))
    assert (kept.all(1) == kept.any(1)).all()
    assert int(kept.any(1).sum()) == blocks.numel() - round(0.7 * blocks.numel())
    assert blocks[kept.any(1)].min() >= blocks[~kept.any(1)].max()

    mlp = model.blocks[2].mlp
    size = mlp.fc1.weight.abs().sum(1) + mlp.fc2.weight.abs().sum(0)
    neurons = masks["blocks.2.mlp.fc1.bias"]
    assert int(neurons.sum()) == 96
    assert set(neurons.nonzero().flatten().tolist()) == set(size.topk(96).indices.tolist())
    assert int(masks["blocks.0.attn.proj.weight"].any(0).sum()) == 64
    assert masks["blocks.4.mlp.fc1.weight"].all()
    check_masks({}, masks, Recipe("custom", custom_config=config))


def test_only_blocks_with_units_shrink_and_the_others_keep_their_zeros():
    model = sample()
    level = {"default": "dense", "blocks.1.*": "block:4x1 0.7"}
    config = {"sparsity": {"mode": "nxm", "level": level, "units": {"blocks.0.mlp": 8}}}
    masks = compute_masks(model, "custom", custom_config=config)
    masks["blocks.1.mlp.fc1.weight"][:4] = False  # a neuron that is gone by chance
    masks["blocks.1.mlp.fc2.weight"][:, 0] = False
    small = shrink(model, masks, Recipe("custom", custom_config=config).shrinks)
    assert [len(block.mlp.fc1.weight) for block in small.blocks[:3]] == [8, 384, 384]
    rest = masks_of_the_rest(small, masks, Recipe("custom", custom_config=config).shrinks)
    assert "blocks.0.mlp.fc1.weight" not in rest
    assert torch.equal(rest["blocks.1.mlp.fc2.weight"], masks["blocks.1.mlp.fc2.weight"])


@pytest.mark.parametrize(
    ("level", "units", "message"),
    [
        ("block:5x1 0.5", {}, r"level 'default' is block:5x1 0.5: expected blocks that divide"),
        ("block:4x1 1.0", {}, "level 'default' is 'block:4x1 1.0': expected"),
        ("block:0x1 0.5", {}, "level 'default' is 'block:0x1 0.5': expected"),
        ("block:4x1", {}, "level 'default' is 'block:4x1': expected"),
        ("dense", {"blocks.0.attn": 4}, "units 'blocks.0.attn' is 4: expected 1 to 3"),
        ("dense", {"blocks.0.attn": 0}, "units 'blocks.0.attn' is 0: expected the name of a block"),
        ("dense", {"blocks.9.attn": 1}, "units 'blocks.9.attn' matches no block .*blocks.0.attn"),
        ("dense", [2], r"units is \[2\]: expected a mapping"),
        (0.5, {"blocks.0.mlp": 8}, "blocks.0.mlp.fc1.weight has a level and units"),
    ],
)
def test_wrong_blocks_and_units_are_one_line_that_names_them(level, units, message):
    config = {"sparsity": {"mode": "nxm", "level": {"default": level}, "units": units}}
    with pytest.raises(PruningError, match=message) as error:
        compute_masks(sample(), "custom", custom_config=config)
    assert "\n" not in str(error.value)


def test_units_are_pruned_at_once_and_count_when_recipes_are_compared():
    def recipe(count, **choices):
        level = {"default": "dense"}
        config = {"sparsity": {"mode": "nxm", "level": level, "units": {"blocks.0.mlp": count}}}
        return Recipe("custom", custom_config=config, **choices)

    assert recipe(8).differences(recipe(9)) == ["custom_config"]
    assert Recipe.from_dict(recipe(8).to_dict()) == recipe(8)
    with pytest.raises(PruningError, match="one-shot with units in the custom YAML"):
        recipe(8, prune_schedule="gradual").check()
