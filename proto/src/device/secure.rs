//! The device's steps of secure aggregation as calls: each answer leads to the next message, until the
//! shares are revealed. The protocol itself is `fleetune_secagg::Device`.

use super::{
    Action, Request, Response,
    kept::KeptSession,
    session::{Step, ended_step},
    upload::Upload,
};
use crate::{
    digest::Digest,
    limits::{BACKOFF_MS_MIN, RETRY_DELAY_MS_MAX},
    secure::{
        advertisement_to_wire, parse_confirmations, parse_roster, parse_shares, parse_survivors,
        reveal_to_wire, shares_to_wire,
    },
    time::UnixMillis,
    wire,
};
use fleetune_secagg::{Device as SecureDevice, DevicePolicy, Identity, RingVector, Terms};
use prost::Message;
use rand_chacha::ChaCha20Rng;

/// What the steps need of the device around them.
pub(super) struct Surroundings<'a> {
    pub(super) policy: &'a DevicePolicy,
    pub(super) identity: Option<&'a Identity>,
    pub(super) rng: &'a mut ChaCha20Rng,
    pub(super) now: UnixMillis,
}

/// A session of secure aggregation and the message that is to be sent.
pub(super) struct SecureStage {
    device: SecureDevice,
    message: OutMessage,
}

/// The message of each step. Requests are kept without their token.
enum OutMessage {
    Keys(wire::AdvertiseKeysRequest, RingVector),
    Shares(wire::ShareKeysRequest, RingVector),
    Uploading(Upload),
    Masked(Upload),
    Confirmation(wire::ConfirmSurvivorsRequest),
    Reveal(wire::RevealSharesRequest),
}

impl SecureStage {
    pub(super) fn begin(
        terms: Terms,
        identity: &Identity,
        vector: RingVector,
        rng: &mut ChaCha20Rng,
    ) -> Self {
        let (device, advertisement) = SecureDevice::advertise(terms, identity, rng);
        let keys = Some(advertisement_to_wire(&advertisement));
        let request = wire::AdvertiseKeysRequest { session_token: Vec::new(), keys };
        Self { device, message: OutMessage::Keys(request, vector) }
    }

    /// Step and, within step 2, nothing more: a chunk more or less is not worth a save.
    pub(super) fn number(&self) -> u32 {
        match self.message {
            OutMessage::Keys(..) => 1,
            OutMessage::Shares(..) => 2,
            OutMessage::Uploading(_) | OutMessage::Masked(_) => 3,
            OutMessage::Confirmation(_) => 4,
            OutMessage::Reveal(_) => 5,
        }
    }

    /// Names the session by the keys that this device drew for it; the same after a restart.
    pub(super) fn keys_sha256(&self) -> [u8; 32] {
        Digest::of(&advertisement_to_wire(self.device.advertisement()).encode_to_vec()).sha256
    }

    pub(super) fn is_revealing(&self) -> bool {
        matches!(self.message, OutMessage::Reveal(_))
    }

    pub(super) fn action(&self, token: &[u8]) -> Action {
        let session_token = token.to_vec();
        Action::Call(match &self.message {
            OutMessage::Keys(request, _) => {
                Request::AdvertiseKeys(wire::AdvertiseKeysRequest { session_token, ..request.clone() })
            }
            OutMessage::Shares(request, _) => {
                Request::ShareKeys(wire::ShareKeysRequest { session_token, ..request.clone() })
            }
            OutMessage::Uploading(upload) => return upload.write_chunk(token),
            OutMessage::Masked(upload) => Request::SubmitMaskedUpdate(wire::SubmitMaskedUpdateRequest {
                session_token,
                masked_update: Some(upload.resource()),
            }),
            OutMessage::Confirmation(request) => {
                Request::ConfirmSurvivors(wire::ConfirmSurvivorsRequest { session_token, ..request.clone() })
            }
            OutMessage::Reveal(request) => {
                Request::RevealShares(wire::RevealSharesRequest { session_token, ..request.clone() })
            }
        })
    }

