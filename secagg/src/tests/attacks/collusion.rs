//! Coordinator and peers together, or the coordinator under many names: rosters that are consistent in
//! themselves, with entries that their owners really signed.

use super::liar::{advertise_as, assert_empty, forged_view, known_key};
use crate::{
    Abort, Advertisement, AdvertisementError, Certificate, CertificateError, Degrees, Device, Identity,
    RosterView, ShareBundle, SurvivorSet,
    tests::world::{self, NOW, POPULATION, Script, World, registrar},
};
use ed25519_dalek::SigningKey;

/// An identity of the coordinator's own making.
fn sybil(number: u8) -> Identity {
    let key = SigningKey::from_bytes(&[number; 32]);
    let certificate = Certificate::insecure_self_signed(&key, POPULATION, NOW + 1);
    Identity::new(key, certificate).unwrap()
}

/// The roster in the order of its ids, as every roster is, and where `of` stands in it.
fn sorted(mut roster: Vec<Advertisement>, of: &Advertisement) -> (Vec<Advertisement>, u32) {
    roster.sort_by_key(Advertisement::id);
    let place = roster.iter().position(|entry| entry.id() == of.id()).unwrap();
    (roster, u32::try_from(place).unwrap())
}

/// The coordinator in the middle: its own keys in a neighbour's name.
#[test]
fn substituted_keys_are_refused() {
    type Lie = fn(&mut Advertisement);
    let lies: [Lie; 3] =
        [|a| a.share_key = known_key(1), |a| a.mask_key = known_key(2), |a| a.nonce = [3; 32]];
    for lie in lies {
        let (mut world, cohort) = World::frozen(Script::default());
        let mut roster = world.advertisements();
        lie(&mut roster[5]);
        let view = forged_view(&world.terms, &roster, cohort.degrees(), 2);
        let outcome = world.see_roster(2, &view);
        let expected = Abort::Neighbour { index: 5, source: AdvertisementError::Signature };
        world.assert_left(2, outcome, &expected);
    }
}

/// One peer is real, all others are the coordinator's: no registrar knows them.
#[test]
fn made_up_peers_are_refused() {
    let (mut world, _) = World::frozen(Script::default());
    let own = world.device(0).advertisement().clone();
    let fake =
        |number: u8| advertise_as(&sybil(number), &world.terms, known_key(number), known_key(number + 1));
    let all: Vec<Advertisement> = (0..7).map(|i| fake(2 * i + 1)).chain([own.clone()]).collect();
    let (roster, place) = sorted(all, &own);
    let view = forged_view(&world.terms, &roster, Degrees { degree: 7, threshold: 5 }, place);
    let outcome = world.see_roster(0, &view);
    let index = u32::from(place == 0);
    let source = AdvertisementError::Certificate(CertificateError::Registrar);
    world.assert_left(0, outcome, &Abort::Neighbour { index, source });
}

/// Certified, but for others, for a time gone by, or with a key that anybody signs for.
#[test]
fn peers_with_worthless_certificates_are_refused() {
    let key = SigningKey::from_bytes(&[77; 32]);
    let public = key.verifying_key().to_bytes();
    let issue = |population, expires| Certificate::issue(&registrar(), population, public, expires);
    let mut neutral = [0; 32];
    neutral[0] = 1;
    let cases = [
        (issue("others", NOW + 1), CertificateError::Registrar),
        (issue(POPULATION, NOW), CertificateError::Expired),
        (Certificate { expires_unix_ms: NOW + 9, ..issue(POPULATION, NOW) }, CertificateError::Registrar),
        (Certificate::issue(&registrar(), POPULATION, neutral, NOW + 1), CertificateError::Key),
    ];
    for (certificate, reason) in cases {
        let (mut world, cohort) = World::frozen(Script::default());
        let own = world.device(0).advertisement().clone();
        let mut all = world.advertisements();
        let honest = Identity::new(key.clone(), issue(POPULATION, NOW + 1)).unwrap();
        all[6] = advertise_as(&honest, &world.terms, known_key(1), known_key(2));
        all[6].certificate = certificate;
        let id = all[6].id();
        let (roster, place) = sorted(all, &own);
        let view = forged_view(&world.terms, &roster, cohort.degrees(), place);
        let outcome = world.see_roster(0, &view);
        let index = u32::try_from(roster.iter().position(|entry| entry.id() == id).unwrap()).unwrap();
        let source = AdvertisementError::Certificate(reason);
        world.assert_left(0, outcome, &Abort::Neighbour { index, source });
    }
}

