import numpy as np
import torch

from sfumato.randomness import generator_for, permuted_indices, randint_for, randn_for


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    keys = [(0, 3, k) for k in range(8)]
    whole = randn_for(keys, (2, 3))
    parts = torch.cat([randn_for(keys[:3], (2, 3)), randn_for(keys[3:], (2, 3))])
    assert torch.equal(whole, parts)
    assert len({float(row[0, 0]) for row in whole}) == 8


def test_equal_keys_give_equal_streams_and_different_keys_do_not():
    assert torch.equal(torch.randn(5, generator=generator_for(1, 2)), torch.randn(5, generator=generator_for(1, 2)))
    assert not torch.equal(
        torch.randn(5, generator=generator_for(1, 2)), torch.randn(5, generator=generator_for(2, 1))
    )


def test_integers_cover_their_range_evenly():
    drawn = randint_for([(9, k) for k in range(4000)], 4)
    assert torch.bincount(drawn).min() > 900


def test_each_pass_is_a_permutation_and_slices_agree():
    whole = permuted_indices(5, 7, 0, 21)
    for start in range(0, 21, 7):
        assert sorted(whole[start : start + 7]) == list(range(7))
    assert not np.array_equal(whole[:7], whole[7:14])
    assert np.array_equal(whole[4:18], permuted_indices(5, 7, 4, 14))