    pub(super) fn response(&mut self, response: Response, around: &mut Surroundings<'_>) -> Step {
        self.take(response, around).unwrap_or_else(Step::Refused)
    }

    fn take(&mut self, response: Response, around: &mut Surroundings<'_>) -> Result<Step, String> {
        match (&mut self.message, response) {
            (OutMessage::Keys(..), Response::AdvertiseKeys(answer)) => self.take_roster(answer, around),
            (OutMessage::Shares(..), Response::ShareKeys(answer)) => self.take_shares(answer),
            (OutMessage::Uploading(upload), Response::WriteBlobChunk(answer)) => {
                let not_before_ms = upload.written(&answer);
                if upload.is_complete() {
                    self.message = OutMessage::Masked(upload.clone());
                }
                Ok(Step::Continue { not_before_ms })
            }
            (OutMessage::Masked(_), Response::SubmitMaskedUpdate(answer)) => {
                self.take_survivors(answer, around)
            }
            (OutMessage::Confirmation(_), Response::ConfirmSurvivors(answer)) => {
                self.take_confirmations(answer)
            }
            (OutMessage::Reveal(_), Response::RevealShares(answer)) => match answer.ended {
                Some(ended) => Ok(ended_step(&ended)),
                None => Ok(Step::Ended("reveal_shares.ended: missing".into())),
            },
            (_, _) => Ok(Step::Ended("the answer is for another step".into())),
        }
    }

    fn take_roster(
        &mut self,
        answer: wire::AdvertiseKeysResponse,
        around: &mut Surroundings<'_>,
    ) -> Result<Step, String> {
        use wire::advertise_keys_response::Outcome;
        let roster = match answer.outcome {
            Some(Outcome::Roster(roster)) => roster,
            Some(Outcome::Pending(pending)) => return Ok(wait(&pending)),
            Some(Outcome::Ended(ended)) => return Ok(ended_step(&ended)),
            None => return Ok(missing()),
        };
        let OutMessage::Keys(_, vector) = &mut self.message else { unreachable!("asked for a roster") };
        let view = parse_roster(roster).map_err(|e| e.to_string())?;
        let bundle = self.device.handle_roster(&view, around.policy, around.now.0, around.rng);
        let bundle = bundle.map_err(|e| e.to_string())?;
        let request = wire::ShareKeysRequest {
            session_token: Vec::new(),
            commitment: bundle.commitment.to_vec(),
            shares: shares_to_wire(&bundle.shares),
        };
        let vector = std::mem::replace(vector, RingVector::zeros(self.device.terms().bits, 0));
        self.message = OutMessage::Shares(request, vector);
        Ok(Step::Continue { not_before_ms: 0 })
    }

    fn take_shares(&mut self, answer: wire::ShareKeysResponse) -> Result<Step, String> {
        use wire::share_keys_response::Outcome;
        let shares = match answer.outcome {
            Some(Outcome::Shares(shares)) => shares,
            Some(Outcome::Pending(pending)) => return Ok(wait(&pending)),
            Some(Outcome::Ended(ended)) => return Ok(ended_step(&ended)),
            None => return Ok(missing()),
        };
        let OutMessage::Shares(_, vector) = &mut self.message else { unreachable!("asked for shares") };
        let forwarded = parse_shares(&shares.shares).map_err(|e| e.to_string())?;
        let vector = std::mem::replace(vector, RingVector::zeros(self.device.terms().bits, 0));
        let masked = self.device.handle_shares(&forwarded, vector).map_err(|e| e.to_string())?;
        let upload = Upload::new(masked.pack());
        self.message =
            if upload.is_inline() { OutMessage::Masked(upload) } else { OutMessage::Uploading(upload) };
        Ok(Step::Continue { not_before_ms: 0 })
    }

