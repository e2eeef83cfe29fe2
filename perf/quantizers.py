"""Formats against the libraries that they are named after: time and memory for one matrix, each way in its own process.

    python -m perf.quantizers [--outputs 1024] [--inputs 2048] [--repeat 3] [--json FILE]

Every way turns float32 weights into codes and back into values, on one core; memory is what the process held at most
beyond what it held before, as Linux counts it. GPTQ is given the same Hessian on both sides. AWQ has no counterpart:
llm-compressor's searches with whole blocks of a model, not with one matrix. Libraries that are not installed are named;
`make oracles` installs them into an environment of their own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perf.memory import forget_peak, peak
from stillknows.registry import bind

TOKENS = 2048  # of calibration
GROUP, BLOCK = 128, 64
Measured = tuple[float, float]  # seconds, MB


class Case(NamedTuple):
    """Weights [O, I], and of calibration inputs the mean of x·xᵀ and of |x|."""

    weight_OI: Tensor
    hessian_II: Tensor
    magnitudes_I: Tensor


class Way(NamedTuple):
    """A library's function for a format. `package` and `module` are what it is installed and imported as."""

    format: str
    package: str
    module: str
    function: Callable[[Case], object]


def make_case(outputs: int, inputs: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(TOKENS, inputs, generator=generator) * torch.randn(inputs, generator=generator).exp()
    x_TI += 0.5 * x_TI.roll(1, 1)
    weight_OI = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return Case(weight_OI, x_TI.T @ x_TI / TOKENS, x_TI.abs().mean(0))


def ours(spec: str) -> Callable[[Case], object]:
    link = bind("transform", spec)
    return lambda case: link(**{name: getattr(case, name) for name in link.plugin.needs})


def in_bitsandbytes(kind: str) -> Callable[[Case], object]:
    def run(case: Case) -> object:
        from bitsandbytes import functional

        if kind == "int8":
            codes, scales, _ = functional.int8_vectorwise_quant(case.weight_OI)
            return functional.int8_vectorwise_dequant(codes, scales)
        packed, state = functional.quantize_4bit(case.weight_OI, blocksize=BLOCK, quant_type=kind)
        return functional.dequantize_4bit(packed, state)

    return run


def _even_grid(case: Case, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """Return arguments, scales and zeros of compressed-tensors' 4-bit grid."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP, **options)  # type: ignore[arg-type]
    blocks = case.weight_OI.unflatten(1, (-1, GROUP))
    return arguments, *calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)


def in_compressed_tensors(case: Case) -> object:
    from compressed_tensors.quantization import fake_quantize  # type: ignore[import-not-found]

    arguments, scale, zero = _even_grid(case)
    return fake_quantize(case.weight_OI, scale, zero, arguments)


def in_llm_compressor(case: Case) -> object:
    from compressed_tensors.quantization import ActivationOrdering
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight  # type: ignore[import-not-found]

    arguments, scale, zero = _even_grid(case, actorder=ActivationOrdering.WEIGHT)
    copies = case.weight_OI[None].clone(), case.hessian_II[None].clone()  # it writes into both
    return quantize_weight(*copies, scale[None], zero[None], None, arguments)


def in_hqq(case: Case) -> object:
    from hqq.core.quantize import Quantizer  # type: ignore[import-not-found]

    codes, meta = Quantizer.quantize(case.weight_OI, nbits=4, group_size=BLOCK, axis=1, round_zero=True, device="cpu")
    return Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})


FORMATS = ("rtn:grid=full", "gptq", "awq", "hqq", "int8", "nf4", "fp4")
WAYS = (
    *(Way(spec.partition(":")[0], "stillknows", "stillknows", ours(spec)) for spec in FORMATS),
    *(Way(kind, "bitsandbytes", "bitsandbytes", in_bitsandbytes(kind)) for kind in ("int8", "nf4", "fp4")),
    Way("rtn", "compressed-tensors", "compressed_tensors", in_compressed_tensors),
    Way("gptq", "llmcompressor", "llmcompressor", in_llm_compressor),
    Way("hqq", "hqq", "hqq", in_hqq),
)


def measure(way: Way, case: Case) -> Measured:
    """Return processor seconds and MB of memory that a way takes, in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(way, case, sender))
    process.start()
    found = receiver.recv()
    process.join()
    return found


def _in_process(way: Way, case: Case, sender: Any) -> None:
    few = slice(0, GROUP)
    way.function(Case(case.weight_OI[:8, few], case.hessian_II[few, few], case.magnitudes_I[few]))  # imports
    before = forget_peak()
    started = time.process_time()
    way.function(case)
    seconds = time.process_time() - started
    sender.send((seconds, peak() - before))


def summary(found: dict[tuple[str, str], list[Measured]], weights: int) -> list[dict[str, Any]]:
    """Return a row for each way with its runs, medians of them, and the median ratio of its time to ours."""
    rows = []
    for (name, package), runs in found.items():
        seconds, memory = (statistics.median(column) for column in zip(*runs, strict=True))
        ratios = [run[0] / own[0] for run, own in zip(runs, found[name, "stillknows"], strict=True)]
        rows.append(
            {
                "format": name,
                "library": package,
                "seconds_per_million": seconds / weights * 1e6,
                "peak_mb": memory,
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "runs": runs,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'format':>6} {'library':>18} {'s per million weights':>22} {'peak MB':>8} {'ratio':>6}"]
    for row in rows:
        numbers = f"{row['seconds_per_million']:22.4f} {row['peak_mb']:8.0f} {row['ratio']:6.2f}"
        lines.append(f"{row['format']:>6} {row['library']:>18} {numbers}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=1024)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write raw figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads would not survive the fork
    missing = {way.package for way in WAYS if importlib.util.find_spec(way.module) is None}
    for package in sorted(missing):
        print(f"{package} is not installed: pip install {package}")
    installed = [way for way in WAYS if way.package not in missing]
    for module in sorted({way.module for way in installed}):
        importlib.import_module(module)
    case = make_case(arguments.outputs, arguments.inputs)
    found: dict[tuple[str, str], list[Measured]] = {(way.format, way.package): [] for way in installed}
    for _ in range(arguments.repeat):
        for way in installed:
            found[way.format, way.package].append(measure(way, case))
    rows = summary(found, case.weight_OI.numel())
    print(table(rows))
    if arguments.json:
        sizes = {"outputs": arguments.outputs, "inputs": arguments.inputs, "tokens": TOKENS, "threads": 1}
        packages = sorted({"torch", *(way.package for way in installed)})
        versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
        figures = {"rows": rows, "runs": ["seconds", "peak MB"], "sizes": sizes, "versions": versions}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
