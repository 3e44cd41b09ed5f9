//! Single calls, as a broken or hostile device would make them.

use super::world::{World, made_up_delta, name, spec, wide_lora};
use crate::{TaskSpec, limits::UPLOAD_IDLE_MS_MAX};
use fleetune_privacy::clip;
use fleetune_proto::{
    Digest, FailureKind, PopulationPolicy, Purpose, UnixMillis,
    transfer::chunk_at,
    wire::{
        self, AggregationProtocol, EndReason, check_in_response::Outcome, resource::Source,
        submit_update_response::Outcome as Submitted,
    },
};
use fleetune_secagg::RingVector;

/// A world whose updates are too large to travel inline, without device machines.
fn world() -> World {
    let mut big = spec(3);
    big.trained = wide_lora(16);
    let mut world = World::with_task(0, big);
    keep(&mut world);
    world
}

fn keep(world: &mut World) {
    while let Some(commit) = world.core.poll_commit() {
        world.core.handle_committed(commit.id, world.now);
    }
}

fn check_in(world: &mut World, nonce: u8, policy_sha256: Vec<u8>) -> wire::CheckInResponse {
    let request = wire::CheckInRequest {
        population: "roles".into(),
        nonce: vec![nonce; 16],
        capabilities: Some(wire::DeviceCapabilities {
            client_version: "1.0.0".into(),
            device_class: "test".into(),
            aggregation_protocols: vec![AggregationProtocol::InsecurePlaintext.into()],
        }),
        policy_sha256,
        eligible_tasks: vec!["lora".into()],
        release_version: 0,
    };
    world.core.handle_check_in(&request, world.now).unwrap()
}

fn policy_sha256(world: &mut World) -> Vec<u8> {
    match check_in(world, 255, Vec::new()).outcome {
        Some(Outcome::Policy(wire::Resource { source: Some(Source::Inline(envelope)) })) => {
            let bytes = super::trust_root().open(Purpose::Policy, &envelope).unwrap();
            assert_eq!(PopulationPolicy::parse(&bytes).unwrap().tasks.len(), 1);
            Digest::of(&envelope).sha256.to_vec()
        }
        other => panic!("expected a policy, got {other:?}"),
    }
}

fn join(world: &mut World, nonce: u8) -> Vec<u8> {
    let policy = policy_sha256(world);
    match check_in(world, nonce, policy).outcome {
        Some(Outcome::Assignment(assignment)) => assignment.session_token,
        other => panic!("expected an assignment, got {other:?}"),
    }
}

fn update(world: &World, device: usize) -> Vec<u8> {
    let spec = TaskSpec { ..spec(3) };
    let dimension = world.core.tasks[&name("lora")].layout.len();
    let clipped = clip(made_up_delta(device, 0, dimension), spec.aggregation.clipping_norm).unwrap();
    let encoded = spec.aggregation.fixed_point().encode(&clipped).unwrap();
    RingVector::from_signed(spec.aggregation.ring_bits, encoded.values()).pack()
}

fn chunk(token: &[u8], bytes: &[u8], offset: usize, length: usize) -> wire::WriteBlobChunkRequest {
    let data = bytes[offset..bytes.len().min(offset + length)].to_vec();
    wire::WriteBlobChunkRequest {
        session_token: token.to_vec(),
        digest: Some(Digest::of(bytes).to_wire()),
        offset: offset as u64,
        crc32c: chunk_at(&data, 0).1,
        data,
    }
}

fn write(world: &mut World, request: &wire::WriteBlobChunkRequest) -> Result<u64, FailureKind> {
    world
        .core
        .handle_write_chunk(request, world.now)
        .map(|a| a.committed_bytes)
        .map_err(|failure| failure.kind)
}

fn submit(world: &mut World, token: &[u8], source: Source) -> Result<EndReason, FailureKind> {
    let update = Some(wire::Resource { source: Some(source) });
    let request = wire::SubmitUpdateRequest { session_token: token.to_vec(), update };
    match world.core.handle_submit(&request, world.now).map_err(|failure| failure.kind)?.outcome {
        Some(Submitted::Ended(ended)) => Ok(EndReason::try_from(ended.reason).unwrap()),
        other => panic!("expected an end, got {other:?}"),
    }
}

