"""Where signatures are demanded nothing but the signed bytes, by a trusted key, is ever loaded."""

import copy
import json
import os
import pickle
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.errors import BadPolicyFile, BadSignature, BadSigningKey, MissingExtra, PolicyError, StalePolicy
from saeguard.guarding import policy, policy_file, signing
from saeguard.guarding.policy import Policy
from saeguard.guarding.policy_file import canonical
from saeguard.guarding.signing import PRIVATE, PUBLIC, PublicKey, Signature, SigningKey, make_keys
from tests.counts import cases
from tests.policies import example, keys
from tests.test_policy import places

KEY, STRANGER = keys()
TRUSTED = (KEY.public,)
Load = Callable[[Path], Policy]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The example, signed."""
    example().save(tmp_path / "p.json", key=KEY)
    return tmp_path / "p.json"


def strict(path: Path) -> Policy:
    return Policy.load(path, signed_by=TRUSTED)


def refused(path: Path, load: Load = strict) -> bool:
    """Whether a file is refused by name; anything else goes up."""
    try:
        load(path)
    except PolicyError:
        return True
    return False


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with its document changed, spelled as signed files are."""
    document = json.loads(path.read_text())
    document = change(document) or document
    path.write_text(canonical(document) + "\n")
    return path


# Tampering


def test_signed_policy_is_loaded_by_who_trusts_its_signer(file):
    assert strict(file) == example()
    assert Policy.load(file, signed_by=[STRANGER.public, KEY.public], at_least=7) == example()
    assert Policy.load(file) == example()


@pytest.mark.usefixtures("without_type_checks")
def test_every_single_bit_flip_is_refused(file):
    whole = file.read_bytes()
    assert 1_000 < len(whole) < 2_000
    passed = []
    with file.open("r+b", buffering=0) as held:
        for place in range(8 * len(whole)):
            byte = whole[place // 8]
            os.pwrite(held.fileno(), bytes([byte ^ 1 << place % 8]), place // 8)
            passed += [] if refused(file) else [place]
            os.pwrite(held.fileno(), bytes([byte]), place // 8)

    assert passed == []
    assert file.read_bytes() == whole
    assert not refused(file)


@pytest.mark.usefixtures("without_type_checks")
def test_every_field_that_is_changed_and_spelled_well_is_refused(file):
    """A bit flip mostly breaks the JSON; who means harm writes it well."""
    whole, document = file.read_text(), json.loads(file.read_text())
    tried = 0
    for path in places(document):
        if path[0] == "signature":
            continue
        for value in (None, True, 0, 8, 0.5, "x", [], {}):
            other = copy.deepcopy(document)
            node = other
            for key in path[:-1]:
                node = node[key]
            if canonical(node[path[-1]]) == canonical(value):
                continue
            node[path[-1]] = value
            file.write_text(canonical(other) + "\n")
            with pytest.raises(BadSignature, match="the policy is not what was signed"):
                strict(file)
            tried += 1
    file.write_text(whole)

    assert tried > 300
    assert strict(file) == example()


@pytest.mark.usefixtures("without_type_checks")
@settings(max_examples=cases(5_000))
@given(data=st.data())
def test_random_edits_of_the_bytes_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "edited.json"
    example().save(path, key=KEY)
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(start + 40, len(whole))))
    put = data.draw(st.binary(max_size=8) | st.sampled_from([b" ", b"\n", b"\r\n", whole[start:stop] * 2]))
    edited = whole[:start] + put + whole[stop:]
    path.write_bytes(edited)

    assert refused(path) == (edited != whole)


STRIPPED = {
    "no signature": lambda d: d.pop("signature") and None,
    "null": lambda d: d.update(signature=None),
    "empty": lambda d: d.update(signature={}),
    "a list": lambda d: d.update(signature=[]),
    "no value": lambda d: d["signature"].pop("value") and None,
    "empty value": lambda d: d["signature"].update(value=""),
    "value of zeros": lambda d: d["signature"].update(value="0" * 128),
    "upper case": lambda d: d["signature"].update(value=d["signature"]["value"].upper()),
    "longer value": lambda d: d["signature"].update(value=d["signature"]["value"] + "00"),
    "algorithm none": lambda d: d["signature"].update(algorithm="none"),
    "another algorithm": lambda d: d["signature"].update(algorithm="hmac-sha256"),
    "no algorithm": lambda d: d["signature"].pop("algorithm") and None,
    "a key of its own": lambda d: d["signature"].update(key=KEY.public.hex),
    "no signer": lambda d: d["signature"].pop("signer") and None,
    "a signer of zeros": lambda d: d["signature"].update(signer="0" * 64),
    "two signatures": lambda d: d.update(signature=[d["signature"], d["signature"]]),
    "signature inside": lambda d: d["policy"].update(signature=d.pop("signature")),
    "another name": lambda d: d.update(Signature=d.pop("signature")),
    "bare policy": lambda d: d["policy"],
}  # fmt: skip


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", STRIPPED)
def test_signature_that_is_stripped_replaced_or_downgraded_is_refused(name, file):
    assert refused(rewritten(file, STRIPPED[name]))


def test_signature_of_another_policy_is_refused(file):
    other = example(on_error="bypass")
    for signature in (KEY.sign(other.to_json()), STRANGER.sign(example().to_json())):
        policy_file.write(file, policy_file.Envelope(example().to_json(), signature))

        with pytest.raises(BadSignature):
            strict(file)


def test_signer_who_is_not_trusted_is_refused_also_under_a_trusted_name(file):
    example().save(file, key=STRANGER)
    with pytest.raises(BadSignature, match=f"it is by {STRANGER.public.hex[:16]}..., and {KEY.public.hex[:16]}"):
        strict(file)

    rewritten(file, lambda d: d["signature"].update(signer=KEY.public.hex))
    with pytest.raises(BadSignature, match="the policy is not what was signed"):
        strict(file)


def test_nobody_trusted_means_that_nothing_passes(file):
    with pytest.raises(BadSignature, match="nobody is trusted"):
        Policy.load(file, signed_by=())


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "signed_by",
    [KEY.public, KEY.public.hex, [KEY.public.hex], {KEY.public}, True],
    ids=["a key", "its text", "a list of texts", "a set", "true"],
)
def test_what_is_no_list_of_keys_trusts_nobody(signed_by, file):
    with pytest.raises(BadSigningKey, match="that is no list of PublicKey"):
        Policy.load(file, signed_by=signed_by)


