"""Which kernels run, decided once when an editor is built."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from saeguard.axes import Fired, Stream
from saeguard.kernels import dense, reference, sliced, stream
from saeguard.kernels.dense_parts import DensePart
from saeguard.kernels.parts import Part
from saeguard.kernels.stream_parts import StreamPart

KernelName = Literal["sliced", "reference"]


@runtime_checkable
class Kernel(Protocol):
    """A function from what is read, what is edited, a part and the selected tokens to the change; see `sliced.edit`."""

    def __call__(self, x: Stream, y: Tensor, part: Part, selected: Fired) -> tuple[Tensor, Tensor, Tensor | None]: ...


@runtime_checkable
class DenseKernel(Protocol):
    """The same for dense ops; see `dense.edit`."""

    def __call__(self, x: Stream, y: Tensor, part: DensePart, selected: Fired) -> tuple[Tensor, Fired, Tensor]: ...


@runtime_checkable
class StreamKernel(Protocol):
    """The same for dense ops that need no activation; see `stream.edit`."""

    def __call__(self, x: Stream, y: Tensor, part: StreamPart, selected: Fired) -> tuple[Tensor, Fired, Tensor]: ...


@dataclass(frozen=True)
class Kernels:
    """One way to compute edits, of all kinds of ops."""

    sliced: Kernel
    dense: DenseKernel
    stream: StreamKernel


KERNELS: dict[KernelName, Kernels] = {
    "sliced": Kernels(sliced.edit, dense.edit, stream.edit),
    "reference": Kernels(reference.edit, reference.edit_dense, reference.edit_stream),
}  # fmt: skip


def pick(force: KernelName | None = None) -> Kernels:
    """The fast kernels; ``force`` is for tests and benchmarks."""
    return KERNELS[force or "sliced"]
