"""`request_rng`: a random stream for one request, whatever other threads do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch.nn import functional

import peftstate
from peftstate._request_rng import _WITH_GENERATOR, _WITHOUT_GENERATOR

X = torch.rand(3, 4, generator=torch.Generator().manual_seed(5))
BIG = torch.rand(1, 8, 16, 16, generator=torch.Generator().manual_seed(7))
QKV = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(6))

CALLS = {
    "alpha_dropout": lambda: functional.alpha_dropout(X, 0.5, training=True),
    "bernoulli": lambda: torch.bernoulli(X),
    "bernoulli_": lambda: X.clone().bernoulli_(0.5),
    "binomial": lambda: torch.binomial(X * 10, X),
    "cauchy_": lambda: X.clone().cauchy_(),
    "categorical": lambda: torch.distributions.Categorical(X).sample(),
    "dirichlet": lambda: torch.distributions.Dirichlet(X).sample(),
    "dropout": lambda: functional.dropout(X, 0.5),
    "dropout_module": lambda: torch.nn.Dropout(0.5)(X),
    "dropout2d": lambda: functional.dropout2d(QKV, 0.5),
    "exponential_": lambda: X.clone().exponential_(),
    "feature_alpha_dropout": lambda: functional.feature_alpha_dropout(QKV, 0.5, training=True),
    "fractional_max_pool2d": lambda: functional.fractional_max_pool2d(BIG, 2, output_size=5),
    "gamma": lambda: torch.distributions.Gamma(X, X).sample(),
    "geometric_": lambda: X.clone().geometric_(0.5),
    "gumbel_softmax": lambda: functional.gumbel_softmax(X),
    "init": lambda: torch.nn.init.kaiming_uniform_(X.clone()),
    "init_trunc": lambda: torch.nn.init.trunc_normal_(X.clone()),
    "linear": lambda: torch.nn.Linear(3, 4).weight,
    "log_normal_": lambda: X.clone().log_normal_(),
    "lstm": lambda: torch.nn.LSTM(4, 4, num_layers=2, dropout=0.5)(QKV[0])[0],
    "attention": lambda: torch.nn.MultiheadAttention(4, 2, dropout=0.5)(
        *QKV.expand(3, 2, 3, 4)[:, 0]
    )[0],
    "multinomial": lambda: torch.multinomial(X, 1),
    "multinomial_method": lambda: X.multinomial(2),
    "native_dropout": lambda: torch.native_dropout(X, 0.5, True)[0],  # noqa: FBT003
    "normal": lambda: torch.normal(X, 1.0),
    "normal_": lambda: X.clone().normal_(),
    "poisson": lambda: torch.poisson(X * 10),
    "rand": lambda: torch.rand(5),
    "rand_like": lambda: torch.rand_like(X),
    "randint": lambda: torch.randint(1000, (5,)),
    "randint_like": lambda: torch.randint_like(X, 1000),
    "randn": lambda: torch.randn(5),
    "randn_like": lambda: torch.randn_like(X),
    "random_": lambda: X.clone().random_(),
    "randperm": lambda: torch.randperm(50),
    "rrelu": lambda: functional.rrelu(-X, training=True),
    "sdpa": lambda: functional.scaled_dot_product_attention(QKV, QKV, QKV, dropout_p=0.5),
    "uniform_": lambda: X.clone().uniform_(),
}


def alone(seed, call):
    """What some code draws after `torch.manual_seed`, and the numbers that come next."""
    torch.manual_seed(seed)
    return call(), torch.rand(3)


@pytest.mark.parametrize("name", CALLS)
def test_draws_are_those_of_manual_seed(name):
    """Each way to draw gives what it gives alone, goes on from there, and moves nothing global."""
    expected = alone(3, CALLS[name])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    with peftstate.request_rng(3):
        found = CALLS[name](), torch.rand(3)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(torch.get_rng_state(), before)
    with peftstate.request_rng(4):
        assert not torch.equal(CALLS[name](), expected[0])


def test_every_operator_of_torch_that_draws_is_known():
    """A new version of torch that draws in a new way fails here."""
    names = {schema.name.partition("::") for schema in torch._C._jit_get_all_schemas()}
    seeded = {
        name
        for namespace, _, name in names
        if namespace == "aten" and not name.startswith("_")
        for packet in [getattr(torch.ops.aten, name)]
        for overload in packet.overloads()
        if torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
    }
    known = {function.__name__ for function in _WITH_GENERATOR | _WITHOUT_GENERATOR.keys()}
    functional_forms = {"cauchy", "exponential", "geometric", "log_normal", "uniform"}
    functional_forms |= {"normal_functional", "random"}
    inside_others = {
        "miopen_rnn",  # of `lstm` and its like
        "rrelu_with_noise",  # of `rrelu`
        "rrelu_with_noise_",
        "rrelu_with_noise_functional",
    }
    assert seeded - known == functional_forms | inside_others


def test_a_generator_that_is_passed_is_used():
    """The caller's own generator goes before the request's."""
    expected = torch.rand(3, generator=torch.Generator().manual_seed(8))
    with peftstate.request_rng(3):
        found = torch.rand(3, generator=torch.Generator().manual_seed(8))
    assert torch.equal(found, expected)


def test_requests_nest():
    """An inner request has its own stream, after which the outer one goes on."""
    torch.manual_seed(1)
    first, second = torch.rand(2), torch.rand(2)
    with peftstate.request_rng(1):
        assert torch.equal(torch.rand(2), first)
        with peftstate.request_rng(2):
            torch.rand(7)
        assert torch.equal(torch.rand(2), second)


def test_the_stream_ends_with_an_exception():
    """After an error in a request the thread draws from the process's generator again."""
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), peftstate.request_rng(2):
        functional.dropout(X, 1 / 0)
    assert torch.equal(torch.rand(2), expected)


def test_concurrent_generations_are_as_if_alone(load_base):
    """Sixteen threads that sample at once give the tokens of sixteen runs alone."""
    model = load_base("fp32").eval()
    ids = torch.tensor([[1, 5, 9]])

    def generate():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=12
        )

    expected = [alone(seed, generate)[0] for seed in range(16)]
    assert len({tuple(row[0].tolist()) for row in expected}) > 8
    torch.manual_seed(77)
    before = torch.get_rng_state()
    barrier = Barrier(16)

    def serve(seed):
        barrier.wait()
        with peftstate.request_rng(seed):
            return generate()

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(serve, range(16)))
    assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True] * 16
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_with_dropout_do_not_mix():
    """What takes no generator takes turns: each thread still gets its own stream."""

    def draw():
        return torch.cat([functional.dropout(torch.ones(2000), 0.5) for _ in range(30)])

    expected = [alone(seed, draw)[0] for seed in range(8)]

    def serve(seed):
        with peftstate.request_rng(seed):
            return draw()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(serve, range(8)))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
