"""Swap parts of a module (or attributes of an object) for a while, and put them back by whatever exception. Knows no
LoRA."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Loan = tuple[dict[str, Any], str, Any]
"""(a dict such as module._modules, key, the original value): Any, because that is a module or a parameter."""

NOTHING = object()  # the original value where the key was missing


class InPlaceOf(nn.Module):
    """A substitute for a linear layer, with the attributes that pipelines and text encoders read of one."""

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


def lend(loans: list[Loan], slots: dict[str, Any], key: str, substitute: Any) -> None:
    """Set slots[key] to the substitute until lending() ends."""
    loans.append((slots, key, slots[key]))  # before the swap, so that an exception in between loses nothing
    slots[key] = substitute


def clear(loans: list[Loan], slots: dict[str, Any], key: str) -> None:
    """Remove slots[key], if it is there, until lending() ends: then it is as it was, whatever was written since."""
    loans.append((slots, key, slots.get(key, NOTHING)))
    slots.pop(key, None)
