import copy
import json

import msgspec
import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data

from attribution import receipt, record
from attribution.digests import token_digest
from attribution.eip712 import Domain, StructType, digest, full_message
from attribution.errors import AttributionError, RecordError, SignatureError, Unauthenticated
from attribution.manifest import Manifest
from attribution.signing import LocalSigner, recover


@pytest.fixture
def golden(vectors):
    return vectors("record.json")


@pytest.fixture
def operator(generator):
    return LocalSigner(generator.key("operator")).address


def signed(generator, built, word="operator"):
    signer = LocalSigner(generator.key(word))
    record_hash = built.record_hash()
    signature = receipt.sign(built, record_hash, receipt.receipt_domain(31337), signer)
    salts = receipt.Salts(bytes(32), bytes(range(32)))
    bundle = receipt.bundle(built, record_hash, 31337, signer.address, signature, salts)
    return json.loads(json.dumps(bundle))


def test_verify_golden_bundle_names_its_signer(golden, operator):
    verified = receipt.verify(golden["bundle"], {operator.lower()})

    assert verified.signer == operator
    assert verified.record_hash == golden["chain"][0]["record_hash"]
    assert verified.chain_id == 31337


def test_verify_without_trust_is_unauthenticated(golden):
    with pytest.raises(Unauthenticated, match="unauthenticated"):
        receipt.verify(golden["bundle"], set())


def test_verify_any_other_signer_fails(golden, generator):
    other = LocalSigner(generator.key("somebody else")).address

    with pytest.raises(SignatureError, match="not trusted"):
        receipt.verify(golden["bundle"], {other})


def test_verify_a_bundle_signed_by_somebody_else_fails_even_when_it_names_the_operator(generator, operator):
    bundle = signed(generator, generator.sample_record(), word="somebody else")

    with pytest.raises(SignatureError, match="not trusted"):
        receipt.verify(bundle, {operator})
    with pytest.raises(SignatureError, match="not by that key"):
        receipt.verify({**bundle, "signer": operator}, {operator})


def leaves(value, path=()):
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def test_verify_a_trusted_operator_cannot_sign_for_another(generator):
    record = generator.sample_record()
    bundle = signed(generator, record, word="somebody else")

    with pytest.raises(SignatureError, match="nobody signs for another"):
        receipt.verify(bundle, [bundle["signer"], record.operator])


def test_verify_every_changed_value_of_a_bundle_is_found(golden, operator):
    for path, value in leaves(golden["bundle"]):
        if path[0] == "salts":
            continue  # salts are checked with the token ids, below
        bundle = copy.deepcopy(golden["bundle"])
        target = bundle
        for part in path[:-1]:
            target = target[part]
        target[path[-1]] = value + 1 if isinstance(value, int) else ("0" * 64 if value is None else tampered(value))
        with pytest.raises(AttributionError):
            receipt.verify(bundle, {operator})


def tampered(text):
    flipped = "1" if text[-1] != "1" else "2"
    return text[:-1] + flipped


@pytest.mark.parametrize("name", ["schema", "chain_id", "receipt", "signer", "signature", "record"])
@pytest.mark.parametrize("value", [None, 7, "x", [], {}, True])
def test_verify_malformed_bundles_are_refused(golden, operator, name, value):
    with pytest.raises(AttributionError):
        receipt.verify({**golden["bundle"], name: value}, {operator})
    missing = {key: item for key, item in golden["bundle"].items() if key != name}
    with pytest.raises(AttributionError):
        receipt.verify(missing, {operator})


def test_verify_a_consistent_record_under_the_old_signature_fails(golden, generator, operator):
    cheaper = record.build(
        generator.sample_facts(tokens=msgspec.structs.replace(generator.sample_facts().tokens, output=1)),
        sequence=1,
        previous_hash=record.GENESIS_HASH,
    )
    bundle = signed(generator, cheaper)
    bundle["signature"] = golden["bundle"]["signature"]

    with pytest.raises(SignatureError):
        receipt.verify(bundle, {operator})


def test_verify_tokens_tells_the_answer_from_any_other(golden):
    bundle, prompts, outputs = golden["bundle"], golden["prompt_ids"], golden["output_ids"]
    receipt.verify_tokens(bundle, prompts, outputs)

    for other in ([[4, 5]], [[4, 5, 6]], [[6], [4, 5]], [[4, 5], [7]], []):
        with pytest.raises(RecordError, match="output"):
            receipt.verify_tokens(bundle, prompts, other)
    with pytest.raises(RecordError, match="prompt"):
        receipt.verify_tokens(bundle, [[1, 2]], outputs)
    with pytest.raises(SignatureError, match=r"salts\.prompt"):
        receipt.verify_tokens({**bundle, "salts": {}}, prompts, outputs)


def test_verify_compares_contributions_with_the_manifest(generator, operator):
    names = [("maker 1", 333_333), ("maker 2", 666_667)]
    value = {
        "schema": "openlora.manifest/1",
        "adapter_id": generator.hashed("a1"),
        "name": "n",
        "trainer": {"address": generator.account("trainer"), "name": "t"},
        "base_id": generator.hashed("base"),
        "datanets": [{"id": "d", "name": "d", "corpus_root": "c" * 64, "license": "MIT"}],
        "contributors": [
            {"address": generator.account(name), "name": name, "datanet": "d", "share_ppm": share} for name, share in names
        ],
        "training": {},
        "license": "MIT",
    }
    honest = Manifest.parse(json.dumps(value).encode())
    facts = generator.sample_facts()
    terms = (record.RecipeTerm(facts.terms[0].adapter_id, honest.manifest_hash(), "0.7"), facts.terms[1])
    built = record.build(generator.sample_facts(terms=terms), sequence=1, previous_hash=record.GENESIS_HASH)
    receipt.verify(signed(generator, built), {operator}, [honest])

    swapped = facts.contributions[0].contributors
    lying = msgspec.structs.replace(
        facts.contributions[0], contributors=((swapped[0][0], swapped[1][1]), (swapped[1][0], swapped[0][1]))
    )
    dishonest = record.build(
        generator.sample_facts(terms=terms, contributions=(lying,)), sequence=1, previous_hash=record.GENESIS_HASH
    )
    receipt.verify(signed(generator, dishonest), {operator})
    with pytest.raises(RecordError, match="manifest"):
        receipt.verify(signed(generator, dishonest), {operator}, [honest])


