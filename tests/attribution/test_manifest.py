import copy
import json

import pytest

from attribution import canonical
from attribution.errors import ManifestError
from attribution.manifest import Manifest

LOWER = "0x" + "ab" * 20
MANIFEST = {
    "schema": "openlora.manifest/1",
    "adapter_id": "a" * 64,
    "name": "speeches",
    "trainer": {"address": "0x" + "11" * 20, "name": "Trainer"},
    "base_id": "b" * 64,
    "datanets": [{"id": "d1", "name": "Corpus", "corpus_root": "c" * 64, "license": "MIT"}],
    "contributors": [
        {"address": LOWER, "name": "One", "datanet": "d1", "share_ppm": 400_000},
        {"address": "0x" + "22" * 20, "name": "Two", "datanet": "d1", "share_ppm": 500_000},
        {"address": LOWER, "name": "One, again", "datanet": "d1", "share_ppm": 100_000},
    ],
    "training": {"steps": 300, "lr": "0.0002"},
    "license": "Apache-2.0",
}


def changed(path, value):
    result = copy.deepcopy(MANIFEST)
    target = result
    for part in path[:-1]:
        target = target[part]
    if value is KeyError:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return json.dumps(result).encode()


def test_parse_good_manifest_round_trips():
    manifest = Manifest.parse(json.dumps(MANIFEST, indent=3).encode())

    assert Manifest.parse(canonical.dumps(manifest.to_json())) == manifest
    assert manifest.manifest_hash() == Manifest.parse(json.dumps(MANIFEST, sort_keys=True).encode()).manifest_hash()


def test_contribution_adds_one_address_up_and_sorts():
    contribution = Manifest.parse(json.dumps(MANIFEST).encode()).contribution()

    assert contribution.trainer == "0x" + "11" * 20
    assert [share for _, share in contribution.contributors] == [500_000, 500_000]
    assert [account for account, _ in contribution.contributors] == sorted(account for account, _ in contribution.contributors)


def test_manifest_hash_changes_with_any_share():
    data = json.loads(json.dumps(MANIFEST))
    data["contributors"][0]["share_ppm"] += 1
    data["contributors"][1]["share_ppm"] -= 1

    other = Manifest.parse(json.dumps(data).encode())
    assert other.manifest_hash() != Manifest.parse(json.dumps(MANIFEST).encode()).manifest_hash()


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("schema",), "openlora.manifest/2", "schema"),
        (("extra",), 1, "$"),
        (("license",), KeyError, "$"),
        (("adapter_id",), "A" * 64, "adapter_id"),
        (("base_id",), "b" * 63, "base_id"),
        (("name",), "", "name"),
        (("name",), "x" * 201, "name"),
        (("trainer", "address"), "0x" + "00" * 20, "trainer.address"),
        (("trainer", "address"), "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAeD".swapcase(), "trainer.address"),
        (("trainer", "name"), 3, "trainer.name"),
        (("trainer", "url"), "x", "trainer"),
        (("datanets",), {}, "datanets"),
        (("datanets", 0, "corpus_root"), None, "datanets[0].corpus_root"),
        (("datanets", 0, "extra"), 1, "datanets[0]"),
        (("contributors",), [], "contributors"),
        (("contributors", 0, "share_ppm"), 400_001, "contributors"),
        (("contributors", 1, "share_ppm"), 0, "contributors[1].share_ppm"),
        (("contributors", 1, "share_ppm"), True, "contributors[1].share_ppm"),
        (("contributors", 1, "share_ppm"), "500000", "contributors[1].share_ppm"),
        (("contributors", 2, "datanet"), "d2", "contributors[2].datanet"),
        (("contributors", 2, "address"), "vitalik.eth", "contributors[2].address"),
        (("training", "tags"), ["a"], "training.tags"),
        (("training", "deep"), None, "training.deep"),
        (("training",), [], "training"),
    ],
)
def test_parse_wrong_field_is_named(path, value, field):
    with pytest.raises(ManifestError) as caught:
        Manifest.parse(changed(path, value))

    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"schema":1,"schema":1}', b'{"a":1.5}', b"\xff"])
def test_parse_other_bytes_are_refused(data):
    with pytest.raises(ManifestError):
        Manifest.parse(data)


def test_parse_a_datanet_twice_is_refused():
    with pytest.raises(ManifestError, match="twice"):
        Manifest.parse(changed(("datanets",), MANIFEST["datanets"] * 2))


def test_parse_too_large_names_the_limit():
    with pytest.raises(ManifestError, match="1048576"):
        Manifest.parse(b" " * (1 << 20) + b"{}")
