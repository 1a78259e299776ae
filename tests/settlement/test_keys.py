import json
import os

import pytest
from eth_account import Account

from attribution.signing import LocalSigner as AuditorsSigner
from attribution.signing import recover
from node.errors import KeystoreError
from node.settlement.keys import ROLES, KeyDirectory
from node.settlement.keystore import decrypt, encrypt
from node.settlement.signer import LocalSigner

KEY = b"\x07" * 32
PASSWORD = "correct horse"


@pytest.fixture
def directory(tmp_path):
    return KeyDirectory(tmp_path / "keys", scrypt_n=2)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "key.json"
    path.write_bytes(encrypt(KEY, PASSWORD, scrypt_n=2))
    path.chmod(0o600)
    return path


def change(path, **changes):
    fields = json.loads(path.read_bytes())
    for dotted, value in changes.items():
        target = fields
        *parents, last = dotted.split("__")
        for name in parents:
            target = target[name]
        target[last] = value
    path.write_text(json.dumps(fields))


def refused(path, password=PASSWORD):
    with pytest.raises(KeystoreError) as caught:
        decrypt(path, password)
    assert PASSWORD not in caught.value.message
    assert KEY.hex() not in caught.value.message
    return caught.value.error_code


def test_directory_first_start_makes_three_private_files_and_a_password(directory, tmp_path):
    keys = directory.open()
    assert len({keys.operator.address, keys.submitter.address, keys.payout_address}) == 3
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == sorted(
        [*(f"{role}.json" for role in ROLES), "password"]
    )
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()} == {0o600}
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


def test_directory_second_start_opens_the_same_keys(directory):
    first, second = directory.open(), directory.open()
    assert first.operator.address == second.operator.address
    assert first.payout_address == second.payout_address


def test_directory_existing_key_is_never_overwritten(directory):
    directory.open()
    with pytest.raises(KeystoreError):
        directory.create("operator")


def test_directory_without_its_password_file_makes_no_new_one(directory, tmp_path):
    directory.open()
    (tmp_path / "keys" / "password").unlink()
    with pytest.raises(KeystoreError) as caught:
        directory.open()
    assert caught.value.error_code == "keystore_missing"


def test_directory_one_key_for_two_duties_is_refused(directory, tmp_path):
    directory.open()
    (tmp_path / "keys" / "submitter.json").write_bytes((tmp_path / "keys" / "operator.json").read_bytes())
    with pytest.raises(KeystoreError, match="same key"):
        directory.open()


def test_directory_empty_password_file_is_refused(directory, tmp_path):
    directory.open()
    (tmp_path / "keys" / "password").write_text("")
    with pytest.raises(KeystoreError) as caught:
        directory.load("operator")
    assert caught.value.error_code == "keystore_password"


def test_keystore_opens_what_it_wrote_and_others_can_open_it(file):
    assert decrypt(file, PASSWORD).address == LocalSigner(KEY).address
    assert bytes(Account.decrypt(json.loads(file.read_bytes()), PASSWORD)) == KEY


def test_keystore_wrong_password_is_one_line_without_the_library_text(file):
    assert refused(file, "wrong") == "keystore_password"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_keystore_readable_by_others_is_refused_with_the_fix(file, mode):
    file.chmod(mode)
    with pytest.raises(KeystoreError, match=f"chmod 600 {file}") as caught:
        decrypt(file, PASSWORD)
    assert caught.value.error_code == "keystore_permissions"


def test_keystore_symbolic_link_is_refused(file, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(file)
    assert refused(link) == "keystore_permissions"


def test_keystore_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert refused(tmp_path / "pipe") == "keystore_permissions"


def test_keystore_missing_file_is_refused(tmp_path):
    assert refused(tmp_path / "none") == "keystore_missing"


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": "3"},
        {"crypto__cipher": "rot13"},
        {"crypto__kdf": "md5"},
        {"crypto__kdfparams": None},
        {"crypto__kdfparams__n": 1 << 30},
        {"crypto__kdfparams__n": 3},
        {"crypto__kdfparams__n": 1},
        {"crypto__kdfparams__n": "2"},
        {"crypto__kdfparams__n": True},
        {"crypto__kdfparams__r": 1 << 30},
        {"crypto__kdfparams__p": 1 << 30},
        {"crypto__kdfparams__p": 0},
        {"crypto__kdfparams__dklen": 1 << 40},
        {"crypto": []},
        {"address": "00" * 20},
    ],
)
def test_keystore_unusable_or_costly_file_is_refused_at_once(file, changes):
    change(file, **changes)
    assert refused(file) == "keystore_damaged"


@pytest.mark.parametrize("changes", [{"crypto__mac": "00" * 32}, {"crypto__ciphertext": "zz"}, {"crypto__kdfparams__salt": 5}])
def test_keystore_changed_content_reads_as_wrong_password_or_damage(file, changes):
    change(file, **changes)
    assert refused(file) == "keystore_password"


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b"[" * 50_000, b"{}" + b" " * 70_000])
def test_keystore_file_that_is_none_is_refused(file, content):
    file.write_bytes(content)
    assert refused(file) == "keystore_damaged"


@pytest.mark.parametrize("rounds", [1, 10**12])
def test_keystore_pbkdf2_rounds_out_of_range_are_refused(file, rounds):
    change(file, crypto__kdf="pbkdf2", crypto__kdfparams={"c": rounds, "dklen": 32, "prf": "hmac-sha256", "salt": "00"})
    assert refused(file) == "keystore_damaged"


def test_signer_shows_its_address_and_nothing_else():
    signer = LocalSigner(KEY)
    shown = f"{signer} {signer!r} {[signer]}"
    assert KEY.hex() not in shown
    assert str(int.from_bytes(KEY, "big")) not in shown
    assert not hasattr(signer, "__dict__")


def test_signer_signature_recovers_to_its_address():
    signer = LocalSigner(KEY)
    digest = bytes(range(32))
    assert Account._recover_hash(digest, signature=signer.sign_hash(digest)) == signer.address
    with pytest.raises(ValueError, match="32 bytes"):
        signer.sign_hash(b"short")


def test_signer_signs_as_the_auditors_one_does():
    for number in range(1, 9):
        key, digest = bytes([number]) * 32, bytes([255 - number]) * 32
        ours, theirs = LocalSigner(key), AuditorsSigner(key)
        assert ours.sign_hash(digest) == theirs.sign_hash(digest)
        assert recover(digest, ours.sign_hash(digest)) == ours.address == theirs.address
