"""Certificates: what is signed, by whom, and every change that must be noticed."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rfc8785
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jsonschema import Draft202012Validator
from safetensors.numpy import save_file
from test_report import SUBJECTS, make_audit, make_report

import stillknows as sk
from stillknows.certifying import keys
from stillknows.certifying.files import digests, model_files, require_model
from stillknows.certifying.files import fingerprint as fingerprint_of
from stillknows.certifying.schema import SCHEMA, json_schema
from stillknows.errors import Misfit, UserError
from stillknows.ledger import LEDGER, Ledger
from stillknows.model.modelfiles import ModelFiles, fingerprint
from stillknows.model.ref import ModelRef
from stillknows.observations import observations_path, save_observations
from stillknows.reporting import report as reports
from stillknows.types import Benchmark

Case = Callable[..., Any]
ROOT = Path(__file__).parents[1]
CHANGES = 1000  # single bytes that are changed, one at a time
QUESTION = '{"question": "where was a born ?", "answer": "Rome"}\n'


class Made(NamedTuple):
    """An audit of tiny files with its certificate, all in one folder."""

    folder: Path

    @property
    def audit(self) -> Path:
        return self.folder / "audit"

    @property
    def model(self) -> Path:
        return self.folder / "clean"

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.json"

    @property
    def public_key(self) -> Path:
        return self.folder / "key.pem.pub"

    def verify(self, **options: Any) -> sk.Verification:
        return sk.verify(self.certificate, self.model, public_key=self.public_key, audit=self.audit, **options)


def tiny_model(folder: Path, seed: int) -> Path:
    """Write the files of a model that nobody loads."""
    folder.mkdir()
    (folder / "config.json").write_text(f'{{"model_type": "llama", "seed": {seed}}}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("not read by the model")
    weights = np.random.default_rng(seed).normal(size=(8, 16)).astype(np.float32)
    save_file({"a.weight": weights, "b.weight": weights.T.copy()}, folder / "model.safetensors")
    return folder


def make_folder(folder: Path) -> Made:
    """Write an audit as it lies on disk, made by hand."""
    audit = make_audit()
    paths = {label: tiny_model(folder / label, i) for i, label in enumerate(audit.sources)}
    for role in ("forget", "retain"):
        (folder / f"{role}.jsonl").write_text(QUESTION)
    spec = f"jsonl:forget={folder / 'forget.jsonl'},retain={folder / 'retain.jsonl'}"
    request = replace(audit.request, benchmark=Benchmark(spec, audit.request.benchmark.splits))
    audit = replace(
        audit,
        request=request,
        sources={label: ModelRef(str(path), ModelFiles(path)) for label, path in paths.items()},
        fingerprints={label: fingerprint(path) for label, path in paths.items()},
    )
    out = folder / "audit"
    ledger = Ledger(out)
    for place, seen in audit.observations.items():
        file = observations_path(out, *place, is_defended=False)
        save_observations(file, str(place), seen)
        ledger.add(file)
    ledger.ask({"benchmark": {"spec": spec, "items": "0" * 64}})
    reports.write(make_report(audit), out)
    return Made(folder)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = make_folder(tmp_path_factory.mktemp("honest"))
    key = made.folder / "key.pem"
    sk.certify(made.audit, key=key, out=made.certificate, label="clean", new_key=True)
    return made


@pytest.fixture
def made(honest: Made) -> Any:
    """The folder where it lies, since the certificate names paths; every change is taken back."""
    kept = honest.folder.with_name("kept")
    shutil.copytree(honest.folder, kept)
    yield honest
    shutil.rmtree(honest.folder)
    kept.rename(honest.folder)


def statement(path: Path) -> dict[str, Any]:
    return json.loads(base64.b64decode(json.loads(path.read_text())["payload"]))


# What is signed


def test_a_certificate_is_an_in_toto_statement_in_a_dsse_envelope(honest: Made) -> None:
    """Checked by hand: the envelope, the encoding before signing, the canonical form, the digests."""
    envelope = json.loads(honest.certificate.read_text())
    assert envelope.keys() == {"payload", "payloadType", "signatures"}
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    assert kind == b"application/vnd.in-toto+json"
    signed = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
    [signature] = envelope["signatures"]
    key: Any = load_pem_public_key(honest.public_key.read_bytes())
    key.verify(base64.b64decode(signature["sig"]), signed)
    content = json.loads(payload)
    assert rfc8785.dumps(content) == payload
    assert content["_type"] == "https://in-toto.io/Statement/v1"
    assert {part["name"]: part["digest"]["sha256"] for part in content["subject"]} == {
        f"model/{name}": hashlib.sha256((honest.model / name).read_bytes()).hexdigest()
        for name in ("config.json", "tokenizer.json", "model.safetensors")
    }
    assert content["predicate"]["signer"]["keyid"] == signature["keyid"]


def test_the_statement_follows_the_published_schema(honest: Made) -> None:
    text = files("stillknows.certifying").joinpath(SCHEMA).read_text(encoding="utf-8")
    code = "from stillknows.certifying import schema; from stillknows import store; "
    code += f"store.write_json(Path('stillknows/certifying/{SCHEMA}'), schema.json_schema()), and copy it to docs/"
    assert json.loads(text) == json_schema(), f"run: {code}"
    assert (ROOT / "docs" / SCHEMA).read_text(encoding="utf-8") == text
    Draft202012Validator.check_schema(json_schema())
    Draft202012Validator(json_schema()).validate(statement(honest.certificate))


def test_the_predicate_says_what_the_audit_rests_on(honest: Made) -> None:
    found = statement(honest.certificate)["predicate"]
    names = [part["name"] for part in found["resources"]]
    roles = {name.partition("/")[0] for name in names}
    assert roles == {"original", "control", "data", "audit"}
    assert {"data/forget/forget.jsonl", "original/model/model.safetensors", "audit/report.json"} <= set(names)
    assert "audit/observations/clean/int4/forget.npz" in names
    assert [part["name"] for part in found["configuration"]] == ["audit/ledger.json", "audit/report.json"]
    assert {"relearn", "gptq"} <= set(found["notTested"]["variants"])
    assert not {"bf16", "int4", "full"} & set(found["notTested"]["variants"])
    assert found["software"].keys() == {"stillknows", "torch"}
    assert {row["status"] for row in found["annex"]} == {"done", "not run", "not applicable"}


@pytest.mark.parametrize(("label", "result"), [("clean", "PASSED"), ("brittle", "FAILED"), ("broken", "FAILED")])
def test_verdicts_are_told_in_the_words_of_test_results(label: str, result: str, honest: Made, tmp_path: Path) -> None:
    made = sk.certify(honest.audit, key=honest.folder / "key.pem", out=tmp_path / "c.json", label=label)
    found = statement(made.path)["predicate"]
    assert (found["result"], found["verdict"]) == (result, made.verdict)
    tests = {name: found[f"{name}Tests"] for name in ("passed", "warned", "failed")}
    claims = {claim["name"]: claim["verdict"] for claim in found["claims"]}
    assert claims
    of_claims = {f"claim: {name}" for name in claims}
    assert {name for names in tests.values() for name in names} == {"bf16", "full", "int4"} | of_claims
    for name, verdict in claims.items():
        assert f"claim: {name}" in tests[{"PASS": "passed", "FAIL": "failed"}.get(verdict, "warned")]
    failed = [name for name in tests["failed"] if name not in of_claims]
    assert failed == ([] if label == "clean" else ["int4"] if label == "brittle" else ["full", "bf16", "int4"])


# Every change is found


def changeable(made: Made) -> dict[str, list[Path]]:
    """Return the files of which every byte counts, by what they are."""
    return {
        "weights": [made.model / "model.safetensors"],
        "the rest of the model": [made.model / "config.json", made.model / "tokenizer.json"],
        "controls": [made.folder / "original" / "model.safetensors", made.folder / "control" / "config.json"],
        "data": [made.folder / "forget.jsonl", made.folder / "retain.jsonl"],
        "observations": sorted((made.audit / "observations").rglob("*.npz")),
        "report and ledger": [made.audit / "report.json", made.audit / LEDGER],
        "certificate": [made.certificate],
    }


def refusal(made: Made) -> str:
    """Return why a certificate is refused, "" where it is not."""
    try:
        made.verify()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_thousand_changes_of_single_bytes_are_found(made: Made) -> None:
    assert made.verify().trusted
    draw, kinds, missed = random.Random(0), changeable(made), []
    for number in range(CHANGES):
        kind = draw.choice(list(kinds))
        file = draw.choice(kinds[kind])
        whole = file.read_bytes()
        place = draw.randrange(len(whole))
        other = draw.choice([value for value in range(256) if value != whole[place]])
        file.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
        message = refusal(made)
        if file.name not in message:
            missed.append((number, kind, place, message))
        file.write_bytes(whole)
    assert missed == []
    assert made.verify().trusted


def test_a_change_of_the_certificate_is_found_with_its_own_key_alone(made: Made) -> None:
    """Its key's id, spaces, and bits that base64 leaves unused are not signed."""
    text = made.certificate.read_text()
    payload = json.loads(text)["payload"].rstrip("=")
    spare = payload[:-1] + chr(ord(payload[-1]) + 1)
    keyid = json.loads(text)["signatures"][0]["keyid"]
    for other in (
        text.replace(payload, spare),
        text.replace('"payload":', '"payload": '),
        text.replace(keyid, "0" * 64),
        text.rstrip("\n"),
        text.replace('"signatures"', '"more":1,"signatures"'),
    ):
        assert other != text
        made.certificate.write_text(other)
        with pytest.raises(UserError, match=r"certificate\.json"):
            sk.verify(made.certificate, made.model)