def test_digest_of_every_golden_case_equals_eth_account(vectors):
    cases = vectors("eip712.json")["cases"]
    assert {case["primary_type"] for case in cases} == {"Voucher", "Collection", "Epoch", "Adapter", "Receipt"}
    for case in cases:
        fields = tuple((item["name"], item["type"]) for item in case["types"][case["primary_type"]])
        message = {
            name: int(case["message"][name]) if kind.startswith("uint") else case["message"][name] for name, kind in fields
        }
        values = case["domain"]
        domain = Domain(values["name"], values["version"], values["chainId"], values.get("verifyingContract"))
        ours = digest(domain, StructType(case["primary_type"], fields), message)
        theirs = Account.sign_message(
            encode_typed_data(full_message=full_message(domain, StructType(case["primary_type"], fields), message)),
            case["private_key"],
        )
        assert "0x" + ours.hex() == case["digest"] == "0x" + theirs.message_hash.hex()
        assert case["signature"] == "0x" + theirs.signature.hex()
        assert recover(ours, bytes.fromhex(case["signature"][2:])) == case["signer"]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("uint8", 256),
        ("uint64", -1),
        ("uint256", 2**256),
        ("uint256", "1"),
        ("uint256", True),
        ("address", "0x12"),
        ("address", "somebody"),
        ("address", "0x" + "g" * 40),
        ("bytes32", "0x" + "0" * 63),
        ("bytes32", "0x" + "ab" * 31 + "  "),
        ("bytes32", "0X" + "ab" * 32),
        ("bytes32", b"short"),
        ("bytes32[]", "0x"),
        ("string", 5),
        ("bool", 1),
    ],
)
def test_struct_hash_values_of_another_type_are_refused(kind, value):
    with pytest.raises(SignatureError, match=r"T\.field"):
        StructType("T", (("field", kind),)).struct_hash({"field": value})


def test_struct_hash_other_fields_are_refused():
    struct = StructType("T", (("a", "bool"),))

    for message in ({}, {"b": True}, {"a": True, "b": True}):
        with pytest.raises(SignatureError, match="must have a"):
            struct.struct_hash(message)


def test_struct_type_nested_structs_are_refused():
    with pytest.raises(SignatureError, match="flat"):
        StructType("T", (("inner", "Other"),))


def test_recover_malleable_and_damaged_signatures_are_refused(generator):
    signature = LocalSigner(generator.key("operator")).sign_hash(bytes(32))
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    flipped = signature[:32] + (order - int.from_bytes(signature[32:64], "big")).to_bytes(32, "big") + bytes([55 - signature[64]])

    for damaged in (b"", signature[:64], flipped, signature[:64] + b"\x00", bytes(64) + b"\x1b", b"\xff" * 32 + signature[32:]):
        with pytest.raises(SignatureError):
            recover(bytes(32), damaged)


def test_local_signer_shows_no_key(generator):
    key = generator.key("operator")

    assert key.hex() not in repr(LocalSigner(key))
    with pytest.raises(SignatureError):
        LocalSigner(b"short")


def test_token_digest_depends_on_salt_and_boundaries():
    assert token_digest(bytes(32), [[1, 2], [3]]) != token_digest(bytes(32), [[1], [2, 3]])
    assert token_digest(bytes(32), [[1]]) != token_digest(b"\x01" * 32, [[1]])
    with pytest.raises(ValueError, match="32"):
        token_digest(b"short", [[1]])


@pytest.mark.parametrize("payer", [None, "0x" + "Ab" * 20])
@pytest.mark.parametrize("manifests", [(), (None,), ("c" * 64,), (None, "d" * 64)])
def test_digest_of_a_record_is_the_digest_of_its_message(generator, payer, manifests):
    adapters = tuple(record.RecipeAdapter(f"{index:064x}", manifest, "1", 1) for index, manifest in enumerate(manifests))
    sample = generator.sample_record()
    changed = msgspec.structs.replace(sample, payer=payer, recipe=msgspec.structs.replace(sample.recipe, adapters=adapters))
    domain, record_hash = receipt.receipt_domain(31337), changed.record_hash()

    expected = digest(domain, receipt.RECEIPT, receipt.message_of(changed, record_hash))
    assert receipt.digest_of(changed, record_hash, domain) == expected


def test_digest_of_a_fee_beyond_256_bits_is_refused(generator):
    changed = msgspec.structs.replace(generator.sample_record(), fee_wei=str(2**256))

    with pytest.raises(SignatureError, match="feeWei"):
        receipt.digest_of(changed, changed.record_hash(), receipt.receipt_domain(31337))


def test_encoded_bundle_is_the_bundle(generator):
    built, signature, salts = generator.sample_record(), b"\x01" * 65, receipt.Salts(bytes(32), bytes(range(32)))
    named = (built.record_hash(), 31337, built.operator, signature, salts)

    encoded = receipt.encoded_bundle(built, built.to_bytes(), *named)
    assert json.loads(encoded) == json.loads(json.dumps(receipt.bundle(built, *named)))
