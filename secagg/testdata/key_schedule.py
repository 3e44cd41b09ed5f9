"""The key schedule of secure aggregation, computed a second time from its description.

Prints the values that the tests of `secagg/src/key_schedule.rs` hold. It shares no code with the crate: hashes
and HKDF are Python's own hashlib and hmac, curves and ciphers are those of pyca/cryptography. Run it again only
when the protocol's version changes: `python3 key_schedule.py`.
"""

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305


def label(name):
    return b"fleetune-sa/v1/" + name.encode() + b"\0"


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


def hkdf(salt, secret, info):
    """RFC 5869, one block of 32 bytes."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def merkle(leaves):
    """RFC 6962, section 2.1; a leaf is a hash already."""
    if len(leaves) == 1:
        return leaves[0]
    left = 1
    while left * 2 < len(leaves):
        left *= 2
    return sha256(b"\x01", merkle(leaves[:left]), merkle(leaves[left:]))


class Member:
    """All secrets of member number n: 32 times one byte."""

    def __init__(self, n):
        self.public = Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32).public_key().public_bytes_raw()
        self.id = sha256(self.public)
        self.share_secret = X25519PrivateKey.from_private_bytes(bytes([n + 32]) * 32)
        self.mask_secret = X25519PrivateKey.from_private_bytes(bytes([n + 64]) * 32)
        self.share_key = self.share_secret.public_key().public_bytes_raw()
        self.mask_key = self.mask_secret.public_key().public_bytes_raw()
        self.self_mask = bytes([n + 96]) * 32
        self.nonce = bytes([n + 128]) * 32
        self.leaf = sha256(b"\0", self.public, self.share_key, self.mask_key, self.nonce)


def agree(secret, public):
    return secret.exchange(X25519PublicKey.from_public_bytes(public))


def aes_mask(seed, count):
    """AES-128 of a 64-bit little-endian counter followed by 8 bytes of the seed, block by block."""
    cipher = Cipher(algorithms.AES128(seed[:16]), modes.ECB()).encryptor()
    return cipher.update(b"".join(struct.pack("<Q", block) + seed[16:24] for block in range(count // 16)))


def chacha_mask(seed, count):
    """ChaCha20 with the counter at zero; this library wants counter and nonce in one."""
    return Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(count))


config = bytes([8]) * 32
session = sha256(
    label("session"),
    text("roles"),
    text("lora"),
    struct.pack("<II", 3, 1),
    bytes([7]) * 32,
    config,
    bytes([9]) * 32,
)

members = sorted((Member(n) for n in (1, 2, 3)), key=lambda member: member.id)
ids = b"".join(member.id for member in members)
root = merkle([member.leaf for member in members])
roster = sha256(label("roster"), struct.pack("<Q", 3), root, ids)

# The first and the last of the roster, as a pair.
i, j = members[0], members[2]
share_info = label("share-aead") + roster + i.id + j.id + i.share_key + j.share_key
shared = agree(i.share_secret, j.share_key)
assert shared == agree(j.share_secret, i.share_key)
forth, back = (hkdf(session, shared, share_info + sender.id) for sender in (i, j))
pair_info = label("pair-mask") + roster + i.id + j.id + i.mask_key + j.mask_key + config
pair_seed = hkdf(session, agree(i.mask_secret, j.mask_key), pair_info)
self_seed = hkdf(session, i.self_mask, label("self-mask") + roster + i.id + config)
bitmap = bytes([0b101])
survivors = sha256(label("survivor-set"), struct.pack("<I", 3), bitmap)
sealed = ChaCha20Poly1305(forth).encrypt(bytes(12), bytes(range(64)), session + struct.pack("<II", 0, 2))

values = {
    "session": session,
    "merkle root": root,
    "roster": roster,
    "share key 0 to 2": forth,
    "share key 2 to 0": back,
    "sealed share 0 to 2": sealed,
    "pair seed": pair_seed,
    "pair mask, aes128-ctr": aes_mask(pair_seed, 32),
    "pair mask, chacha20": chacha_mask(pair_seed, 32),
    "self seed": self_seed,
    "self mask, aes128-ctr": aes_mask(self_seed, 32),
    "self mask, chacha20": chacha_mask(self_seed, 32),
    "commitment": sha256(label("self-mask-commitment"), session, i.id, i.self_mask),
    "graph seed": sha256(label("graph"), session, roster),
    "survivors message": label("survivors") + session + roster + survivors,
    "advertised": label("advertise") + session + i.share_key + i.mask_key + i.nonce,
}
for name, value in values.items():
    print(f"{name}: {value.hex()}")
