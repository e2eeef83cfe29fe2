"""Adapters written as peft's folders: what a run added to the linear maps of its base, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillknows.errors import UserError
from stillknows.lazy import Tensor, nn, no_grad, torch
from stillknows.model import modelfiles, tokens
from stillknows.model.adapters import PREFIX, WEIGHTS, LowRankUpdate
from stillknows.model.layers import linears
from stillknows.model.modelfiles import ADAPTER
from stillknows.model.ref import LoadOptions, ModelRef
from stillknows.store import RECORD, atomic_folder, write_sealed, write_text

CLOSE = 1e-5  # of a layer's largest weight: how far what is read back may be from what was trained


Updates = Mapping[str, LowRankUpdate]  # by the names of layers


def save(
    model: nn.Module, updates: Updates, source: ModelRef, tokenizer: Any, out: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """Write what a run added to a model as an adapter of its base, with its record; return that.

    An adapter that the model was made of is added to: [s·B, B']·[A; A'] is one update of the sum of their ranks. All
    get the largest rank, filled up with zeros, and the scale 1.

    Args:
        model: after the run, updates merged; what is read back is compared with it.

    Raises UserError where what is read back is not that model.
    """
    before = source.adapter.updates() if source.adapter is not None else {}
    joined = {name: _joined(before.get(name), updates.get(name)) for name in {**before, **updates}}
    rank = max(update.a_RI.shape[0] for update in joined.values())
    base = source.base or source
    with atomic_folder(out, modelfiles.present(out)) as folder:
        _write_weights(folder / WEIGHTS, joined, rank)
        write_text(folder / ADAPTER, json.dumps(_settings(model, base, sorted(joined), rank), indent=2) + "\n")
        tokenizer.save_pretrained(folder)
        _require_written(model, tokenizer, folder)
        return write_sealed(folder / RECORD, record)


def _joined(first: LowRankUpdate | None, second: LowRankUpdate | None) -> LowRankUpdate:
    found = [update for update in (first, second) if update is not None]
    return LowRankUpdate(torch.cat([u.b_OR for u in found], 1), torch.cat([u.a_RI for u in found], 0))


def _write_weights(path: Path, updates: Updates, rank: int) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, (b_OR, a_RI) in updates.items():
        more = rank - a_RI.shape[0]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(a_RI, (0, 0, 0, more)).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(b_OR, (0, more)).contiguous()
    save_file(tensors, path, {"format": "pt"})


def _settings(model: nn.Module, base: ModelRef, names: list[str], rank: int) -> dict[str, Any]:
    """Return adapter_config.json: with α = r the scale is 1."""
    turned = {layer.name for layer in linears(model) if layer.transposed}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path.resolve()) if Path(base.name).expanduser().exists() else base.name,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": names,
        "fan_in_fan_out": bool(turned & set(names)),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


@no_grad
def _require_written(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Read an adapter back, merged into its base. Raises UserError unless it is this model and this tokenizer."""
    target = ModelRef.open(str(folder), LoadOptions(trust_remote_code=True)).load()
    wanted, found = model.state_dict(), target.model.state_dict()
    wrong = [key for key in wanted if key not in found or not _close(found[key], wanted[key])]
    wrong += [key for key in found if key not in wanted] + tokens.differences(tokenizer, target.tokenizer)
    if wrong:
        raise UserError(
            f"the adapter was not written as it should be: {len(wrong)} parts differ, the first: {wrong[0]}",
            "save the whole model: leave out `save`; please report this",
        )


def _close(found: Tensor, wanted: Tensor) -> bool:
    wanted = wanted.float().cpu()
    return found.shape == wanted.shape and bool((found.cpu() - wanted).abs().max() <= CLOSE * wanted.abs().max())
