//! Lies about who survived: to get both shares of a peer, or a sum of few, or the difference of two sums.

use super::liar::assert_empty;
use crate::{
    Abort, Confirmation, DeviceId, Floors, Reveal, RevealedShare, SurvivorSet,
    tests::world::{Script, World},
};
use std::collections::BTreeMap;

const OUT_OF_ORDER: Abort = Abort::OutOfOrder { expected: "waiting for confirmations", found: "survivors" };

fn all_but(members: u32, missing: &[u32]) -> SurvivorSet {
    SurvivorSet::of(members, |place| !missing.contains(&place))
}

/// Shares of each kind that the coordinator has of each device.
fn count_shares(reveals: &[Reveal], kinds: &mut BTreeMap<(u32, bool), u32>) {
    for (peer, share) in reveals.iter().flat_map(|reveal| &reveal.shares) {
        *kinds.entry((*peer, matches!(share, RevealedShare::SelfMask(_)))).or_default() += 1;
    }
}

/// First a survivor, then a dropout: both shares of place 3 would unmask its vector.
#[test]
fn a_second_survivor_set_is_refused() {
    let (mut world, cohort) = World::delivered(Script::default());
    for place in [0, 1, 2] {
        world.see_survivors(place, cohort.survivors()).unwrap();
        let again = world.see_survivors(place, &all_but(8, &[3]));
        world.assert_left(place, again, &OUT_OF_ORDER);
    }
}

/// The same set a second time is no exception: repeating a message is the shell's affair.
#[test]
fn survivors_after_the_reveal_are_refused() {
    let (mut world, cohort) = World::confirmed(Script::default());
    let signed = cohort.confirmations(1).unwrap();
    world.see_confirmations(1, &signed).unwrap();
    let again = world.see_survivors(1, &all_but(8, &[3]));
    world.assert_left(
        1,
        again,
        &Abort::OutOfOrder { expected: "a session that is over", found: "survivors" },
    );
}

/// To some the victim survived, to others it vanished. One peer colludes and signs whatever is asked; no
/// honest device reveals.
#[test]
fn equivocated_survivors_end_unconfirmed() {
    const VICTIM: u32 = 4;
    const COLLUDER: u32 = 9;
    let (mut world, cohort) = World::delivered(Script { members: 10, ..Script::default() });
    let threshold = cohort.degrees().threshold;
    let sets = [cohort.survivors().clone(), all_but(10, &[VICTIM])];
    let told = |place: u32| usize::from(place >= 5);
    let mut signed: [Vec<Confirmation>; 2] = [Vec::new(), Vec::new()];
    for place in 0..COLLUDER {
        let confirmation = world.see_survivors(place, &sets[told(place)]).unwrap();
        signed[told(place)].push(confirmation);
    }
    let record = world.device(COLLUDER).to_record();
    for (set, signed) in sets.iter().zip(&mut signed) {
        signed.push(world.see_survivors(COLLUDER, set).unwrap());
        *world.device(COLLUDER) = crate::Device::from_record(&record).unwrap();
    }
    for place in 0..COLLUDER {
        // The coordinator sends everything it has, also the signatures under the other set.
        let everything =
            if told(place) == 0 { signed.concat() } else { [&signed[1][..], &signed[0]].concat() };
        let valid = u32::try_from(signed[told(place)].len()).unwrap() - 1;
        assert!(valid < threshold);
        let outcome = world.see_confirmations(place, &everything);
        world.assert_left(place, outcome, &Abort::Unconfirmed { valid, threshold });
    }
}

/// The coordinator holds the vector of place 2 and says to all that it vanished. It gets the mask key and
/// never the self mask: the vector stays masked.
#[test]
fn a_survivor_that_is_called_lost_keeps_its_own_mask() {
    let (mut world, _) = World::delivered(Script::default());
    let survivors = all_but(8, &[2]);
    let others: Vec<u32> = (0..8).filter(|place| *place != 2).collect();
    let signed: Vec<Confirmation> =
        others.iter().map(|place| world.see_survivors(*place, &survivors).unwrap()).collect();
    let reveals: Vec<Reveal> =
        others.iter().map(|place| world.see_confirmations(*place, &signed).unwrap()).collect();
    let mut kinds = BTreeMap::new();
    count_shares(&reveals, &mut kinds);
    assert_eq!((kinds.get(&(2, false)), kinds.get(&(2, true))), (Some(&7), None));
    for place in others {
        assert_eq!((kinds.get(&(place, false)), kinds.get(&(place, true))), (None, Some(&6)));
    }
    let told = world.see_survivors(2, &survivors);
    world.assert_left(2, told, &Abort::NotASurvivor);
}

