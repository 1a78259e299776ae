import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution.errors import IdentityError
from attribution.treehash import LEAF_BYTES, tree_hash, tree_hash_file, tree_root


def test_tree_hash_golden_vectors_match(vectors):
    for case in vectors("identity.json")["trees"]:
        assert tree_hash(bytes(i * 31 % 251 for i in range(case["length_bytes"]))) == case["root"]


def test_tree_hash_of_three_leaves_follows_the_definition():
    data = bytes(range(256)) * (LEAF_BYTES // 256) * 2 + b"tail"
    leaves = [hashlib.sha256(b"\x00" + data[i : i + LEAF_BYTES]).digest() for i in range(0, len(data), LEAF_BYTES)]
    pair = hashlib.sha256(b"\x01" + leaves[0] + leaves[1]).digest()
    top = hashlib.sha256(b"\x01" + pair + leaves[2]).digest()

    assert len(leaves) == 3
    assert tree_hash(data) == hashlib.sha256(b"\x02" + len(data).to_bytes(8, "big") + top).hexdigest()


@pytest.mark.parametrize("size", [0, 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 5 * LEAF_BYTES + 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_tree_hash_file_equals_the_hash_of_its_bytes(tmp_path, size, threads):
    data = hashlib.shake_128(str(size).encode()).digest(size)
    path = tmp_path / "weights.bin"
    path.write_bytes(data)

    assert tree_hash_file(path, threads=threads) == tree_hash(data)


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=20), st.data())
def test_tree_root_any_changed_leaf_changes_the_root(leaves, data):
    index = data.draw(st.integers(0, len(leaves) - 1))
    changed = list(leaves)
    changed[index] = bytes(byte ^ 1 for byte in changed[index])

    assert tree_root(leaves, 5) != tree_root(changed, 5)
    assert tree_root(leaves, 5) != tree_root(leaves, 6)


def test_tree_root_without_leaves_is_refused():
    with pytest.raises(IdentityError):
        tree_root([], 0)


def test_tree_hash_file_that_is_missing_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        tree_hash_file(tmp_path / "none")
