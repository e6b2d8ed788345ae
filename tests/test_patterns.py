"""The masks that `sparsity_factory.patterns` makes from scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity_factory.patterns import PAIRWISE_UP_TO, n_of_m

few_values = st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1.001, 1.002, 3.0, 1e30])  # many ties, several in one bin


@settings(deadline=None)
@given(st.data())
def test_n_of_m_keeps_the_n_largest_and_the_earlier_of_equals_in_every_group(data):
    m = data.draw(st.sampled_from([1, 2, 3, 4, 8, PAIRWISE_UP_TO, PAIRWISE_UP_TO + 1]))
    n = data.draw(st.integers(1, m))
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    values = data.draw(st.lists(few_values, min_size=rows * groups * m, max_size=rows * groups * m))
    score = torch.tensor(values).view(rows, groups * m)
    mask = n_of_m(score, n, m)
    for group, kept in zip(score.view(-1, m).tolist(), mask.view(-1, m), strict=True):
        best = sorted(range(m), key=lambda i: (-group[i], i))[:n]
        assert kept.nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("m", [4, 64])
def test_n_of_m_groups_along_the_input_dimension_of_a_transposed_score(m):
    score = torch.randn(128, 6, generator=torch.Generator().manual_seed(0)).abs().T
    mask = n_of_m(score, 1, m)
    assert mask.shape == (6, 128)
    assert torch.equal(mask, n_of_m(score.contiguous(), 1, m))
    assert (mask.reshape(-1, m).sum(1) == 1).all()
