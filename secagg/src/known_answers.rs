//! Published test vectors of the primitives that come from other crates, called as the protocol calls them: a
//! new version of one that computes something else fails here and not in the field. Tests only.
//!
//! AES-CTR and the ChaCha20 keystream are in `mask/tests.rs`, the Merkle tree's in `roster_tree.rs`.

use crate::{
    identity::{CertificateError, verifying_key},
    key_schedule::{LowOrder, agree, is_low_order},
};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit, aead::AeadInOut};
use ed25519_dalek::{Signature, Signer, SigningKey, Verifier, VerifyingKey};
use hkdf::Hkdf;
use sha2::Sha256;
use x25519_dalek::{PublicKey, StaticSecret};

fn bytes<const N: usize>(text: &str) -> [u8; N] {
    hex::decode(text).unwrap().try_into().unwrap()
}

fn x25519(secret: [u8; 32], public: [u8; 32]) -> [u8; 32] {
    agree(&StaticSecret::from(secret), &public).unwrap().to_bytes()
}

/// RFC 7748, section 5.2. The second coordinate has its top bit set, which is to be ignored.
#[test]
fn x25519_function() {
    let check = |secret, public, expected: &str| {
        assert_eq!(hex::encode(x25519(bytes(secret), bytes(public))), expected);
    };
    check(
        "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
        "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    );
    check(
        "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
        "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
        "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
    );
}

/// RFC 7748, section 5.2: its own output as the next secret, once and a thousand times.
#[test]
fn x25519_iterated() {
    let mut base = [0; 32];
    base[0] = 9;
    let (mut secret, mut public) = (base, base);
    for round in 1..=1000 {
        (secret, public) = (x25519(secret, public), secret);
        if round == 1 {
            let expected = "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079";
            assert_eq!(hex::encode(secret), expected);
        }
    }
    let expected = "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51";
    assert_eq!(hex::encode(secret), expected);
}

/// RFC 7748, section 6.1.
#[test]
fn x25519_agreement() {
    let alice = bytes("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a");
    let bob = bytes("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb");
    let public = |secret: [u8; 32]| PublicKey::from(&StaticSecret::from(secret)).to_bytes();
    let of_alice = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a";
    let of_bob = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f";
    assert_eq!((hex::encode(public(alice)), hex::encode(public(bob))), (of_alice.into(), of_bob.into()));
    let shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742";
    assert_eq!(hex::encode(x25519(alice, public(bob))), shared);
    assert_eq!(hex::encode(x25519(bob, public(alice))), shared);
}

/// All encodings of points of low order, on the curve and its twist, with and without the ignored top bit
/// (RFC 7748, section 6.1; the list is D. J. Bernstein's, cr.yp.to/ecdh.html). A peer that sent one would
/// make the pair's secret known to everybody.
#[test]
fn x25519_refuses_low_order() {
    let points = [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ];
    for (point, top) in points.iter().flat_map(|point| [(point, 0), (point, 0x80)]) {
        let mut public: [u8; 32] = bytes(point);
        public[31] |= top;
        for secret in [[0; 32], [1; 32], [0xff; 32]] {
            assert_eq!(agree(&StaticSecret::from(secret), &public).err(), Some(LowOrder), "{point} {top}");
        }
        assert!(is_low_order(&public), "{point} {top}");
    }
}

/// RFC 8032, section 7.1: tests 1, 2, 3 and SHA(abc).
const ED25519: [[&str; 4]; 4] = [
    [
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155\
         5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ],
    [
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da\
         085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ],
    [
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac\
         18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ],
    [
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
         2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589\
         09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ],
];

#[test]
fn ed25519() {
    for [secret, public, message, signature] in ED25519 {
        let (key, message) = (SigningKey::from_bytes(&bytes(secret)), hex::decode(message).unwrap());
        assert_eq!(hex::encode(key.verifying_key().to_bytes()), public);
        assert_eq!(hex::encode(key.sign(&message).to_bytes()), signature);
        let (key, signature) = (verifying_key(&bytes(public)).unwrap(), bytes::<64>(signature));
        assert!(key.verify_strict(&message, &Signature::from_bytes(&signature)).is_ok());
        for bit in 0..512 {
            let mut forged = signature;
            forged[bit / 8] ^= 1 << (bit % 8);
            assert!(key.verify_strict(&message, &Signature::from_bytes(&forged)).is_err(), "bit {bit}");
        }
        let longer = [&message[..], &[0]].concat();
        assert!(key.verify_strict(&longer, &Signature::from_bytes(&signature)).is_err());
    }
}

/// Adding the group's order to s gives a second signature of the same message, unless it is refused (RFC
/// 8032, section 5.1.7).
#[test]
fn ed25519_signatures_are_not_malleable() {
    let order: [u8; 32] = bytes("edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010");
    for [_, public, message, signature] in ED25519 {
        let mut other: [u8; 64] = bytes(signature);
        let mut carry = 0;
        for (byte, add) in other[32..].iter_mut().zip(order) {
            let sum = u16::from(*byte) + u16::from(add) + carry;
            (*byte, carry) = (sum.to_le_bytes()[0], sum >> 8);
        }
        let key = verifying_key(&bytes(public)).unwrap();
        let message = hex::decode(message).unwrap();
        assert!(key.verify_strict(&message, &Signature::from_bytes(&other)).is_err());
    }
}

/// The eight points of low order. With such a key one signature holds for any message, by the lenient rule;
/// a peer could deny what it signed, or sign for two.
#[test]
fn ed25519_refuses_low_order_keys() {
    let points = [
        "0100000000000000000000000000000000000000000000000000000000000000",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0000000000000000000000000000000000000000000000000000000000000080",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    ];
    // R the neutral element and s = 0.
    let mut nothing = [0; 64];
    nothing[0] = 1;
    let signature = Signature::from_bytes(&nothing);
    for point in points {
        assert_eq!(verifying_key(&bytes(point)).err(), Some(CertificateError::Key), "{point}");
        let key = VerifyingKey::from_bytes(&bytes(point)).unwrap();
        assert!((0..64u8).all(|message| key.verify_strict(&[message], &signature).is_err()), "{point}");
    }
    let neutral = VerifyingKey::from_bytes(&bytes(points[0])).unwrap();
    assert!(neutral.verify(b"anything", &signature).is_ok(), "the lenient rule accepts it");
}

/// RFC 5869, appendices A.1, A.2 and A.3.
#[test]
fn hkdf_sha256() {
    let range = |from: u8, to: u8| (from..=to).collect::<Vec<u8>>();
    let check = |secret: &[u8], salt: &[u8], info: &[u8], expected: &str| {
        let mut key = vec![0; expected.len() / 2];
        Hkdf::<Sha256>::new(Some(salt), secret).expand(info, &mut key).unwrap();
        assert_eq!(hex::encode(key), expected);
    };
    check(
        &[0x0b; 22],
        &range(0, 0x0c),
        &range(0xf0, 0xf9),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    );
    check(
        &range(0, 0x4f),
        &range(0x60, 0xaf),
        &range(0xb0, 0xff),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09\
         da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    );
    check(
        &[0x0b; 22],
        &[],
        &[],
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    );
}

/// RFC 8439, section 2.8.2; and nothing that differs in a bit opens.
#[test]
fn chacha20_poly1305() {
    let key: [u8; 32] = bytes("808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f");
    let nonce: [u8; 12] = bytes("070000004041424344454647");
    let data: [u8; 12] = bytes("50515253c0c1c2c3c4c5c6c7");
    let plain =
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, \
                  sunscreen would be it.";
    let expected = "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d6\
                    3dbea45e8ca9671282fafb69da92728b1a71de0a9e060b2905d6a5b67ecd3b36\
                    92ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc\
                    3ff4def08e4b7a9de576d26586cec64b6116";
    let mut text = plain.to_vec();
    let cipher = ChaCha20Poly1305::new(&key.into());
    let tag = cipher.encrypt_inout_detached(&nonce.into(), &data, text.as_mut_slice().into()).unwrap();
    assert_eq!(hex::encode(&text), expected);
    assert_eq!(hex::encode(tag), "1ae10b594f09e26a7e902ecbd0600691");

    let open = |sealed: &[u8], data: &[u8]| {
        let (text, tag) = sealed.split_at(plain.len());
        let (mut text, tag) = (text.to_vec(), <[u8; 16]>::try_from(tag).unwrap());
        let opened =
            cipher.decrypt_inout_detached(&nonce.into(), data, text.as_mut_slice().into(), &tag.into());
        opened.ok().map(|()| text)
    };
    let sealed = [&text[..], &tag[..]].concat();
    assert_eq!(open(&sealed, &data), Some(plain.to_vec()));
    for bit in 0..sealed.len() * 8 {
        let mut forged = sealed.clone();
        forged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(open(&forged, &data), None, "bit {bit}");
    }
    for bit in 0..data.len() * 8 {
        let mut forged = data;
        forged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(open(&sealed, &forged), None, "bit {bit} of the data");
    }
}
