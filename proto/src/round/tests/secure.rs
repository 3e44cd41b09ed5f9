//! A round under secure aggregation, step by step, with the devices' side as it ships.

use super::super::*;
use crate::plan::tests::secure_plan;
use ed25519_dalek::SigningKey;
use fleetune_secagg::{
    Certificate, CohortPlan, Device, DevicePolicy, Floors, Identity, MaskSuite, Registrars, RingBits,
    SessionId, SessionParts, StepError, Terms,
};
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

const POLICY: RoundPolicy = RoundPolicy {
    report_goal: 5,
    selected_max: 6,
    reports_min: 3,
    selection_ms: 100,
    report_ms: 1000,
    step_ms: 50,
};

/// A round and devices that have a place in it.
struct Scene {
    round: Round,
    policy: DevicePolicy,
    rng: ChaCha20Rng,
    devices: Vec<Party>,
}

/// One device. It always learns its number, counted from one, and the negative of it.
struct Party {
    who: Participant,
    identity: Identity,
    device: Device,
    keys: Advertisement,
    number: i32,
}

fn terms() -> Terms {
    let session = SessionId::derive(&SessionParts {
        population: "roles",
        task: "lora",
        round: 0,
        attempt: 0,
        model_sha256: [6; 32],
        config_sha256: [5; 32],
        server_nonce: [7; 32],
    });
    let (suite, bits) = (MaskSuite::Aes128Ctr, RingBits::new(32).unwrap());
    Terms { session, config_sha256: [5; 32], suite, bits, dimension: 2 }
}

fn registrar() -> SigningKey {
    SigningKey::from_bytes(&[200; 32])
}

fn identity(number: u8) -> Identity {
    let key = SigningKey::from_bytes(&[100 + number; 32]);
    let certificate =
        Certificate::issue(&registrar(), "roles", key.verifying_key().to_bytes(), 1_000_000_000);
    Identity::new(key, certificate).unwrap()
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::of(bytes)
}

impl Scene {
    /// So many devices have joined at time 0; those in `excluded` broke an earlier attempt.
    fn joined(devices: u8, members_max: u32, excluded: &[u8]) -> Self {
        let plan = secure_plan().aggregation;
        let registrars = Registrars::Keys(vec![registrar().verifying_key()]);
        let secure = SecureSetup {
            terms: terms(),
            plan: CohortPlan {
                members_max,
                survivors_min: 2,
                assumptions: plan.secure.unwrap().assumptions,
                degrees: None,
            },
            population: "roles".into(),
            registrars: registrars.clone(),
            excluded: excluded.iter().map(|number| identity(*number).certificate().id()).collect(),
            step_ms: POLICY.step_ms,
        };
        let id = RoundId { task: Name::parse("t", "lora").unwrap(), round: 0, attempt: 0 };
        let mut round = Round::open(id, POLICY, &plan, 2, Some(secure), UnixMillis(0));
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let devices = (0..devices).map(|number| {
            let identity = identity(number);
            let (device, keys) = Device::advertise(terms(), &identity, &mut rng);
            let who = round.handle_join(UnixMillis(0)).unwrap();
            Party { who, identity, device, keys, number: i32::from(number) + 1 }
        });
        let devices = devices.collect();
        let floors = Floors { cohort_min: 2, survivors_min: 2, ..Floors::default() };
        let policy = DevicePolicy { population: "roles".into(), registrars, floors };
        Self { round, policy, rng, devices }
    }

    /// All devices have joined and advertised at time 10.
    fn advertised(devices: u8) -> Self {
        let mut scene = Self::joined(devices, 100, &[]);
        for index in 0..usize::from(devices) {
            scene.advertise(index, 10).unwrap();
        }
        scene
    }

    fn advertise(&mut self, index: usize, now: u64) -> Result<Answer<RosterView>, SecureError> {
        let party = &self.devices[index];
        let keys = party.keys.clone();
        self.round.handle_advertisement(party.who, digest(&keys.share_key), keys, UnixMillis(now))
    }
}

/// A scene past step 0, and what its devices have sent.
struct Run {
    scene: Scene,
    bundles: Vec<Option<ShareBundle>>,
    masked: Vec<Option<Vec<u8>>>,
}

