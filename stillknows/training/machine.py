"""What this machine has: memory that is free, and how fast it multiplies matrices."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from stillknows.lazy import enable_grad, torch

ROWS, SECONDS, MOST = (
    256,
    0.5,
    2**24,
)  # tokens of a product, how long it is repeated, and the most weights of its matrix


def process_memory() -> int | None:
    """Return the bytes that this process holds now; None where the system does not tell (all but Linux)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def free_memory(device: str) -> int | None:
    """Return the bytes that a device, or this machine, could still give to one process; None where it is not told."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return None


@enable_grad
def flops_per_second(inputs: int, outputs: int, device: str) -> float:
    """Return how many floating-point operations a second a linear layer of these sizes makes, forward and backward.

    It is measured, for about a second: 6 operations for each weight and token.
    """
    outputs = max(1, min(outputs, MOST // inputs))
    weight_OI = torch.randn(outputs, inputs, device=device, requires_grad=True)
    rows_TI = torch.randn(ROWS, inputs, device=device, requires_grad=True)

    def once() -> None:
        loss = torch.nn.functional.linear(rows_TI, weight_OI).sum()
        torch.autograd.grad(loss, [weight_OI, rows_TI])
        if device != "cpu":
            loss.item()  # waits until it is done

    once()
    started, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started < SECONDS:
        once()
        count += 1
    return 6 * inputs * outputs * ROWS * count / (time.perf_counter() - started)
