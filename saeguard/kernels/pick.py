"""Which kernel runs, decided once when an editor is built."""

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from saeguard.axes import Fired, Stream
from saeguard.kernels import reference, sliced
from saeguard.kernels.parts import Part

KernelName = Literal["sliced", "reference"]


@runtime_checkable
class Kernel(Protocol):
    """A function from x, a part and the selected tokens to the change of x and of each column's activation."""

    def __call__(self, x: Stream, part: Part, selected: Fired) -> tuple[Stream, Tensor]: ...


KERNELS: dict[KernelName, Kernel] = {"sliced": sliced.edit, "reference": reference.edit}


def pick(force: KernelName | None = None) -> Kernel:
    """The fast kernel; ``force`` is for tests and benchmarks."""
    return KERNELS[force or "sliced"]
