//! What arrives too early, too late, twice, or in the wrong shape.

use crate::{
    Abort, RingError, RingVector, StepError, Taken,
    tests::world::{Script, World},
};

fn world() -> World {
    World::new(Script { members: 8, ..Script::default() })
}

/// An update that arrives after the survivors were frozen is not mixed in: with its owner's mask key revealed,
/// only its self mask would protect it.
#[test]
fn a_late_vector_is_not_added() {
    let mut dropouts = [const { Vec::new() }; 5];
    dropouts[2] = vec![3];
    let mut world = World::new(Script { members: 8, dropouts, ..Script::default() });
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    let forwarded = {
        let mut cohort_forwarded = None;
        world.mask(&mut cohort).unwrap();
        cohort_forwarded.get_or_insert_with(|| cohort.forwarded(3).unwrap()).clone()
    };
    assert_eq!(forwarded.len(), 7);
    let late = RingVector::zeros(world.terms.bits, world.terms.dimension).pack();
    assert_eq!(cohort.handle_masked(3, [9; 32], &late), Ok(Taken::TooLate));
    world.confirm(&mut cohort).unwrap();
    world.reveal(&mut cohort).unwrap();
    let opened = cohort.into_opening().run(1).unwrap();
    assert_eq!((opened.sum, opened.survivors), world.expected());
}

#[test]
fn vectors_of_the_wrong_shape() {
    let mut world = world();
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    let right = RingVector::zeros(world.terms.bits, world.terms.dimension).pack();
    let short = cohort.handle_masked(0, [1; 32], &right[1..]).unwrap_err();
    assert!(matches!(short, StepError::Vector(RingError::PackedLength { .. })), "{short:?}");
    let long = cohort.handle_masked(0, [1; 32], &[&right[..], &[0]].concat()).unwrap_err();
    assert!(matches!(long, StepError::Vector(RingError::PackedLength { .. })), "{long:?}");
    // The device, too, masks nothing but a vector of its session.
    let forwarded = cohort.forwarded(0).unwrap();
    let other = RingVector::zeros(world.terms.bits, 3);
    let abort = world.device(0).handle_shares(&forwarded, other).err().unwrap();
    assert!(matches!(abort, Abort::Vector(RingError::Dimension { .. })), "{abort:?}");
}

#[test]
fn padding_that_is_not_zero() {
    let mut world = World::new(Script { members: 8, bits: 9, dimension: 3, ..Script::default() });
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    let error = cohort.handle_masked(0, [1; 32], &[0, 0, 0, 0xf8]).unwrap_err();
    assert_eq!(error, StepError::Vector(RingError::Padding));
}

#[test]
fn other_bytes_for_a_step_that_is_taken() {
    let mut world = world();
    let mut cohort = world.freeze();
    let bundle = world.take_roster(&cohort, 0).unwrap();
    let mut other = bundle.clone();
    other.commitment[0] ^= 1;
    assert_eq!(cohort.handle_shares(0, bundle.clone()), Ok(Taken::Added));
    assert_eq!(cohort.handle_shares(0, bundle), Ok(Taken::Repeated));
    assert_eq!(cohort.handle_shares(0, other), Err(StepError::OtherBytes));
    let vector = RingVector::zeros(world.terms.bits, world.terms.dimension).pack();
    assert_eq!(cohort.handle_masked(0, [1; 32], &vector), Err(StepError::Early));
}

#[test]
fn nothing_counts_twice() {
    let mut world = world();
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    let packed = RingVector::zeros(world.terms.bits, world.terms.dimension).pack();
    assert_eq!(cohort.handle_masked(0, [1; 32], &packed), Ok(Taken::Added));
    assert_eq!(cohort.handle_masked(0, [1; 32], &packed), Ok(Taken::Repeated));
    assert_eq!(cohort.handle_masked(0, [2; 32], &packed), Err(StepError::OtherBytes));
}

#[test]
fn bundles_that_do_not_fit_the_roster() {
    let mut world = world();
    let mut cohort = world.freeze();
    let bundle = world.take_roster(&cohort, 0).unwrap();
    let mut missing = bundle.clone();
    missing.shares.pop();
    let mut misnamed = bundle.clone();
    misnamed.shares[0].peer = 0;
    for bad in [missing, misnamed] {
        assert!(matches!(cohort.handle_shares(0, bad), Err(StepError::Malformed(_))));
    }
}

#[test]
fn shares_from_nobody_or_twice() {
    for (spoil, expected) in [(0usize, 99), (1, 2)] {
        let mut world = world();
        let mut cohort = world.freeze();
        world.share(&mut cohort).unwrap();
        let mut forwarded = cohort.forwarded(0).unwrap();
        if spoil == 0 {
            forwarded[0].peer = 99;
        } else {
            let twice = forwarded[1].clone();
            forwarded.push(twice);
        }
        let vector = world.vectors[world.order[0]].clone();
        let abort = world.device(0).handle_shares(&forwarded, vector).err();
        assert_eq!(abort, Some(Abort::UnexpectedShares(expected)));
    }
}

#[test]
fn too_few_shares_to_go_on() {
    let mut world = world();
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    let forwarded = cohort.forwarded(0).unwrap();
    let vector = world.vectors[world.order[0]].clone();
    let threshold = cohort.degrees().threshold;
    let few = &forwarded[..threshold as usize - 1];
    let abort = world.device(0).handle_shares(few, vector).err().unwrap();
    let present = threshold - 1;
    assert_eq!(abort, Abort::TooFewNeighbours { present, threshold, step: "shared their secrets" });
}
