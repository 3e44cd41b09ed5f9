//! The key schedule against values computed by `testdata/key_schedule.py`, which shares no code with it; and
//! that nothing which should change a key leaves it as it was.

use super::*;
use crate::{
    Advertisement, Certificate, RingBits, RingVector, RosterTree, SessionParts, Sign, SurvivorSet, add_masks,
    mask::MaskSuite,
};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit, aead::AeadInOut};
use ed25519_dalek::SigningKey;

/// A member whose secrets are 32 times one byte each.
struct Member {
    share_secret: StaticSecret,
    mask_secret: StaticSecret,
    self_mask: [u8; 32],
    advertisement: Advertisement,
    id: DeviceId,
}

impl Member {
    fn new(n: u8) -> Self {
        let secret = |step| StaticSecret::from([n + step; 32]);
        let (share_secret, mask_secret) = (secret(32), secret(64));
        let public_key = SigningKey::from_bytes(&[n; 32]).verifying_key().to_bytes();
        let advertisement = Advertisement {
            certificate: Certificate { public_key, expires_unix_ms: 0, signature: [0; 64] },
            share_key: PublicKey::from(&share_secret).to_bytes(),
            mask_key: PublicKey::from(&mask_secret).to_bytes(),
            nonce: [n + 128; 32],
            signature: [0; 64],
        };
        let id = advertisement.id();
        Self { share_secret, mask_secret, self_mask: [n + 96; 32], advertisement, id }
    }

    fn share_end(&self, index: u32) -> End<'_> {
        End { index, id: &self.id, key: &self.advertisement.share_key }
    }

    fn mask_end(&self, index: u32) -> End<'_> {
        End { index, id: &self.id, key: &self.advertisement.mask_key }
    }
}

fn terms() -> Terms {
    let config_sha256 = [8; 32];
    let session = SessionId::derive(&SessionParts {
        population: "roles",
        task: "lora",
        round: 3,
        attempt: 1,
        model_sha256: [7; 32],
        config_sha256,
        server_nonce: [9; 32],
    });
    let bits = RingBits::new(32).unwrap();
    Terms { session, config_sha256, suite: MaskSuite::Aes128Ctr, bits, dimension: 8 }
}

fn members() -> [Member; 3] {
    let mut members = [1, 2, 3].map(Member::new);
    members.sort_by_key(|member| member.id);
    members
}

fn tree(members: &[Member; 3]) -> RosterTree {
    RosterTree::new(members.iter().map(|member| member.advertisement.leaf()).collect())
}

fn binding(members: &[Member; 3]) -> Binding {
    Binding::new(&terms(), &tree(members).root(), &members.each_ref().map(|member| member.id))
}

/// The first 32 bytes of a mask.
fn expanded(suite: MaskSuite, seed: MaskSeed) -> String {
    let mut vector = RingVector::zeros(terms().bits, 8);
    add_masks(suite, &mut vector, &[(seed, Sign::Plus)]);
    hex::encode(vector.pack())
}

#[test]
fn what_a_session_is_bound_to() {
    let members = members();
    let (binding, own) = (binding(&members), &members[0]);
    let check = |found: &[u8], expected: &str| assert_eq!(hex::encode(found), expected);
    check(binding.session.as_bytes(), "ee59117c86ae140e3ae6f587ccbbd0b7456e57d4d97e31e84d47fb462675f667");
    check(&tree(&members).root(), "5b8337068fe31543b782050ea725059b463932a89b625daa84f77b6f6cf21641");
    check(&binding.roster_root, "b450a6ab84853e88b06065bad89bfac9c71bbd9051314da379829ee2e91fe7b4");
    check(&binding.graph_seed(), "ba4f4abe3ab49dedcbf19791fc8182fd364c4b752bde16dfd64f0aeadf9a6e5e");
    check(
        &binding.commitment(&own.self_mask, &own.id),
        "402c063e3bb83ecb9b9a8924a21cb097be611b0cb764093dda181162a8fb9b39",
    );
    let survivors = SurvivorSet::of(3, |index| index != 1);
    check(
        &binding.survivors_message(&survivors.sha256()),
        "666c656574756e652d73612f76312f7375727669766f727300ee59117c86ae140e3ae6f587ccbbd0\
          b7456e57d4d97e31e84d47fb462675f667b450a6ab84853e88b06065bad89bfac9c71bbd9051314d\
          a379829ee2e91fe7b41ddc3c94d1e1076cba15cbbc10968cc17f57fd418bc258175e15189b0e59cc\
          1f",
    );
    let Advertisement { share_key, mask_key, nonce, .. } = &own.advertisement;
    check(
        &advertised(&binding.session, share_key, mask_key, nonce),
        "666c656574756e652d73612f76312f61647665727469736500ee59117c86ae140e3ae6f587ccbbd0\
          b7456e57d4d97e31e84d47fb462675f6677d34a4815fa6b982535e60af3bd9b49556816080f1641f\
          f81d2b7c8ae8268a447a1a4e709bf085ac494aba0469b9b1eda0ab1f78b16aabb79ffeda90623e85\
          228181818181818181818181818181818181818181818181818181818181818181",
    );
}

