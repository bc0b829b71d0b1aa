"""How one mechanism is measured: what a script describes as cases becomes measurements.

In a case, our kernel, our reference, and whatever else expresses the same, take turns on the same tensors, once what
they give was compared with the reference in double precision.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attnsr.benchmarks.measuring import DTYPES, Call, Limits, Size, agreeing, backend, measure, operation_timer
from attnsr.benchmarks.results import Measurement

Function: TypeAlias = Callable[..., Tensor | tuple[Tensor, ...]]
Tensors: TypeAlias = dict[str, Tensor]

KERNEL, REFERENCE, COMPILED = 'kernel', 'reference', 'torch.compile'
FORWARD, BACKWARD = 'forward', 'forward, backward'

#: Largest error of an element of an output or a gradient, as a fraction of the root mean square of all its elements. In
#: bfloat16 that of scaled_dot_product_attention, which is as right as any, was 0.28 among tens of millions.
BOUNDS = {'float32': 1e-3, 'bfloat16': 0.4}


@dataclass(frozen=True)
class Contestant:
    """Another way to compute a case.

    Attributes:
        name: For the tables.
        function: Takes the tensors of the case, by name.
        backend: That the operations in it run on.
    """

    name: str
    function: Function
    backend: str = 'reference'


@dataclass(frozen=True)
class Case:
    """A use of a mechanism in a network.

    Attributes:
        name: Of the network, and which of its layers it is.
        make: The tensors for batch, height and width, in float32, on PyTorch's default device.
        function: The mechanism, of these tensors by name.
        multiple: Height and width must be multiples of this.
        fixed: Names of the tensors that have no gradient.
        rivals: Other ways to compute it.
        backward: Whether the gradients are measured too.
        not_compiled: Why torch.compile is no contestant, or None.
        remarks: What is to be said, given the seconds of each contestant.
    """

    name: str
    make: Callable[[int, int, int], Tensors]
    function: Function
    multiple: int = 1
    fixed: tuple[str, ...] = ()
    rivals: tuple[Contestant, ...] = ()
    backward: bool = True
    not_compiled: str | None = None
    remarks: Callable[[Mapping[str, float]], list[str]] = lambda seconds: []


def measurements(
    what: str,
    cases: Sequence[Case],
    sizes: Sequence[Size],
    device: str,
    dtypes: Sequence[str],
    limits: Limits,
    seconds: float,
    without: Mapping[str, str],
) -> Iterator[Measurement]:
    """Measure all cases at all sizes, size by size: a run that is ended early has measured all at the first ones.

    On the CPU the gradients are measured on patches of training only.

    Args:
        what: The mechanism.
        cases: Its uses.
        sizes: What they work on.
        device: ``'cpu'`` or ``'cuda'``.
        dtypes: Of :data:`attnsr.benchmarks.measuring.DTYPES`.
        limits: Of the device.
        seconds: For the rounds of one comparison.
        without: Names of contestants that are left out, and why each is.
    """
    for size, dtype, case in product(sizes, dtypes, cases):
        rounded = size.rounded(case.multiple)
        with_gradients = case.backward and (device == 'cuda' or size.training)
        for computed in (FORWARD, BACKWARD) if with_gradients else (FORWARD,):
            yield _measure(what, case, rounded, device, dtype, computed, limits, seconds, without)


def _measure(
    what: str,
    case: Case,
    size: Size,
    device: str,
    dtype: str,
    computed: str,
    limits: Limits,
    seconds: float,
    without: Mapping[str, str],
) -> Measurement:
    torch.manual_seed(0)
    with torch.device(device):
        made = case.make(size.batch, size.height, size.width)
        tensors = {name: x.to(DTYPES[dtype]) for name, x in made.items()}
        outputs, work = _work(case, tensors, computed)
        cotangents = [torch.randn(y.shape).to(y.dtype) for y in outputs] if computed == BACKWARD else None
    contestants, absent = _contestants(case, device, without)
    result = Measurement(
        what=what,
        case=case.name,
        size=size.name,
        extent=(size.batch, size.height, size.width),
        dtype=dtype,
        computed=computed,
        base=REFERENCE,
        bound=BOUNDS[dtype],
        absent=absent,
        least_seconds=limits.least_seconds(*work, dtype),
    )
    torch.compiler.reset()
    agreed = _agreeing(result, case, contestants, tensors, cotangents)
    measure(result, agreed, operation_timer(device), device, seconds)
    result.remarks = case.remarks({name: of.seconds for name, of in result.figures.items()})
    return result


def _contestants(case: Case, device: str, without: Mapping[str, str]) -> tuple[list[Contestant], dict[str, str]]:
    """Those that take part, and why others do not."""
    contestants = [
        Contestant(KERNEL, case.function, 'triton'),
        Contestant(REFERENCE, case.function),
        *case.rivals,
        Contestant(COMPILED, torch.compile(case.function, dynamic=False)),
    ]
    absent = {}
    for name in (each.name for each in contestants if each.backend == 'triton' and device != 'cuda'):
        absent[name] = 'the kernels need a CUDA device'
    if case.not_compiled:
        absent[COMPILED] = case.not_compiled
    for name in (each.name for each in contestants if each.name in without):
        absent[name] = without[name]
    return [each for each in contestants if each.name not in absent], absent


def _compute(case: Case, by: Contestant, tensors: Tensors, cotangents: Sequence[Tensor] | None) -> list[Tensor]:
    """The outputs, and with cotangents the gradients after them: what is timed."""
    with backend(by.backend):
        if cotangents is None:
            with torch.inference_mode():
                return _as_list(by.function(**tensors))
        given = {name: x.detach().requires_grad_(name not in case.fixed) for name, x in tensors.items()}
        outputs = _as_list(by.function(**given))
        leaves = [x for x in given.values() if x.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def _expected(case: Case, tensors: Tensors, cotangents: Sequence[Tensor] | None) -> list[Tensor]:
    """What :func:`_compute` gives in float64, or in float32 where the device has no memory for that."""
    try:
        return _exact(case, tensors, cotangents, torch.float64)
    except torch.OutOfMemoryError:
        return _exact(case, tensors, cotangents, torch.float32)


def _exact(case: Case, tensors: Tensors, cotangents: Sequence[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
    exact = {name: x.to(dtype) for name, x in tensors.items()}
    exact_cotangents = cotangents and [y.to(dtype) for y in cotangents]
    return _compute(case, Contestant(REFERENCE, case.function), exact, exact_cotangents)


def _agreeing(
    result: Measurement,
    case: Case,
    contestants: Sequence[Contestant],
    tensors: Tensors,
    cotangents: Sequence[Tensor] | None,
) -> dict[str, tuple[Call, float]]:
    expected = _expected(case, tensors, cotangents)

    def prepare(contestant: Contestant) -> tuple[Call, float]:
        call = partial(_compute, case, contestant, tensors, cotangents)
        return call, _largest_error(call(), expected)

    prepared = {each.name: partial(prepare, each) for each in contestants}
    kernels = [each.name for each in contestants if each.backend == 'triton']
    return agreeing(result, prepared, optional=[COMPILED], kernels=kernels)


def _largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """As :data:`BOUNDS` has it."""
    errors = []
    for y, right in zip(found, expected, strict=True):
        unit = right.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        errors.append(((y.to(right.dtype) - right).abs().max() / unit).item())
    return max(errors, key=lambda error: (math.isnan(error), error))


def _work(case: Case, tensors: Tensors, computed: str) -> tuple[list[Tensor], tuple[int, int]]:
    """The outputs as they would be, and the bytes that must be moved and the operations that must be done for them.

    Bytes: each input is read and each output written once; for gradients the inputs and the cotangents are read, and
    the gradients written. Operations: those of the products in the definition, computed once.
    """
    shapes = {name: x.detach().to('meta').requires_grad_(name not in case.fixed) for name, x in tensors.items()}
    gradients: Sequence[Tensor] = ()
    with backend('reference'), FlopCounterMode(display=False, custom_mapping=_CORRECTED) as counter:
        outputs = _as_list(case.function(**shapes))
        if computed == BACKWARD:
            leaves = [x for x in shapes.values() if x.requires_grad]
            gradients = torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])
    moved = _bytes(shapes.values()) + _bytes(outputs)
    if gradients:
        moved = 2 * moved + _bytes(gradients)
    return [y.detach() for y in outputs], (moved, counter.get_total_flops())


def _convolution_backward_flops(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *arguments: Any, out_shape: Any = None
) -> int:
    """Of the gradients of input and weight that are asked for, from the shapes.

    PyTorch's own count is wrong where a convolution has groups, by as much as there are groups.
    """
    *_, asked_for = arguments
    return 2 * math.prod(weight) * grad[0] * math.prod(grad[2:]) * sum(asked_for[:2])


_CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward_flops}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
