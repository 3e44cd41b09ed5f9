//! Wrong shares, sealed by their owner or changed by who reveals them: the sum opens exactly and those at fault
//! are named, or it does not open, and nobody honest is blamed.

use crate::{
    Cohort, Device, DeviceId, OpenError, Opened, RevealedShare, ShareBundle, Suspicion,
    tests::world::{NOW, Script, World},
};

const MEMBERS: u32 = 10;
/// Of nine neighbours.
const THRESHOLD: u32 = 6;
const OWNER: u32 = 4;

fn script() -> Script {
    Script { members: MEMBERS, ..Script::default() }
}

fn id(world: &mut World, place: u32) -> DeviceId {
    world.device(place).advertisement().id()
}

/// A session in which these change every share that they reveal.
fn with_liars(liars: &[u32], threads: usize) -> (World, Result<Opened, OpenError>) {
    let (mut world, mut cohort) = World::confirmed(script());
    assert_eq!(cohort.degrees().threshold, THRESHOLD);
    for place in 0..MEMBERS {
        let signed = cohort.confirmations(place).unwrap();
        let mut reveal = world.see_confirmations(place, &signed).unwrap();
        for (_, share) in reveal.shares.iter_mut().filter(|_| liars.contains(&place)) {
            let (RevealedShare::SelfMask(bytes) | RevealedShare::MaskKey(bytes)) = share;
            bytes[place as usize] ^= 1 + u8::try_from(place).unwrap();
        }
        cohort.handle_reveal(place, reveal).unwrap();
    }
    let opened = cohort.into_opening().run(threads);
    (world, opened)
}

#[test]
fn as_many_liars_as_shares_to_spare_are_survived_and_named() {
    for liars in [&[8][..], &[0, 9], &[2, 3, 5]] {
        for threads in [1, 3] {
            let (mut world, opened) = with_liars(liars, threads);
            let opened = opened.unwrap();
            let mut expected = Vec::new();
            for owner in 0..MEMBERS {
                for revealer in liars.iter().filter(|liar| **liar != owner) {
                    let (owner, revealer) = (id(&mut world, owner), id(&mut world, *revealer));
                    expected.push(Suspicion { owner, revealer });
                }
            }
            assert_eq!(opened.suspicions, expected, "{liars:?}");
            assert_eq!((opened.sum, opened.survivors), world.expected());
        }
    }
}

/// Four liars leave five honest shares of each honest device's secret, one too few.
#[test]
fn too_many_liars_and_nothing_opens_and_no_honest_device_is_blamed() {
    let liars = [0, 3, 7, 9];
    let (mut world, opened) = with_liars(&liars, 1);
    let error = opened.unwrap_err();
    let honest = (0..MEMBERS).filter(|place| !liars.contains(place));
    let honest: Vec<DeviceId> = honest.map(|place| id(&mut world, place)).collect();
    assert_eq!((error.owners, error.blamed), (honest.clone(), Vec::new()));
    assert!(error.suspicions.iter().all(|suspicion| !honest.contains(&suspicion.revealer)));
}

/// A session in which OWNER shares what `spoil` makes of its bundle; it vanishes at step 2 if told so.
fn with_spoilt(
    lost: bool,
    spoil: impl FnOnce(&mut World, &Cohort, ShareBundle) -> ShareBundle,
) -> (World, Result<Opened, OpenError>) {
    let mut script = script();
    if lost {
        script.dropouts[2] = vec![OWNER];
    }
    let (mut world, mut cohort) = World::frozen(script);
    for place in (0..MEMBERS).filter(|place| *place != OWNER) {
        let bundle = world.take_roster(&cohort, place).unwrap();
        cohort.handle_shares(place, bundle).unwrap();
    }
    let record = world.device(OWNER).to_record();
    let honest = world.take_roster(&cohort, OWNER).unwrap();
    let shared = world.device(OWNER).to_record();
    *world.device(OWNER) = Device::from_record(&record).unwrap();
    let spoilt = spoil(&mut world, &cohort, honest);
    *world.device(OWNER) = Device::from_record(&shared).unwrap();
    cohort.handle_shares(OWNER, spoilt).unwrap();
    cohort.close_step().unwrap();
    world.mask(&mut cohort).unwrap();
    world.confirm(&mut cohort).unwrap();
    world.reveal(&mut cohort).unwrap();
    let opened = cohort.into_opening().run(1);
    (world, opened)
}

/// Shares of two polynomials, well sealed: those of the second for `count` neighbours.
fn of_two(count: usize) -> impl FnOnce(&mut World, &Cohort, ShareBundle) -> ShareBundle {
    move |world, cohort, mut bundle| {
        let again = world.take_roster(cohort, OWNER).unwrap();
        bundle.shares[..count].clone_from_slice(&again.shares[..count]);
        bundle
    }
}

#[test]
fn an_owner_that_seals_some_wrong_shares_is_named_and_the_sum_is_exact() {
    for lost in [false, true] {
        for wrong in 1..=3usize {
            let (mut world, opened) = with_spoilt(lost, of_two(wrong));
            let opened = opened.unwrap();
            assert_eq!((&opened.sum, opened.survivors), (&world.expected().0, world.expected().1));
            let owner = id(&mut world, OWNER);
            assert_eq!(opened.suspicions.len(), wrong);
            assert!(opened.suspicions.iter().all(|suspicion| suspicion.owner == owner));
        }
    }
}

/// Its neighbours' shares of all other secrets are right, so the lie is its own.
#[test]
fn an_owner_that_seals_too_many_wrong_shares_is_blamed() {
    for lost in [false, true] {
        let (mut world, opened) = with_spoilt(lost, of_two(4));
        let (error, owner) = (opened.unwrap_err(), id(&mut world, OWNER));
        assert_eq!((error.owners, error.blamed), (vec![owner], vec![owner]));
    }
}

/// Good shares of a secret that is not the one committed to, or whose public half was not advertised.
#[test]
fn an_owner_that_shares_another_secret_is_blamed() {
    let other_commitment = |_: &mut World, _: &Cohort, mut bundle: ShareBundle| {
        bundle.commitment[0] ^= 1;
        bundle
    };
    let other_mask_key = |world: &mut World, cohort: &Cohort, _: ShareBundle| {
        const MASK_KEY_FROM: usize = 1 + 32 + 32 + 4 + 4 + 8 + 32;
        let mut record = world.device(OWNER).to_record();
        record[MASK_KEY_FROM + 7] ^= 1;
        let mut liar = Device::from_record(&record).unwrap();
        liar.handle_roster(&cohort.roster_view(OWNER), &world.policy, NOW, &mut world.rng).unwrap()
    };
    let (mut world, first) = with_spoilt(false, other_commitment);
    let (_, second) = with_spoilt(true, other_mask_key);
    let owner = id(&mut world, OWNER);
    for opened in [first, second] {
        let error = opened.unwrap_err();
        assert_eq!((error.owners, error.blamed), (vec![owner], vec![owner]));
    }
    // Nobody asks for the secret that is wrong: no harm done.
    let (world, opened) = with_spoilt(false, other_mask_key);
    let opened = opened.unwrap();
    assert_eq!((opened.sum, opened.survivors), world.expected());
}