impl Run {
    /// Every device has advertised; those in `sharing` send shares.
    fn shared(devices: u8, sharing: &[usize], now: u64) -> Self {
        let scene = Scene::advertised(devices);
        let count = usize::from(devices);
        let mut run = Self { scene, bundles: vec![None; count], masked: vec![None; count] };
        run.share(sharing, now);
        run
    }

    fn share(&mut self, who: &[usize], now: u64) {
        for index in who {
            let answer = self.scene.advertise(*index, now);
            let Ok(Answer::Ready(view)) = answer else { panic!("a roster: {answer:?}") };
            let Scene { policy, rng, devices, round } = &mut self.scene;
            let bundle = devices[*index].device.handle_roster(&view, policy, now, rng).unwrap();
            round.handle_shares(devices[*index].who, bundle.clone(), UnixMillis(now)).unwrap();
            self.bundles[*index] = Some(bundle);
        }
    }

    fn mask(&mut self, who: &[usize], now: u64) {
        for index in who {
            let party = &mut self.scene.devices[*index];
            let bundle = self.bundles[*index].clone().unwrap();
            let answer = self.scene.round.handle_shares(party.who, bundle, UnixMillis(now)).unwrap();
            let Answer::Ready(forwarded) = answer else { panic!("forwarded shares: {answer:?}") };
            let vector = RingVector::from_signed(terms().bits, &[party.number, -party.number]);
            let packed = party.device.handle_shares(&forwarded, vector).unwrap().pack();
            let taken = self.scene.round.handle_masked(party.who, digest(&packed), &packed, UnixMillis(now));
            assert_ne!(taken.unwrap(), Answer::TooLate);
            self.masked[*index] = Some(packed);
        }
    }

    fn masked_again(&mut self, index: usize, now: u64) -> Answer<SurvivorSet> {
        let packed = self.masked[index].clone().unwrap();
        let who = self.scene.devices[index].who;
        self.scene.round.masked_before(who, digest(&packed), UnixMillis(now)).unwrap().unwrap()
    }

    fn confirm(&mut self, who: &[usize], now: u64) -> Vec<Confirmation> {
        let one = |index: &usize| {
            let answer = self.masked_again(*index, now);
            let Answer::Ready(survivors) = answer else { panic!("survivors: {answer:?}") };
            let Scene { policy, devices, round, .. } = &mut self.scene;
            let party = &mut devices[*index];
            let signed = party.device.handle_survivors(&survivors, policy, &party.identity).unwrap();
            assert_ne!(round.handle_confirmation(party.who, signed, UnixMillis(now)), Ok(Answer::TooLate));
            signed
        };
        who.iter().map(one).collect()
    }

    fn reveal(&mut self, who: &[usize], signed: &[Confirmation], now: u64) {
        for (index, signed) in who.iter().zip(signed) {
            let Scene { devices, round, .. } = &mut self.scene;
            let party = &mut devices[*index];
            let answer = round.handle_confirmation(party.who, *signed, UnixMillis(now)).unwrap();
            let Answer::Ready(confirmations) = answer else { panic!("confirmations: {answer:?}") };
            let reveal = party.device.handle_confirmations(&confirmations).unwrap();
            assert_eq!(round.handle_reveal(party.who, reveal, UnixMillis(now)), Ok(Answer::Ready(())));
        }
    }

    fn open(&mut self, now: u64) {
        let (cohort, opening) = self.scene.round.poll_opening().expect("a sum to open");
        assert!(self.scene.round.poll_opening().is_none(), "given out once");
        self.scene.round.handle_opened(cohort, opening.run(1), UnixMillis(now));
    }

    fn round(&mut self) -> &mut Round {
        &mut self.scene.round
    }

    fn sum(&self) -> Vec<i32> {
        self.scene.round.sum().expect("a sum").sum().to_signed()
    }
}

const ALL: [usize; 5] = [0, 1, 2, 3, 4];

#[test]
fn at_its_goal_the_roster_freezes_and_the_steps_follow_without_waiting() {
    let mut run = Run::shared(5, &ALL, 10);
    assert_eq!((run.round().phase(), run.round().is_secure()), (Phase::Aggregating, true));
    run.mask(&ALL, 20);
    let signed = run.confirm(&ALL, 30);
    run.reveal(&ALL, &signed, 40);
    assert!(run.round().has_revealed() && run.round().sum().is_none());
    run.open(50);
    assert_eq!((run.round().phase(), run.sum()), (Phase::Finished, vec![15, -15]));
    assert_eq!(run.round().counts(), RoundCounts { selected: 5, completed: 5, withdrawn: 0 });
    let cohort = run.round().cohorts().remove(0);
    assert_eq!((cohort.members, cohort.degrees.degree, cohort.degrees.threshold), (5, 4, 3));
    assert_eq!((cohort.dropouts, cohort.outcome), (fleetune_secagg::DropoutCounts::default(), Ok(5)));
    assert!(run.round().troubles().is_empty() && run.round().blamed().is_empty());
}

