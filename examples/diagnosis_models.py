"""Models unlearned in many ways, and audited: what `examples/validate_diagnosis.py` is fitted and tested on.

    python examples/diagnosis_models.py [--seeds 0 1 2] [--originals runs/seeds] [--out runs/diagnosis]

The originals are those of `python examples/demo_seeds.py`. Every way of keeping weights, rate and method below is used
on each of them, and how much is forgotten is audited in formats that can be diagnosed, those that need no calibration
inputs. About ten minutes a seed on one core; a second run reuses what the first one finished.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from stillknows.auditing import audit
from stillknows.errors import UserError
from stillknows.experiments import demo
from stillknows.model import loading
from stillknows.progress import log, shown
from stillknows.registry import bind
from stillknows.reporting import report
from stillknows.reporting.build import build
from stillknows.store import build_once, locked
from stillknows.training.settings import Settings
from stillknows.types import ORIGINAL, Benchmark
from stillknows.unlearning import unlearn

RATES = {
    "bfloat16": (7e-6, 1e-5, 1.5e-5, 2e-5, 3e-5, 1e-4),
    "stochastic": (1.5e-5,),
    "float32": (7e-6, 3e-5),
}
METHODS = {"npo": demo.METHOD, "ga": "ga + nll:weight=1"}
VARIANTS = (
    "full,bf16,fp8,int8,nf4,fp4,int4,rtn:group=0,rtn:group=32,rtn:group=-1,rtn:bits=5,rtn:bits=3,hqq,mxfp4,nvfp4,"
    "gguf:Q4_0,gguf:Q5_0,gguf:Q8_0"
)


def runs(seed: int) -> Iterator[tuple[str, str, Settings]]:
    """Yield name, method and settings of every model that is made of one original."""
    for storage, rates in RATES.items():
        for rate in rates:
            settings = replace(demo.UNLEARNING, weights=storage, lr=rate, seed=seed)
            yield f"npo-{storage}-{rate:g}", METHODS["npo"], settings
    for rate in (1.5e-5, 3e-5):
        settings = replace(demo.UNLEARNING, weights="bfloat16", lr=rate, seed=seed, max_steps=200)
        yield f"ga-bfloat16-{rate:g}", METHODS["ga"], settings


def make(original: Path, benchmark: Benchmark, seed: int, out: Path) -> None:
    """Unlearn and audit every model of one seed; finished steps are not repeated."""
    models = {}
    for name, method, settings in runs(seed):
        models[name] = str(out / "models" / name)
        request = unlearn.UnlearnConfig(str(original), benchmark, method, settings)
        with build_once(Path(models[name]), asdict(request)) as folder:
            if folder:
                unlearn.unlearn(request, folder, overwrite=True)
    forgotten = replace(benchmark, splits=tuple(split for split in benchmark.splits if split.role == "forget"))
    request = audit.AuditConfig(
        original=str(original), subjects=models, benchmark=forgotten, variants=VARIANTS, metrics=demo.METRICS
    )
    report.write(build(audit.audit(request, out), "python examples/diagnosis_models.py"), out)


@shown()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--originals", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--out", type=Path, default=Path("runs/diagnosis"))
    arguments = parser.parse_args()
    loading.quiet()
    for seed in arguments.seeds:
        original = arguments.originals / str(seed) / "models" / ORIGINAL
        if not original.is_dir():
            raise UserError(f"there is no model {original}", f"python examples/demo_seeds.py --seeds {seed}")
        log(f"seed {seed}")
        with locked(arguments.out / str(seed)):
            make(original, bind("benchmark", f"world:seed={seed}")(), seed, arguments.out / str(seed))


if __name__ == "__main__":
    main()
