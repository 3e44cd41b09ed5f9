//! Peers that lie, against the coordinator and the devices around them.

use crate::{
    AdmitError, Advertisement, AdvertisementError, Certificate, CertificateError, Device, Gathering,
    Identity, Registrars, Reveal, RevealedShare, StepError,
    tests::world::{NOW, POPULATION, Script, World, registrar, terms},
};
use ed25519_dalek::SigningKey;

fn gathering(world: &World) -> Gathering {
    Gathering::new(world.terms, POPULATION, Registrars::Keys(vec![registrar().verifying_key()]))
}

#[test]
fn keys_that_are_not_let_in() {
    let world = World::new(Script { members: 4, ..Script::default() });
    let own = |i: usize| world.devices[i].advertisement().clone();
    let refused = |advertisement: Advertisement| {
        let mut gathering = gathering(&world);
        gathering.admit(own(1), NOW).unwrap();
        let error = gathering.admit(advertisement, NOW).unwrap_err();
        assert_eq!(gathering.count(), 1);
        error
    };
    assert_eq!(refused(own(1)), AdmitError::Duplicate);
    assert_eq!(refused(Advertisement { share_key: own(1).share_key, ..own(0) }), AdmitError::Duplicate);
    assert_eq!(refused(Advertisement { mask_key: own(0).share_key, ..own(0) }), AdmitError::Duplicate);
    let signature = AdmitError::Advertisement(AdvertisementError::Signature);
    assert_eq!(refused(Advertisement { nonce: [0; 32], ..own(0) }), signature);
    assert_eq!(refused(Advertisement { signature: own(1).signature, ..own(0) }), signature);
    // Poisoned points: agreed secrets would be known to everybody.
    let mut minus_one = [0xff; 32];
    (minus_one[0], minus_one[31]) = (0xec, 0x7f);
    for key in [[0; 32], minus_one] {
        let low_order = AdmitError::Advertisement(AdvertisementError::LowOrder);
        assert_eq!(refused(Advertisement { share_key: key, ..own(0) }), low_order);
        assert_eq!(refused(Advertisement { mask_key: key, ..own(0) }), low_order);
    }
    let expired = AdmitError::Advertisement(CertificateError::Expired.into());
    let mut gathering = gathering(&world);
    assert_eq!(gathering.admit(own(0), 10_000), Err(expired));
}

#[test]
fn a_weak_identity_or_a_foreign_certificate() {
    let world = World::new(Script { members: 4, ..Script::default() });
    let mut weak = world.devices[0].advertisement().clone();
    let mut neutral = [0; 32];
    neutral[0] = 1;
    weak.certificate = Certificate::issue(&registrar(), POPULATION, neutral, 10_000);
    let key = AdmitError::Advertisement(CertificateError::Key.into());
    assert_eq!(gathering(&world).admit(weak, NOW), Err(key));
    let mut stolen = world.devices[0].advertisement().clone();
    stolen.certificate = world.devices[1].advertisement().certificate.clone();
    let signature = AdmitError::Advertisement(AdvertisementError::Signature);
    assert_eq!(gathering(&world).admit(stolen, NOW), Err(signature));
}

/// Keys of an earlier attempt are signed for that attempt.
#[test]
fn replayed_keys() {
    let mut world = World::new(Script { members: 4, ..Script::default() });
    let earlier = terms(&world.script, 7);
    let replayed = Device::advertise(earlier, &world.identities[0], &mut world.rng).1;
    let signature = AdmitError::Advertisement(AdvertisementError::Signature);
    assert_eq!(gathering(&world).admit(replayed, NOW), Err(signature));
}

/// A certificate is for one key.
#[test]
fn an_identity_needs_its_own_certificate() {
    let other = Certificate::issue(&registrar(), POPULATION, [3; 32], 10_000);
    assert!(Identity::new(SigningKey::from_bytes(&[1; 32]), other).is_err());
}

/// A neighbour that reveals wrong shares: the sum is right all the same, and it is named.
#[test]
fn poisoned_reveals() {
    let mut world = World::new(Script { members: 10, ..Script::default() });
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    world.mask(&mut cohort).unwrap();
    world.confirm(&mut cohort).unwrap();
    for place in 0..10u32 {
        let confirmations = cohort.confirmations(place).unwrap();
        let mut reveal = world.device(place).handle_confirmations(&confirmations).unwrap();
        if place == 3 {
            for (_, share) in &mut reveal.shares {
                if let RevealedShare::SelfMask(bytes) = share {
                    bytes[5] ^= 0x55;
                }
            }
        }
        cohort.handle_reveal(place, reveal).unwrap();
    }
    cohort.close_step().unwrap();
    let opened = cohort.into_opening().run(1).unwrap();
    let liar = world.device(3).advertisement().id();
    assert_eq!((opened.sum, opened.survivors), world.expected());
    assert_eq!(opened.suspicions.len(), 9, "one for each neighbour's secret");
    assert!(opened.suspicions.iter().all(|suspicion| suspicion.revealer == liar));
}