#[test]
fn survivors_that_are_too_few_are_refused() {
    let (mut world, _) = World::delivered(Script::default());
    // 40 % of 8 may be missing: 3, so 5 must be there.
    let told = world.see_survivors(1, &all_but(8, &[4, 5, 6, 7]));
    world.assert_left(1, told, &Abort::TooFewSurvivors { survivors: 4, floor: 5 });
    let told = world.see_survivors(2, &SurvivorSet::of(8, |place| place == 2));
    world.assert_left(2, told, &Abort::TooFewSurvivors { survivors: 1, floor: 5 });
    world.policy.floors.survivors_min = 8;
    let told = world.see_survivors(3, &all_but(8, &[4]));
    world.assert_left(3, told, &Abort::TooFewSurvivors { survivors: 7, floor: 8 });
}

#[test]
fn survivors_among_other_members_are_refused() {
    let (mut world, _) = World::delivered(Script::default());
    for (place, found) in [(0, 7), (1, 9), (2, 0)] {
        let told = world.see_survivors(place, &SurvivorSet::of(found, |_| true));
        world.assert_left(place, told, &Abort::SurvivorsOfOtherRoster { expected: 8, found });
    }
}

/// Place 5 never shared. Called a survivor, its self mask could not be removed; its vector is made up.
#[test]
fn a_survivor_that_never_shared_is_refused() {
    let mut dropouts = [const { Vec::new() }; 5];
    dropouts[1] = vec![5];
    let (mut world, cohort) = World::delivered(Script { dropouts, ..Script::default() });
    assert!(!cohort.survivors().contains(5));
    let told = world.see_survivors(0, &all_but(8, &[]));
    world.assert_left(0, told, &Abort::SurvivorWithoutShares(5));
}

/// In a sparse graph the survivors may be many, and few of them around one device.
#[test]
fn a_device_whose_neighbours_are_said_to_be_lost_leaves() {
    let (mut world, cohort) = World::delivered(Script { members: 70, ..Script::default() });
    let (view, threshold) = (cohort.roster_view(0), cohort.degrees().threshold);
    let kept = threshold as usize - 1;
    let lost: Vec<u32> = view.neighbours.iter().skip(kept).map(|entry| entry.index).collect();
    world.policy.floors = Floors { sparse_dropout_permille: 500, dropout_permille: 500, ..Floors::default() };
    let told = world.see_survivors(0, &all_but(70, &lost));
    let present = threshold - 1;
    world.assert_left(0, told, &Abort::TooFewNeighbours { present, threshold, step: "survive" });
}

/// One signature many times, the device's own, those of strangers and those of the lost count for nothing.
#[test]
fn confirmations_count_once_each_and_only_of_surviving_neighbours() {
    let (mut world, cohort) = World::delivered(Script::default());
    let survivors = all_but(8, &[7]);
    let threshold = cohort.degrees().threshold;
    let signed: Vec<Confirmation> =
        (0..7).map(|place| world.see_survivors(place, &survivors).unwrap()).collect();
    let enough = usize::try_from(threshold).unwrap();
    let record = world.device(0).to_record();
    let mut few: Vec<Confirmation> = signed[1..enough].to_vec();
    few.push(signed[0]);
    few.push(signed[1]);
    few.push(Confirmation { index: 7, ..signed[1] });
    few.push(Confirmation { index: 6, ..signed[1] });
    few.push(Confirmation { index: 99, ..signed[2] });
    let told = world.see_confirmations(0, &few);
    world.assert_left(0, told, &Abort::Unconfirmed { valid: threshold - 1, threshold });

    *world.device(0) = crate::Device::from_record(&record).unwrap();
    let told = world.see_confirmations(0, &[]);
    world.assert_left(0, told, &Abort::Unconfirmed { valid: 0, threshold });

    *world.device(0) = crate::Device::from_record(&record).unwrap();
    assert!(world.see_confirmations(0, &signed[1..=enough]).is_ok());
}

/// The same devices signed the same survivors in another attempt.
#[test]
fn confirmations_of_another_attempt_are_worthless() {
    let signed_in = |attempt| {
        let (mut world, cohort) = World::delivered(Script { attempt, ..Script::default() });
        let survivors = cohort.survivors().clone();
        let signed: Vec<Confirmation> =
            (0..8).map(|place| world.see_survivors(place, &survivors).unwrap()).collect();
        let ids: Vec<DeviceId> = world.advertisements().iter().map(crate::Advertisement::id).collect();
        (world, cohort.degrees().threshold, ids, signed)
    };
    let (mut world, threshold, ids, _) = signed_in(1);
    let (_, _, same_ids, replayed) = signed_in(0);
    assert_eq!(ids, same_ids, "the same devices in the same places");
    let told = world.see_confirmations(3, &replayed);
    world.assert_left(3, told, &Abort::Unconfirmed { valid: 0, threshold });
}

/// What is revealed at the end is the last that a device says.
#[test]
fn a_session_that_is_over_is_forgotten() {
    let (mut world, cohort) = World::confirmed(Script::default());
    let signed = cohort.confirmations(2).unwrap();
    assert!(world.see_confirmations(2, &signed).is_ok());
    assert_empty(&world.device(2).to_record(), 4);
    let again = world.see_confirmations(2, &signed);
    let expected = Abort::OutOfOrder { expected: "a session that is over", found: "confirmations" };
    world.assert_left(2, again, &expected);
}
