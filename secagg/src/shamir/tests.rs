use super::*;
use proptest::prelude::*;
use rand::{SeedableRng, TryCryptoRng, TryRng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;
use sha2::{Digest, Sha256};
use std::convert::Infallible;

fn secret(rng: &mut ChaCha20Rng) -> [u8; SECRET_BYTES] {
    std::array::from_fn(|_| rng.random())
}

fn places(pairs: &[SharePair]) -> Vec<(u8, &[u8; 32])> {
    (1..).zip(pairs.iter().map(SharePair::self_mask)).collect()
}

/// Shares of 0x53 under 0x53 + 0xca x + 0x01 x^2, worked out by hand with FIPS 197's multiplication.
#[test]
fn known_shares() {
    let values: Vec<[u8; 32]> = (1..=3u8).map(|x| [0x53 ^ multiply(0xca, x) ^ multiply(x, x); 32]).collect();
    assert_eq!([values[0][0], values[1][0], values[2][0]], [0x98, 0xd8, 0x13]);
    let shares: Vec<(u8, &[u8; 32])> = (1..).zip(&values).collect();
    assert_eq!(*join(3, &shares).unwrap(), [0x53; 32]);
}

/// Shares at some places of SHA-256(00) under SHA-256(00) + SHA-256(01) x + SHA-256(02) x^2 + SHA-256(03) x^3,
/// computed by another program with schoolbook products of polynomials and no tables.
const FROZEN: [(u8, &str); 6] = [
    (1, "f64f40727271659d8d395d8cb73ad2968c9829321dd728f8081df138a98215c4"),
    (2, "f9a2e08b2805605568bd0aa48b101a035539530b21ba46258f961f946d40306e"),
    (5, "48ef257c9a0400f96a5ece265aa9a05a831be86a4685d2bcc638a32130a08942"),
    (128, "afc984c17ec3e4093dedee73f9f9e970f5b5ac74aa3cfb3ff12378a4e609c0a7"),
    (253, "c0ba2103954ee89d85f937506068e58010e1a514fc838cf5eab564dc7d410d4f"),
    (254, "1754d622c59e1660b31559689cf80ffcc946250f0cea30c9ddad551a7449a627"),
];

/// Hands out 64-bit words that were laid down before.
struct Script(std::vec::IntoIter<u64>);

impl TryRng for Script {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        unreachable!("coefficients are drawn in words of 64 bits")
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(self.0.next().expect("as many words as coefficients take"))
    }

    fn try_fill_bytes(&mut self, _: &mut [u8]) -> Result<(), Infallible> {
        unreachable!("coefficients are drawn in words of 64 bits")
    }
}

impl TryCryptoRng for Script {}

#[test]
fn frozen_shares() {
    let [constant, coefficients @ ..] = [0u8, 1, 2, 3].map(|i| <[u8; 32]>::from(Sha256::digest([i])));
    let words: Vec<u64> = coefficients
        .iter()
        .flat_map(|half| half.repeat(2).as_chunks::<8>().0.to_vec())
        .map(u64::from_le_bytes)
        .collect();
    let mut rng = Script(words.into_iter());
    let secret: [u8; SECRET_BYTES] = constant.repeat(2).try_into().unwrap();
    let pairs = split(&secret, 4, SHARES_MAX, &mut rng);
    assert_eq!(rng.0.len(), 0);
    for (place, expected) in FROZEN {
        let pair = &pairs[usize::from(place) - 1];
        assert_eq!(hex::encode(pair.self_mask()), expected, "place {place}");
        assert_eq!(pair.self_mask(), pair.mask_key());
    }
    let frozen =
        FROZEN.map(|(place, share)| (place, <[u8; 32]>::try_from(hex::decode(share).unwrap()).unwrap()));
    let shares: Vec<(u8, &[u8; 32])> = frozen.iter().map(|(place, share)| (*place, share)).collect();
    for first in 0..=2 {
        assert_eq!(*join(4, &shares[first..]).unwrap(), constant);
    }
}

#[test]
fn too_few_or_repeated_places_join_nothing() {
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let pairs = split(&secret(&mut rng), 3, 5, &mut rng);
    let shares = places(&pairs);
    assert_eq!(join(3, &shares[..2]).unwrap_err(), JoinError::TooFew { shares: 2, threshold: 3 });
    let repeated = [shares[0], shares[0], shares[1]];
    assert_eq!(join(3, &repeated).unwrap_err(), JoinError::TooFew { shares: 2, threshold: 3 });
    let at_zero = [(0, shares[0].1), shares[0], shares[1]];
    assert_eq!(join(3, &at_zero).unwrap_err(), JoinError::TooFew { shares: 2, threshold: 3 });
}