/// A device whose sealed shares are garbage for one neighbour costs that neighbour a share, not its session;
/// garbage for all of them makes the sum unopenable and names the owner, and nothing else is learned.
#[test]
fn sealed_garbage() {
    for spoiled in [1usize, 9] {
        let mut world = World::new(Script { members: 10, ..Script::default() });
        let mut cohort = world.freeze();
        for place in 0..10u32 {
            let mut bundle = world.take_roster(&cohort, place).unwrap();
            if place == 4 {
                bundle.shares.iter_mut().take(spoiled).for_each(|share| share.ciphertext[9] ^= 1);
            }
            cohort.handle_shares(place, bundle).unwrap();
        }
        cohort.close_step().unwrap();
        world.mask(&mut cohort).unwrap();
        world.confirm(&mut cohort).unwrap();
        world.reveal(&mut cohort).unwrap();
        let owner = world.device(4).advertisement().id();
        match cohort.into_opening().run(1) {
            Ok(opened) => {
                assert_eq!(spoiled, 1);
                assert_eq!((opened.sum, opened.survivors), world.expected());
            }
            Err(error) => {
                assert_eq!(spoiled, 9);
                assert_eq!(error.owners, [owner]);
            }
        }
    }
}

/// Ciphertexts redirected or swapped by the coordinator do not open: each is for one sender and receiver.
#[test]
fn redirected_shares() {
    let mut world = World::new(Script { members: 8, ..Script::default() });
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    let mut forwarded = cohort.forwarded(0).unwrap();
    let first = forwarded[0].ciphertext;
    forwarded[0].ciphertext = forwarded[1].ciphertext;
    forwarded[1].ciphertext = first;
    let elsewhere = cohort.forwarded(1).unwrap();
    forwarded[2].ciphertext = elsewhere.iter().find(|s| s.peer == forwarded[2].peer).unwrap().ciphertext;
    let vector = world.vectors[world.order[0]].clone();
    world.device(0).handle_shares(&forwarded, vector).unwrap();
    // It takes part, holds no share of the three, and reveals none.
    let (policy, all) = (world.policy.clone(), crate::SurvivorSet::of(8, |_| true));
    let ticket = world.order[0];
    world.devices[ticket].handle_survivors(&all, &policy, &world.identities[ticket]).unwrap();
    let record = world.device(0).to_record();
    let mut copy = Device::from_record(&record).unwrap();
    let (mut signers, mut signed) = (World::new(world.script.clone()), Vec::new());
    let mut others = signers.freeze();
    signers.share(&mut others).unwrap();
    signers.mask(&mut others).unwrap();
    for place in 1..8u32 {
        let ticket = signers.order[place as usize];
        let device = &mut signers.devices[ticket];
        signed.push(device.handle_survivors(&all, &policy, &signers.identities[ticket]).unwrap());
    }
    let Reveal { shares } = copy.handle_confirmations(&signed).unwrap();
    assert_eq!(shares.len(), 7 - 3);
}

/// The same vector in two attempts: the masked vectors have nothing in common beyond chance.
#[test]
fn two_attempts_look_unrelated() {
    let masked = |seed| {
        let script =
            Script { members: 4, dimension: 20_000, bits: 8, zeros: true, seed, ..Script::default() };
        let mut world = World::new(script);
        world.run().unwrap();
        world.masked[0].as_ref().unwrap().vector().lanes().to_vec()
    };
    let (first, second) = (masked(1), masked(2));
    let equal = first.iter().zip(&second).filter(|(a, b)| a == b).count();
    // Expected 78 of 20,000, standard deviation 8.8.
    assert!((30..130).contains(&equal), "{equal} equal values");
}

/// Both kinds of share of one peer cannot be said; the wrong kind is refused.
#[test]
fn the_wrong_kind_of_share() {
    let mut world = World::new(Script { members: 8, ..Script::default() });
    let mut cohort = world.freeze();
    world.share(&mut cohort).unwrap();
    world.mask(&mut cohort).unwrap();
    world.confirm(&mut cohort).unwrap();
    let confirmations = cohort.confirmations(0).unwrap();
    let honest = world.device(0).handle_confirmations(&confirmations).unwrap();
    let (peer, share) = honest.shares[0].clone();
    let RevealedShare::SelfMask(bytes) = share else { panic!("everybody survived") };
    let malformed = |cohort: &mut crate::Cohort, shares: Vec<(u32, RevealedShare)>| {
        let error = cohort.handle_reveal(0, Reveal { shares }).unwrap_err();
        assert!(matches!(error, StepError::Malformed(_)), "{error:?}");
    };
    malformed(&mut cohort, vec![(peer, RevealedShare::MaskKey(bytes.clone()))]);
    let twice = vec![(peer, RevealedShare::SelfMask(bytes.clone())), (peer, RevealedShare::SelfMask(bytes))];
    malformed(&mut cohort, twice);
    malformed(&mut cohort, vec![(0, honest.shares[0].1.clone())]);
    malformed(&mut cohort, vec![(200, honest.shares[0].1.clone())]);
}
