"""What an audit or a run has written and later trusts: changes to it are noticed, each in the command that reads it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORLD, World

from stillknows import store
from stillknows.errors import UserError
from stillknows.observations import load_observations, observations_digest, save_observations
from stillknows.reporting import report

Case = Callable[..., Any]
FLIPS = 150  # single bits that are flipped in a file, one at a time


@pytest.fixture(scope="module")
def honest(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an audit of the never-taught model, and its model with a run record."""
    from stillknows.cli import main

    out = tmp_path_factory.mktemp("honest")
    shutil.copytree(world.control, out / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["stillknows", *map(str, command(out, world))])
        with pytest.raises(SystemExit):
            main()
    return out


def command(folder: Path, world: World) -> list[object]:
    models = ["audit", folder / "model", "--original", world.original, "--control", world.control]
    metrics = ["--metrics", "answer_probability,extraction_strength", "--variants", "full,int8"]
    return [*models, "--benchmark", WORLD, "--out", folder / "audit", *metrics, "--overwrite"]


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(honest, tmp_path / "copy"))


def numbers(folder: Path) -> list[Any]:
    """Return all that the audit has measured and decided."""
    return [(s.verdict, s.observations, s.cells) for s in report.read(folder / "audit").subjects]


def flipped(file: Path) -> list[bytes]:
    """Return the content of a file with one bit flipped, at places all over it."""
    whole, found = file.read_bytes(), []
    for place in random.Random(0).choices(range(8 * len(whole)), k=FLIPS):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        found.append(bytes(content))
    return found


@pytest.mark.parametrize("name", ["audit/report.json", "model/run.json"])
def test_a_flipped_bit_in_a_record_is_refused(name: str, folder: Path) -> None:
    file, seen = folder / name, 0
    before = store.read_sealed(file)
    for content in flipped(file):
        file.write_bytes(content)
        try:
            harmless = store.read_sealed(file) == before  # as another escape for the same letter
        except UserError as error:
            seen += str(file) in str(error)
        else:
            seen += harmless
    assert seen == FLIPS


def test_a_flipped_bit_in_what_is_remembered_is_measured_again(folder: Path) -> None:
    [damage] = folder.glob("audit/observations/model/int8/weights.json")
    key = json.loads(damage.read_text())["key"]
    before = store.recall(damage, key)
    assert before is not None
    for content in flipped(damage):
        damage.write_bytes(content)
        assert store.recall(damage, key) in (before, None)
    [seen] = folder.glob("audit/observations/model/int8/forget.npz")
    expected = observations_digest(known) if (known := load_observations(seen)) else ""
    for content in flipped(seen):
        seen.write_bytes(content)
        found = load_observations(seen)
        assert found is None or observations_digest(found) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved | {"layers": None},
        lambda saved: saved | {"whole": saved["whole"] | {"surviving": 1.0}},
        lambda saved: {"key": saved["key"]},
        lambda saved: [saved],
        lambda saved: {name: value for name, value in saved.items() if name != "digest"},
    ],
)
def test_edited_numbers_of_weights_are_measured_again(change: Case, folder: Path, world: World, cli: Case) -> None:
    before = numbers(folder)
    [file] = folder.glob("audit/observations/model/int8/weights.json")
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert cli(*command(folder, world)).code == 0
    assert numbers(folder) == before


def test_edited_observations_are_made_again(folder: Path, world: World, cli: Case) -> None:
    before = numbers(folder)
    seen = folder / "audit" / "observations"
    shutil.copy(seen / "original" / "full" / "forget.npz", seen / "model" / "full" / "forget.npz")
    assert cli(*command(folder, world)).code == 0
    assert numbers(folder) == before


@pytest.mark.parametrize("how", ["exchanged", "damaged"])
def test_a_report_beside_other_observations_is_refused(how: str, folder: Path, cli: Case) -> None:
    """Also where their own digest and key are right."""
    [file] = folder.glob("audit/observations/model/full/forget.npz")
    others = load_observations(folder / "audit" / "observations" / "original" / "full" / "forget.npz")
    assert others is not None
    if how == "exchanged":
        save_observations(file, "any key", others)
    else:
        file.write_bytes(b"")
    require_refused(cli, folder, "forget.npz is not what report.json was made of")


