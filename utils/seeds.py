"""Random numbers that depend on a key alone, never on what was drawn before."""

import random

import numpy as np
import torch

#: What random numbers are drawn for; first in every key, so that no two purposes share their
#: numbers.
INIT, ORDER, SAMPLE, STEP, CALIBRATION = range(5)


def seed_everything(purpose: int, *key: int) -> None:
    """Seeds every generator from a key such as (SAMPLE, seed, epoch, position), whatever was drawn
    before.
    """
    seed = int(np.random.SeedSequence((purpose, *key)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    # Torch.manual_seed takes a hundred times as long where there is no GPU
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
