"""What an attack took and what it found on a model: a file beside the observations that were made under it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stillknows.auditing.loader import observations_file
from stillknows.auditing.prepared import Prepared
from stillknows.ledger import Ledger
from stillknows.store import replace_file, write_sealed
from stillknows.training.cost import CostMeter
from stillknows.variants.variant import Variant

ATTACK = "attack"  # in the place of a split's name


@dataclass(frozen=True)
class AttackRecord:
    """What an attack on one model took, the same for all models but for seconds, and what it found on this one.

    steps: of optimisation, asked for by its options.
    tokens, forward_tokens: read to make it, with and without gradients, padding included; flops: of these, an estimate
        (see cost.CostMeter).
    queries: answers that it asks for: one for each prompt, and each sample.
    seconds: to make it and to ask under it.
    found: what stands in a place of what is read: the text of tokens, or the file of vectors, in the audit's folder.
    """

    steps: int
    tokens: int
    forward_tokens: int
    flops: float
    queries: int
    seconds: float
    found: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Prepared, variant: Variant, meter: CostMeter | None, found: Mapping[str, str]) -> AttackRecord:
        """Return the record of an attack that was made while the meter ran, None where nothing is read to make it."""
        steps = sum(link.options.get("steps", 0) for link in variant.working if link.plugin.role == "attack")
        queries = sum(_queries(model, variant, split) for split in model.reading(variant).items)
        if meter is None:
            return cls(steps, 0, 0, 0.0, queries, 0.0, found)
        return cls(steps, meter.tokens, meter.forward_tokens, meter.flops, queries, meter.seconds, found)

    @classmethod
    def read(cls, ledger: Ledger, path: Path, key: str) -> AttackRecord | None:
        """Return a record of this key that an audit wrote; None for any other."""
        content = ledger.recall(path, key)
        return None if content is None else cls(**content["record"])

    def write(self, ledger: Ledger, path: Path, key: str) -> None:
        """Write the record."""
        write_sealed(path, {"key": key, "record": asdict(self)})
        ledger.add(path)


def record_file(ledger: Ledger, model: Prepared, variant: str) -> Path:
    """Return where the record of an attack on a model lies."""
    return observations_file(ledger.folder, model, variant, ATTACK).with_suffix(".json")


def readable(found: Mapping[str, Any], tokenizer: Any, ledger: Ledger, path: Path) -> dict[str, str]:
    """Return what an attack found as texts; vectors are written beside its record, and their file is named."""
    texts = {name: tokenizer.decode(value.tolist()) for name, value in found.items() if not value.is_floating_point()}
    vectors = {name: value.detach().cpu() for name, value in found.items() if value.is_floating_point()}
    if vectors:
        from safetensors.torch import save

        file, content = path.with_suffix(".safetensors"), save(vectors)
        replace_file(file, lambda partial: partial.write_bytes(content))
        ledger.add(file)
        texts |= dict.fromkeys(vectors, file.relative_to(ledger.folder).as_posix())
    return texts


def _queries(model: Prepared, variant: Variant, split: str) -> int:
    fields, decoding = model.observed(variant, split)
    asked = sum(bool(item.answer.example.prompt) for item in model.reading(variant).items[split])
    return asked * (("generations" in fields) + decoding.samples * ("samples" in fields))