#[test]
fn at_the_deadline_enough_keys_are_enough_and_too_few_fail_the_round() {
    let mut scene = Scene::joined(5, 100, &[]);
    (0..3).for_each(|index| assert!(matches!(scene.advertise(index, 10), Ok(Answer::Pending(_)))));
    assert_eq!(scene.round.poll_timeout(), Some((UnixMillis(100), "selection deadline")));
    scene.round.handle_timeout(UnixMillis(100));
    assert_eq!(scene.round.poll_timeout(), Some((UnixMillis(1000), "report deadline")));
    scene.round.handle_timeout(UnixMillis(1000));
    assert_eq!(scene.round.phase(), Phase::Aggregating);
    assert_eq!(scene.round.poll_timeout(), Some((UnixMillis(1050), "step deadline")));
    assert_eq!(scene.advertise(4, 1001), Ok(Answer::TooLate), "the roster is frozen");
    assert!(matches!(scene.advertise(0, 1001), Ok(Answer::Ready(view)) if view.members == 3));

    let mut few = Scene::joined(5, 100, &[]);
    (0..2).for_each(|index| assert!(few.advertise(index, 10).is_ok()));
    few.round.handle_timeout(UnixMillis(1000));
    assert_eq!(few.round.phase(), Phase::Failed(RoundFailure::Reports { contributed: 2, needed: 3 }));
    assert_eq!(few.advertise(0, 1001), Ok(Answer::Failed));
    assert_eq!(few.advertise(3, 1001), Ok(Answer::Failed));
}

#[test]
fn withdrawals_end_the_wait_for_keys() {
    let mut scene = Scene::joined(6, 100, &[]);
    (0..4).for_each(|index| assert!(matches!(scene.advertise(index, 10), Ok(Answer::Pending(_)))));
    scene.round.handle_withdrawal(scene.devices[4].who, UnixMillis(20));
    assert_eq!(scene.round.phase(), Phase::Collecting);
    scene.round.handle_withdrawal(scene.devices[5].who, UnixMillis(20));
    assert_eq!((scene.round.phase(), scene.round.counts().withdrawn), (Phase::Aggregating, 2));
}

#[test]
fn keys_of_a_device_that_has_withdrawn_do_not_count_towards_the_goal() {
    let mut scene = Scene::joined(6, 100, &[]);
    (0..4).for_each(|index| assert!(scene.advertise(index, 10).is_ok()));
    scene.round.handle_withdrawal(scene.devices[0].who, UnixMillis(20));
    assert!(matches!(scene.advertise(4, 30), Ok(Answer::Pending(_))), "four are there, five are wanted");
    assert!(matches!(scene.advertise(5, 30), Ok(Answer::Ready(_))));
}

#[test]
fn a_device_that_withdraws_in_the_middle_is_not_awaited() {
    let mut run = Run::shared(5, &[0, 1, 2, 3], 10);
    let last = run.scene.devices[4].who;
    run.round().handle_withdrawal(last, UnixMillis(20));
    run.mask(&[0, 1, 2, 3], 21);
    let signed = run.confirm(&[0, 1, 2, 3], 22);
    run.reveal(&[0, 1, 2, 3], &signed, 23);
    run.open(24);
    assert_eq!((run.round().phase(), run.sum()), (Phase::Finished, vec![10, -10]));
    assert_eq!(run.round().counts(), RoundCounts { selected: 5, completed: 4, withdrawn: 1 });
}

