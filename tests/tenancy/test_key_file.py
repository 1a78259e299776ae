import pytest

from node.errors import ConfigError
from node.tenancy.key_file import read_key_file

KEY = "k-0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "mode", "code"),
    [
        (f"ann {KEY}\n", 0o644, "secret_permissions"),
        ("", 0o600, "config_invalid"),
        ("ann short\n", 0o600, "config_invalid"),
        (f"ann {KEY} extra\n", 0o600, "config_invalid"),
        (f"ann {KEY}\nbob {KEY}\n", 0o600, "config_invalid"),
        (f"anonymous {KEY}\n", 0o600, "config_invalid"),
        (f"ann {'x' * 513}\n", 0o600, "config_invalid"),
        (f"\u00e9 {KEY}\n", 0o600, "config_invalid"),
    ],
)
def test_mistake_is_named_without_the_key(tmp_path, text, mode, code):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        read_key_file(path)
    assert caught.value.error_code == code
    assert KEY not in caught.value.message


def test_file_that_is_missing_or_too_large_is_refused(tmp_path):
    with pytest.raises(ConfigError):
        read_key_file(tmp_path / "absent")
    path = tmp_path / "keys"
    path.write_bytes(b"#" * (5 << 20))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="limit"):
        read_key_file(path)


def test_comments_are_skipped_and_a_tenant_may_have_two_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# keys\n\nann {KEY}\nann {KEY}2\n")
    path.chmod(0o600)
    assert read_key_file(path) == (("ann", KEY), ("ann", f"{KEY}2"))
