import torch

from lit_align.functional.noise import keyed_generator, randn, sample_generators


def test_equal_keys_give_equal_noise_and_others_do_not():
    def draw(*key):
        return torch.randn(4, generator=keyed_generator(*key))

    assert torch.equal(draw("a", 1, 2), draw("a", 1, 2))
    for other in [("b", 1, 2), ("a", 2, 2), ("a", 1, 3), ("a", 12), ("a", 1, 2, 0)]:
        assert not torch.equal(draw("a", 1, 2), draw(*other))


def test_noise_belongs_to_the_sample_not_to_the_batch():
    together = randn((2, 3), sample_generators("x", 7, 1, [0, 1, 2, 3]))
    apart = torch.cat([randn((2, 3), sample_generators("x", 7, 1, [p])) for p in (2, 0)])
    assert torch.equal(together[[2, 0]], apart)


def test_global_generator_is_left_alone():
    state = torch.get_rng_state()
    randn((2,), sample_generators("x", 0, 0, range(3)))
    assert torch.equal(state, torch.get_rng_state())


def test_noise_equals_that_of_a_plain_torch_generator():
    # diffusers draws torch.randn((1, *shape), generator) per sample: the same numbers.
    drawn = randn((4, 8, 8), [torch.Generator().manual_seed(3)])
    assert torch.equal(drawn, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)))