/// The same devices advertised in another round or attempt: their keys of then may be known by now.
#[test]
fn replayed_advertisements_are_refused() {
    let (mut world, cohort) = World::frozen(Script { attempt: 1, ..Script::default() });
    let (before, _) = World::frozen(Script::default());
    let mut roster = world.advertisements();
    roster[4] = before.advertisements()[4].clone();
    assert_eq!(roster[4].certificate, world.advertisements()[4].certificate);
    let view = forged_view(&world.terms, &roster, cohort.degrees(), 3);
    let outcome = world.see_roster(3, &view);
    world.assert_left(3, outcome, &Abort::Neighbour { index: 4, source: AdvertisementError::Signature });
}

/// A device that was given another model (Pasquini et al. 2022) has signed for another session.
#[test]
fn a_device_with_another_model_is_refused_and_refuses() {
    let (mut world, cohort) = World::frozen(Script::default());
    let terms = crate::Terms { session: world::other_model(&world.script), ..world.terms };
    let (mut misled, advertisement) = Device::advertise(terms, world.identity(0), &mut world.rng.clone());
    let mut roster = world.advertisements();
    roster[0] = advertisement;
    let view = forged_view(&world.terms, &roster, cohort.degrees(), 1);
    let outcome = world.see_roster(1, &view);
    world.assert_left(1, outcome, &Abort::Neighbour { index: 0, source: AdvertisementError::Signature });

    let view = forged_view(&terms, &roster, cohort.degrees(), 0);
    let outcome = misled.handle_roster(&view, &world.policy, NOW, &mut world.rng);
    let expected = Abort::Neighbour { index: 1, source: AdvertisementError::Signature };
    assert_eq!(outcome.err(), Some(expected));
    assert_empty(&misled.to_record(), 5);
}

/// Signed by its owner for this session, but not what the others were shown.
#[test]
fn an_entry_that_is_not_in_the_roster_is_refused() {
    let (mut world, cohort) = World::frozen(Script::default());
    let second = advertise_as(world.identity(6), &world.terms, known_key(1), known_key(2));
    let mut view = cohort.roster_view(2);
    let entry = view.neighbours.iter_mut().find(|entry| entry.index == 6).unwrap();
    entry.advertisement = second;
    let outcome = world.see_roster(2, &view);
    world.assert_left(2, outcome, &Abort::NotInRoster(6));

    let mut view = cohort.roster_view(3);
    view.neighbours[0].path[0][0] ^= 1;
    let outcome = world.see_roster(3, &view);
    world.assert_left(3, outcome, &Abort::NotInRoster(0));

    let mut view = cohort.roster_view(4);
    view.neighbours[1].path.push([0; 32]);
    let outcome = world.see_roster(4, &view);
    world.assert_left(4, outcome, &Abort::NotInRoster(1));
}

/// Other keys stand in the device's name: the others would share their secrets with the liar.
#[test]
fn a_roster_without_the_devices_own_keys_is_refused() {
    let (mut world, cohort) = World::frozen(Script::default());
    let mut roster = world.advertisements();
    roster[1].mask_key = known_key(1);
    let view = forged_view(&world.terms, &roster, cohort.degrees(), 1);
    let outcome = world.see_roster(1, &view);
    world.assert_left(1, outcome, &Abort::OwnEntry(1));

    let view = RosterView { root: [1; 32], ..cohort.roster_view(2) };
    let outcome = world.see_roster(2, &view);
    world.assert_left(2, outcome, &Abort::OwnEntry(2));

    let view = cohort.roster_view(4);
    let outcome = world.see_roster(3, &view);
    world.assert_left(3, outcome, &Abort::RosterOrder);
}

/// A peer that names another's key as its own, this device's included, or one key for both uses.
#[test]
fn keys_that_occur_twice_are_refused() {
    for copied in 0..4 {
        let (mut world, cohort) = World::frozen(Script::default());
        let mut roster = world.advertisements();
        let (share_key, mask_key) = match copied {
            0 => (roster[0].share_key, known_key(1)),
            1 => (known_key(1), roster[3].mask_key),
            2 => (roster[2].mask_key, known_key(1)),
            _ => (known_key(1), known_key(1)),
        };
        roster[5] = advertise_as(world.identity(5), &world.terms, share_key, mask_key);
        let view = forged_view(&world.terms, &roster, cohort.degrees(), 0);
        let outcome = world.see_roster(0, &view);
        let named = outcome.as_ref().err().cloned();
        assert!(matches!(named, Some(Abort::Duplicate(0 | 2 | 3 | 5))), "{named:?}");
        world.assert_left(0, outcome, &named.unwrap());
    }
}

