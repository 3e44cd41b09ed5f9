//! Whole sessions: devices and the coordinator in one process, with devices lost at every step, against the
//! plain sum of the survivors.

mod attacks;
mod world;

use crate::{Degrees, Device, MaskSuite, RingBits, RingVector};
use proptest::prelude::*;
use world::{Script, World};

#[test]
fn nobody_lost() {
    for (members, suite) in [(4, MaskSuite::Aes128Ctr), (9, MaskSuite::ChaCha20), (70, MaskSuite::Aes128Ctr)]
    {
        let mut world = World::new(Script { members, suite, ..Script::default() });
        let opened = world.run().expect("the session succeeds");
        assert_eq!((opened.sum, opened.survivors), world.expected());
        assert!(opened.suspicions.is_empty());
    }
}

#[test]
fn every_step_may_lose_as_many_as_assumed() {
    for step in 0..5 {
        let mut dropouts = [const { Vec::new() }; 5];
        dropouts[step] = vec![1, 6, 8];
        let mut world = World::new(Script { members: 16, dropouts, ..Script::default() });
        let opened = world.run().expect("the session succeeds");
        assert_eq!((opened.sum, opened.survivors), world.expected(), "step {step}");
        assert_eq!(opened.survivors, if step < 3 { 13 } else { 16 });
    }
}

#[test]
fn too_many_lost_and_nothing_opens() {
    for step in 0..5 {
        let mut dropouts = [const { Vec::new() }; 5];
        dropouts[step] = (0..9).collect();
        let mut world = World::new(Script { members: 12, dropouts, ..Script::default() });
        assert!(world.run().is_err(), "step {step}");
    }
}

#[test]
fn a_device_goes_on_from_its_record_at_every_step() {
    let script = Script { members: 6, through_records: true, ..Script::default() };
    let (mut saved, mut straight) =
        (World::new(script.clone()), World::new(Script { through_records: false, ..script }));
    let (saved, straight) = (saved.run().unwrap(), straight.run().unwrap());
    assert_eq!(saved, straight);
}

#[test]
fn damaged_records_are_refused() {
    let world = World::new(Script { members: 4, ..Script::default() });
    let record = world.devices[0].to_record();
    for end in 0..record.len() {
        assert!(Device::from_record(&record[..end]).is_err(), "{end} bytes");
    }
    assert!(Device::from_record(&[&record[..], &[0]].concat()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn the_sum_is_exact_for_any_size_width_and_losses(
        members in 4u32..24,
        bits in 8u32..=32,
        dimension in 1usize..300,
        half_degree in 2u32..12,
        chacha: bool,
        lost in prop::collection::vec((0usize..5, 0u32..24), 0..5),
        threads in 1usize..4,
    ) {
        let mut dropouts = [const { Vec::new() }; 5];
        for (step, who) in lost {
            if who < members && dropouts.iter().all(|gone: &Vec<u32>| !gone.contains(&who)) {
                dropouts[step].push(who);
            }
        }
        let degree = (2 * half_degree).min(members - 1);
        let degrees = Degrees { degree, threshold: degree / 2 + 1 };
        let suite = if chacha { MaskSuite::ChaCha20 } else { MaskSuite::Aes128Ctr };
        let script = Script { members, bits, dimension, degrees: Some(degrees), suite, dropouts, threads,
            ..Script::default() };
        let mut world = World::new(script);
        // Too few may be left around one device; then the session fails, and says so. A sum is always exact.
        if let Ok(opened) = world.run() {
            prop_assert_eq!((opened.sum, opened.survivors), world.expected());
        }
    }
}

#[test]
fn a_masked_vector_looks_uniform() {
    // Chi-square over the bytes of masked zeros, 255 degrees of freedom; 330.5 at 0.1 %.
    let script = Script { members: 4, dimension: 40_000, bits: 32, zeros: true, ..Script::default() };
    let mut world = World::new(script);
    world.run().unwrap();
    for masked in &world.masked {
        let mut counts = [0f64; 256];
        let bytes: Vec<u8> = masked.as_ref().unwrap().pack();
        bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1.0);
        let expected = bytes.len() as f64 / 256.0;
        let chi: f64 = counts.iter().map(|count| (count - expected).powi(2) / expected).sum();
        assert!(chi < 330.5, "chi-square {chi}");
    }
    let zeros = RingVector::zeros(RingBits::new(32).unwrap(), 40_000);
    assert_eq!(world.expected().0, zeros);
}
