import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution import canonical, record
from attribution.errors import CanonicalError, RecordError, SplitError
from attribution.fees import Contribution, Price, SplitPolicy, Tokens, fee_wei, parse_wei

PPM = 1_000_000


def hashed(number):
    return f"{number:064x}"


def address(number):
    return f"0x{number:040x}"


@st.composite
def contributions(draw, adapter_id):
    cuts = sorted(draw(st.sets(st.integers(1, PPM - 1), max_size=6)))
    shares = [right - left for left, right in zip([0, *cuts], [*cuts, PPM], strict=True)]
    return Contribution(adapter_id, address(draw(st.integers(1, 5))), tuple((address(i + 10), s) for i, s in enumerate(shares)))


@st.composite
def facts(draw, sample):
    terms, makers = [], []
    for number in draw(st.sets(st.integers(1, 50), max_size=5)):
        has_manifest = draw(st.booleans())
        weight = f"{draw(st.integers(-9, 9))}.{draw(st.integers(1, 999)):03d}"
        terms.append(record.RecipeTerm(hashed(number), hashed(99) if has_manifest else None, weight))
        if has_manifest:
            makers.append(draw(contributions(hashed(number))))
    node, trainer = draw(st.integers(0, PPM)), draw(st.integers(0, PPM))
    node, trainer = min(node, PPM - trainer) if node + trainer > PPM else node, trainer
    prompt = draw(st.integers(0, 10**6))
    return msgspec.structs.replace(
        sample,
        request_id=draw(st.text("abc123-", min_size=1, max_size=20)),
        status=draw(st.sampled_from(["ok", "cancelled", "failed", "interrupted"])),
        terms=tuple(terms),
        contributions=tuple(makers),
        tokens=Tokens(prompt, draw(st.integers(0, prompt)), draw(st.integers(0, 10**6))),
        price=Price(str(draw(st.integers(0, 10**24))), str(draw(st.integers(0, 10**24)))),
        policy=SplitPolicy(node, trainer, PPM - node - trainer),
    )


@given(st.data())
def test_build_split_sums_to_the_fee_and_verifies(generator, data):
    built = record.build(data.draw(facts(generator.sample_facts())), sequence=1, previous_hash=record.GENESIS_HASH)

    assert sum(int(line.amount_wei) for line in built.split) == int(built.fee_wei)
    assert all(int(line.amount_wei) > 0 for line in built.split)
    record.verify(built)
    assert record.parse(built.to_bytes()) == built
    assert built.to_bytes() == canonical.dumps(msgspec.to_builtins(built))
    assert record.parse(built.to_bytes()).record_hash() == built.record_hash()


def test_build_golden_chain_matches(generator, vectors):
    previous = record.GENESIS_HASH
    for entry in vectors("record.json")["chain"]:
        parsed = record.parse(entry["record"])
        record.verify(parsed)
        assert parsed.previous_hash == previous
        assert parsed.record_hash() == entry["record_hash"]
        previous = entry["record_hash"]


def test_build_two_adapters_one_without_a_manifest_pays_the_reserve(generator):
    built = generator.sample_record()
    fee = 17 * 10**9 + 41 * 3_000_000_001
    paid = {(line.role, line.adapter_id): int(line.amount_wei) for line in built.split if line.role != "data"}

    assert int(built.fee_wei) == fee
    assert built.recipe.kind == "linear"
    assert sorted(adapter.share_ppm for adapter in built.recipe.adapters) == [333_333, 666_667]
    assert abs(paid["node", None] * 2 - fee) <= 1
    second = generator.hashed("a2")
    assert abs(paid["reserve", second] * 2 - fee * 333_333 // PPM) <= 4
    assert {line.account for line in built.split if line.role == "reserve"} == {generator.account("reserve")}


def test_build_without_adapters_pays_the_node_alone(generator):
    built = record.build(generator.sample_facts(terms=(), contributions=()), sequence=1, previous_hash=record.GENESIS_HASH)

    assert built.recipe.kind == "base"
    assert [(line.role, line.amount_wei) for line in built.split] == [("node", built.fee_wei)]


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [("ok", 5, 25), ("ok", 0, 10), ("cancelled", 5, 25), ("cancelled", 0, 0), ("failed", 5, 0), ("interrupted", 5, 0)],
)
def test_fee_follows_what_was_delivered(status, output, expected):
    assert fee_wei(status, Tokens(10, 3, output), Price("1", "3")) == expected


@pytest.mark.parametrize("text", ["", "-1", "+1", "01", "1.0", "1e3", " 1", "٣", str(2**256), "9" * 100])
def test_parse_wei_anything_but_a_plain_number_is_refused(text):
    with pytest.raises(RecordError):
        parse_wei(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fee_wei", "1"),
        ("split", ()),
        ("schema", "openlora.record/2"),
        ("tokens", Tokens(17, 16, 42)),
        ("price", Price("1000000001", "3000000001")),
        ("policy", SplitPolicy(500_001, 199_999, 300_000)),
        ("status", "failed"),
        ("status", "unheard-of"),
        ("contributions", ()),
        ("sequence", 0),
        ("finished_ms", 1),
        ("base_id", "zz"),
        ("request_id", "two words"),
        ("request_id", "\ud800"),
        ("request_id", ""),
        ("finish_reason", "x" * 65),
        ("finished_ms", 2**53),
        ("payer", "somebody"),
    ],
)
def test_verify_a_changed_field_is_found(generator, name, value):
    changed = msgspec.structs.replace(generator.sample_record(), **{name: value})

    with pytest.raises(RecordError):
        record.verify(changed)