def test_signature_made_for_another_use_is_refused(file):
    """The same key over the same bytes, without the words in front."""
    text = example().to_json()
    bare = KEY._key.sign(text.encode()).hex()
    policy_file.write(file, policy_file.Envelope(text, Signature(KEY.public.hex, bare)))

    with pytest.raises(BadSignature, match="the policy is not what was signed"):
        strict(file)


def test_older_release_that_is_played_back_is_refused(file):
    example(serial=8).save(file.with_name("new.json"), key=KEY)

    assert Policy.load(file.with_name("new.json"), signed_by=TRUSTED, at_least=8).serial == 8
    with pytest.raises(StalePolicy):
        Policy.load(file, signed_by=TRUSTED, at_least=8)
    with pytest.raises(BadSignature, match="the policy is not what was signed"):
        strict(rewritten(file, lambda d: d["policy"].update(serial=8)))


LAYOUTS = {
    "indented": lambda d: json.dumps(d, sort_keys=True, indent=1) + "\n",
    "spaces": lambda d: json.dumps(d, sort_keys=True) + "\n",
    "keys turned": lambda d: json.dumps({k: d[k] for k in reversed(sorted(d))}, separators=(",", ":")) + "\n",
    "no line end": lambda d: canonical(d),
    "two line ends": lambda d: canonical(d) + "\n\n",
    "escaped letter": lambda d: canonical(d).replace("biology", "\\u0062iology") + "\n",
    "longer number": lambda d: canonical(d).replace('"level":0.01', '"level":0.010') + "\n",
    "byte order mark": lambda d: "\ufeff" + canonical(d) + "\n",
}


