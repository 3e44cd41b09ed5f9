//! Devices that speak too early, too late, twice, or for others; and what the coordinator replays to them. The
//! sum stays that of the survivors, whatever else was sent.

use crate::{
    Abort, Cohort, Confirmation, Reveal, RevealedShare, SealedShare, StepError, SurvivorSet, Taken,
    tests::world::{Script, World},
};

const MEMBERS: u32 = 10;

fn losing(step: usize, place: u32) -> Script {
    let mut dropouts = [const { Vec::new() }; 5];
    dropouts[step] = vec![place];
    Script { members: MEMBERS, dropouts, ..Script::default() }
}

#[track_caller]
fn assert_exact(world: &World, cohort: Cohort) {
    let opened = cohort.into_opening().run(1).unwrap();
    assert_eq!((opened.sum, opened.survivors), world.expected());
    assert!(opened.suspicions.is_empty());
}

/// Place 4 is always one step behind: everything it has to say comes after the step was closed.
#[test]
fn late_messages_are_turned_away_and_never_mixed_in() {
    let (mut world, mut cohort) = World::frozen(losing(1, 4));
    let record = world.device(4).to_record();
    let late = world.take_roster(&cohort, 4).unwrap();
    *world.device(4) = crate::Device::from_record(&record).unwrap();
    world.share(&mut cohort).unwrap();
    assert_eq!(cohort.handle_shares(4, late), Ok(Taken::TooLate));
    assert!(cohort.forwarded(4).is_none());
    let packed = world.vectors[world.order[4]].pack();
    assert_eq!(cohort.handle_masked(4, [4; 32], &packed), Ok(Taken::TooLate));
    world.mask(&mut cohort).unwrap();
    let signature = world.identity(4).sign(b"anything");
    assert_eq!(cohort.handle_confirmation(4, Confirmation { index: 4, signature }), Ok(Taken::TooLate));
    world.confirm(&mut cohort).unwrap();
    assert_eq!(cohort.handle_reveal(4, Reveal { shares: Vec::new() }), Ok(Taken::TooLate));
    assert!(cohort.confirmations(4).is_none());
    world.reveal(&mut cohort).unwrap();
    assert_exact(&world, cohort);
}

/// A signature under the survivors that comes late, then a reveal of shares that were never asked for.
#[test]
fn a_device_that_confirms_late_reveals_nothing_that_counts() {
    let (mut world, mut cohort) = World::delivered(losing(3, 6));
    let survivors = cohort.survivors().clone();
    let record = world.device(6).to_record();
    let late = world.see_survivors(6, &survivors).unwrap();
    *world.device(6) = crate::Device::from_record(&record).unwrap();
    world.confirm(&mut cohort).unwrap();
    assert_eq!(cohort.handle_confirmation(6, late), Ok(Taken::TooLate));
    assert!(cohort.confirmations(6).is_none());
    let made_up = RevealedShare::SelfMask([3; 32].into());
    assert_eq!(cohort.handle_reveal(6, Reveal { shares: vec![(0, made_up)] }), Ok(Taken::TooLate));
    world.reveal(&mut cohort).unwrap();
    assert_exact(&world, cohort);
}

#[test]
fn steps_that_have_not_begun_take_nothing() {
    let (mut world, mut cohort) = World::shared(losing(4, 0));
    let signature = world.identity(1).sign(b"anything");
    let confirmation = Confirmation { index: 1, signature };
    let reveal = Reveal { shares: Vec::new() };
    assert_eq!(cohort.handle_confirmation(1, confirmation), Err(StepError::Early));
    assert_eq!(cohort.handle_reveal(1, reveal.clone()), Err(StepError::Early));
    world.mask(&mut cohort).unwrap();
    assert_eq!(cohort.handle_reveal(1, reveal), Err(StepError::Early));
    world.confirm(&mut cohort).unwrap();
    world.reveal(&mut cohort).unwrap();
    assert_exact(&world, cohort);
}

