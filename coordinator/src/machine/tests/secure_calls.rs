//! Single calls of secure aggregation, as a broken or hostile device would make them: a message is stopped on
//! its way, lies are told in its place, and then it arrives after all.

use super::secure::check_adapter;
use super::world::{Fault, Step, World, secure_spec, spec};
use crate::{RoundOutcome, TaskSpec};
use fleetune_proto::{
    FailureKind,
    device::{Event, Request, Response},
    wire::{self, EndReason, resource::Source, revealed_share::Secret},
};

/// A round of secure aggregation in which device 0's message of a step is held.
fn held_at(devices: u32, step: Step) -> World {
    let mut world =
        World::with_task(u8::try_from(devices).unwrap(), TaskSpec { rounds: 1, ..secure_spec(devices) });
    world.actors[0].faults.insert(step, Fault::Hold);
    world.run_until(|world| world.actors[0].held.is_some());
    world
}

fn held(world: &World) -> Request {
    world.actors[0].held.clone().expect("held")
}

fn refused(world: &mut World, request: Request) -> FailureKind {
    world.call(request).expect_err("a refusal").kind
}

/// How a call was answered that ended the session.
fn ended(response: Response) -> EndReason {
    let outcome = match response {
        Response::AdvertiseKeys(answer) => match answer.outcome {
            Some(wire::advertise_keys_response::Outcome::Ended(ended)) => Some(ended),
            _ => None,
        },
        Response::ShareKeys(answer) => match answer.outcome {
            Some(wire::share_keys_response::Outcome::Ended(ended)) => Some(ended),
            _ => None,
        },
        Response::SubmitMaskedUpdate(answer) => match answer.outcome {
            Some(wire::submit_masked_update_response::Outcome::Ended(ended)) => Some(ended),
            _ => None,
        },
        Response::ConfirmSurvivors(answer) => match answer.outcome {
            Some(wire::confirm_survivors_response::Outcome::Ended(ended)) => Some(ended),
            _ => None,
        },
        Response::RevealShares(answer) => answer.ended,
        Response::CheckIn(_)
        | Response::ReportTaskResult
        | Response::WriteBlobChunk(_)
        | Response::SubmitUpdate(_)
        | Response::ReportRelease => panic!("no answer of secure aggregation"),
    };
    outcome.expect("an end").reason()
}

/// The token of device 0's session.
fn token(request: &mut Request) -> &mut Vec<u8> {
    match request {
        Request::AdvertiseKeys(r) => &mut r.session_token,
        Request::ShareKeys(r) => &mut r.session_token,
        Request::WriteBlobChunk(r) => &mut r.session_token,
        Request::SubmitMaskedUpdate(r) => &mut r.session_token,
        Request::ConfirmSurvivors(r) => &mut r.session_token,
        Request::RevealShares(r) => &mut r.session_token,
        Request::SubmitUpdate(r) => &mut r.session_token,
        Request::ReportTaskResult(r) => &mut r.session_token,
        Request::CheckIn(_) | Request::ReportRelease(_) => panic!("no call of a session"),
    }
}

fn inline(bytes: Vec<u8>) -> wire::Resource {
    wire::Resource { source: Some(Source::Inline(bytes)) }
}

/// Well-formed messages of steps 1 to 4 that say nothing of use.
fn later_steps(session_token: &[u8]) -> [Request; 4] {
    let session_token = session_token.to_vec();
    [
        Request::ShareKeys(wire::ShareKeysRequest {
            session_token: session_token.clone(),
            commitment: vec![0; 32],
            shares: Vec::new(),
        }),
        Request::SubmitMaskedUpdate(wire::SubmitMaskedUpdateRequest {
            session_token: session_token.clone(),
            masked_update: Some(inline(vec![0; 448 * 4])),
        }),
        Request::ConfirmSurvivors(wire::ConfirmSurvivorsRequest {
            session_token: session_token.clone(),
            index: 0,
            signature: vec![0; 64],
        }),
        Request::RevealShares(wire::RevealSharesRequest { session_token, shares: Vec::new() }),
    ]
}

