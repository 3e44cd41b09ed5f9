//! The device machine against a coordinator that errs or lies.

use super::*;
use crate::{
    TaskOffer,
    plan::tests::plan,
    sign::{Purpose, seal},
    transfer::chunk_at,
};
use ed25519_dalek::SigningKey;
use wire::check_in_response::Outcome;

const NOW: UnixMillis = UnixMillis(1000);
const WINDOW: wire::RetryWindow = wire::RetryWindow { delay_min_ms: 5000, delay_max_ms: 5000 };

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn name(text: &str) -> Name {
    Name::parse("name", text).unwrap()
}

fn setup() -> DeviceSetup {
    DeviceSetup {
        population: name("roles"),
        trust_root: TrustRoot::new(&[key(1).verifying_key().to_bytes()], 1).unwrap(),
        device_class: "test".into(),
        floors: DeviceFloors {
            protocols: vec![wire::AggregationProtocol::InsecurePlaintext],
            ..DeviceFloors::default()
        },
        release_version: 0,
        release_version_max: 0,
        identity: None,
        registrars: Registrars::Keys(Vec::new()),
        noise: NoiseOrigin::operating_system(),
    }
}

fn device() -> Device {
    Device::new(setup(), [9; 32], NOW)
}

fn inlined(bytes: Vec<u8>) -> wire::Resource {
    wire::Resource { source: Some(wire::resource::Source::Inline(bytes)) }
}

fn policy(population: &str, tasks: &[&str]) -> PopulationPolicy {
    let offer = |task: &&str| TaskOffer {
        task: name(task),
        examples_min: 1,
        protocol: wire::AggregationProtocol::InsecurePlaintext,
    };
    PopulationPolicy { population: name(population), tasks: tasks.iter().map(offer).collect() }
}

fn sealed_policy(policy: &PopulationPolicy, key: &SigningKey) -> Outcome {
    Outcome::Policy(inlined(seal(Purpose::Policy, policy.to_bytes(), &[key])))
}

fn assignment(plan: &TaskPlan, key: &SigningKey) -> wire::TaskAssignment {
    wire::TaskAssignment {
        task: plan.task.as_str().into(),
        session_token: vec![7; 32],
        plan: Some(inlined(seal(Purpose::Plan, plan.to_bytes(), &[key]))),
        round: 2,
        attempt: 0,
        checkpoint: Some(Digest::of(b"checkpoint").to_wire()),
        deadline_ms: 60_000,
        aggregation_nonce: vec![5; 32],
        clipping_norm: 0.0,
    }
}

fn manifest(version: u64) -> ReleaseManifest {
    ReleaseManifest {
        population: name("roles"),
        version,
        task: name("lora"),
        base_model: Digest::of(b"base"),
        adapter: Some(Digest::of(b"adapter")),
        rounds: 3,
        created: UnixMillis(1),
        expires: UnixMillis(1_000_000),
        privacy_statement: "none".into(),
        privacy_statement_json: String::new(),
    }
}

fn answer(outcome: Outcome) -> wire::CheckInResponse {
    wire::CheckInResponse { outcome: Some(outcome), retry_window: Some(WINDOW), release_manifest: None }
}

fn no_work(release: Option<Vec<u8>>) -> wire::CheckInResponse {
    let outcome = Outcome::NoAssignment(wire::NoAssignment {});
    wire::CheckInResponse { release_manifest: release.map(inlined), ..answer(outcome) }
}

/// Expects a check-in and answers it.
fn check_in(device: &mut Device, answer: wire::CheckInResponse, now: UnixMillis) -> wire::CheckInRequest {
    let action = device.poll_action(now);
    let Some(Action::Call(Request::CheckIn(request))) = action else { panic!("no check-in but {action:?}") };
    device.handle_response(Response::CheckIn(answer), now);
    request
}

/// Reads a policy and names its task.
fn named(device: &mut Device) {
    check_in(device, answer(sealed_policy(&policy("roles", &["lora"]), &key(1))), NOW);
    assert!(matches!(device.poll_action(NOW), Some(Action::Choose(_))));
    device.handle_choice(vec![name("lora")], NOW);
}

