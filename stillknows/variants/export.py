"""A model in a format, as the file that people deploy. What the file holds is read back and compared, bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stillknows import __version__
from stillknows.errors import UserError
from stillknows.lazy import Tensor, no_grad, torch
from stillknows.model import modelfiles, run_record, tokens
from stillknows.model.architecture import placed
from stillknows.model.finding import local_folders
from stillknows.model.layers import Linear, linears
from stillknows.model.packed import Kept, bitsandbytes, compressed_tensors, library
from stillknows.model.packed.gguf_writer import GgufWriter, check_architecture
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.progress import progress
from stillknows.registry import Bound
from stillknows.store import (
    RECORD,
    atomic_folder,
    locked,
    read_text,
    require_new,
    require_outside,
    write_sealed,
)
from stillknows.variants import compress, fitting
from stillknows.variants.calibrate import Statistics, sequences
from stillknows.variants.export_folder import FolderWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
IN_BFLOAT16 = ("mxfp4", "nvfp4")  # storage types that transformers unpacks to bfloat16, whatever the folder says
# What to ship instead of a format that no file holds.
NEAREST = {
    "awq": "gptq: awq has a scale for each input of each map, which files can only fold into the layers before",
    "hqq": "rtn:symmetric=false:group=64: hqq's zero points are not whole numbers",
    "full": "the folder itself, as it is",
    "bf16": "the model, saved in bfloat16 by transformers",
    "fp16": "the model, saved in float16 by transformers",
}


@dataclass(frozen=True)
class ExportConfig:
    """What to write. `model` is a local folder or a hub name, `spec` a chain of formats whose last is the file's."""

    model: str
    spec: str
    calibration: Path | None = None
    device: str = "cpu"
    allow_pickle: bool = False
    trust_remote_code: bool = False


class Writer(Protocol):
    """A kind of file in the making; `package` is the library of its own project."""

    package: str

    def check(self, model: PreTrainedModel, tokenizer: Any, name: str) -> None:
        """Raise UserError for a model, here without weights, that such a file cannot hold."""
        ...

    def add(self, layer: Linear, kept: Kept) -> None:
        """Take one matrix."""
        ...

    def write(self, model: PreTrainedModel, tokenizer: Any, folder: Path) -> Path:
        """Write the matrices and the rest of the model into a folder; return what to load."""
        ...


