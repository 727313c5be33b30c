"""Every primitive, as the secure sum calls it, against the published answers and against a second way to compute it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aggregation import keys, shamir
from aggregation.masks import add_mask
from contract.errors import SecureSumError

H = bytes.fromhex


def gives(*answers: bytes) -> Callable[[int], bytes]:
    """Entropy that is known beforehand; each answer must be as long as what is asked for."""
    left = list(answers)

    def entropy(count: int) -> bytes:
        answer = left.pop(0)
        assert len(answer) == count
        return answer

    return entropy


@pytest.mark.parametrize(
    ("scalar", "u", "product"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ],
)
def test_x25519_gives_the_products_of_rfc_7748_section_5_2(scalar: str, u: str, product: str) -> None:
    assert keys.agree(H(scalar), H(u), "anybody") == H(product)


def test_x25519_iterated_gives_the_values_of_rfc_7748_section_5_2() -> None:
    k = u = (9).to_bytes(32, "little")
    for count in range(1, 1001):
        k, u = keys.agree(k, u, "anybody"), k
        if count == 1:
            assert k == H("422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079")
    assert k == H("684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51")


def test_x25519_agrees_as_alice_and_bob_do_in_rfc_7748_section_6_1() -> None:
    alice = H("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = H("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice_public = H("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    bob_public = H("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = H("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert keys.public_bytes(alice) == alice_public
    assert keys.public_bytes(bob) == bob_public
    assert keys.agree(alice, bob_public, "bob") == keys.agree(bob, alice_public, "alice") == shared


FIELD_PRIME = 2**255 - 19
# The u-coordinates of order 1, 2, 4 and 8 on the curve and its twist, and those that are congruent to them: RFC 7748
# section 6.1 has an implementation look for the all-zero result that every one of them leads to (section 7).
LOW_ORDER = [
    0,
    1,
    int.from_bytes(H("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"), "little"),
    int.from_bytes(H("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"), "little"),
    FIELD_PRIME - 1,
    FIELD_PRIME,
    FIELD_PRIME + 1,
]


@pytest.mark.parametrize("top_bit", [0, 2**255])
@pytest.mark.parametrize("u", LOW_ORDER)
def test_an_x25519_key_that_makes_the_agreement_public_is_refused_by_its_owner(u: int, top_bit: int) -> None:
    with pytest.raises(SecureSumError, match="the X25519 key of client mallory cannot be used"):
        keys.agree(bytes(range(32)), (u + top_bit).to_bytes(32, "little"), "client mallory")


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_an_x25519_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(SecureSumError, match="the X25519 key of client mallory cannot be used"):
        keys.agree(bytes(range(32)), b"\x09" * length, "client mallory")


@pytest.mark.parametrize(
    ("secret", "salt", "info", "length", "answer"),
    [
        pytest.param(
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            42,
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
            id="A.1",
        ),
        pytest.param(
            bytes(range(0x50)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            82,
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
            id="A.2",
        ),
        pytest.param(
            b"\x0b" * 22,
            b"",
            b"",
            42,
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
            id="A.3",
        ),
    ],
)
def test_hkdf_gives_the_keys_of_rfc_5869_appendix_a(
    secret: bytes, salt: bytes, info: bytes, length: int, answer: str
) -> None:
    for asked in (keys.KEY_BYTES, length):
        assert HKDF(SHA256(), asked, salt=salt, info=info).derive(secret) == H(answer)[:asked]
    assert hkdf(secret, salt, info) == H(answer)[: keys.KEY_BYTES]


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """The first 32 bytes by RFC 5869 sections 2.2 and 2.3: T(1) alone."""
    extracted = hmac.new(salt or bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def test_a_derived_key_is_hkdf_salted_with_the_session_over_length_prefixed_fields() -> None:
    secret, session_id = bytes(range(32)), bytes(range(100, 132))
    fields = [(b"s", b"pair mask"), (b"i", b"3"), (b"i", b"12"), (b"b", b"\xad" * 32), (b"s", b"adapter")]
    info = hashlib.sha256(b"".join(kind + len(raw).to_bytes(8, "big") + raw for kind, raw in fields)).digest()
    derived = keys.derive(secret, session_id, "pair mask", 3, 12, b"\xad" * 32, "adapter")
    assert derived == hkdf(secret, session_id, info)


def test_fields_that_join_to_the_same_bytes_have_other_digests() -> None:
    lists = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"), ("a", "b", "c"), (1,), ("1",), (b"1",)]
    assert len({keys.digest("label", *fields) for fields in lists} | {keys.digest("labela", "bc")}) == len(lists) + 1


GCM_KEY = "feffe9928665731c6d6a8f9467308308" * 2
GCM_PLAIN = (
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
GCM_CIPHER = (
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
)


@pytest.mark.parametrize(
    ("key", "nonce", "plain", "bound_to", "cipher", "tag"),
    [
        pytest.param("00" * 32, "00" * 12, "", "", "", "530f8afbc74536b9a963b4f1c4cb738b", id="case 13"),
        pytest.param(
            "00" * 32,
            "00" * 12,
            "00" * 16,
            "",
            "cea7403d4d606b6e074ec5d3baf39d18",
            "d0d1c8a799996bf0265b98b5d48ab919",
            id="case 14",
        ),
        pytest.param(
            GCM_KEY,
            "cafebabefacedbaddecaf888",
            GCM_PLAIN,
            "",
            GCM_CIPHER,
            "b094dac5d93471bdec1a502270e3cc6c",
            id="case 15",
        ),
        pytest.param(
            GCM_KEY,
            "cafebabefacedbaddecaf888",
            GCM_PLAIN[:120],
            "feedfacedeadbeeffeedfacedeadbeefabaddad2",
            GCM_CIPHER[:120],
            "76fc6ece0f4e1768cddf8853bb2d551b",
            id="case 16",
        ),
    ],
)
def test_sealing_gives_the_answers_of_the_gcm_submission_to_nist_appendix_b(
    key: str, nonce: str, plain: str, bound_to: str, cipher: str, tag: str
) -> None:
    """McGrew and Viega, "The Galois/Counter Mode of Operation", which SP 800-38D refers to: the AES-256 cases."""
    sealed = keys.seal(H(key), H(plain), H(bound_to), gives(H(nonce)))
    assert sealed == H(nonce) + H(cipher) + H(tag)
    assert keys.unseal(H(key), sealed, H(bound_to), "anybody") == H(plain)


def test_a_sealed_share_opens_with_its_own_key_in_its_own_place_and_whole_only() -> None:
    sealed = keys.seal(bytes(32), b"two shares", b"from 1 to 2", gives(bytes(range(12))))
    flipped = [
        bytes(b ^ (bit << 3) for b, bit in zip(sealed, row, strict=True)) for row in np.eye(len(sealed), dtype=int)
    ]
    cut = [sealed[:length] for length in range(len(sealed))]
    for forged in (*flipped, *cut, sealed + b"\0"):
        with pytest.raises(SecureSumError, match="sealed by client a cannot be opened"):
            keys.unseal(bytes(32), forged, b"from 1 to 2", "client a")
    for key, place in ((bytes(31) + b"\1", b"from 1 to 2"), (bytes(32), b"from 2 to 1"), (bytes(32), b"")):
        with pytest.raises(SecureSumError, match="sealed by client a cannot be opened"):
            keys.unseal(key, sealed, place, "client a")


CTR_KEY = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"


def test_counter_mode_gives_the_answer_of_sp_800_38a_appendix_f_5_5() -> None:
    plain = (
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    stream = Cipher(algorithms.AES(H(CTR_KEY)), modes.CTR(bytes(range(0xF0, 0x100)))).encryptor()
    buffer = bytearray(64)
    assert stream.update_into(H(plain), memoryview(buffer)) == 64
    assert buffer == H(cipher)


def keystream(key: bytes, count: int) -> bytes:
    """The encrypted blocks 0, 1, 2, ... of SP 800-38A section 6.5, by the block cipher alone."""
    blocks = b"".join(number.to_bytes(16, "big") for number in range(-(-count // 16)))
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)[:count]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000, 65537])
def test_a_mask_is_the_block_cipher_over_a_counter_from_zero_read_as_little_endian(bits: int, size: int) -> None:
    vector = np.zeros(size, dtype=f"uint{bits}")
    add_mask(vector, H(CTR_KEY))
    stream = keystream(H(CTR_KEY), size * bits // 8)
    step = bits // 8
    expected = [int.from_bytes(stream[at : at + step], "little") for at in range(0, len(stream), step)]
    assert vector.tolist() == expected


def test_the_mask_of_the_zero_key_begins_with_the_hash_subkey_of_the_gcm_submission_case_13() -> None:
    vector = np.zeros(4, dtype=np.uint32)
    add_mask(vector, bytes(32))
    assert vector.astype("<u4").tobytes() == H("dc95c078a2408989ad48a21492842087")


@pytest.mark.parametrize(
    ("secret", "public", "message", "signature"),
    [
        pytest.param(
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            b"",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
            "d25bf5f0595bbe24655141438e7a100b",
            id="test 1",
        ),
        pytest.param(
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            b"\x72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
            "387b2eaeb4302aeeb00d291612bb0c00",
            id="test 2",
        ),
        pytest.param(
            "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            b"\xaf\x82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
            "4a7c15e9716ed28dc027beceea1ec40a",
            id="test 3",
        ),
        pytest.param(
            "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
            "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
            hashlib.sha512(b"abc").digest(),
            "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e030"
            "3dca179c138ac17ad9bef1177331a704",
            id="test SHA(abc)",
        ),
    ],
)
def test_signatures_are_those_of_rfc_8032_section_7_1(secret: str, public: str, message: bytes, signature: str) -> None:
    identity = Ed25519PrivateKey.from_private_bytes(H(secret))
    assert identity.public_key().public_bytes_raw() == H(public)
    assert keys.sign(identity, message) == H(signature)
    keys.verify(H(public), H(signature), message, "the message")


def test_a_signature_of_another_message_key_or_length_is_refused_by_name() -> None:
    identity = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    public = identity.public_key().public_bytes_raw()
    signature = keys.sign(identity, b"said")
    # RFC 8032 section 5.1.7: S at or above the group's order is malleable, and no signature.
    order = 2**252 + 27742317777372353535851937790883648493
    malleable = signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    forgeries = [
        (public, signature, b"not said"),
        (public, malleable, b"said"),
        (public, signature[:-1], b"said"),
        (public, signature + b"\0", b"said"),
        (public, b"", b"said"),
        (public, bytes(keys.SIGNATURE_BYTES), b"said"),
        (keys.public_bytes(bytes(range(32))), signature, b"said"),
        (public[:-1], signature, b"said"),
        (b"", signature, b"said"),
    ]
    for key, forged, message in forgeries:
        with pytest.raises(SecureSumError, match="the advert of client a is not signed by the identity in the roster"):
            keys.verify(key, forged, message, "the advert of client a")


def field(number: int) -> bytes:
    return number.to_bytes(32, "big")


LAST = 2**256 - 190


@pytest.mark.parametrize(
    ("secret", "coefficients", "points", "shares"),
    [
        pytest.param(5, [], [1, 2, 9], [5, 5, 5], id="a constant"),
        pytest.param(5, [7], [1, 2, 3], [12, 19, 26], id="5 + 7x"),
        pytest.param(1, [2, 3], [1, 2, 3, 10], [6, 17, 34, 321], id="1 + 2x + 3x^2"),
        pytest.param(LAST, [1], [1, 2, 3], [0, 1, 2], id="-1 + x"),
        pytest.param(0, [LAST], [1, 2, 3], [LAST, LAST - 1, LAST - 2], id="-x"),
        pytest.param(0, [0, 1], [1, 3, 2**128], [1, 9, 189], id="x^2, which wraps at 2^128"),
    ],
)
def test_shares_are_the_polynomials_values_that_a_hand_can_check(
    secret: int, coefficients: list[int], points: list[int], shares: list[int]
) -> None:
    entropy = gives(*(field(number) for number in coefficients))
    split = shamir.split(field(secret), len(coefficients) + 1, points, entropy)
    assert split == {point: field(share) for point, share in zip(points, shares, strict=True)}
    needed = dict(list(split.items())[-len(coefficients) - 1 :])
    assert shamir.combine(needed, shamir.weights_at_zero(needed)) == field(secret)


@pytest.mark.parametrize(
    ("points", "weights"),
    [([7], [1]), ([1, 2], [2, -1]), ([1, 2, 3], [3, -3, 1]), ([1, 2, 3, 4], [4, -6, 4, -1]), ([2, 4], [2, -1])],
)
def test_lagranges_weights_at_zero_are_those_of_the_textbook(points: list[int], weights: list[int]) -> None:
    expected = {point: weight % (2**256 - 189) for point, weight in zip(points, weights, strict=True)}
    assert shamir.weights_at_zero(points) == expected


def test_a_secret_is_drawn_again_until_it_is_in_the_field() -> None:
    entropy = gives(field(LAST + 1), b"\xff" * 32, field(LAST))
    assert shamir.draw_secret(entropy) == field(LAST)


def test_shares_are_the_same_by_powers_and_by_the_products_of_lagrange() -> None:
    prime = 2**256 - 189
    drawn = [hashlib.sha256(bytes([number])).digest() for number in range(7)]
    numbers = [int.from_bytes(one, "big") for one in drawn]
    assert max(numbers) < prime
    points = [1, 2, 3, 5, 8, 13, 21, 10_000]
    split = shamir.split(drawn[0], 7, points, gives(*drawn[1:]))
    for x in points:
        # The coefficients come in rising powers, as they are drawn.
        assert int.from_bytes(split[x], "big") == sum(c * pow(x, k, prime) for k, c in enumerate(numbers)) % prime
    total = 0
    for x in points[:7]:
        others = [other for other in points[:7] if other != x]
        term = int.from_bytes(split[x], "big")
        for other in others:
            term = term * other * pow(other - x, prime - 2, prime) % prime
        total += term
    assert (total % prime) == numbers[0]