@pytest.mark.parametrize("signed_by", [TRUSTED, None], ids=["demanded", "not demanded"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_signed_file_has_one_spelling(name, signed_by, file):
    file.write_text(LAYOUTS[name](json.loads(file.read_text())))

    with pytest.raises(BadPolicyFile):
        Policy.load(file, signed_by=signed_by)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "byte order mark"])
def test_unsigned_file_may_be_laid_out_and_says_the_same(name, tmp_path):
    example().save(tmp_path / "p.json")
    document = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(LAYOUTS[name](document))

    assert Policy.load(tmp_path / "p.json").fingerprint() == example().fingerprint()


def test_document_that_was_signed_but_says_things_another_way_is_refused(file):
    """Signed by the right key, well spelled, and still not what `save` writes: a default left out."""
    document = json.loads(example().to_json())
    del document["on_error"]
    text = canonical(document)
    policy_file.write(file, policy_file.Envelope(text, KEY.sign(text)))

    with pytest.raises(BadPolicyFile, match="not in the form that is written"):
        strict(file)


def test_signature_proves_nothing_where_none_is_demanded_but_has_to_have_the_form_of_one(file):
    example().save(file, key=STRANGER)
    assert Policy.load(file) == example()

    with pytest.raises(BadSignature, match="64 and 128 hexadecimal digits"):
        Policy.load(rewritten(file, lambda d: d["signature"].update(value="00")))


# Mutants: published faults of this kind, and that the tests above would notice them


def checked_where_there_is_one(text: str, signature: Signature | None, signed_by: Any) -> None:
    """OPA, GHSA-g2pf-6v5v-qcc8: what is verified depends on what the file says, so a stripped file passes."""
    if signature is not None:
        signing.demand(text, signature, signed_by)


def trusts_the_key_in_the_file(text: str, signature: Signature | None, signed_by: Any) -> None:
    """The signer's key is taken from the file: whoever signs is trusted."""
    signing.demand(text, signature, [] if signature is None else [PublicKey(signature.signer)])


def looks_at_the_form_only(text: str, signature: Signature | None, signed_by: Any) -> None:
    if signature is None or signature.signer not in {key.hex for key in signed_by}:
        raise BadSignature("a signature", "there is none", "Sign it.")


def attacks(file: Path) -> dict[str, Path]:
    """A stripped, a stranger's and a changed file."""
    made = {name: file.with_name(f"{name}.json") for name in ("stripped", "stranger", "changed")}
    example(on_error="bypass").save(made["stripped"])
    example(on_error="bypass").save(made["stranger"], key=STRANGER)
    made["changed"].write_bytes(file.read_bytes())
    rewritten(made["changed"], lambda d: d["policy"].update(on_error="bypass"))
    return made


@pytest.mark.parametrize(
    ("mutant", "lets_by"),
    [
        (checked_where_there_is_one, {"stripped"}),
        (trusts_the_key_in_the_file, {"stranger"}),
        (looks_at_the_form_only, {"changed"}),
    ],
)
def test_each_attack_is_refused_and_passes_the_mutant_that_is_open_to_it(mutant, lets_by, file, monkeypatch):
    files = attacks(file)
    before = {name for name, path in files.items() if not refused(path)}
    monkeypatch.setattr(policy, "demand", mutant)
    after = {name for name, path in files.items() if not refused(path)}

    assert before == set()
    assert after == lets_by


# Keys


def test_pair_of_keys_comes_back_from_its_files_and_only_the_owner_may_read_the_private_one(tmp_path):
    public, place = make_keys(tmp_path / "k")

    assert place == tmp_path / "k.pub"
    assert PublicKey.from_file(place) == public == SigningKey.from_file(tmp_path / "k").public
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert public.verifies("text", SigningKey.from_file(tmp_path / "k").sign("text"))
    assert not public.verifies("texts", SigningKey.from_file(tmp_path / "k").sign("text"))


