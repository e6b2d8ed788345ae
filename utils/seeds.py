"""Random numbers that depend on a key alone, never on earlier ones."""

import random

import numpy as np
import torch

#: Purposes of random numbers. A key begins with one, so that no two purposes share their numbers.
INIT, ORDER, SAMPLE, STEP, CALIBRATION = range(5)


def seed_everything(purpose: int, *key: int) -> None:
    """Seeds every generator from a purpose and a key, such as SAMPLE, seed, epoch, position."""
    seed = int(np.random.SeedSequence((purpose, *key)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)

    # torch.manual_seed takes a hundred times as long if there is no GPU.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
