"""What stands in the place of something else for a while, and goes again by whatever exception. Knows no LoRA."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Loan = tuple[dict[str, Any], str, Any]
"""(a module's own table of parts, key, what was there): Any, because parts are modules or parameters."""

NOTHING = object()  # in the place of what was there


class InPlaceOf(nn.Module):
    """What stands in the place of a linear layer, and has of it what pipelines and text encoders ask a linear for."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


@contextmanager
def lending() -> Iterator[list[Loan]]:
    """A list of loans, all undone on leaving, by whatever exception."""
    loans: list[Loan] = []
    try:
        yield loans
    finally:
        # Cog injects a cancellation at any bytecode that begins a call or ends a loop, here too. Hence no function, and
        # one more round of what was interrupted.
        interruption: BaseException | None = None
        while loans:
            try:
                while loans:
                    slots, key, original = loans[-1]
                    if original is NOTHING:
                        slots.pop(key, None)
                    else:
                        slots[key] = original
                    loans.pop()
            except BaseException as error:
                interruption = error
        if interruption is not None:
            raise interruption


def lend(loans: list[Loan], slots: dict[str, Any], key: str, loan: Any) -> None:
    """Put something in the place of what slots hold under the key, until lending() ends."""
    loans.append((slots, key, slots[key]))  # before the swap, so that an exception in between loses nothing
    slots[key] = loan


def clear(loans: list[Loan], slots: dict[str, Any], key: str) -> None:
    """Leave the key to whoever writes there, until lending() ends: then it is as it was, or not there if it was not."""
    loans.append((slots, key, slots.get(key, NOTHING)))
    slots.pop(key, None)
