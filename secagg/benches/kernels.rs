//! The kernels that a session's time goes into, beside what the memory allows: masks, the wire form of
//! vectors, and shares. Whole sessions are measured by `fleetune-sim bench secagg`.
//!
//! Throughputs are bytes of u32 lanes (for masks: of all masks together; for shares: of secrets), whatever
//! the width on the wire, so that the lines compare with the copy and the sum at the top.

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use fleetune_secagg::{
    MaskSeed, MaskSuite, RingBits, RingVector, SECRET_BYTES, SharePair, Sign, add_masks, join, join_checked,
    split,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;
use std::hint::black_box;

/// Values of a vector.
const DIMENSION: usize = 1_000_000;
const LANE_BYTES: usize = 4;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    memory(&mut criterion);
    masks(&mut criterion);
    wire(&mut criterion);
    shares(&mut criterion);
    criterion.final_summary();
}

fn rng() -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(1)
}

fn random_lanes(dimension: usize) -> Vec<u32> {
    let mut rng = rng();
    (0..dimension).map(|_| rng.random()).collect()
}

fn lane_bytes<'a>(
    criterion: &'a mut Criterion,
    name: &str,
    vectors: usize,
    dimension: usize,
) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes((vectors * dimension * LANE_BYTES) as u64)).sample_size(20);
    group
}

/// What no kernel can beat: a vector copied, and one vector added to another, in cache and out of it.
fn memory(criterion: &mut Criterion) {
    for (name, dimension) in [("4 MB", DIMENSION), ("400 MB", 100 * DIMENSION)] {
        let mut group = lane_bytes(criterion, &format!("memory {name}"), 1, dimension);
        let source: Vec<u32> = (0..).take(dimension).collect();
        let mut sum = source.clone();
        group.bench_function("copy", |b| b.iter(|| black_box(&mut sum).copy_from_slice(black_box(&source))));
        group.bench_function("add", |b| {
            b.iter(|| {
                let (sum, source) = (black_box(&mut sum), black_box(&source));
                sum.iter_mut().zip(source).for_each(|(sum, lane)| *sum = sum.wrapping_add(*lane));
            });
        });
    }
}

fn masks(criterion: &mut Criterion) {
    let mut rng = rng();
    for (bits, count) in [(32, 16), (32, 50), (16, 50)] {
        let seeds = (0..count).map(|i| {
            let sign = if i % 2 == 0 { Sign::Plus } else { Sign::Minus };
            (MaskSeed::new(rng.random()), sign)
        });
        let seeds: Vec<(MaskSeed, Sign)> = seeds.collect();
        let mut vector = RingVector::zeros(ring(bits), DIMENSION);
        let mut group = lane_bytes(criterion, &format!("{count} masks of {bits} bits"), count, DIMENSION);
        for suite in [MaskSuite::Aes128Ctr, MaskSuite::ChaCha20] {
            group.bench_function(suite.name(), |b| {
                b.iter(|| add_masks(suite, black_box(&mut vector), black_box(&seeds)));
            });
        }
    }
}

fn wire(criterion: &mut Criterion) {
    for bits in [16, 20, 21, 32].map(ring) {
        let vector = RingVector::from_lanes(bits, random_lanes(DIMENSION));
        let packed = vector.pack();
        let mut sum = vector.clone();
        let mut group = lane_bytes(criterion, &format!("wire of {} bits", bits.bits()), 1, DIMENSION);
        group.bench_function("pack", |b| b.iter(|| black_box(&vector).pack()));
        group.bench_function("unpack", |b| {
            b.iter(|| RingVector::unpack(bits, DIMENSION, black_box(&packed)).map(black_box).is_ok());
        });
        group.bench_function("add_packed", |b| {
            b.iter(|| black_box(&mut sum).add_packed(black_box(&packed)).is_ok());
        });
        group.bench_function("add_assign", |b| {
            b.iter(|| black_box(&mut sum).add_assign(black_box(&vector)).is_ok());
        });
    }
}

/// Neighbours of one device, the shares that rebuild its secrets, and the wrong ones that decoding survives.
const SHARES: usize = 50;
const THRESHOLD: usize = 34;
const WRONG: usize = 8;

fn shares(criterion: &mut Criterion) {
    let mut rng = rng();
    let secret: [u8; SECRET_BYTES] = std::array::from_fn(|_| rng.random());
    let mut group = criterion.benchmark_group(format!("{THRESHOLD} of {SHARES} shares"));
    let pairs = split(&secret, THRESHOLD, SHARES, &mut rng);
    group.bench_function("split 64 bytes", |b| {
        b.iter(|| split(black_box(&secret), THRESHOLD, SHARES, &mut rng));
    });

    let right: Vec<(u8, &[u8; 32])> = (1..).zip(pairs.iter().map(SharePair::self_mask)).collect();
    let is_right = |found: &[u8; 32]| found[..] == secret[..32];
    group.bench_function("join 32 bytes", |b| b.iter(|| join(THRESHOLD, black_box(&right)).is_ok()));
    group.bench_function("join and check 32 bytes", |b| {
        b.iter(|| join_checked(THRESHOLD, black_box(&right), &is_right).is_ok());
    });

    let mut spoilt: Vec<(u8, [u8; 32])> = right.iter().map(|(place, share)| (*place, **share)).collect();
    spoilt.iter_mut().take(WRONG).for_each(|(_, share)| share[0] ^= 1);
    let spoilt: Vec<(u8, &[u8; 32])> = spoilt.iter().map(|(place, share)| (*place, share)).collect();
    let found = join_checked(THRESHOLD, &spoilt, &is_right).map(|joined| joined.bad.len());
    assert_eq!(found, Ok(WRONG), "decoding names the wrong shares");
    group.bench_function(format!("join and check, {WRONG} wrong"), |b| {
        b.iter(|| join_checked(THRESHOLD, black_box(&spoilt), &is_right).is_ok());
    });
}

fn ring(bits: u32) -> RingBits {
    RingBits::new(bits).expect("8 to 32 bits")
}
