"""Files that nobody wrote on purpose: each is read as what it is, or refused in one line."""

import copy
import random
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import utils
from benchmarks.torture import equal
from sparsity_factory import PruningError, Recipe, check_masks, compute_masks, unpack
from sparsity_factory.custom_yaml import resolve_levels
from trainer.arguments import read_preset
from utils import UserError, load_checkpoint

LAMP = ["--pruner", "lamp", "--sparsity", "0.65"]
SHAPES = {"a.weight": (8, 12), "b.weight": (4, 8)}
LEVELS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["dense", "2:4"]),
    st.lists(st.one_of(st.integers(-2, 9), st.floats(0, 1), st.text(max_size=2)), max_size=3),
)
CONFIGS = st.one_of(
    LEVELS,
    st.fixed_dictionaries(
        {
            "sparsity": st.one_of(
                LEVELS,
                st.fixed_dictionaries(
                    {
                        "mode": st.one_of(st.sampled_from(["nxm", "unstructured"]), LEVELS),
                        "level": st.one_of(
                            LEVELS,
                            st.lists(LEVELS, min_size=2, max_size=2),
                            st.dictionaries(
                                st.sampled_from(["default", "a.*", "b*", "*", "c"]),
                                LEVELS,
                                max_size=4,
                            ),
                        ),
                    }
                ),
            )
        }
    ),
)


def in_a_file(content: bytes, read):
    """What `read` gives for a file of that content; None if it was refused, in one line that names
    the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.yaml")
        path.write_bytes(content)
        try:
            return read(str(path))
        except (PruningError, UserError) as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            assert len(str(error)) < 1000
            return None


@settings(max_examples=examples(400), suppress_health_check=[HealthCheck.too_slow])
@given(CONFIGS)
def test_any_structure_gives_masks_that_obey_it_or_one_line(config):
    levels = in_a_file(yaml.safe_dump(config).encode(), lambda path: resolve_levels(path, SHAPES))
    if levels is None:
        return
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(12, 8), "b": torch.nn.Linear(8, 4)})
    masks = compute_masks(model, "custom", custom_config=config)
    check_masks({}, masks, Recipe("custom", custom_config=config))
    for name, level in levels.items():
        kept = level if isinstance(level, int) else masks[name].numel() * level[0] // level[1]
        assert masks[name].count_nonzero() == kept


@settings(max_examples=examples(300))
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text("sparity: nxmlevdfo[]{},.0123456789-&*!|>\n\"'#%@`?", max_size=200).map(str.encode),
    )
)
def test_any_bytes_are_a_configuration_or_one_line(content):
    in_a_file(content, lambda path: resolve_levels(path, SHAPES))
    in_a_file(content, read_preset)


@pytest.mark.parametrize(
    "bomb",
    [
        "a: &a [x, x]\n"
        + "".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *a]\n" for i in range(30)),
        "[" * 100_000,
        "{a: " * 50_000,
        "- " * 100_000,
        "? " * 100_000,
        "'" + "x" * 200_000,
        "&a [*a]",
    ],
)
def test_a_bomb_is_defused_in_one_line(bomb):
    assert in_a_file(bomb.encode(), lambda path: resolve_levels(path, SHAPES)) is None
    assert in_a_file(bomb.encode(), read_preset) is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint as the trainer writes it."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(12, 8)})
    masks = compute_masks(model, "lamp", 0.5)
    from sparsity_factory import Masks

    state = {
        "model": model.state_dict(),
        "masks": Masks(model, masks).state_dict(),
        "epoch": 3,
        "best": "model",
    }
    path = tmp_path_factory.mktemp("fuzz") / "c.pth"
    utils.save_checkpoint(state, path)
    return path.read_bytes()


def test_a_checkpoint_with_bytes_flipped_or_cut_off_is_refused_or_means_the_same(
    checkpoint, tmp_path
):
    chance, path = random.Random(0), tmp_path / "damaged.pth"
    path.write_bytes(checkpoint)
    whole = load_checkpoint(str(path))
    refused = 0
    for number in range(400):
        damaged = bytearray(checkpoint)
        if number % 2:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            for _ in range(chance.choice([1, 1, 8])):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            read = load_checkpoint(str(path))
        except UserError as error:
            refused += 1
            assert "damaged.pth" in str(error)
            assert "\n" not in str(error)
            continue
        assert equal(read, whole)  # a flip in the padding, or in a name that nobody reads
    assert refused > 300


JUNK = [
    None,
    True,
    -1,
    10**30,
    float("nan"),
    "text",
    [],
    {},
    [1, "a"],
    {"a": 1},
    torch.zeros(3),
    torch.zeros(2, 0),
    torch.full((2, 2), torch.nan),
    torch.zeros(1).expand(10**6, 10**6),
    torch.zeros(2, 3).to_sparse(),
    torch.zeros(10**6, 10**6, device="meta"),
    {"sparsity": torch.zeros(2)},
]


@pytest.mark.slow
def test_a_checkpoint_with_foreign_parts_is_refused_in_one_line_or_runs(
    run_main, tiny, tmp_path, capfd
):
    import main

    run_main(*tiny, *LAMP, "--output_dir", "out")
    whole, chance = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True), random.Random(0)
    whole["args"].pop("distributed")
    for number in range(12):
        damaged = copy.deepcopy(whole)
        keys = list(damaged) * 2 + ["optimizer"] * 8 + ["pruner"] * 4
        parent, key = damaged, chance.choice(keys)
        while isinstance(parent[key], dict | list) and parent[key] and chance.random() < 0.8:
            parent = parent[key]
            key = chance.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key] = chance.choice(JUNK)
        torch.save(damaged, tmp_path / "damaged.pth")
        capfd.readouterr()
        for flags in (
            ["--audit", "damaged.pth"],
            [*tiny, "--resume", "damaged.pth", *LAMP],
            [*tiny, "--finetune", "damaged.pth"],
        ):
            status = main.run(flags)
            error = capfd.readouterr().err
            assert status in (0, 1, 2), (number, key)
            assert status == 0 or error.startswith("error: ") and error.count("\n") == 1, (
                number,
                key,
                error,
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(1, 0, 96),
        torch.zeros(1, 1, 96),
        torch.zeros(2, 50, 96),
        torch.zeros(1, 50, 96).to_sparse(),
        torch.zeros(1, 50, 96, device="meta"),
    ],
)
def test_a_position_embedding_that_is_none_is_refused_in_one_line(run_main, tiny, tmp_path, weight):
    run_main(*tiny, "--output_dir", "out")
    checkpoint = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    checkpoint["model"]["pos_embed"] = weight
    torch.save(checkpoint, tmp_path / "damaged.pth")
    error = run_main(*tiny, "--finetune", "damaged.pth", status=2)
    assert error.startswith("error: damaged.pth: ")
    assert error.count("\n") == 1


def test_masks_of_a_size_that_the_file_does_not_pay_for_are_refused():
    with pytest.raises(PruningError, match="contiguous"):
        unpack(
            {
                "a": {
                    "bits": torch.zeros(1, dtype=torch.uint8).expand(2**40),
                    "shape": [2**20, 2**23],
                }
            }
        )