fn submit_blob(world: &mut World, token: &[u8], bytes: &[u8]) -> Result<EndReason, FailureKind> {
    submit(world, token, Source::Blob(Digest::of(bytes).to_wire()))
}

fn contribute(world: &mut World, token: &[u8], device: usize) -> Result<EndReason, FailureKind> {
    let bytes = update(world, device);
    write(world, &chunk(token, &bytes, 0, 1 << 20))?;
    submit_blob(world, token, &bytes)
}

fn completed(world: &World) -> u32 {
    world.core.task_status(&name("lora")).unwrap().counts.completed
}

#[test]
fn a_repeated_nonce_gets_its_first_answer() {
    let mut world = world();
    let policy = policy_sha256(&mut world);
    let first = check_in(&mut world, 1, policy.clone());
    world.now = world.now.plus(100);
    let again = check_in(&mut world, 1, policy.clone());
    let (Some(Outcome::Assignment(first)), Some(Outcome::Assignment(again))) = (first.outcome, again.outcome)
    else {
        panic!("expected two assignments");
    };
    assert_eq!(again.session_token, first.session_token);
    assert_eq!((first.deadline_ms, again.deadline_ms), (20_000, 19_900));
    assert_eq!(world.core.task_status(&name("lora")).unwrap().counts.selected, 1);
    assert_ne!(join(&mut world, 2), first.session_token);
}

#[test]
fn malformed_check_ins_are_refused() {
    let mut world = world();
    let mut check = |expected: FailureKind, spoil: &dyn Fn(&mut wire::CheckInRequest)| {
        let mut request =
            wire::CheckInRequest { population: "roles".into(), nonce: vec![1; 16], ..Default::default() };
        spoil(&mut request);
        assert_eq!(world.core.handle_check_in(&request, world.now).unwrap_err().kind, expected);
    };
    check(FailureKind::InvalidArgument, &|r| r.nonce = vec![1; 15]);
    check(FailureKind::NotFound, &|r| r.population = "others".into());
    check(FailureKind::InvalidArgument, &|r| r.population = "../x".into());
    check(FailureKind::InvalidArgument, &|r| r.eligible_tasks = vec!["A B".into()]);
    check(FailureKind::InvalidArgument, &|r| r.eligible_tasks = vec!["t".into(); 65]);
    let long = wire::DeviceCapabilities { device_class: "x".repeat(65), ..Default::default() };
    check(FailureKind::InvalidArgument, &|r| r.capabilities = Some(long.clone()));
}

#[test]
fn a_device_without_the_protocol_or_the_task_gets_no_place() {
    let mut world = world();
    let policy_sha256 = policy_sha256(&mut world);
    let capable = wire::DeviceCapabilities {
        aggregation_protocols: vec![AggregationProtocol::InsecurePlaintext.into()],
        ..Default::default()
    };
    for (nonce, tasks, capabilities) in [
        (1, vec!["lora".to_owned()], None),
        (2, vec![], Some(capable.clone())),
        (3, vec!["x".into()], Some(capable)),
    ] {
        let request = wire::CheckInRequest {
            population: "roles".into(),
            nonce: vec![nonce; 16],
            policy_sha256: policy_sha256.clone(),
            eligible_tasks: tasks,
            capabilities,
            release_version: 0,
        };
        let answer = world.core.handle_check_in(&request, world.now).unwrap();
        assert_eq!(answer.outcome, Some(Outcome::NoAssignment(wire::NoAssignment {})));
    }
}

#[test]
fn a_wrong_session_token_opens_nothing() {
    let mut world = world();
    let mut token = join(&mut world, 1);
    token[7] ^= 1;
    let bytes = update(&world, 0);
    assert_eq!(write(&mut world, &chunk(&token, &bytes, 0, 100)), Err(FailureKind::Unauthenticated));
    assert_eq!(submit_blob(&mut world, &token, &bytes), Err(FailureKind::Unauthenticated));
    assert_eq!(submit_blob(&mut world, &token[..31], &bytes), Err(FailureKind::Unauthenticated));
    let report = wire::ReportTaskResultRequest { session_token: token, result: 1 };
    let failure = world.core.handle_report_task(&report, world.now).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Unauthenticated);
}

