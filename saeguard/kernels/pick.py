"""Which kernel runs, decided once when an editor is built."""

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from saeguard.axes import Fired, Stream
from saeguard.kernels import reference, sliced
from saeguard.kernels.parts import Part

KernelName = Literal["sliced", "reference"]


@runtime_checkable
class Kernel(Protocol):
    """A function from what is read, what is edited, a part and the selected tokens to the change; see `sliced.edit`."""

    def __call__(self, x: Stream, y: Tensor, part: Part, selected: Fired) -> tuple[Tensor, Tensor, Tensor | None]: ...


KERNELS: dict[KernelName, Kernel] = {"sliced": sliced.edit, "reference": reference.edit}


def pick(force: KernelName | None = None) -> Kernel:
    """The fast kernel; ``force`` is for tests and benchmarks."""
    return KERNELS[force or "sliced"]
