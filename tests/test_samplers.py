import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from samplers import EvalBatchSampler, TrainSampler
from trainer.seeded_data import SeededDataset

sizes = st.integers(1, 2000)
worlds = st.integers(1, 9)


def shares(size, world_size, **options):
    return [
        list(TrainSampler(size, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]


@given(sizes, worlds)
def test_every_image_is_seen_once_and_the_last_round_is_filled_up(size, world_size):
    parts = shares(size, world_size)
    assert len({len(part) for part in parts}) == 1
    indices = [index for part in parts for index, _ in part]
    counts = np.bincount(indices, minlength=size)
    assert counts.min() >= 1
    assert len(indices) - size < world_size


@given(st.integers(9, 2000), worlds, st.integers(2, 4))
def test_repeats_of_an_image_are_neighbours_spread_over_the_processes(size, world_size, repeats):
    parts = shares(size, world_size, repeats=repeats)
    in_order = [index for step in zip(*parts, strict=True) for index, _ in step]
    for start in range(0, len(in_order), repeats):
        assert len(set(in_order[start : start + repeats])) == 1
    assert max(np.bincount(in_order)) <= repeats


@given(st.integers(256, 2000), worlds)
def test_an_epoch_of_repeated_augmentation_is_as_long_as_in_deit(size, world_size):
    sampler = TrainSampler(size, repeats=3, world_size=world_size)
    assert len(sampler) == len(list(sampler)) == size // 256 * 256 // world_size


def test_repeated_augmentation_does_not_empty_a_small_data_set():
    assert len(list(TrainSampler(100, repeats=3))) == 100


@given(sizes, worlds)
def test_no_two_samples_of_an_epoch_have_the_same_random_key(size, world_size):
    keys = [key for part in shares(size, world_size, repeats=3) for _, key in part]
    assert len(set(keys)) == len(keys)


def test_the_order_changes_with_the_epoch_and_the_seed_and_with_nothing_else():
    def order(seed, epoch):
        sampler = TrainSampler(50, seed=seed)
        sampler.set_epoch(epoch)
        return [index for index, _ in sampler]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


@given(sizes, st.integers(1, 70), worlds)
def test_evaluation_shares_out_the_very_batches_of_a_single_process(size, batch_size, world_size):
    whole = list(EvalBatchSampler(size, batch_size))
    parts = [
        list(EvalBatchSampler(size, batch_size, rank, world_size)) for rank in range(world_size)
    ]
    assert sum(whole, []) == list(range(size))
    assert sorted(sum(parts, [])) == whole
    assert [
        len(EvalBatchSampler(size, batch_size, rank, world_size)) for rank in range(world_size)
    ] == list(map(len, parts))


class Noise(Dataset):
    """Draws from all three generators, as augmentations do."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        import random

        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])


def test_random_choices_do_not_depend_on_the_number_of_workers():
    def epoch(workers):
        sampler = TrainSampler(12, seed=3)
        return torch.cat(
            list(DataLoader(SeededDataset(Noise()), 4, sampler=sampler, num_workers=workers))
        )

    alone = epoch(0)
    assert torch.equal(alone, epoch(1))
    assert torch.equal(alone, epoch(3))
    assert len(alone[:, 1].unique()) == 12