def test_ed25519_is_that_of_the_standard(tmp_path):
    """RFC 8032, section 7.1, test 1: the key pair of an empty message."""
    secret = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    (tmp_path / "k").write_text(f"{PRIVATE}{secret}\n")
    (tmp_path / "k").chmod(0o600)

    key = SigningKey.from_file(tmp_path / "k")

    assert key.public.hex == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.sign("x") == key.sign("x")


@pytest.mark.parametrize(
    "content",
    ["", "0" * 64, PRIVATE, f"{PRIVATE}{'0' * 63}", f"{PRIVATE}{'0' * 65}", f"{PRIVATE}{'A' * 64}",
     f"{PUBLIC}{'0' * 64}", f"{PRIVATE}{'0' * 64}\n\n", f" {PRIVATE}{'0' * 64}", f"{PRIVATE}{'0' * 64}" + "\n" * 400],
)  # fmt: skip
def test_file_that_is_no_private_key_is_refused_without_a_word_of_it(content, tmp_path):
    (tmp_path / "k").write_text(content)
    (tmp_path / "k").chmod(0o600)

    with pytest.raises(BadSigningKey, match="it is not saeguard-ed25519-private:<64 hexadecimal digits>") as caught:
        SigningKey.from_file(tmp_path / "k")
    ours = caught.value.__traceback__.tb_next  # this test's own frame knows the content
    shown = "".join(traceback.TracebackException(BadSigningKey, caught.value, ours, capture_locals=True).format())
    assert "digits = " in shown
    assert "0" * 60 not in shown
    assert "A" * 60 not in shown


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602])
def test_private_key_that_others_may_read_is_refused(mode, tmp_path):
    make_keys(tmp_path / "k")
    (tmp_path / "k").chmod(mode)

    with pytest.raises(BadSigningKey, match="others than its owner may read or write it"):
        SigningKey.from_file(tmp_path / "k")


def test_private_key_is_not_taken_for_a_public_one(tmp_path):
    make_keys(tmp_path / "k")
    with pytest.raises(BadSigningKey, match="it is not saeguard-ed25519-public"):
        PublicKey.from_file(tmp_path / "k")
    with pytest.raises(BadSigningKey, match="it cannot be read"):
        PublicKey.from_file(tmp_path / "none")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n", None, 3])
def test_text_that_is_no_public_key_is_refused(text):
    with pytest.raises(BadSigningKey, match="64 lower-case hexadecimal digits"):
        PublicKey(text)


def test_keys_are_never_replaced(tmp_path):
    (tmp_path / "k.pub").write_text("there")
    with pytest.raises(BadSigningKey, match="there is a file already"):
        make_keys(tmp_path / "k")
    assert not (tmp_path / "k").exists()

    (tmp_path / "k.pub").unlink()
    (tmp_path / "target").write_text("kept")
    (tmp_path / "k").symlink_to(tmp_path / "target")
    with pytest.raises(BadSigningKey, match="there is a file already"):
        make_keys(tmp_path / "k")
    assert (tmp_path / "target").read_text() == "kept"


def test_key_that_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space") as caught:
        make_keys(tmp_path / "k")

    assert list(tmp_path.iterdir()) == []
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert PRIVATE not in shown.replace(f"PRIVATE = '{PRIVATE}'", "")


def test_private_key_does_not_show_itself(tmp_path):
    make_keys(tmp_path / "k")
    secret = (tmp_path / "k").read_text().strip().removeprefix(PRIVATE)
    key = SigningKey.from_file(tmp_path / "k")

    assert secret not in f"{key} {key!r} {vars(type(key))}"
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(BadSigningKey, match="keys are not pickled"):
            copying(key)


def test_without_cryptography_signatures_are_refused_and_unsigned_files_still_read(file, tmp_path, monkeypatch):
    make_keys(tmp_path / "k")
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "cryptography", None)

    assert Policy.load(file) == example()
    for call in (lambda: strict(file), SigningKey.generate, lambda: SigningKey.from_file(tmp_path / "k")):
        with pytest.raises(MissingExtra, match=r"pip install 'saeguard\[serve\]'"):
            call()