/// Forged, under other survivors, or in another's place: passed on, they would cost the others their session.
#[test]
fn signatures_that_are_not_the_devices_own_are_refused() {
    let (mut world, mut cohort) = World::delivered(losing(4, 0));
    let survivors = cohort.survivors().clone();
    let record = world.device(3).to_record();
    let other = world.see_survivors(3, &SurvivorSet::of(MEMBERS, |place| place != 7)).unwrap();
    *world.device(3) = crate::Device::from_record(&record).unwrap();
    let honest = world.see_survivors(3, &survivors).unwrap();
    *world.device(3) = crate::Device::from_record(&record).unwrap();
    let mut forged = honest;
    forged.signature[40] ^= 1;
    let cases = [
        (3, other),
        (3, forged),
        (2, honest),
        (2, Confirmation { index: 2, ..honest }),
        (3, Confirmation { index: 2, ..honest }),
    ];
    for (place, confirmation) in cases {
        let refused = cohort.handle_confirmation(place, confirmation);
        assert!(matches!(refused, Err(StepError::Malformed(_))), "{refused:?}");
    }
    assert_eq!(cohort.handle_confirmation(3, honest), Ok(Taken::Added));
    assert_eq!(cohort.handle_confirmation(3, honest), Ok(Taken::Repeated));
    assert_eq!(cohort.handle_confirmation(3, forged), Err(StepError::OtherBytes));
    world.confirm(&mut cohort).unwrap();
    world.reveal(&mut cohort).unwrap();
    assert_exact(&world, cohort);
}

/// Vectors too long, too short, or another than the one that counts leave the sum as it was.
#[test]
fn refused_vectors_leave_no_trace_in_the_sum() {
    let (mut world, mut cohort) = World::shared(losing(4, 0));
    let forwarded = cohort.forwarded(5).unwrap();
    let record = world.device(5).to_record();
    let packed = world.see_shares(5, &forwarded).unwrap().pack();
    *world.device(5) = crate::Device::from_record(&record).unwrap();
    let long = [&packed[..], &packed].concat();
    for wrong in [&packed[1..], &long, &[]] {
        assert!(matches!(cohort.handle_masked(5, [1; 32], wrong), Err(StepError::Vector(_))));
    }
    assert_eq!(cohort.handle_masked(5, [1; 32], &packed), Ok(Taken::Added));
    assert_eq!(cohort.handle_masked(5, [2; 32], &packed), Err(StepError::OtherBytes));
    world.mask(&mut cohort).unwrap();
    assert_eq!(cohort.handle_masked(5, [2; 32], &packed), Err(StepError::OtherBytes));
    world.confirm(&mut cohort).unwrap();
    world.reveal(&mut cohort).unwrap();
    assert_exact(&world, cohort);
}

#[test]
fn another_reveal_than_the_first_is_refused() {
    let (mut world, mut cohort) = World::confirmed(losing(4, 9));
    world.reveal(&mut cohort).unwrap();
    let other = Reveal { shares: vec![(1, RevealedShare::SelfMask([0; 32].into()))] };
    assert_eq!(cohort.handle_reveal(2, other), Err(StepError::OtherBytes));
    assert_exact(&world, cohort);
}

/// Shares of the same devices from another attempt: they open nothing, and the device reveals none of them.
#[test]
fn replayed_shares_are_never_revealed() {
    let (before, old) = World::shared(Script { members: MEMBERS, ..Script::default() });
    let (mut world, cohort) = World::shared(Script { members: MEMBERS, attempt: 1, ..Script::default() });
    assert_eq!(before.order, world.order, "the same devices in the same places");
    let mut forwarded: Vec<SealedShare> = cohort.forwarded(0).unwrap();
    let replayed = old.forwarded(0).unwrap();
    forwarded[..4].clone_from_slice(&replayed[..4]);
    world.see_shares(0, &forwarded).unwrap();
    let all = SurvivorSet::of(MEMBERS, |_| true);
    world.see_survivors(0, &all).unwrap();
    let signed: Vec<Confirmation> = (1..MEMBERS)
        .map(|place| {
            world.see_shares(place, &cohort.forwarded(place).unwrap()).unwrap();
            world.see_survivors(place, &all).unwrap()
        })
        .collect();
    let reveal = world.see_confirmations(0, &signed).unwrap();
    let revealed: Vec<u32> = reveal.shares.iter().map(|(peer, _)| *peer).collect();
    assert_eq!(revealed, [5, 6, 7, 8, 9]);
}

/// From the device itself, from nobody, or twice.
#[test]
fn shares_from_no_neighbour_end_the_session() {
    let (mut world, cohort) = World::shared(Script { members: 70, ..Script::default() });
    let neighbours = cohort.roster_view(0).neighbours;
    let stranger = (1..70).find(|place| !neighbours.iter().any(|entry| entry.index == *place)).unwrap();
    let record = world.device(0).to_record();
    for peer in [0, stranger, 70, u32::MAX, neighbours[1].index] {
        *world.device(0) = crate::Device::from_record(&record).unwrap();
        let mut forwarded = cohort.forwarded(0).unwrap();
        forwarded[0].peer = peer;
        let outcome = world.see_shares(0, &forwarded);
        world.assert_left(0, outcome, &Abort::UnexpectedShares(peer));
    }
}