/// A device that was assigned that plan.
fn assigned(plan: &TaskPlan, spoil: impl FnOnce(&mut wire::TaskAssignment)) -> Device {
    let mut device = device();
    named(&mut device);
    let mut assignment = assignment(plan, &key(1));
    spoil(&mut assignment);
    let request = check_in(&mut device, answer(Outcome::Assignment(assignment)), NOW);
    assert_eq!(request.eligible_tasks, ["lora"]);
    device
}

/// A device that has to train.
fn training(plan: &TaskPlan) -> Device {
    let mut device = assigned(plan, |_| ());
    for expected in [b"base".as_slice(), b"checkpoint"] {
        assert_eq!(device.poll_action(NOW), Some(Action::Fetch(Digest::of(expected))));
        device.handle_fetched(NOW);
    }
    assert!(matches!(device.poll_action(NOW), Some(Action::Train(_))));
    device
}

fn refused(device: &mut Device) -> String {
    let reason = |event| match event {
        Event::Refused(reason) => Some(reason),
        Event::NoWork
        | Event::Selected { .. }
        | Event::Contributed { .. }
        | Event::Ended(_)
        | Event::Retrying(_)
        | Event::ReleaseActive(_)
        | Event::ReleaseRejected { .. } => None,
    };
    device.poll_events().into_iter().find_map(reason).expect("a refusal")
}

fn reported(device: &mut Device) -> TaskResult {
    let action = device.poll_action(NOW);
    let Some(Action::Call(Request::ReportTaskResult(request))) = action else {
        panic!("no report but {action:?}")
    };
    assert_eq!(request.session_token, [7; 32]);
    TaskResult::try_from(request.result).unwrap()
}

fn ended(ended: wire::EndReason) -> Response {
    let outcome = wire::submit_update_response::Outcome::Ended(wire::Ended { reason: ended.into() });
    Response::SubmitUpdate(wire::SubmitUpdateResponse { outcome: Some(outcome) })
}

#[test]
fn contributes_and_comes_back_inside_the_window() {
    let mut device = training(&plan());
    device.handle_trained(vec![0.5; 4], NOW);
    assert!(matches!(device.poll_action(NOW), Some(Action::Call(Request::SubmitUpdate(_)))));
    device.handle_response(ended(wire::EndReason::Contributed), NOW);
    assert!(device.poll_events().contains(&Event::Contributed { task: name("lora"), round: 2 }));
    assert_eq!((device.is_idle(), device.poll_timeout()), (true, Some(NOW.plus(5000))));
    assert_eq!(device.poll_action(NOW.plus(4999)), None);
    let again = device.poll_action(NOW.plus(5000));
    assert!(matches!(again, Some(Action::Choose(_))), "consent is asked each time: {again:?}");
}

#[test]
fn a_policy_that_nobody_trusted_signed_is_not_read() {
    let mut device = device();
    check_in(&mut device, answer(sealed_policy(&policy("roles", &["lora"]), &key(2))), NOW);
    assert!(refused(&mut device).contains("0 valid signatures"));
    assert_eq!(device.poll_timeout(), Some(NOW.plus(5000)));
    let request = check_in(&mut device, no_work(None), NOW.plus(5000));
    assert!(request.policy_sha256.is_empty() && request.eligible_tasks.is_empty());
}

#[test]
fn a_policy_for_another_population_is_refused() {
    let mut device = device();
    check_in(&mut device, answer(sealed_policy(&policy("others", &["lora"]), &key(1))), NOW);
    assert_eq!(refused(&mut device), "check_in.policy: for population others");
    assert!(device.is_idle());
}

