"""The damped Gram matrix of a layer's inputs, as score and reconstruction by Optimal Brain Surgeon
use it.
"""

import logging

import torch
from torch import Tensor

from .errors import PruningError

log = logging.getLogger(__name__)

DAMPING = 0.01  # of the mean of the Gram matrix's diagonal, as SparseGPT has it
DAMPING_LINE = "is added to the Gram matrix's diagonal, as a share of that diagonal's mean"
MOST_DAMPING = 1e3  # with so much, the matrix is nearly diagonal


def damped_gram(gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """The damped Gram matrix H, and U, the upper Cholesky factor of its inverse: H^-1 = U^T U.

    An input that is always zero is independent of the others, whatever the damping. The damping is
    raised tenfold, with a warning in the log, until the matrix can be factored.

    Raises:
        PruningError: the matrix has negative eigenvalues.
    """
    diagonal = gram.diagonal()
    scale = diagonal.mean() if diagonal.any() else torch.ones_like(diagonal[0])
    while True:
        damped = gram + torch.diag(damping * scale + scale * (diagonal == 0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and factor.isfinite().all():
            return damped, factor

        if damping > MOST_DAMPING:
            raise PruningError(
                "expected the Gram matrix of some inputs: this one has negative eigenvalues"
            )
        damping = max(10 * damping, 1e-6)
        log.warning(
            "A Gram matrix of %d inputs cannot be factored: its damping is raised to %g",
            len(gram),
            damping,
        )
