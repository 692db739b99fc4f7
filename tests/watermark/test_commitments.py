"""Encodings, commitments, trees and signatures against published vectors, and what must be refused."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

import pytest

from datamodules.errors import InputError
from watermark import canonical, commitments, merkle, signatures

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())


def test_canonical_encoding() -> None:
    value = {"b": [1, True, "é\n"], "a": {"z": -5, "y": ""}}
    data = canonical.encode(value)
    assert data == rb'{"a":{"y":"","z":-5},"b":[1,true,"\u00e9\n"]}'
    assert canonical.decode(data, "x") == value


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1,"a":1}', b'{"a":1.0}', b'{"a":null}', b'{"a":NaN}', b'{"a":01}',
        b'{"a":-0}', b'{"a":1}\n', b'{"a":"\xc3\xa9"}', b'{"a":"\\u0061"}', b'{"a":"\\/"}', b"", b"[" * 100_000,
    ],
)  # fmt: skip
def test_anything_but_the_canonical_encoding_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^x: "):
        canonical.decode(data, "x")


def test_complaints_show_nothing_of_a_file() -> None:
    for data in (b'{"seed":0.123456789}', b'{"seed":123456789.0}', b'{"123456789":1}', b'"123456789', b'{"a":"\xff"}'):
        with pytest.raises(InputError) as found:
            canonical.fields(canonical.decode(data, "x"), "x", {"seed": str})
        assert "123456789" not in str(found.value)
        assert "xff" not in str(found.value)


@pytest.mark.parametrize("text", ["a\nOWNED", "\x1b[2K", "naïve", "x" * 301, 3, "\t"])
def test_a_line_for_a_person_is_printable_ascii(text: object) -> None:
    with pytest.raises(InputError, match="printable ASCII"):
        canonical.line(text, "model")
    assert canonical.line("http://127.0.0.1:80 ab", "model")
    assert canonical.line("", "model") == ""


def test_too_long_and_unencodable() -> None:
    with pytest.raises(InputError, match="more than 3"):
        canonical.decode(b'"abc"', "x", limit=3)
    for value in (1.5, None, {1: 2}, b"bytes"):
        with pytest.raises(TypeError):
            canonical.encode(value)  # type: ignore[arg-type]


def test_a_commitment_by_hand() -> None:
    r, key_id = bytes(range(32)), b"k" * 32
    start = b"pharmakon/watermark/commitment" + b"\0\2" + key_id + b"\0\0\0\7"
    message = start + b"\1" + b"\0" * 7 + b"\4" + b"\0\0\0\3"
    expected = hmac.new(r, message, hashlib.sha256).digest()
    assert commitments.commit(r, key_id, 7, "label", commitments.label_payload(3)) == expected
    assert expected.hex() == VECTORS["commitment"]["values"]["label"]
    payload = b"uint8 CHW" + b"\0\0\0\3" + b"\0\0\0\2" * 2 + b"\0\0\0\5" + bytes(range(12))
    message = start + b"\0" + b"\0" * 7 + bytes([len(payload)]) + payload
    expected = hmac.new(r, message, hashlib.sha256).digest()
    given = commitments.trigger_payload(bytes(range(12)), (3, 2, 2), 5)
    assert commitments.commit(r, key_id, 7, "trigger", given) == expected
    assert expected.hex() == VECTORS["commitment"]["values"]["trigger"]
    assert commitments.trigger_payload(bytes(12), (3, 2, 2), -1)[21:25] == b"\xff" * 4


def test_a_commitment_opens_to_one_thing() -> None:
    r, key_id, payload = b"r" * 32, b"k" * 32, commitments.trigger_payload(bytes(12), (3, 2, 2), 0)
    made = commitments.commit(r, key_id, 0, "trigger", payload)
    assert commitments.opens(made, r, key_id, 0, "trigger", payload)
    assert not commitments.opens(made, b"s" * 32, key_id, 0, "trigger", payload)
    assert not commitments.opens(made, r, b"l" * 32, 0, "trigger", payload)
    assert not commitments.opens(made, r, key_id, 1, "trigger", payload)
    assert not commitments.opens(made, r, key_id, 0, "label", payload)
    assert not commitments.opens(made, r, key_id, 0, "trigger", commitments.trigger_payload(bytes(12), (3, 4, 1), 0))
    assert not commitments.opens(made, r, key_id, 0, "trigger", commitments.trigger_payload(bytes(12), (3, 2, 2), 1))
    # HMAC itself would take a short r and the same one with a zero behind it for one and the same
    assert not commitments.opens(made, r[:31], key_id, 0, "trigger", payload)
    with pytest.raises(ValueError, match="32 bytes"):
        commitments.commit(r + b"\0", key_id, 0, "trigger", payload)
    with pytest.raises(ValueError, match="pixels"):
        commitments.trigger_payload(bytes(11), (3, 2, 2), 0)


LEAVES = [bytes.fromhex(text) for text in VECTORS["merkle"]["leaves"]]


@pytest.mark.parametrize("count", range(9))
def test_merkle_roots_of_certificate_transparency(count: int) -> None:
    assert merkle.root(LEAVES[:count]).hex() == VECTORS["merkle"]["roots"][count]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 200])
def test_each_path_leads_to_the_root_and_no_other_does(count: int) -> None:
    leaves = [bytes([number]) for number in range(count)]
    top = merkle.root(leaves)
    for index in range(count):
        path = merkle.path(leaves, index)
        assert merkle.climb(leaves[index], index, count, path) == top
        assert merkle.climb(leaves[index] + b"x", index, count, path) != top
        assert merkle.climb(leaves[index], index, count, [*path, top]) is None
        if count > 1:
            assert merkle.climb(leaves[index], (index + 1) % count, count, path) != top
            assert merkle.climb(leaves[index], index, count, path[:-1]) is None
            assert merkle.climb(leaves[index], index, count, [bytes(32), *path[1:]]) != top
    assert merkle.climb(leaves[0], count, count, []) is None


def test_a_node_does_not_pass_for_a_leaf() -> None:
    left, right = (merkle.leaf_hash(leaf) for leaf in (b"a", b"b"))
    assert merkle.root([left + right]) != merkle.root([b"a", b"b"])


@pytest.mark.parametrize("case", VECTORS["ed25519"])
def test_ed25519_is_that_of_rfc_8032(case: dict[str, str]) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    secret = bytes.fromhex(case["secret"])
    assert signatures.public(secret).hex() == case["public"]
    assert Ed25519PrivateKey.from_private_bytes(secret).sign(bytes.fromhex(case["message"])).hex() == case["signature"]


def test_a_signature_serves_one_purpose_of_one_owner() -> None:
    secret, other = b"s" * 32, signatures.public(b"o" * 32)
    owner, signature = signatures.public(secret), signatures.sign(secret, "purpose", b"message")
    assert signatures.check(owner, signature, "purpose", b"message")
    assert not signatures.check(owner, signature, "purpos", b"emessage")
    assert not signatures.check(owner, signature, "purpose", b"another")
    assert not signatures.check(other, signature, "purpose", b"message")
    assert not signatures.check(owner, signature[:-1] + bytes([signature[-1] ^ 1]), "purpose", b"message")
    assert not signatures.check(owner, b"", "purpose", b"message")


@pytest.mark.parametrize("sign", [0, 0x80])
@pytest.mark.parametrize("y", [*sorted(signatures._WEAK), signatures._P, signatures._P + 1])
def test_a_public_key_of_small_order_signs_nothing(y: int, sign: int) -> None:
    """Under the neutral element R = 0, s = 0 is a signature of each message; under the others of some."""
    owner = bytearray(y.to_bytes(32, "little"))
    owner[31] |= sign
    for number in range(32):
        assert not signatures.check(bytes(owner), b"\1" + bytes(63), "purpose", bytes([number]))