#[test]
fn policies_without_end_let_the_device_rest() {
    let mut device = device();
    let mut check_ins = 0;
    while device.poll_timeout() == Some(NOW) {
        let task = ["lora", "other"][check_ins % 2];
        check_in(&mut device, answer(sealed_policy(&policy("roles", &[task]), &key(1))), NOW);
        check_ins += 1;
        assert!(check_ins < 20, "it never rests");
        if device.poll_action(NOW).is_some() {
            device.handle_choice(vec![name(task)], NOW);
        }
    }
    assert_eq!(check_ins, POLICIES_IN_A_ROW_MAX as usize + 1);
    assert_eq!(refused(&mut device), "check_in.policy: more than 4 policies in a row");
    assert_eq!(device.poll_timeout(), Some(NOW.plus(5000)));
}

#[test]
fn the_policy_that_the_device_holds_is_refused() {
    let mut device = device();
    named(&mut device);
    check_in(&mut device, answer(sealed_policy(&policy("roles", &["lora"]), &key(1))), NOW);
    assert!(refused(&mut device).contains("the policy that this device named"));
    assert!(device.is_idle());
}

#[test]
fn bad_assignments_are_refused_and_reported() {
    let check = |plan: &TaskPlan, spoil: &dyn Fn(&mut wire::TaskAssignment), expected: &str| {
        let mut device = assigned(plan, spoil);
        let reason = refused(&mut device);
        assert!(reason.contains(expected), "{reason}");
        assert_eq!(reported(&mut device), TaskResult::PlanRejected);
        device.handle_response(Response::ReportTaskResult, NOW);
        assert_eq!(device.poll_timeout(), Some(NOW.plus(5000)));
    };
    let with = |change: &dyn Fn(&mut TaskPlan)| {
        let mut plan = plan();
        change(&mut plan);
        plan
    };
    check(&with(&|p| p.population = name("others")), &|_| (), "it is for population others");
    check(&with(&|p| p.expires = NOW), &|_| (), "expired");
    check(&with(&|p| p.task = name("secret")), &|_| (), "has not named task secret");
    check(&plan(), &|a| a.task = "other".into(), "it is for task lora, not \"other\"");
    check(&with(&|p| p.training.steps = 1001), &|_| (), "1001 optimizer steps");
    check(&with(&|p| p.aggregation.summands_min = 1), &|_| (), "sums of 1 contributions");
    let forged = assignment(&plan(), &key(2)).plan;
    check(&plan(), &|a| a.plan.clone_from(&forged), "0 valid signatures");
    let as_policy = inlined(seal(Purpose::Policy, plan().to_bytes(), &[&key(1)]));
    check(&plan(), &|a| a.plan = Some(as_policy.clone()), "0 valid signatures");
    check(&plan(), &|a| a.plan = None, "missing");
    check(&plan(), &|a| a.checkpoint = None, "assignment.checkpoint: missing");
    let huge = Digest { size: 1 << 40, ..Digest::of(b"") }.to_wire();
    check(&plan(), &|a| a.checkpoint = Some(huge.clone()), "checkpoint of 1099511627776 bytes");
}

#[test]
fn a_device_that_named_nothing_takes_no_task() {
    let mut device = device();
    named(&mut device);
    check_in(&mut device, no_work(None), NOW);
    assert!(matches!(device.poll_action(NOW.plus(5000)), Some(Action::Choose(_))));
    device.handle_choice(vec![name("unheard")], NOW.plus(5000));
    let offer = answer(Outcome::Assignment(assignment(&plan(), &key(1))));
    let request = check_in(&mut device, offer, NOW.plus(5000));
    assert!(request.eligible_tasks.is_empty(), "only offered tasks are named");
    assert!(refused(&mut device).contains("has not named task lora"));
}

#[test]
fn updates_that_are_no_numbers_or_too_long_are_reported_as_failed() {
    for (delta, expected) in [(vec![0.0, f32::NAN, 0.0, 0.0], "is NaN"), (vec![0.0; 5], "update of 5 values")]
    {
        let mut device = training(&plan());
        device.handle_trained(delta, NOW);
        assert_eq!(reported(&mut device), TaskResult::TrainingFailed);
        let events = device.poll_events();
        let said = |e: &Event| matches!(e, Event::Ended(reason) if reason.contains(expected));
        assert!(events.iter().any(said), "{events:?}");
    }
}