@pytest.mark.parametrize(
    "name", ["vocab.json", "chat_template.jinja", "special_tokens_map.json", "adapter_config.json"]
)
def test_an_extra_file_that_the_model_would_be_read_with_is_found(name: str, made: Made) -> None:
    (made.model / name).write_text("{}")
    with pytest.raises(Misfit, match=name):
        made.verify()


def test_a_file_that_no_model_reads_does_not_matter(made: Made) -> None:
    (made.model / "README.md").write_text("other words")
    (made.model / "notes.txt").write_text("mine")
    assert made.verify().verdict == "FORGOTTEN"


def test_exchanged_and_missing_files_are_named(made: Made) -> None:
    seen = made.audit / "observations"
    cases: dict[str, tuple[Path, Path]] = {
        "model": (made.folder / "brittle" / "model.safetensors", made.model / "model.safetensors"),
        "observations": (seen / "control/full/forget.npz", seen / "clean/full/forget.npz"),
        "data": (made.audit / LEDGER, made.folder / "retain.jsonl"),
    }
    for source, target in cases.values():
        whole = target.read_bytes()
        shutil.copy(source, target)
        with pytest.raises(Misfit, match=f"{target.name} was changed"):
            made.verify()
        target.write_bytes(whole)
    (made.model / "tokenizer.json").unlink()
    with pytest.raises(Misfit, match=r"model/tokenizer\.json is missing"):
        made.verify()