    fn take_survivors(
        &mut self,
        answer: wire::SubmitMaskedUpdateResponse,
        around: &mut Surroundings<'_>,
    ) -> Result<Step, String> {
        use wire::submit_masked_update_response::Outcome;
        let survivors = match answer.outcome {
            Some(Outcome::Survivors(survivors)) => survivors,
            Some(Outcome::Pending(pending)) => return Ok(wait(&pending)),
            Some(Outcome::Ended(ended)) => return Ok(ended_step(&ended)),
            None => return Ok(missing()),
        };
        let members = self.device.cohort().map_or(0, |(members, _)| members);
        let survivors = parse_survivors(members, &survivors).map_err(|e| e.to_string())?;
        let identity = around.identity.ok_or("this device has lost its identity")?;
        let confirmation = self.device.handle_survivors(&survivors, around.policy, identity);
        let confirmation = confirmation.map_err(|e| e.to_string())?;
        self.message = OutMessage::Confirmation(wire::ConfirmSurvivorsRequest {
            session_token: Vec::new(),
            index: confirmation.index,
            signature: confirmation.signature.to_vec(),
        });
        Ok(Step::Continue { not_before_ms: 0 })
    }

    fn take_confirmations(&mut self, answer: wire::ConfirmSurvivorsResponse) -> Result<Step, String> {
        use wire::confirm_survivors_response::Outcome;
        let confirmations = match answer.outcome {
            Some(Outcome::Confirmations(confirmations)) => confirmations,
            Some(Outcome::Pending(pending)) => return Ok(wait(&pending)),
            Some(Outcome::Ended(ended)) => return Ok(ended_step(&ended)),
            None => return Ok(missing()),
        };
        let confirmations = parse_confirmations(&confirmations).map_err(|e| e.to_string())?;
        let reveal = self.device.handle_confirmations(&confirmations).map_err(|e| e.to_string())?;
        let shares = reveal_to_wire(&reveal);
        self.message = OutMessage::Reveal(wire::RevealSharesRequest { session_token: Vec::new(), shares });
        Ok(Step::Continue { not_before_ms: 0 })
    }

    pub(super) fn keep(&self, kept: &mut KeptSession) {
        kept.step = self.number();
        kept.session = self.device.to_record().to_vec();
        kept.message = match &self.message {
            OutMessage::Keys(request, vector) => {
                kept.vector = vector.pack();
                request.encode_to_vec()
            }
            OutMessage::Shares(request, vector) => {
                kept.vector = vector.pack();
                request.encode_to_vec()
            }
            OutMessage::Uploading(upload) | OutMessage::Masked(upload) => upload.bytes().to_vec(),
            OutMessage::Confirmation(request) => request.encode_to_vec(),
            OutMessage::Reveal(request) => request.encode_to_vec(),
        };
    }

    pub(super) fn restore(kept: &KeptSession) -> Option<Self> {
        let device = SecureDevice::from_record(&kept.session).ok()?;
        let (bits, dimension) = (device.terms().bits, device.terms().dimension);
        let vector = || RingVector::unpack(bits, dimension, &kept.vector).ok();
        let bytes = kept.message.as_slice();
        let message = match kept.step {
            1 => OutMessage::Keys(Message::decode(bytes).ok()?, vector()?),
            2 => OutMessage::Shares(Message::decode(bytes).ok()?, vector()?),
            3 => {
                let upload = Upload::new(bytes.to_vec());
                if upload.is_inline() { OutMessage::Masked(upload) } else { OutMessage::Uploading(upload) }
            }
            4 => OutMessage::Confirmation(Message::decode(bytes).ok()?),
            5 => OutMessage::Reveal(Message::decode(bytes).ok()?),
            _ => return None,
        };
        Some(Self { device, message })
    }
}

fn wait(pending: &wire::Pending) -> Step {
    Step::Continue { not_before_ms: pending.poll_after_ms.clamp(BACKOFF_MS_MIN, RETRY_DELAY_MS_MAX) }
}

fn missing() -> Step {
    Step::Ended("the answer's outcome is missing".into())
}