#[test]
fn answers_to_the_wrong_call_end_the_session() {
    let mut resting = device();
    assert!(resting.poll_action(NOW).is_some());
    resting.handle_response(Response::ReportTaskResult, NOW);
    assert!(resting.is_idle() && resting.poll_timeout() >= Some(NOW.plus(BACKOFF_MS_MAX)));
    let mut busy = training(&plan());
    busy.handle_trained(vec![0.5; 4], NOW);
    assert!(busy.poll_action(NOW).is_some());
    busy.handle_response(Response::WriteBlobChunk(wire::WriteBlobChunkResponse::default()), NOW);
    assert!(busy.is_idle());
    assert!(busy.poll_events().contains(&Event::Ended("the answer is for another step".into())));
}

#[test]
fn answers_nobody_asked_for_change_nothing() {
    let mut device = device();
    device.handle_choice(vec![name("lora")], NOW);
    device.handle_trained(vec![0.0; 4], NOW);
    device.handle_fetched(NOW);
    device.handle_installed(NOW);
    device.handle_install_failed("no", NOW);
    let failure = TrainingFailure::Interrupted("no".into());
    device.handle_training_failed(&failure, NOW);
    assert!(device.is_idle() && device.poll_events().is_empty());
    check_in(&mut device, no_work(None), NOW);
}

#[test]
fn repeats_the_same_bytes_and_gives_up_at_the_limit() {
    let mut device = device();
    let (mut now, mut requests) = (NOW, Vec::new());
    while let Some(Action::Call(Request::CheckIn(request))) = device.poll_action(now) {
        requests.push(request);
        device.handle_call_failed(&CallFailure::new(FailureKind::Unavailable, "gone"), now);
        assert_eq!(device.poll_action(now), None, "never at once");
        let next = device.poll_timeout().unwrap();
        now = if device.is_idle() { now } else { next };
    }
    assert_eq!(requests.len(), CALL_ATTEMPTS_MAX as usize);
    assert!(requests.windows(2).all(|pair| pair[0] == pair[1]), "the nonce is the same");
    assert!(device.poll_timeout() >= Some(now.plus(BACKOFF_MS_MAX)));
}

#[test]
fn an_unknown_session_is_forgotten() {
    let mut device = training(&plan());
    device.handle_trained(vec![0.5; 4], NOW);
    assert!(device.poll_action(NOW).is_some());
    device.handle_call_failed(&CallFailure::new(FailureKind::Unauthenticated, "who"), NOW);
    assert!(device.is_idle());
    assert_eq!(device.poll_timeout(), Some(NOW.plus(5000)), "the window still counts");
}

#[test]
fn uploads_follow_the_committed_bytes_and_end_with_the_deadline() {
    let mut large = plan();
    large.adapter.dimension = INLINE_BYTES_MAX;
    let mut device = training(&large);
    device.handle_trained(vec![0.001; INLINE_BYTES_MAX], NOW);
    let action = device.poll_action(NOW);
    let Some(Action::Call(Request::WriteBlobChunk(first))) = action else {
        panic!("no upload but {action:?}")
    };
    assert_eq!((first.offset, first.crc32c), (0, chunk_at(&first.data, 0).1));
    let committed = |bytes| Response::WriteBlobChunk(wire::WriteBlobChunkResponse { committed_bytes: bytes });
    device.handle_response(committed(1000), NOW);
    let action = device.poll_action(NOW);
    let Some(Action::Call(Request::WriteBlobChunk(second))) = action else {
        panic!("no upload but {action:?}")
    };
    assert_eq!((second.offset, &second.data[..]), (1000, &first.data[1000..]));
    let mut calls = 0;
    device.handle_response(committed(0), NOW);
    while !device.is_idle() {
        let now = device.poll_timeout().unwrap();
        if device.poll_action(now).is_some() {
            device.handle_response(committed(0), now);
        }
        calls += 1;
        assert!(calls <= 60_000 / BACKOFF_MS_MIN + 1, "an upload without progress must end");
    }
    assert!(device.poll_events().contains(&Event::Ended("the round's deadline is over".into())));
}

