"""What a format leaves of an update, and why: two checkpoints compared on disk, matrix by matrix, with no model loaded.

`tally` counts, `rates` says what a step can move, `causes` puts it into words, `prediction` says what came back where
as much was left; whether it does here is measured by an audit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillknows import defaults
from stillknows.analysis.bf16_updates import (
    EXPONENTS,
    HALF_STEP,
    count_exponents,
    least_rate,
    movable,
    rate_that_moves_half,
)
from stillknows.analysis.explain import cause
from stillknows.analysis.recovery_curve import SURVIVES, Curve
from stillknows.analysis.update_survival import Format, Tally, by_layer, compare, total
from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, torch
from stillknows.model import modelfiles, run_record
from stillknows.model.architecture import MatrixRole
from stillknows.model.ref import require_same_shapes
from stillknows.model.safetensors_index import StoredWeights, locate, stored
from stillknows.progress import progress, warn
from stillknows.specs import Specs, spelled
from stillknows.variants.compress import WEIGHTS, Chain, is_calibrated, links_of, matrices, parse_variant
from stillknows.variants.fitting import fitted

Json = dict[str, Any]


def diagnose(
    original: str,
    unlearned: str,
    formats: Specs = defaults.FORMATS,
    *,
    sizes: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare an unlearned checkpoint with its original under formats, without a forward pass.

    Args:
        original, unlearned: folders or hub names of models with safetensors weights.
        formats: formats of weights; those that look at inputs are refused. One named without
            options takes the largest usual group that fits; a default one that fits in none is left out.
        sizes: count which weights changed by their size, too.

    Returns a JSON-able object:
        run: what the unlearned model's run record says of its weights, learning rate and steps, and for weights kept as
            bfloat16 `movable` and `half_movable_lr` of `rates`; None without a record.
        formats: for each `Tally.shares`, a `cause` in words, the `recovery` to expect as a `Prediction`, `least_lr` of
            `rates` where the record has a rate and the format loses an update below half its step (else None), `sizes`
            of `Tally.by_size` (None unless asked for), and the shares by layer and tensor.

    Raises UserError, before anything is quantized: unknown or unsuitable formats, models that differ in shape, weights
    that are pickled, quantized or missing. While matrices are read: weights that are not finite, files that change.
    """
    wanted = {spec: _of_weights(spec) for spec in spelled(formats)}
    if not wanted:
        raise UserError("no format is named", f"leave `formats` out for {defaults.FORMATS}")
    found = [locate(name, trust_remote_code) for name in (original, unlearned)]
    sources = [ref.check() for ref in found]
    require_same_shapes(*sources)
    skeletons = [ref.skeleton for ref in sources]
    skeleton = max(skeletons, key=lambda model: sum(1 for _ in model.parameters()))  # with the fewest shared matrices
    chains = _fitted(skeleton, wanted, named=spelled(formats) != spelled(defaults.FORMATS))
    places = {spec: {layer.name: at for layer, at in matrices(skeleton, chain)} for spec, chain in chains.items()}
    layers = {layer.name: layer for chain in chains.values() for layer, _ in matrices(skeleton, chain)}
    before, after = (stored(*pair, layers.values()) for pair in zip(sources, skeletons, strict=True))
    settings, curve = _settings(sources[1].folder), Curve.published()
    exponents = torch.zeros(EXPONENTS, dtype=torch.int64) if _is_rounded(settings) else None
    with modelfiles.unchanged(*(source.folder for source in sources)):
        tallies = _count(before, after, chains, places, sizes, exponents)
    if settings is not None and exponents is not None:
        settings["movable"] = movable(exponents, settings["lr"])
        settings["half_movable_lr"] = rate_that_moves_half(exponents)
    return {
        "original": original,
        "unlearned": unlearned,
        "run": settings,
        "formats": [_diagnosis(spec, found, settings, curve) for spec, found in tallies.items()],
    }


def _fitted(skeleton: nn.Module, wanted: Mapping[str, Chain], *, named: bool) -> dict[str, Chain]:
    """Return the formats as they fit the model, by name; one that cannot is left out, and told, unless `named`."""
    chains = {}
    for spec, chain in wanted.items():
        try:
            name, fitting = fitted(skeleton, chain, spec, exact=named)
        except UserError as error:
            if named:
                raise
            because = str(error).partition("\n")[0].removeprefix(f"{spec}: ")
            warn(f"{spec} is left out: {because}")
            continue
        chains[name] = fitting
    return chains


def _of_weights(spec: str) -> Chain:
    chain = parse_variant(spec)
    if any(map(is_calibrated, chain)) or len(links_of(chain, WEIGHTS)) < len(chain):
        raise UserError(
            f"{spec} depends on what each layer is given, and no model is run here",
            f"leave it out; an audit with `variants` {spec} measures what it does",
        )
    return chain


def _count(
    before: Mapping[str, StoredWeights],
    after: Mapping[str, StoredWeights],
    chains: Mapping[str, Chain],
    places: Mapping[str, Mapping[str, MatrixRole | None]],
    sizes: bool,
    exponents: Tensor | None,
) -> dict[str, dict[str, Tally]]:
    """Return the tallies by format and tensor. One matrix of each model is in memory at a time.

    Args:
        exponents: what the original's weights are added to, as `count_exponents` counts them; None where not needed.
    """
    tallies: dict[str, dict[str, Tally]] = {spec: {} for spec in chains}
    with progress("diagnosing", len(before)) as advance:
        for name in before:
            before_OI, after_OI = (found[name].read() for found in (before, after))
            if exponents is not None:
                exponents += count_exponents(before_OI)
            formats = {spec: Format(chain, at[name]) for spec, chain in chains.items() if name in (at := places[spec])}
            for spec, tally in compare(before_OI, after_OI, formats, sizes=sizes).items():
                tallies[spec][name] = tally
            advance()
    return tallies


def _diagnosis(spec: str, tallies: Mapping[str, Tally], settings: Json | None, curve: Curve) -> Json:
    tally = total(tallies.values())
    shares, surviving = tally.shares(), tally.surviving
    return {
        "format": spec,
        **shares,
        "cause": cause(shares),
        "recovery": None if surviving is None else curve.predict(surviving, tally.weights)._asdict(),
        "least_lr": _least_lr(shares, settings),
        "sizes": tally.by_size(),
        "layers": [{"layer": layer, **parts.shares()} for layer, parts in by_layer(tallies).items()],
        "tensors": [{"tensor": name, **tally.shares()} for name, tally in tallies.items()],
    }


def _least_lr(shares: Json, settings: Json | None) -> float | None:
    surviving, steps = shares["surviving"], shares["update_steps"]
    if settings is None or not settings["lr"] or not settings["steps"]:
        return None
    if surviving is None or surviving >= SURVIVES or not steps or steps >= HALF_STEP:
        return None
    return least_rate(settings["lr"], steps)


def _settings(folder: Path) -> Json | None:
    """Return how weights were kept, the rate and the steps taken, as an unlearned model's run record has them."""
    record = run_record.read(folder) or {}
    settings, fit = record.get("settings"), record.get("fit")
    if not isinstance(settings, dict):
        return None
    steps = fit.get("steps") if isinstance(fit, dict) else None
    return {"weights": settings.get("weights"), "lr": _number(settings.get("lr")), "steps": _number(steps)}


def _number(value: object) -> float | None:
    """Return a finite number as it is, None for what no training has as its rate or its steps."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _is_rounded(settings: Json | None) -> bool:
    """Tell whether each step of a known rate was rounded to the nearest bfloat16."""
    return settings is not None and settings["weights"] == "bfloat16" and isinstance(settings["lr"], float)
