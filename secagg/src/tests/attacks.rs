//! A coordinator that lies, against the real device: each lie ends in its named abort, and nothing is revealed
//! after it. Peers that lie are in `attacks/peers.rs`, what arrives too late or twice in `attacks/calls.rs`,
//! coordinator and peers together in `attacks/collusion.rs`, lies about survivors in `attacks/survivors.rs`,
//! wrong shares in `attacks/poisoned.rs`.

mod admission;
mod calls;
mod collusion;
mod late;
mod liar;
mod peers;
mod poisoned;
mod survivors;

use super::world::{NOW, POPULATION, Script, World, identity, registrar, terms};
use crate::{
    Abort, Advertisement, AdvertisementError, Certificate, CertificateError, Cohort, Confirmation, Degrees,
    Device, Floors, Identity, ParameterError, RosterView, SessionId, ShareBundle, SurvivorSet, Terms,
};
use ed25519_dalek::SigningKey;
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

/// Eight devices with a frozen roster, nothing shared yet.
fn frozen(members: u32) -> (World, Cohort) {
    let mut world = World::new(Script { members, ..Script::default() });
    let cohort = world.freeze();
    (world, cohort)
}

/// The device at place 0 is shown a view.
fn show(world: &mut World, view: &RosterView) -> Result<ShareBundle, Abort> {
    let policy = world.policy.clone();
    let ticket = world.order[0];
    world.devices[ticket].handle_roster(view, &policy, NOW, &mut world.rng)
}

/// Whatever comes after an abort, the device says nothing more, and its secrets are gone.
fn is_silent(device: &mut Device) {
    assert!(matches!(device.handle_confirmations(&[]), Err(Abort::OutOfOrder { .. })));
    let vector = crate::RingVector::zeros(device.terms().bits, device.terms().dimension);
    assert!(matches!(device.handle_shares(&[], vector), Err(Abort::OutOfOrder { .. })));
    // Session, config, suite, bits and dimension come first; then the three secrets.
    let record = device.to_record();
    assert!(record[1 + 32 + 32 + 4 + 4 + 8..][..96].iter().all(|byte| *byte == 0), "secrets are wiped");
}

/// One lie about the roster and its abort.
fn roster_lie(
    members: u32,
    lie: impl FnOnce(&mut World, &mut RosterView),
    expected: impl FnOnce(&Abort) -> bool,
) {
    let (mut world, cohort) = frozen(members);
    let mut view = cohort.roster_view(0);
    lie(&mut world, &mut view);
    let abort = show(&mut world, &view).expect_err("a lie");
    assert!(expected(&abort), "{abort:?}");
    is_silent(world.device(0));
}

#[test]
fn the_honest_roster_is_accepted() {
    let (mut world, cohort) = frozen(8);
    assert!(show(&mut world, &cohort.roster_view(0)).is_ok());
}

/// Key substitution: the coordinator in the middle shows keys of its own in a neighbour's name.
#[test]
fn substituted_keys() {
    roster_lie(
        8,
        |_, view| view.neighbours[2].advertisement.mask_key = [9; 32],
        |abort| matches!(abort, Abort::Neighbour { source: AdvertisementError::Signature, .. }),
    );
}

/// The same, signed by an identity that the coordinator made up: a Sybil, whom no registrar knows.
#[test]
fn made_up_peers() {
    let made_up = |world: &mut World, certificate: Certificate, key: SigningKey| {
        let identity = Identity::new(key, certificate).unwrap();
        Device::advertise(world.terms, &identity, &mut world.rng).1
    };
    let key = SigningKey::from_bytes(&[77; 32]);
    let public = key.verifying_key().to_bytes();
    let cases = [
        (Certificate::insecure_self_signed(&key, POPULATION, 10_000), CertificateError::Registrar),
        (Certificate::issue(&registrar(), "other-population", public, 10_000), CertificateError::Registrar),
        (Certificate::issue(&registrar(), POPULATION, public, NOW), CertificateError::Expired),
    ];
    for (certificate, reason) in cases {
        // The coordinator builds the whole roster around its puppet, so tree, order and graph are right.
        let mut world = World::new(Script { members: 6, ..Script::default() });
        let puppet = made_up(&mut world, certificate, key.clone());
        let mut view = forged_roster(&world, puppet);
        let place = view.ids.iter().position(|id| *id == world.devices[0].advertisement().id()).unwrap();
        view.index = u32::try_from(place).unwrap();
        let policy = world.policy.clone();
        let abort = world.devices[0].handle_roster(&view, &policy, NOW, &mut world.rng).unwrap_err();
        let expected = AdvertisementError::Certificate(reason);
        assert!(matches!(abort, Abort::Neighbour { source, .. } if source == expected), "{abort:?}");
        is_silent(&mut world.devices[0]);
    }
}

