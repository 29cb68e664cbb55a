"""Over a run no random number serves twice: every micro-batch has a key of the generator to itself."""

from __future__ import annotations

import torch
from sae_diffusion.diffusion.noise import derive_seed
from sae_diffusion.train import trainer

from sae_kernels import token_noise_eps


def test_no_key_is_used_twice_in_a_simulated_run():
    """Two of 100,000 random 63-bit keys agree with probability 5e-10; the purposes never share one either."""
    steps = range(100_000)
    noise = {derive_seed(7, trainer.NOISE, index) for index in steps}
    assert len(noise) == len(steps)
    for purpose in (trainer.SIGMAS, trainer.DROPOUT):
        assert not noise & {derive_seed(7, purpose, index) for index in range(1000)}
    assert not noise & {derive_seed(8, trainer.NOISE, index) for index in range(1000)}


def test_different_keys_and_offsets_give_different_numbers():
    """Of 4 million numbers of neighbouring draws no more agree than 24-bit fractions must by chance."""
    draws = [token_noise_eps((4096,), seed=derive_seed(7, trainer.NOISE, index)) for index in range(500)]
    draws += [token_noise_eps((4096,), seed=1, offset=offset) for offset in range(500)]
    table = torch.stack(draws)
    # Neighbours in time, element by element; chance agreement is about 1e-7 for each pair.
    assert (table[1:] == table[:-1]).sum() <= 10
    assert (table[:, 1:] == table[:, :-1]).sum() <= 10