/// The round ends as if nothing had happened.
fn finish(mut world: World) {
    world.deliver_held(0);
    world.run_to_end();
    let record = world.records().remove(0);
    assert_eq!((record.outcome, record.completed), (RoundOutcome::Finished, 5));
    check_adapter(&world, &[(0..5).collect()]);
}

#[test]
fn a_step_before_its_turn_is_refused_and_does_no_harm() {
    let mut world = held_at(5, Step::Keys);
    let own = token(&mut held(&world)).clone();
    for request in later_steps(&own) {
        assert_eq!(refused(&mut world, request), FailureKind::FailedPrecondition, "before the keys");
    }
    let advertised = world.call(held(&world)).unwrap();
    assert!(matches!(advertised, Response::AdvertiseKeys(_)));
    for request in later_steps(&own).into_iter().skip(1) {
        assert_eq!(refused(&mut world, request), FailureKind::FailedPrecondition, "before the shares");
    }
    finish(world);
    for (step, early) in [(Step::Shares, 1), (Step::Masked, 2), (Step::Confirm, 3)] {
        let mut world = held_at(5, step);
        let own = token(&mut held(&world)).clone();
        for request in later_steps(&own).into_iter().skip(early) {
            assert_eq!(refused(&mut world, request), FailureKind::FailedPrecondition, "{step:?}");
        }
        finish(world);
    }
}

/// Changes one bit of what a message says.
fn flip(request: &mut Request) {
    match request {
        Request::AdvertiseKeys(r) => r.keys.as_mut().unwrap().share_key[3] ^= 1,
        Request::ShareKeys(r) => r.shares[1].ciphertext[9] ^= 1,
        Request::SubmitMaskedUpdate(r) => {
            let Some(Source::Inline(bytes)) = &mut r.masked_update.as_mut().unwrap().source else {
                panic!("inline")
            };
            bytes[100] ^= 1;
        }
        Request::ConfirmSurvivors(r) => r.signature[5] ^= 1,
        Request::RevealShares(r) => secret(&mut r.shares[0])[0] ^= 1,
        Request::WriteBlobChunk(_)
        | Request::SubmitUpdate(_)
        | Request::ReportTaskResult(_)
        | Request::CheckIn(_)
        | Request::ReportRelease(_) => panic!("no step of secure aggregation"),
    }
}

fn secret(share: &mut wire::RevealedShare) -> &mut Vec<u8> {
    match share.secret.as_mut().unwrap() {
        Secret::SelfMask(bytes) | Secret::MaskKey(bytes) => bytes,
    }
}

#[test]
fn every_message_counts_once_and_other_bytes_are_refused() {
    for step in Step::ALL {
        let mut world = held_at(5, step);
        let first = world.call(held(&world)).unwrap();
        let again = world.call(held(&world)).unwrap();
        assert_eq!(first, again, "{step:?}");
        let mut other = held(&world);
        flip(&mut other);
        assert_eq!(refused(&mut world, other), FailureKind::AlreadyExists, "{step:?}");
        finish(world);
    }
}

#[test]
fn an_unknown_token_opens_nothing() {
    for step in Step::ALL {
        let mut world = held_at(5, step);
        for spoil in [(|t: &mut Vec<u8>| t[31] ^= 1) as fn(&mut Vec<u8>), |t| t.truncate(31), Vec::clear] {
            let mut request = held(&world);
            spoil(token(&mut request));
            assert_eq!(refused(&mut world, request), FailureKind::Unauthenticated, "{step:?}");
        }
        finish(world);
    }
}

type Spoil = fn(&mut Request);

/// Each of the spoilt messages is refused; then the right one still counts.
fn check_malformed(step: Step, spoils: &[Spoil]) {
    let mut world = held_at(5, step);
    for (number, spoil) in spoils.iter().enumerate() {
        let mut request = held(&world);
        spoil(&mut request);
        assert_eq!(refused(&mut world, request), FailureKind::InvalidArgument, "{step:?} {number}");
    }
    finish(world);
}