/// A roster of all devices and one more, as device 0 would see it: a full graph, and all of it consistent.
fn forged_roster(world: &World, extra: Advertisement) -> RosterView {
    let mut all: Vec<Advertisement> = world.devices.iter().map(|d| d.advertisement().clone()).collect();
    all.push(extra);
    all.sort_by_key(Advertisement::id);
    let own = world.devices[0].advertisement().id();
    let index = u32::try_from(all.iter().position(|a| a.id() == own).unwrap()).unwrap();
    let degree = u32::try_from(all.len()).unwrap() - 1;
    Cohort::new(world.terms, all, Degrees { degree, threshold: degree / 2 + 1 }, 2).roster_view(index)
}

#[test]
fn entries_that_are_not_in_the_tree() {
    roster_lie(8, |_, view| view.neighbours[1].path[0][3] ^= 1, |a| matches!(a, Abort::NotInRoster(_)));
    roster_lie(8, |_, view| view.path[0][3] ^= 1, |abort| matches!(abort, Abort::OwnEntry(0)));
    // A split roster: another root than the one that the paths lead to.
    roster_lie(8, |_, view| view.root[0] ^= 1, |abort| matches!(abort, Abort::OwnEntry(0)));
}

/// The coordinator leaves the device out, or puts other keys in its name.
#[test]
fn own_entry_replaced() {
    roster_lie(
        8,
        |world, view| {
            let ticket = world.order[0];
            let other = Device::advertise(world.terms, &world.identities[ticket], &mut world.rng).0;
            world.devices[ticket] = other;
            view.index = 0;
        },
        |abort| matches!(abort, Abort::OwnEntry(0)),
    );
}

/// One identity in two places would count twice; an order of the coordinator's choice would draw graphs at will.
#[test]
fn places_that_are_not_those_of_the_ids() {
    let refused = |abort: &Abort| *abort == Abort::RosterOrder;
    roster_lie(8, |_, view| view.ids[3] = view.ids[4], refused);
    roster_lie(8, |_, view| view.ids.swap(2, 5), refused);
    roster_lie(8, |_, view| view.index = 1, refused);
    roster_lie(8, |_, view| view.ids.truncate(7), refused);
    roster_lie(8, |_, view| view.ids.push(crate::DeviceId([255; 32])), refused);
    // Ascending, but not the members': the neighbour at that place has another id.
    roster_lie(
        8,
        |_, view| {
            let mut id = view.ids[4].0;
            id[31] ^= 1;
            view.ids[4] = crate::DeviceId(id);
        },
        refused,
    );
}

#[test]
fn neighbours_that_the_graph_does_not_give() {
    let wrong = |abort: &Abort| *abort == Abort::WrongNeighbours;
    roster_lie(8, |_, view| drop(view.neighbours.pop()), wrong);
    roster_lie(8, |_, view| view.neighbours.swap(0, 1), wrong);
    let repeat = |_: &mut World, view: &mut RosterView| {
        let twice = view.neighbours[0].clone();
        view.neighbours[1] = twice;
    };
    roster_lie(8, repeat, wrong);
    // In a sparse graph: a puppet in place of the neighbour that the seed gives.
    roster_lie(
        70,
        |_, view| {
            let own = view.index;
            let named: Vec<u32> = view.neighbours.iter().map(|n| n.index).collect();
            let other = (0..70).find(|i| *i != own && !named.contains(i));
            if let Some(other) = other {
                view.neighbours[0].index = other;
            } else {
                view.neighbours.clear();
            }
        },
        |abort| matches!(abort, Abort::WrongNeighbours | Abort::RosterOrder),
    );
}

#[test]
fn cohorts_below_the_floors() {
    for members in [0, 1, 2, 3] {
        let spoil = |_: &mut World, view: &mut RosterView| view.members = members;
        roster_lie(8, spoil, |abort| *abort == Abort::CohortTooSmall { members, floor: 4 });
    }
    let huge = |_: &mut World, view: &mut RosterView| view.members = u32::MAX;
    roster_lie(8, huge, |abort| matches!(abort, Abort::CohortTooLarge { .. }));
    let most = |world: &mut World, _: &mut RosterView| world.policy.floors.members_max = 7;
    roster_lie(8, most, |abort| *abort == Abort::CohortTooLarge { members: 8, max: 7 });
    let floor = |world: &mut World, _: &mut RosterView| world.policy.floors.cohort_min = 9;
    roster_lie(8, floor, |abort| *abort == Abort::CohortTooSmall { members: 8, floor: 9 });
}