#[test]
fn keys_of_shares() {
    let members = members();
    let (binding, [i, _, j]) = (binding(&members), &members);
    let shared = agree(&i.share_secret, &j.advertisement.share_key).unwrap();
    let forth = binding.share_key(&shared, i.share_end(0), j.share_end(2));
    let back = binding.share_key(&shared, j.share_end(2), i.share_end(0));
    assert_eq!(hex::encode(*forth), "05d80b5814de267ceca7c156bb7196fb0076012eb02be379074f2b96c3ff257a");
    assert_eq!(hex::encode(*back), "604d5a3b107ad999d2b89075539abd1d81faa4fd5183a703b1cbc29ac4153f80");
    let mut text: [u8; 64] = std::array::from_fn(|i| u8::try_from(i).unwrap());
    let tag = ChaCha20Poly1305::new((&*forth).into())
        .encrypt_inout_detached(&[0; 12].into(), &binding.share_data(0, 2), text.as_mut_slice().into())
        .unwrap();
    let sealed = "19ee1660f1f19bd387e067ff636b519b9a988cba4b2415d88ad328b40ee008f050f3abe3054b39fe\
          f99adfc25ee89795c746193015a77f415e0c17d1a7674b819d55c56e33dea831b71dc9a157afd357";
    assert_eq!(hex::encode([&text[..], &tag].concat()), sealed);
}

#[test]
fn masks_of_a_pair_and_of_one() {
    let members = members();
    let (binding, [i, _, j]) = (binding(&members), &members);
    let [from_i, from_j] = [(i, j), (j, i)].map(|(own, peer)| {
        let shared = agree(&own.mask_secret, &peer.advertisement.mask_key).unwrap();
        binding.pair_seed(&shared, i.mask_end(0), j.mask_end(2))
    });
    let shared = agree(&i.mask_secret, &j.advertisement.mask_key).unwrap();
    let either_order = binding.pair_seed(&shared, j.mask_end(2), i.mask_end(0));
    for seed in [from_i, from_j, either_order] {
        let aes = "2aee9e229bf9752c011a1b51956b047439a5670d66208a5476f9bf6ba3a3f4cd";
        assert_eq!(expanded(MaskSuite::Aes128Ctr, seed.clone()), aes);
        let chacha = "32b32bdb6446ca8084e7bad589aa5938e7106a6a7e2c158c085bd48c2db5a85c";
        assert_eq!(expanded(MaskSuite::ChaCha20, seed), chacha);
    }
    let own = binding.self_seed(&i.self_mask, &i.id);
    let aes = "7ad100017672d390c2f98d1187ceb8901a8a0ffbbdc0805a2c4a98e2ad64289c";
    assert_eq!(expanded(MaskSuite::Aes128Ctr, own.clone()), aes);
    let chacha = "c6a95032c6e3ecf6f238f877646235ca52a7e700ce2ec9d4b6a0e74a84d6c0b8";
    assert_eq!(expanded(MaskSuite::ChaCha20, own), chacha);
}

/// Two devices of one pair that were told different things have masks that do not cancel.
#[test]
fn whatever_two_devices_disagree_about_separates_their_keys() {
    let members = members();
    let (binding, [i, _, j]) = (binding(&members), &members);
    let others = [
        Binding { session: SessionId::from_bytes([1; 32]), ..binding },
        Binding { config_sha256: [1; 32], ..binding },
        Binding { roster_root: [1; 32], ..binding },
    ];
    let shared = agree(&i.mask_secret, &j.advertisement.mask_key).unwrap();
    let masks = |binding: &Binding, i: End<'_>, j: End<'_>| {
        [
            expanded(MaskSuite::Aes128Ctr, binding.pair_seed(&shared, i, j)),
            expanded(MaskSuite::Aes128Ctr, binding.self_seed(&[1; 32], i.id)),
        ]
    };
    let (i, j) = (i.mask_end(0), j.mask_end(2));
    let agreed = masks(&binding, i, j);
    for (n, other) in others.iter().enumerate() {
        let [pair, own] = masks(other, i, j);
        assert!(pair != agreed[0] && own != agreed[1], "binding {n}");
    }
    let stranger = DeviceId([1; 32]);
    for (n, i) in
        [End { id: &stranger, ..i }, End { key: &[1; 32], ..i }, End { index: 3, ..i }].iter().enumerate()
    {
        assert_ne!(masks(&binding, *i, j)[0], agreed[0], "end {n}");
    }
    // A share is for one session, roster, sender and receiver; the plan is in the session.
    let key = |binding: &Binding, from, to| hex::encode(*binding.share_key(&shared, from, to));
    let agreed = key(&binding, i, j);
    assert_ne!(agreed, key(&binding, j, i));
    assert_ne!(agreed, key(&others[0], i, j));
    assert_ne!(agreed, key(&others[2], i, j));
    assert_ne!(agreed, key(&binding, End { id: &stranger, ..i }, j));
}

#[test]
fn every_listed_key_is_of_low_order_and_honest_keys_are_not() {
    for key in LOW_ORDER {
        for secret in [[1; 32], [2; 32], [77; 32]] {
            assert_eq!(agree(&StaticSecret::from(secret), &key).err(), Some(LowOrder));
        }
        let mut with_top_bit = key;
        with_top_bit[31] |= 0x80;
        assert!(is_low_order(&key) && is_low_order(&with_top_bit));
    }
    for secret in 0..=255 {
        let public = PublicKey::from(&StaticSecret::from([secret; 32])).to_bytes();
        assert!(!is_low_order(&public));
    }
}