def require_refused(cli: Case, folder: Path, why: str) -> None:
    """All commands that read an audit's result end with this message, which says what to type."""
    for command in ("report", "explain", "score"):
        ran = cli(command, folder / "audit")
        assert (ran.code, ran.out) == (2, "")
        assert why in ran.err
        assert "--overwrite" in ran.err


@pytest.mark.parametrize(
    "other",
    [
        "original/full/forget",
        "model/int8/forget",
        "model/full/retain",
        "an audit before",
        "the same under another key",
    ],
)
def test_exchanged_observations_are_refused_and_made_again(other: str, folder: Path, world: World, cli: Case) -> None:
    """Of another model, variant, split or audit, under the key that the audit asks for and with the right digest."""
    before, seen = numbers(folder), folder / "audit" / "observations"
    file = seen / "model" / "full" / "forget.npz"
    with np.load(file) as content:
        key = json.loads(content["meta"].tobytes())["key"]
    mine = load_observations(file)
    assert mine is not None
    if other == "an audit before":
        content = replace(mine, generations=mine.answers)
    elif other == "the same under another key":
        content, key = mine, "another"
    else:
        content = load_observations(seen / f"{other}.npz")
        assert content is not None
    save_observations(file, key, content)
    require_refused(cli, folder, "model/full/forget.npz is not what report.json was made of")
    ran = cli(*command(folder, world))
    assert ran.code == 0
    assert ("measured again" in ran.err) == (key != "another")
    assert numbers(folder) == before
    assert cli("report", folder / "audit").code == 0


def test_a_cell_that_was_deleted_is_refused_and_made_again(folder: Path, world: World, cli: Case) -> None:
    before = numbers(folder)
    (folder / "audit" / "observations" / "control" / "int8" / "retain.npz").unlink()
    require_refused(cli, folder, "control/int8/retain.npz is missing, and report.json was made of it")
    assert cli(*command(folder, world)).code == 0
    assert numbers(folder) == before


def test_an_edited_report_with_a_digest_of_its_own_is_refused(folder: Path, cli: Case) -> None:
    file = folder / "audit" / "report.json"
    content = store.read_sealed(file)
    content["subjects"][0]["cells"][0] |= {"value": 0.0, "low": 0.0, "high": 0.0}
    store.write_sealed(file, content)
    require_refused(cli, folder, "report.json is not the report that ledger.json names")


def test_an_audit_without_its_ledger_is_refused_and_measured_again(folder: Path, world: World, cli: Case) -> None:
    before, file = numbers(folder), folder / "audit" / "ledger.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"report": "0"}))
    require_refused(cli, folder, "ledger.json was changed after it was written")
    file.unlink()
    require_refused(cli, folder, "has no ledger.json")
    ran = cli(*command(folder, world))
    assert ran.code == 0
    assert "measured again" in ran.err
    assert numbers(folder) == before


def test_what_an_audit_was_asked_is_kept_and_can_be_asked_again(folder: Path, world: World) -> None:
    from stillknows.auditing.request import asked_again, described
    from stillknows.ledger import Ledger

    kept = Ledger.read(folder / "audit").request
    again = asked_again(kept)
    assert described(again) == kept
    assert (again.original, again.benchmark, again.variants) == (str(world.original), world.benchmark, ("full", "int8"))
    with pytest.raises(UserError, match="has other items than those that were audited"):
        asked_again(kept | {"benchmark": kept["benchmark"] | {"items": "0"}})
    with pytest.raises(UserError, match="cannot be made again"):
        asked_again(kept | {"benchmark": kept["benchmark"] | {"spec": "jsonl:forget=gone,retain=gone"}})


# An audit again


