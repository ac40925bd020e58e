"""Numbers become 0-D tensors on the device, without a synchronisation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .arguments import check_number


class HyperTensors:
    """Turns the hyper-parameters of a step into tensors; a value that has not changed is reused.

    Raises:
        TypeError: a value is no number.
        ValueError: a value is negative or not finite.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, Tensor]] = {}
        self._like: tuple[torch.device, torch.dtype] | None = None

    def __call__(self, values: Mapping[str, float | Tensor], params: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors in the order of the sorted names."""
        if self._like is None:
            self._like = next(iter(params.values())).device, self.dtype(params)
        return [self._tensor(name, values[name], *self._like) for name in sorted(values)]

    def _tensor(self, name: str, value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(device, dtype)
        known = self._known.get(name)
        if known is None or known[0] != value:
            check_number(name.rpartition(".")[2], value)
            # NOTE: torch.full launches a kernel; torch.tensor would copy from the host and wait
            known = self._known[name] = (value, torch.full((), value, dtype=dtype, device=device))
        return known[1]

    @staticmethod
    def dtype(params: Mapping[str, Tensor]) -> torch.dtype:
        """The dtype of hyper-parameters: float64 where any parameter is."""
        wide = any(p.dtype == torch.float64 for p in params.values())
        return torch.float64 if wide else torch.float32
