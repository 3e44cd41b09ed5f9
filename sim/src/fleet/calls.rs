//! A device's call, carried to the coordinator's core and back.

use super::Fleet;
use fleetune_proto::{
    device::{Request, Response},
    wire::{self, EndReason, submit_update_response::Outcome},
};

impl Fleet<'_> {
    pub(super) fn call(&mut self, index: usize, request: Request) {
        let now = self.now;
        let core = &mut self.core;
        let answer = match request {
            Request::CheckIn(r) => core.handle_check_in(&r, now).map(Response::CheckIn),
            Request::WriteBlobChunk(r) => core.handle_write_chunk(&r, now).map(Response::WriteBlobChunk),
            Request::SubmitUpdate(r) => core.handle_submit(&r, now).map(Response::SubmitUpdate),
            Request::AdvertiseKeys(r) => core.handle_advertise_keys(&r, now).map(Response::AdvertiseKeys),
            Request::ShareKeys(r) => core.handle_share_keys(&r, now).map(Response::ShareKeys),
            Request::SubmitMaskedUpdate(r) => {
                core.handle_submit_masked(&r, now).map(Response::SubmitMaskedUpdate)
            }
            Request::ConfirmSurvivors(r) => {
                core.handle_confirm_survivors(&r, now).map(Response::ConfirmSurvivors)
            }
            Request::RevealShares(r) => core.handle_reveal_shares(&r, now).map(Response::RevealShares),
            Request::ReportTaskResult(r) => {
                core.handle_report_task(&r, now).map(|_| Response::ReportTaskResult)
            }
            Request::ReportRelease(r) => core.handle_report_release(&r, now).map(|_| Response::ReportRelease),
        };
        let device = &mut self.devices[index];
        match answer {
            Ok(response) => {
                if is_in_the_sum(&response)
                    && let Some(trained) = device.trained.take()
                {
                    self.contributions.push(trained);
                }
                device.machine.handle_response(response, now);
            }
            Err(failure) => device.machine.handle_call_failed(&failure, now),
        }
    }
}

/// The step of secure aggregation that a call takes, from 1; 0 for all other calls.
pub(super) fn secure_step(request: &Request) -> u32 {
    match request {
        Request::AdvertiseKeys(_) => 1,
        Request::ShareKeys(_) => 2,
        Request::SubmitMaskedUpdate(_) => 3,
        Request::ConfirmSurvivors(_) => 4,
        Request::RevealShares(_) => 5,
        Request::CheckIn(_)
        | Request::ReportTaskResult(_)
        | Request::WriteBlobChunk(_)
        | Request::SubmitUpdate(_)
        | Request::ReportRelease(_) => 0,
    }
}

/// Bytes of a request that take time to send.
pub(super) fn sent_bytes(request: &Request) -> u64 {
    let resource = |resource: &Option<wire::Resource>| match resource
        .as_ref()
        .and_then(|resource| resource.source.as_ref())
    {
        Some(wire::resource::Source::Inline(bytes)) => bytes.len() as u64,
        Some(wire::resource::Source::Blob(_)) | None => 0,
    };
    match request {
        Request::WriteBlobChunk(chunk) => chunk.data.len() as u64,
        Request::SubmitUpdate(submit) => resource(&submit.update),
        Request::SubmitMaskedUpdate(submit) => resource(&submit.masked_update),
        Request::ShareKeys(shares) => shares.shares.iter().map(|share| share.ciphertext.len() as u64).sum(),
        Request::CheckIn(_)
        | Request::AdvertiseKeys(_)
        | Request::ConfirmSurvivors(_)
        | Request::RevealShares(_)
        | Request::ReportTaskResult(_)
        | Request::ReportRelease(_) => 0,
    }
}

/// True once the device's update is in a sum: taken, under the plaintext protocol; masked and taken, under
/// secure aggregation.
fn is_in_the_sum(response: &Response) -> bool {
    use wire::submit_masked_update_response::Outcome as Masked;
    match response {
        Response::SubmitUpdate(answer) => match &answer.outcome {
            Some(Outcome::Ended(ended)) => ended.reason() == EndReason::Contributed,
            Some(Outcome::Pending(_)) | None => false,
        },
        Response::SubmitMaskedUpdate(answer) => match &answer.outcome {
            Some(Masked::Survivors(_) | Masked::Pending(_)) => true,
            Some(Masked::Ended(_)) | None => false,
        },
        Response::CheckIn(_)
        | Response::ReportTaskResult
        | Response::WriteBlobChunk(_)
        | Response::AdvertiseKeys(_)
        | Response::ShareKeys(_)
        | Response::ConfirmSurvivors(_)
        | Response::RevealShares(_)
        | Response::ReportRelease => false,
    }
}