def test_another_model_and_another_key_do_not_fit(made: Made, tmp_path: Path) -> None:
    with pytest.raises(Misfit, match=r"brittle/model\.safetensors was changed"):
        sk.verify(made.certificate, made.folder / "brittle")
    keys.new_key(tmp_path / "other.pem")
    with pytest.raises(Misfit, match="was signed by the key"):
        sk.verify(made.certificate, made.model, public_key=tmp_path / "other.pem.pub")


def test_a_statement_that_others_signed_anew_is_refused_by_the_right_key(made: Made, tmp_path: Path) -> None:
    """Also where it names the right key in the place of their own."""
    from securesystemslib.dsse import Envelope

    keys.new_key(tmp_path / "other.pem")
    content = statement(made.certificate)
    content["predicate"]["verdict"] = "FORGOTTEN"
    envelope = Envelope(rfc8785.dumps(content), "application/vnd.in-toto+json", {})
    envelope.sign(keys.signer(tmp_path / "other.pem"))
    forged = envelope.to_dict()
    for keyid in (forged["signatures"][0]["keyid"], content["predicate"]["signer"]["keyid"]):
        forged["signatures"][0]["keyid"] = keyid
        made.certificate.write_bytes(rfc8785.dumps(forged) + b"\n")
        with pytest.raises(Misfit, match="its signature does not fit"):
            sk.verify(made.certificate, made.model, public_key=made.public_key)