def replayed(folder: Path, cli: Case, cells: int) -> Any:
    """Certify what the folder holds, whoever wrote it, and replay it."""
    audit, out = folder / "audit", folder / "certificate.json"
    ran = cli("certify", audit, "--key", folder / "key.pem", "--new-key", "--out", out)
    assert ran.code == 0, ran.err
    return cli("verify", out, folder / "model", "--audit", audit, "--replay", "--cells", cells)


def test_an_honest_audit_is_replayed(folder: Path, cli: Case) -> None:
    ran = replayed(folder, cli, 2)
    assert ran.code == 0, ran.err
    assert "fits: the report, made again from the observations" in ran.out
    assert ran.out.count("observed again: ") == 2


def test_a_report_that_says_otherwise_than_the_observations_is_refused(folder: Path, cli: Case) -> None:
    """All digests are right, the ledger's and the certificate's too."""
    from stillknows.ledger import Ledger

    file = folder / "audit" / "report.json"
    content = store.read_sealed(file)
    cells = content["subjects"][0]["cells"]
    number = next(i for i, cell in enumerate(cells) if "value" in cell)
    cells[number]["value"] += 0.01
    Ledger.read(folder / "audit").close(store.write_sealed(file, content))
    ran = replayed(folder, cli, 0)
    assert (ran.code, ran.out) == (6, "")
    assert f"report.json says otherwise than the observations: subjects.0.cells.{number}.value" in ran.err


def test_observations_that_nobody_made_are_refused(folder: Path, cli: Case) -> None:
    """The whole audit was made again from them, so that everything fits but the model."""
    from stillknows.auditing.audit import audit
    from stillknows.auditing.request import asked_again
    from stillknows.ledger import Ledger
    from stillknows.reporting.build import build

    out = folder / "audit"
    ledger, file = Ledger.read(out), out / "observations" / "model" / "full" / "forget.npz"
    seen = load_observations(file)
    assert seen is not None
    assert seen.log_probs is not None
    with np.load(file) as content:
        key = json.loads(content["meta"].tobytes())["key"]
    save_observations(file, key, replace(seen, log_probs=tuple(row - 0.02 for row in seen.log_probs)))
    ledger.add(file)
    report.write(build(audit(asked_again(ledger.request), out), "stillknows audit"), out)
    ran = replayed(folder, cli, 100)
    assert (ran.code, ran.out) == (6, "")
    assert "observed again, model, full, forget: 0.02 nats, 0 of" in ran.err


def test_a_report_without_its_observations_is_shown(folder: Path, cli: Case) -> None:
    shutil.rmtree(folder / "audit" / "observations")
    assert cli("report", folder / "audit").code == 0


def test_an_edited_run_record_is_refused_before_anything_is_measured(
    folder: Path, world: World, cli: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    file = folder / "model" / "run.json"
    shutil.rmtree(folder / "audit")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    record = json.loads(file.read_text())
    for other in (record | {"objective": "none"}, {k: v for k, v in record.items() if k != "digest"}):
        file.write_text(json.dumps(other))
        ran = cli(*command(folder, world))
        assert (ran.code, ran.out) == (2, "")
        assert str(file) in ran.err
        assert "--overwrite" in ran.err


def test_a_run_record_of_another_program_is_none_of_ours(folder: Path, world: World, cli: Case) -> None:
    (folder / "model" / "run.json").write_text('{"loss": 1}')
    assert cli(*command(folder, world)).code == 0
    assert report.read(folder / "audit").subjects[0].run is None


def test_an_audit_of_an_earlier_version_says_what_to_do(folder: Path, world: World, cli: Case) -> None:
    file = folder / "audit" / "report.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "digest"}))
    ran = cli("report", folder / "audit")
    assert (ran.code, ran.out) == (2, "")
    assert "report.json carries no digest: an earlier version or another program wrote it" in ran.err
    assert "--overwrite" in ran.err
    assert cli(*command(folder, world)).code == 0
    assert cli("report", folder / "audit").code == 0