#[test]
fn the_same_update_again_changes_nothing_and_other_bytes_are_refused() {
    let mut world = world();
    let token = join(&mut world, 1);
    assert_eq!(contribute(&mut world, &token, 0), Ok(EndReason::Contributed));
    assert_eq!(contribute(&mut world, &token, 0), Ok(EndReason::Contributed));
    let other = update(&world, 1);
    assert_eq!(write(&mut world, &chunk(&token, &other, 0, 100)), Err(FailureKind::AlreadyExists));
    assert_eq!(submit_blob(&mut world, &token, &other), Err(FailureKind::AlreadyExists));
    assert_eq!(submit(&mut world, &token, Source::Inline(vec![1, 2, 3])), Err(FailureKind::AlreadyExists));
    assert_eq!(completed(&world), 1);
}

#[test]
fn an_update_of_the_wrong_length_is_refused_and_the_right_one_still_counts() {
    let mut world = world();
    let token = join(&mut world, 1);
    let mut long = update(&world, 0);
    long.push(0);
    assert_eq!(write(&mut world, &chunk(&token, &long, 0, 100)), Err(FailureKind::InvalidArgument));
    assert_eq!(submit(&mut world, &token, Source::Inline(vec![0; 64])), Err(FailureKind::InvalidArgument));
    assert_eq!(
        submit(&mut world, &token, Source::Inline(vec![0; 65 << 10])),
        Err(FailureKind::InvalidArgument)
    );
    assert_eq!(contribute(&mut world, &token, 0), Ok(EndReason::Contributed));
}

#[test]
fn an_upload_resumes_where_it_stands() {
    let mut world = world();
    let token = join(&mut world, 1);
    let bytes = update(&world, 0);
    let size = bytes.len() as u64;
    assert_eq!(write(&mut world, &chunk(&token, &bytes, 0, 1000)), Ok(1000));
    assert_eq!(write(&mut world, &chunk(&token, &bytes, 500, 1000)), Ok(1500));
    assert_eq!(write(&mut world, &chunk(&token, &bytes, 2000, 1000)), Ok(1500), "a gap is not taken");
    assert_eq!(write(&mut world, &chunk(&token, &bytes, 0, 0)), Ok(1500), "empty asks");
    let mut flipped = chunk(&token, &bytes, 1500, 1000);
    flipped.data[10] ^= 1;
    assert_eq!(write(&mut world, &flipped), Err(FailureKind::DataLoss));
    assert_eq!(submit_blob(&mut world, &token, &bytes), Err(FailureKind::FailedPrecondition));
    assert_eq!(write(&mut world, &chunk(&token, &bytes, 1500, 1 << 20)), Ok(size));
    assert_eq!(submit_blob(&mut world, &token, &bytes), Ok(EndReason::Contributed));
    assert_eq!(write(&mut world, &chunk(&token, &bytes, 0, 0)), Ok(size));
}

#[test]
fn bytes_that_are_not_what_they_were_announced_as_are_refused() {
    let mut world = world();
    let token = join(&mut world, 1);
    let (bytes, lie) = (update(&world, 0), update(&world, 1));
    let mut request = chunk(&token, &lie, 0, 1 << 20);
    request.digest = Some(Digest::of(&bytes).to_wire());
    write(&mut world, &request).unwrap();
    assert_eq!(submit_blob(&mut world, &token, &bytes), Err(FailureKind::InvalidArgument));
    assert_eq!(completed(&world), 0);
    assert_eq!(contribute(&mut world, &token, 0), Ok(EndReason::Contributed));
}