def test_one_file_fits_whatever_it_is_called(honest: Made, tmp_path: Path) -> None:
    """A quantized file, as `verify` reads it: bytes."""
    made = make_folder(tmp_path / "made") if (tmp_path / "made").mkdir() is None else None
    assert made is not None
    model = tmp_path / "model-Q4_0.gguf"
    model.write_bytes(b"GGUF" + bytes(range(200)))
    content = reports.read(made.audit).to_json()
    [subject] = [s for s in content["subjects"] if s["name"] == "clean"]
    subject |= {"path": str(model), "fingerprint": fingerprint(model)}
    reports.write(reports.parsed(content, "it"), made.audit)
    sk.certify(made.audit, key=honest.folder / "key.pem", out=tmp_path / "c.json", label="clean")
    renamed = model.rename(tmp_path / "renamed.gguf")
    assert sk.verify(tmp_path / "c.json", renamed).model == str(renamed)
    renamed.write_bytes(b"GGUF" + bytes(range(1, 201)))
    with pytest.raises(Misfit, match=r"renamed\.gguf was changed"):
        sk.verify(tmp_path / "c.json", renamed)
    with pytest.raises(Misfit, match="is missing"):
        sk.verify(tmp_path / "c.json", made.model)


def test_an_adapter_is_bound_with_its_base(saved: Case, tmp_path: Path) -> None:
    base, adapter = saved(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 1,
        "lora_alpha": 1,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    save_file({"a": np.zeros(2, dtype=np.float32)}, adapter / "adapter_model.safetensors")
    expected = digests(model_files(str(adapter)))
    assert {"model/model.safetensors", "model-adapter/adapter_model.safetensors"} < expected.keys()
    assert fingerprint_of(expected) == ModelRef.open(str(adapter)).fingerprint
    require_model(expected, str(adapter))
    for file in (base / "config.json", adapter / "adapter_model.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + b" ")
        with pytest.raises(Misfit, match=file.name):
            require_model(expected, str(adapter))
        file.write_bytes(whole)


def test_what_lies_elsewhere_now_is_told_and_not_passed_over(made: Made) -> None:
    shutil.move(made.folder / "control", made.folder / "moved")
    found = made.verify()
    assert found.not_checked == ("control, which lies elsewhere now",)
    assert any(part.endswith("files of data") for part in found.checked)
    assert "add `audit`" in sk.verify(made.certificate, made.model).not_checked[0]
    assert not sk.verify(made.certificate, made.model).trusted


# What is refused before anything is signed


def test_only_what_was_audited_is_certified(made: Made, tmp_path: Path) -> None:
    again = {"key": made.folder / "key.pem", "out": tmp_path / "c.json"}
    with pytest.raises(UserError, match="judged 3 models: clean, brittle, broken"):
        sk.certify(made.audit, **again)
    with pytest.raises(UserError, match="no model 'claen'; did you mean 'clean'"):
        sk.certify(made.audit, label="claen", **again)
    for file, why in (
        (made.model / "config.json", "is not the model that was audited as clean"),
        (made.folder / "original" / "config.json", "is not the model that was audited as original"),
        (made.audit / "observations/broken/full/forget.npz", "is not what report.json was made of"),
    ):
        whole = file.read_bytes()
        file.write_bytes(whole + b" ")
        with pytest.raises(UserError, match=why):
            sk.certify(made.audit, label="clean", **again)
        file.write_bytes(whole)
    assert not (tmp_path / "c.json").exists()
    (tmp_path / "c.json").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        sk.certify(made.audit, label="clean", **again)


# Keys


def test_a_new_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    keys.new_key(key, "secret")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert b"ENCRYPTED" in key.read_bytes()
    before = key.read_bytes()
    with pytest.raises(UserError, match="no key is overwritten"):
        keys.new_key(key)
    key.unlink()
    with pytest.raises(UserError, match=r"key\.pem\.pub exists already"):
        keys.new_key(key)
    key.write_bytes(before)
    assert keys.signer(key, "secret").public_key == keys.public_key(tmp_path / "key.pem.pub")
    with pytest.raises(UserError, match=r"has a passphrase\n.*STILLKNOWS_PASSPHRASE"):
        keys.signer(key)
    with pytest.raises(UserError, match="cannot be opened"):
        keys.signer(key, "wrong")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_keys_of_openssl_will_do_and_those_of_other_kinds_are_refused(tmp_path: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    openssl("genpkey", "-algorithm", "ed25519", "-out", "plain.pem")
    openssl("pkey", "-in", "plain.pem", "-pubout", "-out", "plain.pub")
    openssl("pkey", "-in", "plain.pem", "-aes256", "-passout", "pass:secret", "-out", "locked.pem")
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "ec.pem")
    public = keys.public_key(tmp_path / "plain.pub")
    assert keys.signer(tmp_path / "plain.pem").public_key == public
    assert keys.signer(tmp_path / "locked.pem", "secret").public_key == public
    with pytest.raises(UserError, match="another kind than Ed25519"):
        keys.signer(tmp_path / "ec.pem")
    for wrong, read in (("plain.pub", keys.signer), ("plain.pem", keys.public_key), ("none.pem", keys.signer)):
        with pytest.raises(UserError, match=wrong):
            read(tmp_path / wrong)


# The command line


def test_commands_end_with_the_right_codes(made: Made, tmp_path: Path, cli: Case, monkeypatch: Any) -> None:
    out = tmp_path / "c.json"
    monkeypatch.setenv("STILLKNOWS_PASSPHRASE", "secret")
    key = tmp_path / "key.pem"
    ran = cli("certify", made.audit, "--label", "clean", "--key", key, "--new-key", "--out", out)
    assert (ran.code, ran.out.startswith(f"{out}: FORGOTTEN (PASSED) for {made.model}")) == (0, True)
    ran = cli("verify", out, made.model, "--public-key", f"{key}.pub", "--json")
    assert ran.code == 0
    assert (json.loads(ran.out)["fits"], json.loads(ran.out)["trusted"]) == (True, True)
    assert cli("verify", out, made.model).code == 0
    (made.model / "model.safetensors").write_bytes(b"other")
    ran = cli("verify", out, made.model)
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (6, "", 1)
    assert "model.safetensors was changed" in ran.err
    for wrong in (["verify", tmp_path / "none.json", made.model], ["verify", out, tmp_path / "none"]):
        assert cli(*wrong).code == 2
    assert cli("verify", made.audit / "report.json", made.model).code == 2
    assert cli("verify", out, made.model, "--replay").code == 2


def test_without_the_extra_a_message_says_what_to_install(made: Made, cli: Case, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "rfc8785", None)
    for command in (
        ["verify", made.certificate, made.model],
        ["certify", made.audit, "--label", "clean", "--key", made.folder / "key.pem", "--out", made.folder / "c.json"],
    ):
        ran = cli(*command)
        assert ran.code == 2
        assert "certificates need rfc8785, which is not installed\n  pip install 'stillknows[certificates]'" in ran.err


def test_subjects_by_hand_are_the_reports(honest: Made) -> None:
    """The fixture is an audit as `report` reads it."""
    assert {s.name for s in reports.read(honest.audit).audited} == set(SUBJECTS)
