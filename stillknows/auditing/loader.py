"""The models of an audit, loaded one at a time, and where their observations lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stillknows.auditing.asking import Reader
from stillknows.auditing.prepared import Prepared
from stillknows.lazy import Tensor, nn
from stillknows.model import adapters
from stillknows.model.ref import ModelRef
from stillknows.model.target import LocalTarget
from stillknows.observations import observations_path
from stillknows.variants import compress

OBSERVATIONS_VERSION = 4  # raise when observe() or its inputs change their meaning


def observations_file(out: Path, model: Prepared, variant: str, split: str) -> Path:
    """Return where the observations of a model on a split in a variant lie."""
    return observations_path(out, model.label, variant, split, is_defended=model.defence is not None)


class Loader:
    """Keeps the model that was asked for last, so that models are loaded when needed, once, and one at a time.

    All of them get the original's tokenizer and end generations as it does. Updates are compared with a copy of the
    original's weights that `chains` apply to, kept as well once it is needed.
    """

    def __init__(self, reader: Reader, chains: Sequence[compress.Chain]) -> None:
        self.reader, self.chains = reader, chains
        self.latest: LocalTarget | None = None
        self.originals: dict[str, Tensor] = {}
        self.others: dict[str, nn.Module] = {}
        self.adapters: dict[str, adapters.Parts] = {}

    def __call__(self, model: Prepared) -> LocalTarget:
        if self.latest is None or self.latest.name != model.label:
            self.latest = None
            found = model.ref.load(model.label)
            self.latest = replace(found, tokenizer=self.reader.tokenizer)
            if found.model.generation_config is not None:
                found.model.generation_config.eos_token_id = sorted(self.reader.ends)
        return self.latest

    def beside(self, ref: ModelRef) -> nn.Module:
        """Return a model that attacks on others need, which is not changed; it is kept."""
        if ref.fingerprint not in self.others:
            self.others[ref.fingerprint] = ref.load().model
        return self.others[ref.fingerprint]

    def adapter(self, ref: ModelRef) -> adapters.Parts | None:
        """Return what the adapter adds that a model is; None for a model that is none."""
        if ref.adapter is not None and ref.fingerprint not in self.adapters:
            self.adapters[ref.fingerprint] = adapters.parts(ref)
        return self.adapters.get(ref.fingerprint)

    def original_weights(self, original: Prepared) -> dict[str, Tensor]:
        self.originals = self.originals or compress.weights(self(original).model, *self.chains)
        return self.originals