#[test]
fn uploads_have_slots_and_idle_ones_are_given_away() {
    let mut world = world();
    let tokens: Vec<_> = (1..=3).map(|nonce| join(&mut world, nonce)).collect();
    let updates: Vec<_> = (0..3).map(|device| update(&world, device)).collect();
    assert_eq!(write(&mut world, &chunk(&tokens[0], &updates[0], 0, 1000)), Ok(1000));
    world.now = world.now.plus(10);
    assert_eq!(write(&mut world, &chunk(&tokens[1], &updates[1], 0, 1000)), Ok(1000));
    let third = chunk(&tokens[2], &updates[2], 0, 1 << 20);
    assert_eq!(write(&mut world, &third), Err(FailureKind::ResourceExhausted));
    submit_blob(&mut world, &tokens[1], &updates[1]).unwrap_err();
    contribute(&mut world, &tokens[1], 1).unwrap();
    assert_eq!(write(&mut world, &third), Ok(updates[2].len() as u64), "a finished upload leaves its slot");
    assert_eq!(submit_blob(&mut world, &tokens[2], &updates[2]), Ok(EndReason::Contributed));
}

#[test]
fn an_idle_upload_gives_its_slot_to_another_and_starts_over() {
    let mut slow = spec(3);
    slow.trained = wide_lora(16);
    slow.round_policy.report_ms = 10 * UPLOAD_IDLE_MS_MAX;
    let mut world = World::with_task(0, slow);
    keep(&mut world);
    let tokens: Vec<_> = (1..=3).map(|nonce| join(&mut world, nonce)).collect();
    for (device, token) in tokens[..2].iter().enumerate() {
        let bytes = update(&world, device);
        write(&mut world, &chunk(token, &bytes, 0, 1000)).unwrap();
    }
    world.now = world.now.plus(UPLOAD_IDLE_MS_MAX);
    assert_eq!(contribute(&mut world, &tokens[2], 2), Ok(EndReason::Contributed));
    let bytes = update(&world, 0);
    assert_eq!(write(&mut world, &chunk(&tokens[0], &bytes, 1000, 1000)), Ok(0), "it goes on from the start");
    assert_eq!(contribute(&mut world, &tokens[0], 0), Ok(EndReason::Contributed));
}

#[test]
fn after_the_round_devices_are_told_why_and_then_forgotten() {
    let mut world = world();
    let tokens: Vec<_> = (1..=3).map(|nonce| join(&mut world, nonce)).collect();
    let late = update(&world, 2);
    write(&mut world, &chunk(&tokens[2], &late, 0, 1000)).unwrap();
    contribute(&mut world, &tokens[0], 0).unwrap();
    contribute(&mut world, &tokens[1], 1).unwrap();
    world.now = world.now.plus(20_000);
    assert_eq!(submit_blob(&mut world, &tokens[2], &late), Ok(EndReason::TooLate));
    assert_eq!(write(&mut world, &chunk(&tokens[2], &late, 1000, 10)), Err(FailureKind::FailedPrecondition));
    assert_eq!(contribute(&mut world, &tokens[0], 0), Ok(EndReason::Contributed));
    world.now = world.now.plus(crate::limits::SESSION_KEEP_MS);
    assert_eq!(submit_blob(&mut world, &tokens[2], &late), Err(FailureKind::Unauthenticated));
}

#[test]
fn a_withdrawal_frees_the_wait_and_is_idempotent() {
    let mut world = world();
    let tokens: Vec<_> = (1..=3).map(|nonce| join(&mut world, nonce)).collect();
    contribute(&mut world, &tokens[0], 0).unwrap();
    contribute(&mut world, &tokens[1], 1).unwrap();
    let report = |result| wire::ReportTaskResultRequest { session_token: tokens[2].clone(), result };
    assert_eq!(
        world.core.handle_report_task(&report(0), world.now).unwrap_err().kind,
        FailureKind::InvalidArgument
    );
    world.core.handle_report_task(&report(1), world.now).unwrap();
    world.core.handle_report_task(&report(1), world.now).unwrap();
    let record = world.core.poll_commit().unwrap().record.unwrap();
    assert_eq!((record.selected, record.completed, record.withdrawn), (3, 2, 1));
    let bytes = update(&world, 2);
    assert_eq!(submit_blob(&mut world, &tokens[2], &bytes), Err(FailureKind::FailedPrecondition));
}

#[test]
fn releases_are_reported_only_if_they_exist() {
    let mut world = world();
    let request = wire::ReportReleaseRequest { population: "roles".into(), version: 1, state: 1 };
    let failure = world.core.handle_report_release(&request, UnixMillis(0)).unwrap_err();
    assert_eq!(failure.kind, FailureKind::NotFound);
}
