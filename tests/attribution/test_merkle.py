import pytest
from eth_abi import encode
from eth_utils import keccak
from hypothesis import given
from hypothesis import strategies as st

from attribution import merkle
from attribution.errors import MerkleError
from attribution.merkle import Tree, TreeDomain

DOMAIN = TreeDomain(31337, "0x" + "aa" * 20, "0x" + "bb" * 20)
totals = st.dictionaries(
    st.integers(1, 2**160 - 1).map(lambda number: f"0x{number:040x}"), st.integers(0, 2**256 - 1), min_size=1, max_size=40
)


@given(totals)
def test_proof_of_every_entry_leads_to_the_root(entries):
    tree = Tree(DOMAIN, entries)

    assert tree.total_wei == sum(entries.values())
    for account, cumulative in tree.entries:
        assert merkle.verify(tree.root, merkle.leaf_hash(DOMAIN, account, cumulative), tree.proof(account))


@given(totals, st.data())
def test_proof_for_another_amount_account_or_domain_fails(entries, data):
    tree = Tree(DOMAIN, entries)
    account, cumulative = data.draw(st.sampled_from(tree.entries))
    proof = tree.proof(account)

    others = [
        merkle.leaf_hash(DOMAIN, account, (cumulative + 1) % 2**256),
        merkle.leaf_hash(DOMAIN, "0x" + "00" * 20, cumulative),
        merkle.leaf_hash(TreeDomain(1, DOMAIN.rewards, DOMAIN.operator), account, cumulative),
        merkle.leaf_hash(TreeDomain(31337, DOMAIN.operator, DOMAIN.operator), account, cumulative),
        merkle.leaf_hash(TreeDomain(31337, DOMAIN.rewards, DOMAIN.rewards), account, cumulative),
    ]
    assert not any(merkle.verify(tree.root, leaf, proof) for leaf in others)


@given(totals, st.randoms())
def test_root_order_of_entries_changes_nothing(entries, random):
    pairs = list(entries.items())
    random.shuffle(pairs)

    shuffled = Tree(DOMAIN, dict(pairs))
    assert shuffled.root == Tree(DOMAIN, entries).root
    assert shuffled.leaves_hash() == Tree(DOMAIN, entries).leaves_hash()


@given(totals)
def test_root_any_other_amount_changes_it(entries):
    account = next(iter(entries))
    changed = {**entries, account: (entries[account] + 1) % 2**256}

    assert Tree(DOMAIN, changed).root != Tree(DOMAIN, entries).root
    assert Tree(DOMAIN, changed).leaves_hash() != Tree(DOMAIN, entries).leaves_hash()


def test_leaf_hash_equals_the_abi_encoding():
    account, cumulative = "0x" + "12" * 20, 2**255 + 5
    kinds = ["uint256", "address", "address", "address", "uint256"]
    encoded = encode(kinds, [31337, DOMAIN.rewards, DOMAIN.operator, account, cumulative])

    assert merkle.leaf_hash(DOMAIN, account, cumulative) == keccak(keccak(encoded))


def test_tree_golden_vectors_match(vectors):
    for case in vectors("merkle.json")["trees"]:
        domain = TreeDomain(case["chain_id"], case["rewards"], case["operator"])
        tree = Tree(domain, {entry["account"]: int(entry["cumulative"]) for entry in reversed(case["entries"])})
        assert "0x" + tree.root.hex() == case["root"]
        assert [account for account, _ in tree.entries] == [entry["account"] for entry in case["entries"]]
        for entry, leaf in zip(case["entries"], tree.leaves, strict=True):
            assert "0x" + leaf.hex() == entry["leaf"]
            assert ["0x" + node.hex() for node in tree.proof(entry["account"])] == entry["proof"]


@pytest.mark.parametrize(
    "entries", [{}, {"0x12": 1}, {"0x" + "ab" * 20: 1, "0x" + "AB" * 20: 2}, {"0x" + "ab" * 20: -1}, {"0x" + "ab" * 20: 2**256}]
)
def test_tree_entries_without_a_tree_are_refused(entries):
    with pytest.raises(MerkleError):
        Tree(DOMAIN, entries)


def test_proof_of_a_stranger_is_refused():
    tree = Tree(DOMAIN, {"0x" + "ab" * 20: 1})

    for stranger in ("0x" + "ac" * 20, "nobody"):
        with pytest.raises(MerkleError, match="no entry"):
            tree.proof(stranger)


@given(st.lists(st.binary(min_size=32, max_size=32).map(bytes.hex), min_size=1, max_size=20))
def test_records_proof_of_every_record_leads_to_the_root(hashes):
    root = merkle.records_root(hashes)

    for index, record_hash in enumerate(hashes):
        assert merkle.verify(root, merkle.record_leaf(record_hash), merkle.records_proof(hashes, index))


def test_records_root_depends_on_every_record():
    hashes = [f"{number:064x}" for number in range(5)]

    assert merkle.records_root(hashes) != merkle.records_root([*hashes[:4], f"{9:064x}"])
    with pytest.raises(MerkleError):
        merkle.records_root([])
    with pytest.raises(MerkleError):
        merkle.records_proof(hashes, 5)