/// Of one secret, t - 1 shares are split again and again: each of their bytes takes every value alike, and
/// so does each pair's exclusive or. Chi-square, 255 degrees of freedom; 330.5 at 0.1 %.
#[test]
fn fewer_than_the_threshold_look_uniform() {
    let mut rng = ChaCha20Rng::seed_from_u64(7);
    let secret = [0x42; SECRET_BYTES];
    let mut counts = [[0f64; 256]; 4];
    let repetitions = 400;
    for _ in 0..repetitions {
        let pairs = split(&secret, 4, 6, &mut rng);
        for byte in 0..SECRET_BYTES {
            let three = [0, 3, 5].map(|i| pairs[i].as_bytes()[byte]);
            for (count, value) in counts.iter_mut().zip([three[0], three[1], three[2], three[0] ^ three[2]]) {
                count[usize::from(value)] += 1.0;
            }
        }
    }
    for count in counts {
        let expected = f64::from(repetitions) * SECRET_BYTES as f64 / 256.0;
        let chi: f64 = count.iter().map(|c| (c - expected).powi(2) / expected).sum();
        assert!(chi < 330.5, "chi-square {chi}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_threshold_of_shares_join(seed: u64, threshold in 1usize..40, spare in 0usize..40) {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let secret = secret(&mut rng);
        let pairs = split(&secret, threshold, threshold + spare, &mut rng);
        let mut shares = places(&pairs);
        shares.shuffle(&mut rng);
        prop_assert_eq!(&join(threshold, &shares).unwrap()[..], &secret[..32]);
        let keys: Vec<(u8, &[u8; 32])> = (1..).zip(pairs.iter().map(SharePair::mask_key)).collect();
        prop_assert_eq!(&join(threshold, &keys[spare..]).unwrap()[..], &secret[32..]);
    }

    #[test]
    fn wrong_shares_are_survived_and_named(
        seed: u64, threshold in 1usize..20, spare in 0usize..20, one_byte: bool,
    ) {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let secret = secret(&mut rng);
        let pairs = split(&secret, threshold, threshold + spare, &mut rng);
        let mut values: Vec<(u8, [u8; 32])> = places(&pairs).into_iter().map(|(x, y)| (x, *y)).collect();
        values.shuffle(&mut rng);
        let mut bad: Vec<u8> = Vec::new();
        for (place, value) in values.iter_mut().take(spare / 2) {
            bad.push(*place);
            let byte: usize = rng.random_range(0..32);
            value[byte] ^= rng.random_range(1..=255u8);
            if !one_byte {
                *value = value.map(|byte| byte ^ rng.random::<u8>());
                value[byte] = value[byte].wrapping_add(1);
            }
        }
        bad.sort_unstable();
        values.shuffle(&mut rng);
        let shares: Vec<(u8, &[u8; 32])> = values.iter().map(|(x, y)| (*x, y)).collect();
        let joined = join_checked(threshold, &shares, &|found| found[..] == secret[..32]).unwrap();
        prop_assert_eq!(&joined.secret[..], &secret[..32]);
        let mut named = joined.bad;
        named.sort_unstable();
        prop_assert_eq!(named, bad);
    }
}

#[test]
fn more_wrong_shares_than_can_be_told_are_an_error() {
    let mut rng = ChaCha20Rng::seed_from_u64(3);
    let secret = secret(&mut rng);
    let pairs = split(&secret, 5, 9, &mut rng);
    let mut values: Vec<(u8, [u8; 32])> = places(&pairs).into_iter().map(|(x, y)| (x, *y)).collect();
    values.iter_mut().take(5).for_each(|(_, value)| *value = rng.random());
    let shares: Vec<(u8, &[u8; 32])> = values.iter().map(|(x, y)| (*x, y)).collect();
    let error = join_checked(5, &shares, &|found| found[..] == secret[..32]).err();
    assert_eq!(error, Some(JoinError::Wrong { shares: 9, threshold: 5 }));
}

#[test]
fn with_one_share_to_spare_one_wrong_one_is_found_wherever_it_is() {
    let mut rng = ChaCha20Rng::seed_from_u64(5);
    let secret = secret(&mut rng);
    for threshold in [1, 2, 3, 7, 40] {
        let pairs = split(&secret, threshold, threshold + 1, &mut rng);
        for liar in 0..=threshold {
            let mut values: Vec<(u8, [u8; 32])> = places(&pairs).into_iter().map(|(x, y)| (x, *y)).collect();
            values[liar].1[9] ^= 0x55;
            let shares: Vec<(u8, &[u8; 32])> = values.iter().map(|(x, y)| (*x, y)).collect();
            let joined = join_checked(threshold, &shares, &|found| found[..] == secret[..32]).unwrap();
            assert_eq!(joined.bad, [values[liar].0], "{threshold} shares needed, number {liar} is wrong");
        }
    }
}