/// A secret agreed with a point of low order is known to everybody.
#[test]
fn keys_of_low_order_are_refused() {
    let mut high = [0xff; 32];
    high[0] = 0xec;
    high[31] = 0x7f;
    for low in [[0; 32], high] {
        for (share_key, mask_key) in [(low, known_key(1)), (known_key(1), low)] {
            let (mut world, cohort) = World::frozen(Script::default());
            let mut roster = world.advertisements();
            roster[7] = advertise_as(world.identity(7), &world.terms, share_key, mask_key);
            let view = forged_view(&world.terms, &roster, cohort.degrees(), 1);
            let outcome = world.see_roster(1, &view);
            let source = AdvertisementError::LowOrder;
            world.assert_left(1, outcome, &Abort::Neighbour { index: 7, source });
        }
    }
}

#[test]
fn a_second_roster_is_refused() {
    let (mut world, cohort) = World::shared(Script::default());
    let outcome = world.see_roster(0, &cohort.roster_view(0));
    world.assert_left(0, outcome, &Abort::OutOfOrder { expected: "waiting for shares", found: "a roster" });
}

/// Two rosters of the same devices, differing in the keys of one that colludes. The coordinator carries
/// everything between the halves; nothing of one half counts in the other.
#[test]
fn a_split_roster_ends_unconfirmed() {
    const COLLUDER: u32 = 9;
    let (mut world, cohort) = World::frozen(Script { members: 10, ..Script::default() });
    let degrees = cohort.degrees();
    let mut rosters = [world.advertisements(), world.advertisements()];
    rosters[1][9] = advertise_as(world.identity(COLLUDER), &world.terms, known_key(1), known_key(2));
    let half = |place: u32| usize::from(place >= 5);
    let mut bundles: Vec<ShareBundle> = Vec::new();
    for place in 0..COLLUDER {
        let view = forged_view(&world.terms, &rosters[half(place)], degrees, place);
        bundles.push(world.see_roster(place, &view).unwrap());
    }
    let survivors = SurvivorSet::of(10, |place| place != COLLUDER);
    let mut signed = Vec::new();
    for place in 0..COLLUDER {
        let of = |peer: u32| {
            let found = bundles[peer as usize].shares.iter().find(|share| share.peer == place).unwrap();
            crate::SealedShare { peer, ..found.clone() }
        };
        let forwarded: Vec<_> = (0..COLLUDER).filter(|peer| *peer != place).map(of).collect();
        world.see_shares(place, &forwarded).unwrap();
        signed.push(world.see_survivors(place, &survivors).unwrap());
    }
    for place in 0..COLLUDER {
        let peers = if half(place) == 0 { 4 } else { 3 };
        let outcome = world.see_confirmations(place, &signed);
        let expected = Abort::Unconfirmed { valid: peers, threshold: degrees.threshold };
        world.assert_left(place, outcome, &expected);
    }
}

/// If everything else is forced: a device that masks for another session than its peers spoils the sum, and the
/// coordinator learns nothing from it.
#[test]
fn the_masks_of_a_misled_device_do_not_cancel() {
    let mut dropouts = [const { Vec::new() }; 5];
    dropouts[3] = vec![0];
    let (mut world, mut cohort) = World::shared(Script { dropouts, ..Script::default() });
    let mut record = world.device(0).to_record();
    // The session's id comes right after the version.
    record[1] ^= 1;
    *world.device(0) = Device::from_record(&record).unwrap();
    world.mask(&mut cohort).unwrap();
    world.confirm(&mut cohort).unwrap();
    world.reveal(&mut cohort).unwrap();
    let opened = cohort.into_opening().run(1).unwrap();
    let (expected, survivors) = world.expected();
    assert_eq!(opened.survivors, survivors);
    let equal = opened.sum.lanes().iter().zip(expected.lanes()).filter(|(a, b)| a == b).count();
    assert!(equal < 3, "{equal} of 100 values of 20 bits are those of the plain sum");
}
