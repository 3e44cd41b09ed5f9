//! What privacy costs a device: one update of a million values, whole and by stage, and draws a second.
//! `cargo bench -p fleetune-privacy --features simulation`

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use fleetune_privacy::{
    ClippedDelta, ClippingNorm, Delta, GridVariance, IntegerBound, Law, Mechanism, NoiseOrigin, NoiseTable,
    PrivacyParameters, PrivacyPlan, Rotation,
};
use std::hint::black_box;

const DIMENSION: usize = 1_000_000;

fn update() -> Vec<f32> {
    (0..DIMENSION).map(|i| ((i * 2_654_435_761) % 1000) as f32 * 1e-6 - 5e-4).collect()
}

fn plan(sigma: f64) -> PrivacyPlan {
    let parameters = PrivacyParameters {
        mechanism: Mechanism::Skellam,
        clip_units: 4096,
        variance: GridVariance::at_least(sigma * sigma).expect("a variance"),
        honest_survivors_min: 64,
        colluders_max: 0,
        participations_max: 4,
        separation_ms: 0,
        separation_rounds: 1,
        delta: Delta::new(1e-8).expect("a probability"),
        adaptation: None,
        noise_cohort: None,
    };
    PrivacyPlan::new(parameters, DIMENSION).expect("a plan")
}

fn contribution(c: &mut Criterion) {
    let mut group = c.benchmark_group("update of 1e6 values");
    group.sample_size(20);
    let (norm, origin) = (ClippingNorm::new(1.0).expect("a norm"), NoiseOrigin::operating_system());
    let clipped = ClippedDelta::clip_or_zero(update(), norm);
    group.bench_function("clip", |b| {
        b.iter_batched(update, |u| ClippedDelta::clip_or_zero(u, norm), BatchSize::LargeInput);
    });
    let rotation = Rotation::new(DIMENSION, b"round");
    group.bench_function("rotate", |b| b.iter(|| rotation.apply(black_box(clipped.values()), 4096.0)));
    let rotated = rotation.apply(clipped.values(), 4096.0);
    let bound = IntegerBound::new(4096, rotated.len()).expect("a bound");
    let mut source = origin.source(b"").expect("entropy");
    group.bench_function("round and check", |b| {
        b.iter_batched(|| rotated.clone(), |r| bound.round(r, &mut source), BatchSize::LargeInput);
    });
    for sigma in [1.0, 30.0, 1000.0] {
        let plan = plan(sigma);
        group.bench_function(format!("whole, sigma {sigma}"), |b| {
            b.iter_batched(
                update,
                |u| plan.encode(u, norm, b"round", &origin, b"").expect("entropy"),
                BatchSize::LargeInput,
            );
        });
    }
}

fn draws(c: &mut Criterion) {
    let mut group = c.benchmark_group("draws");
    group.sample_size(20).throughput(Throughput::Elements(DIMENSION as u64));
    let mut source = NoiseOrigin::operating_system().source(b"").expect("entropy");
    let mut values = vec![0i32; DIMENSION];
    for sigma in [1.0, 4.0, 30.0, 100.0, 1000.0] {
        let variance = GridVariance::at_least(sigma * sigma).expect("a variance");
        for law in [Law::Skellam(variance), Law::DiscreteGaussian(variance)] {
            let table = NoiseTable::new(law).expect("a law");
            let name =
                format!("{} {sigma}", if matches!(law, Law::Skellam(_)) { "skellam" } else { "gaussian" });
            group.bench_function(name, |b| b.iter(|| table.add_to(black_box(&mut values), &mut source)));
        }
    }
    group.finish();
    c.bench_function("table of sigma 1000", |b| {
        let variance = GridVariance::at_least(1e6).expect("a variance");
        b.iter(|| NoiseTable::new(Law::Skellam(black_box(variance))));
    });
}

criterion_group!(benches, contribution, draws);
criterion_main!(benches);