#[test]
fn an_answer_without_a_window_does_not_make_the_device_spin() {
    let mut device = device();
    let answer = wire::CheckInResponse { retry_window: None, ..no_work(None) };
    check_in(&mut device, answer, NOW);
    assert_eq!(device.poll_timeout(), Some(NOW.plus(RETRY_DELAY_MS_MIN)));
}

#[test]
fn installs_a_newer_release_and_never_an_older_one() {
    let mut device =
        Device::new(DeviceSetup { release_version: 4, release_version_max: 5, ..setup() }, [9; 32], NOW);
    let seal_release = |m: &ReleaseManifest, k: u8| Some(seal(Purpose::Release, m.to_bytes(), &[&key(k)]));
    let mut now = NOW;
    for (version, signer) in [(3, 1), (5, 1), (6, 2)] {
        let request = check_in(&mut device, no_work(seal_release(&manifest(version), signer)), now);
        assert_eq!(request.release_version, 4);
        now = device.poll_timeout().unwrap();
        assert_eq!(now.since(NOW) % 5000, 0, "version {version} changes nothing");
    }
    let mut stale = manifest(6);
    stale.expires = now;
    check_in(&mut device, no_work(seal_release(&stale, 1)), now);
    assert_eq!(device.poll_events().iter().filter(|e| matches!(e, Event::Refused(_))).count(), 2);
    now = device.poll_timeout().unwrap();
    check_in(&mut device, no_work(seal_release(&manifest(6), 1)), now);
    for expected in [b"base".as_slice(), b"adapter"] {
        assert_eq!(device.poll_action(now), Some(Action::Fetch(Digest::of(expected))));
        device.handle_fetched(now);
    }
    assert!(matches!(device.poll_action(now), Some(Action::Install(order)) if order.manifest.version == 6));
    device.handle_installed(now);
    let report = device.poll_action(now);
    let active = i32::from(wire::ReleaseState::Active);
    assert!(
        matches!(&report, Some(Action::Call(Request::ReportRelease(r))) if r.version == 6 && r.state == active),
        "{report:?}"
    );
    device.handle_response(Response::ReportRelease, now);
    now = device.poll_timeout().unwrap();
    assert_eq!(check_in(&mut device, no_work(None), now).release_version, 6);
}

#[test]
fn a_release_without_an_adapter_is_one_file() {
    let mut device = device();
    let whole = ReleaseManifest { adapter: None, ..manifest(2) };
    check_in(&mut device, no_work(Some(seal(Purpose::Release, whole.to_bytes(), &[&key(1)]))), NOW);
    let fetched = device.poll_action(NOW);
    assert!(matches!(fetched, Some(Action::Fetch(digest)) if digest == whole.base_model), "{fetched:?}");
    device.handle_fetched(NOW);
    let install = device.poll_action(NOW);
    assert!(matches!(&install, Some(Action::Install(order)) if order.manifest == whole), "{install:?}");
}

#[test]
fn a_release_that_does_not_open_is_reported_and_not_tried_again() {
    let mut device = device();
    let offer = seal(Purpose::Release, manifest(2).to_bytes(), &[&key(1)]);
    check_in(&mut device, no_work(Some(offer.clone())), NOW);
    for _ in 0..2 {
        assert!(matches!(device.poll_action(NOW), Some(Action::Fetch(_))));
        device.handle_fetched(NOW);
    }
    assert!(matches!(device.poll_action(NOW), Some(Action::Install(_))));
    device.handle_install_failed("does not open", NOW);
    let rejected = i32::from(wire::ReleaseState::Rejected);
    let report = device.poll_action(NOW);
    assert!(
        matches!(&report, Some(Action::Call(Request::ReportRelease(r))) if r.state == rejected),
        "{report:?}"
    );
    device.handle_response(Response::ReportRelease, NOW);
    let now = device.poll_timeout().unwrap();
    assert_eq!(check_in(&mut device, no_work(Some(offer)), now).release_version, 0);
    assert!(device.is_idle() && device.poll_timeout() > Some(now));
}
