"""`request_rng`: one request's own random stream, in a process that serves many at once.

`generate` of transformers takes no generator and draws from the process's
(`transformers/generation/utils.py::GenerationMixin._sample`), so that seeded requests in several
threads spoil each other. A mode of torch is local to its thread: it hands the request's generator
to each function that draws and takes one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch.nn import functional, init
from torch.overrides import TorchFunctionMode

_TAKE_GENERATOR = (
    "_sample_dirichlet _standard_gamma bernoulli binomial multinomial normal poisson rand "
    "rand_like randint randint_like randn randn_like randperm bernoulli_ cauchy_ exponential_ "
    "geometric_ log_normal_ normal_ random_ uniform_"
)
"""The functions of torch, and methods of its tensors, that draw and have a `generator` argument."""
_DROPOUT = "dropout dropout_ dropout1d dropout2d dropout3d feature_dropout feature_dropout_"
_ALPHA_DROPOUT = "alpha_dropout alpha_dropout_ feature_alpha_dropout feature_alpha_dropout_"
_OTHERS = (
    "native_dropout gumbel_softmax fractional_max_pool2d fractional_max_pool3d gru lstm rnn_relu "
    "rnn_tanh kaiming_normal_ kaiming_uniform_ orthogonal_ sparse_ trunc_normal_ xavier_normal_ "
    "xavier_uniform_"
)
_SWAP_LOCK = threading.Lock()


@contextmanager
def request_rng(seed: int) -> Iterator[None]:
    """Give the code of a ``with`` statement a random stream of its own.

    It draws what it would have drawn after ``torch.manual_seed(seed)``, were it alone in the
    process. The process's generators stay where they are, and no request waits for another one.
    Only what draws but takes no generator, such as dropout, puts the stream in the place of the
    process's generator for the time of the call, and such calls wait for each other.

    Enter it in the thread that generates: a thread that is started inside does not inherit it.
    It is about torch; the generators of Python and NumPy are the process's.

    Args:
        seed: As for `torch.manual_seed`.
    """
    with _RequestRng(seed):
        yield


class _RequestRng(TorchFunctionMode):
    """Hands its own generators to the functions that draw."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _WITH_GENERATOR:
            if kwargs.get("generator") is not None:
                return func(*args, **kwargs)
            return func(*args, **{**kwargs, "generator": self._generator(_device(args, kwargs))})
        draws = _WITHOUT_GENERATOR.get(func)
        if draws is None or not draws(args, kwargs):
            return func(*args, **kwargs)
        with self._in_place_of_default(_device(args, kwargs)):
            return func(*args, **kwargs)

    def _generator(self, device: torch.device) -> torch.Generator:
        """The request's generator of a device, which begins as `torch.manual_seed` would set it."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    @contextmanager
    def _in_place_of_default(self, device: torch.device) -> Iterator[None]:
        """Have a device's default generator continue the request's stream for a while."""
        own, default = self._generator(device), _default_generator(device)
        with _SWAP_LOCK:
            before = default.get_state()
            default.set_state(own.get_state())
            try:
                yield
            finally:
                own.set_state(default.get_state())
                default.set_state(before)


def _device(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    """The device on which a call draws, with its index."""
    asked = kwargs.get("device")
    values = (*args, *kwargs.values())
    tensor = next((value for value in values if isinstance(value, torch.Tensor)), None)
    if asked is None:
        device = torch.get_default_device() if tensor is None else tensor.device
    else:
        device = torch.device(asked)
    return device if device.type == "cpu" else torch.empty(0, device=device).device


def _default_generator(device: torch.device) -> torch.Generator:
    """The process's generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    module: Any = torch.get_device_module(device)
    if device.type == "mps":
        generator: torch.Generator = module._get_default_mps_generator()
    else:
        generator = module.default_generators[device.index]
    return generator


@attrs.frozen
class _IfArgument:
    """Whether a call draws, by one of its arguments."""

    place: int
    name: str
    default: bool

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the argument is true, or is a probability above zero."""
        given = args[self.place] if len(args) > self.place else kwargs.get(self.name, self.default)
        return bool(given)


def _always(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Every call draws, as far as we know."""
    del args, kwargs
    return True


def _takes_generator(name: str) -> bool:
    """Whether this version of torch has a function of that name that takes a generator."""
    packet = getattr(torch.ops.aten, name)  # `name` is of our table above
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return any(arg.name == "generator" for each in overloads for arg in each._schema.arguments)


def _functions(names: str) -> Iterator[Any]:
    """The functions and methods of these names, wherever torch has them."""
    for name in names.split():
        for owner in (torch, torch.Tensor, functional, init, torch._C._VariableFunctions):
            if hasattr(owner, name):
                yield getattr(owner, name)


_WITH_GENERATOR = frozenset(
    function
    for name in _TAKE_GENERATOR.split()
    if _takes_generator(name)
    for function in _functions(name)
)
_WITHOUT_GENERATOR: dict[Any, Callable[[Sequence[Any], Mapping[str, Any]], bool]] = {
    function: draws
    for names, draws in (
        (_TAKE_GENERATOR, _always),  # those that do not in this version
        (_DROPOUT, _IfArgument(2, "training", default=True)),
        (_ALPHA_DROPOUT, _IfArgument(2, "training", default=False)),
        ("rrelu rrelu_", _IfArgument(3, "training", default=False)),
        ("scaled_dot_product_attention", _IfArgument(4, "dropout_p", default=False)),
        ("multi_head_attention_forward", _IfArgument(13, "training", default=True)),
        (_OTHERS, _always),
    )
    for function in _functions(names)
    if function not in _WITH_GENERATOR
}
"""What draws and takes no generator, and whether a call of it does."""