#[test]
fn malformed_keys_are_refused() {
    fn keys(request: &mut Request) -> &mut wire::KeyAdvertisement {
        let Request::AdvertiseKeys(request) = request else { panic!("keys") };
        request.keys.as_mut().unwrap()
    }
    let spoils: [Spoil; 9] = [
        |r| keys(r).certificate.truncate(103),
        |r| keys(r).certificate[70] ^= 1,
        |r| keys(r).share_key.push(0),
        |r| keys(r).share_key = vec![0; 32],
        |r| keys(r).mask_key[0] ^= 1,
        |r| keys(r).nonce.clear(),
        |r| keys(r).signature[0] ^= 1,
        |r| keys(r).signature.truncate(63),
        |r| {
            let Request::AdvertiseKeys(request) = r else { panic!("keys") };
            request.keys = None;
        },
    ];
    check_malformed(Step::Keys, &spoils);
}

#[test]
fn malformed_shares_are_refused() {
    fn shares(request: &mut Request) -> &mut wire::ShareKeysRequest {
        let Request::ShareKeys(request) = request else { panic!("shares") };
        request
    }
    let spoils: [Spoil; 6] = [
        |r| shares(r).commitment.truncate(31),
        |r| shares(r).shares[0].ciphertext.truncate(79),
        |r| shares(r).shares.truncate(3),
        |r| shares(r).shares.swap(0, 1),
        |r| shares(r).shares[3].peer = 77,
        |r| shares(r).shares = vec![wire::SealedShare { peer: 1, ciphertext: vec![0; 80] }; 256],
    ];
    check_malformed(Step::Shares, &spoils);
}

#[test]
fn malformed_masked_updates_are_refused() {
    fn masked(request: &mut Request) -> &mut Option<wire::Resource> {
        let Request::SubmitMaskedUpdate(request) = request else { panic!("a masked update") };
        &mut request.masked_update
    }
    let spoils: [Spoil; 5] = [
        |r| *masked(r) = Some(inline(vec![0; 448 * 4 - 1])),
        |r| *masked(r) = Some(inline(vec![0; 448 * 4 + 4])),
        |r| *masked(r) = Some(inline(Vec::new())),
        |r| *masked(r) = Some(inline(vec![0; 65 << 10])),
        |r| *masked(r) = None,
    ];
    check_malformed(Step::Masked, &spoils);
}

#[test]
fn malformed_confirmations_are_refused() {
    fn confirmation(request: &mut Request) -> &mut wire::ConfirmSurvivorsRequest {
        let Request::ConfirmSurvivors(request) = request else { panic!("a confirmation") };
        request
    }
    let spoils: [Spoil; 4] = [
        |r| confirmation(r).signature.truncate(63),
        |r| confirmation(r).signature[0] ^= 1,
        |r| confirmation(r).index = (confirmation(r).index + 1) % 5,
        |r| confirmation(r).index = u32::MAX,
    ];
    check_malformed(Step::Confirm, &spoils);
}

#[test]
fn malformed_reveals_are_refused() {
    fn revealed(request: &mut Request) -> &mut Vec<wire::RevealedShare> {
        let Request::RevealShares(request) = request else { panic!("revealed shares") };
        &mut request.shares
    }
    let spoils: [Spoil; 6] = [
        |r| secret(&mut revealed(r)[0]).truncate(31),
        |r| revealed(r)[0].secret = None,
        |r| revealed(r)[0].peer = 9,
        |r| revealed(r).swap(0, 1),
        |r| {
            let first = revealed(r)[0].clone();
            revealed(r).insert(0, first);
        },
        |r| revealed(r)[0].secret = Some(Secret::MaskKey(vec![0; 32])),
    ];
    check_malformed(Step::Reveal, &spoils);
}