def test_verify_changed_shares_are_found(generator):
    built = generator.sample_record()
    adapters = tuple(msgspec.structs.replace(item, share_ppm=500_000) for item in built.recipe.adapters)
    changed = msgspec.structs.replace(built, recipe=msgspec.structs.replace(built.recipe, adapters=adapters))

    with pytest.raises(RecordError, match="recipe"):
        record.verify(changed)


def test_build_the_same_adapter_twice_is_refused(generator):
    term = generator.sample_facts().terms[1]

    with pytest.raises(RecordError, match="twice"):
        record.build(generator.sample_facts(terms=(term, term), contributions=()), sequence=1, previous_hash=record.GENESIS_HASH)


def test_build_with_zero_weights_only_is_refused(generator):
    term = record.RecipeTerm(hashed(1), None, "0.0")

    with pytest.raises(SplitError):
        record.build(generator.sample_facts(terms=(term,), contributions=()), sequence=1, previous_hash=record.GENESIS_HASH)


def test_build_contributors_that_do_not_sum_to_one_are_refused(generator):
    facts = generator.sample_facts()
    maker = facts.contributions[0]
    short = Contribution(maker.adapter_id, maker.trainer, maker.contributors[:1])

    with pytest.raises(RecordError, match="sum to 1000000"):
        record.build(generator.sample_facts(contributions=(short,)), sequence=1, previous_hash=record.GENESIS_HASH)


@pytest.mark.parametrize("change", [{"extra": 1}, {"sequence": "1"}, {"tokens": {"prompt": 1}}, {"payer": 5}])
def test_parse_other_shapes_are_refused(generator, change):
    value = {**msgspec.to_builtins(generator.sample_record()), **change}

    with pytest.raises(RecordError, match="not a record"):
        record.parse(value)


def test_parse_a_duplicate_key_is_refused():
    with pytest.raises(CanonicalError):
        record.parse(b'{"schema":"a","schema":"b"}')


def merged(sample, merge, **changes):
    return record.build(msgspec.structs.replace(sample, merge=merge, **changes), sequence=1, previous_hash=record.GENESIS_HASH)


@pytest.mark.parametrize("density", ["1", "0.5", "0.000000000000000001"])
def test_build_merge_names_itself_and_shares_by_magnitude(generator, density):
    built = merged(generator.sample_facts(), record.Merge("dare_ties", density, "frequency"))

    assert built.recipe.kind == "merge"
    assert built.recipe.merge == record.Merge("dare_ties", density, "frequency")
    assert [adapter.share_ppm for adapter in built.recipe.adapters] == [666_667, 333_333]
    record.verify(built)
    assert record.parse(built.to_bytes()) == built
    assert built.to_bytes() == canonical.dumps(msgspec.to_builtins(built))


def test_build_without_merge_writes_no_merge(generator):
    built = record.build(generator.sample_facts(), sequence=1, previous_hash=record.GENESIS_HASH)

    assert "merge" not in canonical.loads(built.to_bytes())["recipe"]


def test_recipe_hash_covers_every_part_of_a_merge(generator):
    facts = generator.sample_facts()
    merges = [
        None,
        record.Merge("linear_factors"),
        record.Merge("dare_linear", "0.5"),
        record.Merge("dare_linear", "0.25"),
        record.Merge("ties", "0.5", "total"),
        record.Merge("ties", "0.5", "frequency"),
    ]

    assert len({merged(facts, merge).recipe.recipe_hash for merge in merges}) == len(merges)


@pytest.mark.parametrize(
    "merge",
    [
        record.Merge("linear"),
        record.Merge("blend"),
        record.Merge("ties", "0.5"),
        record.Merge("ties", None, "total"),
        record.Merge("ties", "0", "total"),
        record.Merge("ties", "0.50", "total"),
        record.Merge("ties", "1.5", "total"),
        record.Merge("ties", "0.5", "loudest"),
        record.Merge("dare_linear", "0.5", "total"),
        record.Merge("linear_factors", "0.5"),
    ],
)
def test_build_malformed_merge_is_refused(generator, merge):
    with pytest.raises(RecordError):
        merged(generator.sample_facts(), merge)


def test_build_merge_of_one_adapter_is_refused(generator):
    facts = generator.sample_facts()

    with pytest.raises(RecordError, match="no merge"):
        merged(facts, record.Merge("linear_factors"), terms=facts.terms[:1])


def test_verify_other_merge_than_the_hash_says_is_refused(generator):
    built = merged(generator.sample_facts(), record.Merge("ties", "0.5", "total"))
    recipe = msgspec.structs.replace(built.recipe, merge=record.Merge("ties", "0.5", "frequency"))

    with pytest.raises(RecordError, match="recipe"):
        record.verify(msgspec.structs.replace(built, recipe=recipe))
