//! A device that lies, over real gRPC: each lie has its status, and the coordinator goes on serving.

use super::fleet::Site;
use fleetune_client::{CallFailure, FailureKind, GrpcOptions, GrpcTransport, Transport};
use fleetune_proto::{
    Digest,
    device::{Request, Response},
    wire::{
        AggregationProtocol, CheckInRequest, DeviceCapabilities, EndReason, Resource, SubmitUpdateRequest,
        WriteBlobChunkRequest, check_in_response::Outcome, resource::Source, submit_update_response,
    },
};
use std::fs;

/// Bytes of an update of the embedded base's adapter: 91,136 values of 32 bits.
const UPDATE_BYTES: usize = 91_136 * 4;

pub(super) fn check_in(population: &str, nonce: u8, policy_sha256: Vec<u8>) -> Request {
    let protocols = vec![AggregationProtocol::InsecurePlaintext.into()];
    Request::CheckIn(CheckInRequest {
        population: population.into(),
        nonce: vec![nonce; 16],
        capabilities: Some(DeviceCapabilities { aggregation_protocols: protocols, ..Default::default() }),
        eligible_tasks: if policy_sha256.is_empty() { Vec::new() } else { vec!["lora".into()] },
        policy_sha256,
        release_version: 0,
    })
}

fn write(token: &[u8], bytes: &[u8], crc32c: u32) -> Request {
    Request::WriteBlobChunk(WriteBlobChunkRequest {
        session_token: token.into(),
        digest: Some(Digest::of(bytes).to_wire()),
        offset: 0,
        data: bytes.into(),
        crc32c,
    })
}

fn submit(token: &[u8], source: Source) -> Request {
    let update = Some(Resource { source: Some(source) });
    Request::SubmitUpdate(SubmitUpdateRequest { session_token: token.into(), update })
}

fn refused(answer: Result<Response, CallFailure>) -> FailureKind {
    answer.expect_err("a refusal").kind
}

/// Checks in twice, as a device does: the policy, then a place in the round.
fn session(transport: &mut GrpcTransport) -> Vec<u8> {
    let Ok(Response::CheckIn(answer)) = transport.call(check_in("test", 1, Vec::new())) else {
        panic!("a policy")
    };
    let Some(Outcome::Policy(Resource { source: Some(Source::Inline(policy)) })) = answer.outcome else {
        panic!("a policy inline: {:?}", answer.outcome)
    };
    let policy_sha256 = Digest::of(&policy).sha256.to_vec();
    let Ok(Response::CheckIn(answer)) = transport.call(check_in("test", 2, policy_sha256)) else {
        panic!("a place")
    };
    let Some(Outcome::Assignment(assignment)) = answer.outcome else {
        panic!("a place: {:?}", answer.outcome)
    };
    assignment.session_token
}

#[test]
fn every_lie_has_its_status_and_the_coordinator_goes_on() {
    let site = Site::insecure(1, "report_goal = 2\nselected_max = 2\nreports_min = 2", 1, 1);
    let _coordinator = site.coordinator();
    let address = fs::read_to_string(site.path("address")).expect("an address");
    let coordinator = format!("http://{}", address.trim());
    let options = GrpcOptions { coordinator, ..GrpcOptions::default() };
    let mut transport = GrpcTransport::new(&options).expect("a transport");
    let (update, other, crc) = (vec![0; UPDATE_BYTES], vec![1; UPDATE_BYTES], crc32c::crc32c);
    let blob = |bytes: &[u8]| Source::Blob(Digest::of(bytes).to_wire());

    assert_eq!(refused(transport.call(check_in("nobody", 9, Vec::new()))), FailureKind::NotFound);
    assert_eq!(refused(transport.call(write(&[7; 32], &update, crc(&update)))), FailureKind::Unauthenticated);
    assert_eq!(refused(transport.call(submit(&[7; 32], blob(&update)))), FailureKind::Unauthenticated);
    assert_eq!(refused(transport.call(submit(&[7; 5], blob(&update)))), FailureKind::Unauthenticated);

    let token = session(&mut transport);
    assert_eq!(
        refused(transport.call(write(&token, &update[4..], crc(&update[4..])))),
        FailureKind::InvalidArgument
    );
    assert_eq!(
        refused(transport.call(submit(&token, Source::Inline(vec![0; 8])))),
        FailureKind::InvalidArgument
    );
    assert_eq!(refused(transport.call(write(&token, &update, !crc(&update)))), FailureKind::DataLoss);

    transport.call(write(&token, &update, crc(&update))).expect("a sound upload");
    for _ in 0..2 {
        let Ok(Response::SubmitUpdate(answer)) = transport.call(submit(&token, blob(&update))) else {
            panic!("a contribution, and the same again")
        };
        let Some(submit_update_response::Outcome::Ended(ended)) = answer.outcome else { panic!("ended") };
        assert_eq!(ended.reason(), EndReason::Contributed);
    }
    assert_eq!(refused(transport.call(submit(&token, blob(&other)))), FailureKind::AlreadyExists);
    transport.call(check_in("test", 3, Vec::new())).expect("the coordinator serves");
}