#[test]
fn an_upload_that_is_not_there_is_no_masked_update() {
    let mut world = held_at(5, Step::Masked);
    let mut request = held(&world);
    if let Request::SubmitMaskedUpdate(request) = &mut request {
        let digest = fleetune_proto::Digest::of(&[0; 448 * 4]);
        request.masked_update = Some(wire::Resource { source: Some(Source::Blob(digest.to_wire())) });
    }
    assert_eq!(refused(&mut world, request), FailureKind::FailedPrecondition);
    finish(world);
}

#[test]
fn who_comes_after_its_step_is_closed_is_turned_away() {
    for step in Step::ALL {
        let mut world = held_at(8, step);
        let waited = if step == Step::Keys { 20_000 } else { 5_000 };
        let late = world.now.plus(waited);
        world.run_until(|world| world.now >= late);
        let answer = world.call(held(&world)).unwrap();
        assert_eq!(ended(answer), EndReason::TooLate, "{step:?}");
        world.deliver_held(0);
        world.run_to_end();
        let record = world.records().remove(0);
        let completed = if step >= Step::Confirm { 8 } else { 7 };
        assert_eq!((record.outcome, record.completed), (RoundOutcome::Finished, completed), "{step:?}");
        check_adapter(&world, &[(8 - completed as usize..8).collect()]);
        let told = |event: &Event| matches!(event, Event::Ended(reason) if reason.contains("too late"));
        world.run_until(|world| world.actors[0].events.iter().any(told));
    }
}

#[test]
fn who_withdraws_in_the_middle_is_not_awaited_and_does_not_come_back() {
    for step in Step::ALL {
        let mut world = held_at(8, step);
        let mut request = held(&world);
        let report = wire::ReportTaskResultRequest {
            session_token: token(&mut request).clone(),
            result: wire::TaskResult::AggregationRefused.into(),
        };
        for _ in 0..2 {
            world.call(Request::ReportTaskResult(report.clone())).unwrap();
        }
        assert_eq!(refused(&mut world, request), FailureKind::FailedPrecondition, "{step:?}");
        world.run_to_end();
        let record = world.records().remove(0);
        let completed = if step >= Step::Confirm { 8 } else { 7 };
        assert_eq!((&record.outcome, record.completed), (&RoundOutcome::Finished, completed), "{step:?}");
        assert_eq!((record.selected, record.withdrawn), (8, 1), "{step:?}");
        assert!(record.finished_unix_ms - record.opened_unix_ms < 5_000, "{step:?}: nobody waited");
        check_adapter(&world, &[(8 - completed as usize..8).collect()]);
    }
}

#[test]
fn a_plain_update_has_no_place_in_a_masked_sum() {
    let mut world = held_at(5, Step::Masked);
    let submit = wire::SubmitUpdateRequest {
        session_token: token(&mut held(&world)).clone(),
        update: Some(inline(vec![0; 448 * 4])),
    };
    let Response::SubmitUpdate(answer) = world.call(Request::SubmitUpdate(submit)).unwrap() else {
        panic!("an answer to a submission")
    };
    let Some(wire::submit_update_response::Outcome::Ended(ended)) = answer.outcome else { panic!("ended") };
    assert_eq!(ended.reason(), EndReason::TooLate);
    finish(world);
}

#[test]
fn a_plain_round_takes_no_step_of_secure_aggregation() {
    let mut keys = held(&held_at(5, Step::Keys));
    let mut world = World::with_task(2, spec(2));
    world.actors[1].training_ms = 10_000;
    let submitted = |(_, call): &(usize, Request)| matches!(call, Request::SubmitUpdate(_));
    world.run_until(|world| world.calls.iter().any(submitted));
    let mut submission = world.calls.iter().find(|call| submitted(call)).unwrap().1.clone();
    let own = token(&mut submission).clone();
    *token(&mut keys) = own.clone();
    for request in later_steps(&own).into_iter().chain([keys]) {
        assert_eq!(refused(&mut world, request), FailureKind::FailedPrecondition);
    }
    world.run_to_end();
    assert_eq!(world.records()[0].completed, 2);
}