#[test]
fn each_step_has_its_deadline_and_goes_on_without_those_who_miss_it() {
    // Device 0 misses step 2.
    let mut run = Run::shared(6, &ALL, 10);
    assert_eq!(run.round().cohorts()[0].members, 5, "the sixth came after the goal");
    run.mask(&[1, 2, 3, 4], 20);
    assert_eq!(run.round().poll_timeout(), Some((UnixMillis(60), "step deadline")));
    assert!(matches!(run.masked_again(1, 59), Answer::Pending(_)));
    run.round().handle_timeout(UnixMillis(60));
    let signed = run.confirm(&[1, 2, 3, 4], 70);
    run.reveal(&[1, 2, 3, 4], &signed, 80);
    run.open(90);
    assert_eq!((run.round().phase(), run.sum()), (Phase::Finished, vec![14, -14]));
    assert_eq!(lost(&mut run), [0, 1, 0, 0]);
    // Device 2 misses step 3 or 4; its vector is in the sum.
    for confirms in [false, true] {
        let mut run = Run::shared(5, &ALL, 10);
        run.mask(&ALL, 20);
        let rest = [0, 1, 3, 4];
        let signed = run.confirm(&rest, 30);
        if confirms {
            run.confirm(&[2], 30);
        } else {
            run.round().handle_timeout(UnixMillis(70));
        }
        run.reveal(&rest, &signed, 75);
        assert!(run.round().has_revealed());
        run.round().handle_timeout(UnixMillis(130));
        run.open(140);
        assert_eq!((run.round().phase(), run.sum()), (Phase::Finished, vec![15, -15]));
        assert_eq!(lost(&mut run), if confirms { [0, 0, 0, 1] } else { [0, 0, 1, 0] });
    }
}

/// Devices lost in the steps 1 to 4 of the first cohort.
fn lost(run: &mut Run) -> [u32; 4] {
    let dropouts = run.round().cohorts()[0].dropouts;
    [dropouts.sharing, dropouts.masking, dropouts.confirming, dropouts.revealing]
}

#[test]
fn too_few_left_in_a_step_fail_the_round_before_anything_is_revealed() {
    let mut run = Run::shared(5, &ALL, 10);
    run.mask(&[0, 1, 2], 20);
    run.round().handle_timeout(UnixMillis(60));
    assert_eq!(run.round().phase(), Phase::Failed(RoundFailure::Aggregation { summed: 0, needed: 3 }));
    assert_eq!(run.round().troubles(), ["3 of 5 devices delivered a masked vector; 4 needed"]);
    assert!(!run.round().has_revealed() && run.round().sum().is_none());
    let packed = run.masked[0].clone().unwrap();
    let who = run.scene.devices[0].who;
    let again = run.round().handle_masked(who, digest(&packed), &packed, UnixMillis(70));
    assert_eq!(again, Ok(Answer::Failed));
}

#[test]
fn a_sum_that_is_never_opened_fails_the_round_after_its_time() {
    let mut run = Run::shared(5, &ALL, 10);
    run.mask(&ALL, 20);
    let signed = run.confirm(&ALL, 30);
    run.reveal(&ALL, &signed, 40);
    let (cohort, opening) = run.round().poll_opening().unwrap();
    let (at, _) = run.round().poll_timeout().unwrap();
    assert_eq!(at, UnixMillis(40 + 10 * 60 * 1000));
    run.round().handle_timeout(at);
    assert_eq!(run.round().phase(), Phase::Failed(RoundFailure::Aggregation { summed: 0, needed: 3 }));
    assert!(run.round().has_revealed());
    run.round().handle_opened(cohort, opening.run(1), at.plus(1));
    assert!(run.round().sum().is_none(), "what comes back later is dropped");
}

#[test]
fn the_same_message_again_gets_the_same_answer_and_another_is_refused() {
    let mut run = Run::shared(5, &[0], 10);
    let (first, second) = (run.scene.advertise(1, 11), run.scene.advertise(1, 12));
    assert_eq!(first, second);
    let who: Vec<Participant> = run.scene.devices.iter().map(|party| party.who).collect();
    let other = run.scene.devices[2].keys.clone();
    let refused = run.round().handle_advertisement(who[1], digest(b"other"), other, UnixMillis(13));
    assert_eq!(refused, Err(StepError::OtherBytes.into()));
    let mut bundle = run.bundles[0].clone().unwrap();
    assert!(matches!(
        run.round().handle_shares(who[0], bundle.clone(), UnixMillis(14)),
        Ok(Answer::Pending(_))
    ));
    bundle.commitment[0] ^= 1;
    let refused = run.round().handle_shares(who[0], bundle, UnixMillis(15));
    assert_eq!(refused, Err(StepError::OtherBytes.into()));
}