#[test]
fn degrees_that_do_not_protect() {
    let with = |degree, threshold| {
        move |_: &mut World, view: &mut RosterView| view.degrees = Degrees { degree, threshold }
    };
    roster_lie(8, with(4, 4), |abort| {
        matches!(abort, Abort::SparseGraph { degree: 4, members: 8, below: 64 })
    });
    let equivocation =
        |abort: &Abort| matches!(abort, Abort::Degrees(ParameterError::Equivocation { threshold: 3, .. }));
    roster_lie(8, with(7, 3), equivocation);
    let above = |abort: &Abort| matches!(abort, Abort::Degrees(ParameterError::ThresholdAboveDegree { .. }));
    roster_lie(8, with(7, 8), above);
    let odd = |abort: &Abort| matches!(abort, Abort::Degrees(ParameterError::Degree { .. }));
    roster_lie(70, with(51, 40), odd);
    let disconnected = |abort: &Abort| matches!(abort, Abort::Degrees(ParameterError::Disconnected { .. }));
    roster_lie(70, with(6, 6), disconnected);
}

/// Model inconsistency (Pasquini et al. 2022): a device that is shown another model, plan or attempt is in
/// another session, and its neighbours' signatures do not verify there.
#[test]
fn another_model_is_another_session() {
    let (world, cohort) = frozen(6);
    let view = cohort.roster_view(0);
    let own = identity(u32::try_from(world.order[0]).unwrap());
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let other_terms = Terms { session: SessionId::from_bytes([1; 32]), ..world.terms };
    for other in [other_terms, terms(&world.script, 1)] {
        let mut device = Device::advertise(other, &own, &mut rng).0;
        // Even if the coordinator could make it take part with the same keys in the same roster.
        device = with_keys_of(&device, world.devices.get(world.order[0]).unwrap());
        let abort = device.handle_roster(&view, &world.policy, NOW, &mut rng).unwrap_err();
        let signature = AdvertisementError::Signature;
        assert!(matches!(abort, Abort::Neighbour { source, .. } if source == signature), "{abort:?}");
        is_silent(&mut device);
    }
}

/// A device of one session with the keys of another's device.
fn with_keys_of(session: &Device, keys: &Device) -> Device {
    let (session, keys) = (session.to_record(), keys.to_record());
    let terms = 1 + 32 + 32 + 4 + 4 + 8;
    Device::from_record(&[&session[..terms], &keys[terms..]].concat()).unwrap()
}

/// Lying about dropouts: the survivors that a device is shown must be ones that it can protect.
#[test]
fn survivors_that_cannot_be() {
    let lie = |spoil: &dyn Fn(u32) -> bool, members: u32, expected: Abort| {
        let mut world = World::new(Script { members: 8, ..Script::default() });
        let mut cohort = world.freeze();
        world.share(&mut cohort).unwrap();
        world.mask(&mut cohort).unwrap();
        let (policy, survivors) = (world.policy.clone(), SurvivorSet::of(members, spoil));
        let ticket = world.order[2];
        let abort = world.devices[ticket].handle_survivors(&survivors, &policy, &world.identities[ticket]);
        assert_eq!(abort.unwrap_err(), expected);
        is_silent(&mut world.devices[ticket]);
    };
    lie(&|i| i != 2, 8, Abort::NotASurvivor);
    lie(&|_| true, 9, Abort::SurvivorsOfOtherRoster { expected: 8, found: 9 });
    lie(&|i| i < 4, 8, Abort::TooFewSurvivors { survivors: 4, floor: 5 });
    lie(&|i| i == 2, 8, Abort::TooFewSurvivors { survivors: 1, floor: 5 });
}

#[test]
fn a_survivor_that_never_shared() {
    let mut dropouts = [const { Vec::new() }; 5];
    dropouts[1] = vec![5];
    let mut world = World::new(Script { members: 8, dropouts, ..Script::default() });
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    world.mask(&mut cohort).unwrap();
    let (policy, all) = (world.policy.clone(), SurvivorSet::of(8, |_| true));
    let ticket = world.order[0];
    let abort = world.devices[ticket].handle_survivors(&all, &policy, &world.identities[ticket]).unwrap_err();
    assert_eq!(abort, Abort::SurvivorWithoutShares(5));
}

