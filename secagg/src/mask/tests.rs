use super::*;
use crate::ring::RingBits;
use proptest::prelude::*;

fn vector(bits: u32, dimension: usize) -> RingVector {
    RingVector::zeros(RingBits::new(bits).unwrap(), dimension)
}

fn seed(byte: u8) -> MaskSeed {
    MaskSeed::new(std::array::from_fn(|i| byte.wrapping_add(u8::try_from(i).unwrap())))
}

/// The cipher that masks with, on the vectors of NIST SP 800-38A, section F.5.1 (AES-128 in counter mode).
/// Its counter is big-endian and begins in the middle; the blocks agree when each is started on its own.
#[test]
fn aes_is_aes() {
    let key = hex::decode("2b7e151628aed2a6abf7158809cf4f3c").unwrap();
    let blocks = [
        ("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", "ec8cdf7398607cb0f2d21675ea9ea1e4"),
        ("f0f1f2f3f4f5f6f7f8f9fafbfcfdff00", "362b7c3c6773516318a077d7fc5073ae"),
        ("f0f1f2f3f4f5f6f7f8f9fafbfcfdff01", "6a2cc3787889374fbeb4c81b17ba6c44"),
        ("f0f1f2f3f4f5f6f7f8f9fafbfcfdff02", "e89c399ff0f198c6d40a31db156cabfe"),
    ];
    for (counter, expected) in blocks {
        let (key, counter) = (<[u8; 16]>::try_from(&*key).unwrap(), hex::decode(counter).unwrap());
        let counter: [u8; 16] = counter.try_into().unwrap();
        let mut stream = [0; 16];
        Ctr64LE::<Aes128>::new(&key.into(), &counter.into()).write_keystream(&mut stream);
        assert_eq!(hex::encode(stream), expected);
    }
}

/// RFC 8439, appendix A.1, test vector 1: the keystream of the zero key and nonce.
#[test]
fn chacha_is_chacha() {
    let mut vector = vector(32, 16);
    add_masks(MaskSuite::ChaCha20, &mut vector, &[(MaskSeed::new([0; 32]), Sign::Plus)]);
    let expected = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7\
                    da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586";
    assert_eq!(hex::encode(vector.pack()), expected);
}

/// First values of masks in both suites and widths, computed with another implementation of the ciphers
/// (pyca/cryptography) by the rules in this module's words.
#[test]
fn frozen_masks() {
    let check = |suite, bits, expected: [u32; 4]| {
        let mut masked = vector(bits, 5000);
        add_masks(suite, &mut masked, &[(seed(3), Sign::Plus)]);
        let lanes = masked.lanes();
        assert_eq!([lanes[0], lanes[1], lanes[4097], lanes[4999]], expected, "{suite:?} {bits}");
    };
    check(MaskSuite::Aes128Ctr, 32, FROZEN[0]);
    check(MaskSuite::Aes128Ctr, 16, FROZEN[1]);
    check(MaskSuite::ChaCha20, 20, FROZEN[2]);
    check(MaskSuite::ChaCha20, 9, FROZEN[3]);
}

const FROZEN: [[u32; 4]; 4] = [
    [1_198_373_844, 2_374_312_128, 2_659_423_162, 926_960_704],
    [48_084, 18_285, 4_896, 40_361],
    [846_952, 864_244, 548_054, 880_088],
    [104, 76, 509, 345],
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn every_path_gives_the_portable_result(
        bits in 8u32..=32,
        dimension in 1usize..12_000,
        key: [u8; 32],
        minus: bool,
        start in 0usize..40,
    ) {
        let (narrow, reduce, first) = (bits <= 16, RingBits::new(bits).unwrap().mask(), start * TILE);
        let masks = [(MaskSeed::new(key), if minus { Sign::Minus } else { Sign::Plus }), (seed(9), Sign::Plus)];
        let mut lanes: Vec<u32> = (0..dimension).map(|i| u32::try_from(i).unwrap() & reduce).collect();
        let mut portable = lanes.clone();
        add_aes(&mut lanes, first, &masks, narrow, reduce);
        add_stretch::<Ctr64LE<Aes128>>(&mut portable, first, &masks, narrow, reduce);
        prop_assert_eq!(lanes, portable);
    }

    #[test]
    fn what_is_added_can_be_taken_away_on_any_number_of_threads(
        bits in 8u32..=32,
        dimension in 1usize..20_000,
        threads in 1usize..5,
        chacha: bool,
    ) {
        let suite = if chacha { MaskSuite::ChaCha20 } else { MaskSuite::Aes128Ctr };
        let zero = vector(bits, dimension);
        let (mut serial, mut parallel) = (zero.clone(), zero.clone());
        let masks = [(seed(1), Sign::Plus), (seed(2), Sign::Minus), (seed(3), Sign::Plus)];
        add_masks(suite, &mut serial, &masks);
        add_masks_parallel(suite, &mut parallel, &masks, threads);
        prop_assert_eq!(&serial, &parallel);
        prop_assert!(serial.lanes().iter().all(|lane| *lane <= serial.bits().mask()));
        prop_assert!(dimension < 8 || serial != zero);
        let back = [(seed(3), Sign::Minus), (seed(1), Sign::Minus), (seed(2), Sign::Plus)];
        add_masks_parallel(suite, &mut serial, &back, threads);
        prop_assert_eq!(serial, zero);
    }
}