def export(request: ExportConfig, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Quantize a model and write it as a file of the format's own kind, with run.json; return that record.

    Every quantized matrix is read back from the file and equals, bit by bit, what an audit measures under the format.

    Raises UserError for bad input before the model is loaded: a format that no file holds (naming one that can be
    shipped), a model that the kind of file cannot hold, calibration text that is missing or not needed, and an `out`
    that holds a model (unless `overwrite`) or lies in the model's folder.
    """
    chain = compress.parse_variant(request.spec)
    _check_kinds(chain, request.spec)
    _check_calibration(request, chain)
    _require_free(request, out, overwrite)
    options = LoadOptions(
        request.device, allow_pickle=request.allow_pickle, trust_remote_code=request.trust_remote_code
    )
    source = ModelRef.open(request.model, options)
    if compress.is_placed(chain[-1]):  # which its files tell without torch
        library(GgufWriter.package)
        check_architecture(str(source.files.said(CONFIG).get("model_type")), source.name)
    writer = _writer(storage_type(chain, request.spec), chain, source)
    library(writer.package.replace("-", "_"))
    skeleton, tokenizer = source.check().skeleton, source.tokenizer
    writer.check(skeleton, tokenizer, source.name)
    fitting.check(skeleton, chain, request.spec)
    ids_NL = _calibration(request, tokenizer, source.context_length)
    require_outside(out, source.folders)
    with locked(out):
        _require_free(request, out, overwrite)
        return _run(request, chain, source, writer, ids_NL, out)


def _require_free(request: ExportConfig, out: Path, overwrite: bool) -> None:
    """Raise UserError for an `out` that lies in the model's folder, or holds a model that is to be kept."""
    require_outside(out, local_folders(request.model))
    for path in (out / RECORD, *modelfiles.present(out)):
        require_new(path, overwrite=overwrite)


def text(record: Mapping[str, Any]) -> str:
    """Say in words what was written."""
    return (
        f"{record['matrices']} matrices as {record['form']}, {record['bytes'] / 2**20:.1f} MiB in all; "
        f"each was read back and equals what an audit measures under {record['quantize']}"
    )


def _check_kinds(chain: compress.Chain, spec: str) -> None:
    """Raise UserError for formats of something else than weights, and for those known to be held by no file."""
    strange = [link.spec for link in chain if "weight_OI" not in link.plugin.needs]
    if strange:
        raise UserError(f"{spec}: a file holds weights, and {strange[0]} is none of their formats", "leave it out")
    if chain[-1].plugin.name in NEAREST:
        raise _not_stored(chain[-1], spec)


def _not_stored(link: Bound, spec: str) -> UserError:
    nearest = NEAREST.get(link.plugin.name, "nf4, rtn, gptq, fp8, nvfp4, mxfp4, int8 or gguf")
    return UserError(f"{spec}: no file that others load holds {link.plugin.name}", f"ship {nearest}")


def storage_type(chain: compress.Chain, spec: str) -> str:
    """Return how files keep what a chain's last format makes. UserError for a format that no file holds."""
    _check_kinds(chain, spec)
    last = chain[-1]
    group = max(int(last.options.get("group", 0)), 0)
    inputs = group * -(-256 // group) if group else 256
    row, nothing = torch.zeros(1, inputs), Statistics(torch.eye(inputs), torch.ones(inputs))
    stored = compress.quantize(row, (last,), nothing).stored
    known = (*compressed_tensors.FORMATS, *bitsandbytes.TYPES)
    if stored is None:
        raise _not_stored(last, spec)
    if stored.type not in known and not compress.is_placed(last):
        bits = 4 if int(stored.type.removeprefix("int")) < 4 else 8
        raise UserError(
            f"{spec}: {stored.type} is loaded by nothing that people deploy with",
            f"ship bits={bits}: 4 and 8 bits have kernels",
        )
    if last.options.get("group") == -1:
        raise UserError(f"{spec}: integers with one scale per matrix are not loaded", "ship group=0: one per channel")
    return stored.type


def _writer(kind: str, chain: compress.Chain, source: ModelRef) -> Writer:
    if compress.is_placed(chain[-1]):
        return GgufWriter(str(chain[-1].options["file"]), Path(source.name).resolve().name)
    return FolderWriter(kind, torch.bfloat16 if kind in IN_BFLOAT16 else _dtype(source))


def _dtype(source: ModelRef) -> torch.dtype:
    """Return the type that a checkpoint says its weights have, float32 where it says none."""
    config = source.files.said(CONFIG)
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)


def _check_calibration(request: ExportConfig, chain: compress.Chain) -> None:
    """Raise UserError for a calibration text that is needed and absent, or given and not needed."""
    needed = [link for link in chain if compress.is_calibrated(link)]
    if not needed and request.calibration:
        raise UserError(f"{request.spec} looks at no inputs", "leave `calibration` out")
    other = [name for link in needed if (name := link.options["calibration"]) != "text"]
    if other:
        raise UserError(
            f"{request.spec}: there is no split {other[0]!r} here", "calibrate on a file with `calibration`"
        )
    if needed and request.calibration is None:
        raise UserError(f"{request.spec} looks at inputs, and there is no text", "give one with `calibration`")
    if request.calibration:
        read_text(request.calibration)


def _calibration(request: ExportConfig, tokenizer: Any, context: int) -> Tensor | None:
    """Return calibration tokens [N, L], the same that an audit with this text takes; None where none are needed."""
    if request.calibration is None:
        return None
    text = read_text(request.calibration)
    return sequences([text], tokenizer, context, place=str(request.calibration))


def _run(
    request: ExportConfig,
    chain: compress.Chain,
    source: ModelRef,
    writer: Writer,
    ids_NL: Tensor | None,
    out: Path,
) -> dict[str, Any]:
    subject = source.load()
    with atomic_folder(out, modelfiles.present(out)) as folder:
        digests = _pack(subject.model, chain, ids_NL, writer, request.spec)
        rest = _rest(subject.model, digests)
        path = writer.write(subject.model, subject.tokenizer, folder)
        tokenizer = subject.tokenizer
        del subject  # before the file is loaded
        form = _compare(path, digests, rest, tokenizer)
        record = _record(request, source, writer, form, path, folder, len(digests))
        return write_sealed(folder / RECORD, record)


@no_grad
def _pack(
    model: PreTrainedModel, chain: compress.Chain, ids_NL: Tensor | None, writer: Writer, spec: str
) -> dict[str, str]:
    """Quantize a model matrix by matrix; return what identifies each one's values, by layer."""
    digests = {}
    with progress(f"quantizing to {spec}", sum(1 for _ in compress.matrices(model, chain))) as advance:
        for layer, form in compress.forms(model, chain, ids_NL):
            if form.stored is None:
                raise ValueError(f"{spec} stores nothing of {layer.name}")
            writer.add(layer, Kept(form.codes_OI, *form.stored))
            digests[layer.name] = _digest(form.values_OI)
            if ids_NL is not None:
                layer.write(form.values_OI)  # what comes after is calibrated on it
            advance(1, layer.name)
    return digests


def _digest(values_OI: Tensor) -> str:
    """Identify values; −0 counts as 0, which formats do not tell apart."""
    return hashlib.sha256((values_OI.detach().float().cpu() + 0.0).contiguous().numpy().tobytes()).hexdigest()


def _rest(model: PreTrainedModel, digests: Mapping[str, str]) -> dict[str, str]:
    """Return what identifies each weight that is not quantized, by name; one that two layers share under its first."""
    quantized = {id(model.get_parameter(f"{layer}.weight")) for layer in digests}
    return {key: _digest(value) for key, value in model.named_parameters() if id(value) not in quantized}


def _compare(path: Path, digests: Mapping[str, str], rest: Mapping[str, str], tokenizer: Any) -> str:
    """Read a file as an audit does; return its form in words. Anything that is not what was measured is a fault."""
    source = ModelRef.open(str(path), LoadOptions(trust_remote_code=True), packed=True)  # whose code has just run
    subject = source.load()
    model = subject.model
    found = {layer.name: layer for layer in (*linears(model), *(layer for layer, _ in placed(model)))}
    wrong = [name for name, digest in digests.items() if _digest(found[name].read()) != digest]
    wrong += [name for name, digest in rest.items() if _digest(model.get_parameter(name)) != digest]
    wrong += tokens.differences(tokenizer, subject.tokenizer)
    if wrong:
        raise RuntimeError(f"{len(wrong)} parts were not written as they were measured, the first: {wrong[0]}")
    return source.packing


def _record(
    request: ExportConfig,
    source: ModelRef,
    writer: Writer,
    form: str,
    path: Path,
    folder: Path,
    matrices: int,
) -> dict[str, Any]:
    """Everything that is needed to make the file again."""
    return {
        "stillknows": __version__,
        "model": request.model,
        "fingerprint": source.fingerprint,
        "quantize": request.spec,
        "file": path.name if path != folder else None,
        "form": form,
        "calibration": str(request.calibration) if request.calibration else None,
        "matrices": matrices,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "versions": run_record.versions() | {writer.package: version(writer.package)},
    }