/// Equivocation: half of the devices are told that one of them dropped out, the others that it did not. With
/// both answers the coordinator would have both of its secrets. No device sees enough signatures to reveal.
#[test]
fn two_sets_of_survivors() {
    let mut world = World::new(Script { members: 9, ..Script::default() });
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    world.mask(&mut cohort).unwrap();
    let policy = world.policy.clone();
    let sets = [SurvivorSet::of(9, |_| true), SurvivorSet::of(9, |i| i != 8)];
    let signed: Vec<Confirmation> = (0..8u32)
        .map(|place| {
            let ticket = world.order[place as usize];
            let set = &sets[usize::from(place >= 4)];
            world.devices[ticket].handle_survivors(set, &policy, &world.identities[ticket]).unwrap()
        })
        .collect();
    let threshold = cohort.degrees().threshold;
    for place in 0..8u32 {
        let others: Vec<Confirmation> = signed.iter().copied().filter(|c| c.index != place).collect();
        let abort = world.device(place).handle_confirmations(&others).err();
        assert_eq!(abort, Some(Abort::Unconfirmed { valid: 3, threshold }), "place {place}");
        is_silent(world.device(place));
    }
}

/// After it has signed one set, a device takes no other; and it reveals once.
#[test]
fn a_second_set_or_a_second_reveal() {
    let mut world = World::new(Script { members: 8, ..Script::default() });
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    world.mask(&mut cohort).unwrap();
    world.confirm(&mut cohort).unwrap();
    let (policy, other) = (world.policy.clone(), SurvivorSet::of(8, |i| i != 7));
    let ticket = world.order[0];
    let again = world.devices[ticket].handle_survivors(&other, &policy, &world.identities[ticket]);
    assert!(matches!(again, Err(Abort::OutOfOrder { .. })));
    let confirmations = cohort.confirmations(1).unwrap();
    let device = world.device(1);
    assert!(device.handle_confirmations(&confirmations).is_ok());
    assert!(matches!(device.handle_confirmations(&confirmations), Err(Abort::OutOfOrder { .. })));
    is_silent(device);
}

#[test]
fn confirmations_that_do_not_count() {
    let check = |spoil: &dyn Fn(&mut Vec<Confirmation>)| {
        let mut world = World::new(Script { members: 8, ..Script::default() });
        let mut cohort = world.freeze();
        world.share(&mut cohort).unwrap();
        world.mask(&mut cohort).unwrap();
        world.confirm(&mut cohort).unwrap();
        let mut confirmations = cohort.confirmations(0).unwrap();
        spoil(&mut confirmations);
        let abort = world.device(0).handle_confirmations(&confirmations).err().unwrap();
        assert!(matches!(abort, Abort::Unconfirmed { .. }), "{abort:?}");
        is_silent(world.device(0));
    };
    check(&|all| all.truncate(3));
    check(&|all| all.clear());
    check(&|all| all[0].signature[7] ^= 1);
    check(&|all| all[1] = all[0]);
    check(&|all| all[0].index = 0);
    check(&|all| all[0].index = 99);
    check(&|all| all.swap_with_slice(&mut [Confirmation { index: 1, signature: [0; 64] }; 4]));
}

/// Signatures of another attempt say nothing about this one.
#[test]
fn replayed_confirmations() {
    let mut earlier = World::new(Script { members: 8, seed: 2, ..Script::default() });
    let mut earlier_cohort = earlier.freeze();
    earlier.share(&mut earlier_cohort).unwrap();
    earlier.mask(&mut earlier_cohort).unwrap();
    earlier.confirm(&mut earlier_cohort).unwrap();
    let mut world = World::new(Script { members: 8, ..Script::default() });
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    world.mask(&mut cohort).unwrap();
    world.confirm(&mut cohort).unwrap();
    let replayed = earlier_cohort.confirmations(0).unwrap();
    let abort = world.device(0).handle_confirmations(&replayed).err().unwrap();
    assert!(matches!(abort, Abort::Unconfirmed { valid: 0, .. }), "{abort:?}");
}

/// A coordinator under which a device's own floors were lower would get through: the floors are what stops it.
#[test]
fn the_floors_are_what_stops_it() {
    let (mut world, cohort) = frozen(3);
    let view = cohort.roster_view(0);
    assert!(matches!(show(&mut world, &view), Err(Abort::CohortTooSmall { .. })));
    let (mut world, cohort) = frozen(3);
    world.policy.floors = Floors { cohort_min: 2, survivors_min: 2, ..Floors::default() };
    assert!(show(&mut world, &cohort.roster_view(0)).is_ok());
}