#[test]
fn steps_out_of_order_are_refused() {
    let mut scene = Scene::joined(5, 100, &[]);
    let who = scene.devices[0].who;
    let empty = ShareBundle { commitment: [0; 32], shares: Vec::new() };
    let signed = Confirmation { index: 0, signature: [0; 64] };
    let now = UnixMillis(10);
    let shares = scene.round.handle_shares(who, empty, now);
    assert_eq!(shares, Err(SecureError::NotAdvertised));
    scene.advertise(0, 10).unwrap();
    let masked = scene.round.handle_masked(who, digest(&[0; 8]), &[0; 8], now);
    assert_eq!(masked, Err(StepError::Early.into()), "before the roster is frozen");
    let mut run = Run::shared(5, &[0], 10);
    let masked = run.round().handle_masked(who, digest(&[0; 8]), &[0; 8], now);
    assert_eq!(masked, Err(StepError::Early.into()));
    assert_eq!(run.round().handle_confirmation(who, signed, now), Err(StepError::Early.into()));
    let reveal = Reveal { shares: Vec::new() };
    assert_eq!(run.round().handle_reveal(who, reveal, now), Err(StepError::Early.into()));
    let vector = RingVector::zeros(terms().bits, 2);
    let plain = run.round().handle_contribution(who, digest(b"plain"), &vector, now);
    assert_eq!(plain, Ok(Contribution::TooLate), "a plain update has no place in a masked sum");
}

#[test]
fn a_plain_round_takes_no_step_of_secure_aggregation() {
    let keys = Scene::joined(1, 100, &[]).devices.remove(0).keys;
    let mut round = super::round();
    let who = round.handle_join(UnixMillis(0)).unwrap();
    let refused = round.handle_advertisement(who, digest(b"keys"), keys, UnixMillis(1));
    assert_eq!(refused, Err(SecureError::NotSecure));
    assert!(!round.is_secure() && round.poll_opening().is_none() && round.cohorts().is_empty());
}

#[test]
fn who_is_excluded_is_neither_let_in_nor_awaited() {
    let mut scene = Scene::joined(6, 100, &[5]);
    (0..4).for_each(|index| assert!(scene.advertise(index, 10).is_ok()));
    assert_eq!(scene.advertise(5, 20), Err(SecureError::Excluded));
    assert_eq!(scene.round.phase(), Phase::Collecting, "device 4 is awaited");
    scene.round.handle_withdrawal(scene.devices[4].who, UnixMillis(30));
    assert_eq!(scene.round.phase(), Phase::Aggregating);
}

#[test]
fn one_identity_has_one_place() {
    let mut scene = Scene::joined(5, 100, &[]);
    scene.advertise(0, 10).unwrap();
    let (_, again) = Device::advertise(terms(), &scene.devices[0].identity, &mut scene.rng);
    let who = scene.devices[1].who;
    let refused = scene.round.handle_advertisement(who, digest(b"again"), again, UnixMillis(11));
    assert!(matches!(refused, Err(SecureError::Admit(_))), "{refused:?}");
}

#[test]
fn cohorts_that_fail_do_not_fail_the_others() {
    let mut scene = Scene::joined(6, 3, &[]);
    for index in 0..5 {
        scene.advertise(index, 10).unwrap();
    }
    let members: Vec<u32> = scene.round.cohorts().iter().map(|cohort| cohort.members).collect();
    assert_eq!(members, [3, 2]);
    let view = |scene: &mut Scene, index| match scene.advertise(index, 11) {
        Ok(Answer::Ready(view)) => view,
        other => panic!("a roster: {other:?}"),
    };
    let three: Vec<usize> = (0..5).filter(|index| view(&mut scene, *index).members == 3).collect();
    let mut run = Run { scene, bundles: vec![None; 6], masked: vec![None; 6] };
    run.share(&three, 11);
    run.mask(&three, 12);
    let signed = run.confirm(&three, 13);
    run.reveal(&three, &signed, 14);
    run.open(15);
    assert_eq!(run.round().phase(), Phase::Aggregating, "the other cohort may still come");
    run.round().handle_timeout(UnixMillis(60));
    assert_eq!((run.round().phase(), run.round().counts().completed), (Phase::Finished, 3));
    let sum: i32 = three.iter().map(|index| i32::try_from(*index).unwrap() + 1).sum();
    assert_eq!(run.sum(), [sum, -sum]);
    assert_eq!(run.round().troubles(), ["0 of 2 devices shared their secrets; 2 needed"]);
}
