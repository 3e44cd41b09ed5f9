//! The sessions of selected devices and their uploads.
//!
//! Sessions are found by the SHA-256 of their token: how long a look-up takes says nothing about a token.
//! An upload is in memory only, in one of a fixed number of slots, and gone once its update is in the sum.

use super::error::{invalid, unknown_session};
use crate::limits::{SESSION_KEEP_MS, SESSIONS_MAX, UPLOAD_IDLE_MS_MAX};
use fleetune_proto::{
    CallFailure, Digest, FailureKind, Name, SessionToken, UnixMillis,
    round::Participant,
    transfer::{TransferError, UploadBuffer},
    wire::{self, EndReason},
};
use std::collections::{BTreeMap, VecDeque};

/// SHA-256 of a token.
pub(super) type SessionKey = [u8; 32];

/// Why nothing more can come of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closed {
    /// The device said that it will not contribute.
    Withdrawn,
    /// Its round finished.
    Finished,
    /// Its round failed.
    Failed,
}

/// One device's place in one attempt.
pub(super) struct Session {
    pub(super) task: Name,
    pub(super) participant: Participant,
    /// The update, plain or masked, that is in the sum.
    contributed: Option<Digest>,
    /// The message that revealed shares; the device's part is done with it.
    revealed: Option<Digest>,
    is_secure: bool,
    closed: Option<Closed>,
    upload: Option<UploadBuffer>,
}

/// All sessions that are known.
pub(super) struct Sessions {
    by_key: BTreeMap<SessionKey, Session>,
    uploads: BTreeMap<SessionKey, UnixMillis>,
    upload_slots: usize,
    over: VecDeque<(UnixMillis, Vec<SessionKey>)>,
}

impl Session {
    /// The answer to a submission of `digest` if there is nothing left to do about it.
    pub(super) fn settled(&self, digest: Digest) -> Result<Option<EndReason>, CallFailure> {
        match (self.contributed, self.closed) {
            (Some(before), _) if before != digest => Err(other_bytes()),
            (_, Some(Closed::Failed)) => Ok(Some(EndReason::RoundFailed)),
            (Some(_), _) => Ok(Some(EndReason::Contributed)),
            (None, Some(Closed::Finished)) => Ok(Some(EndReason::TooLate)),
            (None, Some(Closed::Withdrawn)) => Err(withdrawn()),
            (None, None) => Ok(None),
        }
    }

    /// How a session of secure aggregation has ended, if it has.
    pub(super) fn ended(&self) -> Result<Option<EndReason>, CallFailure> {
        match self.closed {
            None => Ok(None),
            Some(Closed::Failed) => Ok(Some(EndReason::RoundFailed)),
            Some(Closed::Finished) if self.contributed.is_some() => Ok(Some(EndReason::Contributed)),
            Some(Closed::Finished) => Ok(Some(EndReason::TooLate)),
            Some(Closed::Withdrawn) => Err(withdrawn()),
        }
    }

    /// True if the same shares were revealed before.
    pub(super) fn has_revealed(&self, digest: Digest) -> Result<bool, CallFailure> {
        match self.revealed {
            Some(before) if before != digest => Err(other_bytes()),
            before => Ok(before.is_some()),
        }
    }

    /// The shares are in.
    pub(super) fn revealed(&mut self, digest: Digest) {
        self.revealed = Some(digest);
    }

    /// The update is in the sum.
    pub(super) fn contributed(&mut self, digest: Digest) {
        self.contributed = Some(digest);
    }

    /// True while the device's part is not done.
    pub(super) fn is_open(&self) -> bool {
        let done = if self.is_secure { self.revealed } else { self.contributed };
        self.closed.is_none() && done.is_none()
    }
}

impl Sessions {
    pub(super) fn new(upload_slots: usize) -> Self {
        assert!(upload_slots > 0, "at least one upload at a time");
        Self { by_key: BTreeMap::new(), uploads: BTreeMap::new(), upload_slots, over: VecDeque::new() }
    }

    pub(super) fn has_room(&self) -> bool {
        self.by_key.len() < SESSIONS_MAX
    }

    pub(super) fn open(
        &mut self,
        token: &SessionToken,
        task: Name,
        participant: Participant,
        is_secure: bool,
    ) -> SessionKey {
        let key = Digest::of(&token.to_wire()).sha256;
        let session = Session {
            task,
            participant,
            contributed: None,
            revealed: None,
            is_secure,
            closed: None,
            upload: None,
        };
        self.by_key.insert(key, session);
        key
    }

    /// Finds a session by the token on the wire.
    pub(super) fn find(&self, token: &[u8]) -> Result<(SessionKey, &Session), CallFailure> {
        let key = Digest::of(token).sha256;
        self.by_key.get(&key).map(|session| (key, session)).ok_or_else(unknown_session)
    }

    pub(super) fn get_mut(&mut self, key: SessionKey) -> &mut Session {
        self.by_key.get_mut(&key).expect("found before, and nothing was forgotten since")
    }

    /// The device gave up: its place is empty, its upload dropped.
    pub(super) fn withdraw(&mut self, key: SessionKey) {
        let session = self.get_mut(key);
        session.closed.get_or_insert(Closed::Withdrawn);
        self.drop_upload(key);
    }

    /// A round is over: nothing more can come of its sessions, and they are forgotten later.
    pub(super) fn close(&mut self, keys: Vec<SessionKey>, closed: Closed, now: UnixMillis) {
        for key in &keys {
            self.drop_upload(*key);
            if let Some(session) = self.by_key.get_mut(key) {
                session.closed.get_or_insert(closed);
            }
        }
        self.over.push_back((now, keys));
    }

    /// Forgets the sessions of rounds that ended long ago.
    pub(super) fn forget(&mut self, now: UnixMillis) {
        while self.over.front().is_some_and(|(at, _)| now.since(*at) >= SESSION_KEEP_MS) {
            for key in self.over.pop_front().into_iter().flat_map(|(_, keys)| keys) {
                self.by_key.remove(&key);
            }
        }
    }

    /// Takes a chunk of the session's upload; `expected_size` is what an update of its task takes. Answers
    /// with the bytes held: after a lost slot that is zero, and the device goes on from there.
    pub(super) fn write_chunk(
        &mut self,
        key: SessionKey,
        request: &wire::WriteBlobChunkRequest,
        expected_size: u64,
        now: UnixMillis,
    ) -> Result<u64, CallFailure> {
        let digest =
            Digest::parse("write_blob_chunk.digest", request.digest.clone()).map_err(|e| invalid(&e))?;
        let session = self.get_mut(key);
        if session.contributed == Some(digest) {
            return Ok(digest.size);
        }
        if session.contributed.is_some() || session.upload.as_ref().is_some_and(|u| u.digest() != digest) {
            return Err(other_bytes());
        }
        if session.closed.is_some() {
            return Err(CallFailure::new(FailureKind::FailedPrecondition, "session: its round is over"));
        }
        if digest.size != expected_size {
            let problem =
                format!("upload of {} bytes; an update of this task has {expected_size}", digest.size);
            return Err(invalid(&problem));
        }
        if request.data.is_empty() {
            return Ok(session.upload.as_ref().map_or(0, UploadBuffer::committed));
        }
        self.take_slot(key, digest, now)?;
        accept(self.get_mut(key).upload.as_mut().expect("the slot is taken"), request)
    }

    /// The complete upload of `digest`; its slot is free afterwards.
    pub(super) fn take_upload(
        &mut self,
        key: SessionKey,
        digest: Digest,
    ) -> Result<UploadBuffer, CallFailure> {
        let held = self.get_mut(key).upload.as_ref().filter(|upload| upload.digest() == digest);
        let committed = held.map_or(0, UploadBuffer::committed);
        if committed < digest.size {
            let problem = format!("upload {digest}: {committed} of {} bytes are here", digest.size);
            return Err(CallFailure::new(FailureKind::FailedPrecondition, problem));
        }
        self.uploads.remove(&key);
        Ok(self.get_mut(key).upload.take().expect("some of its bytes were held"))
    }

    fn take_slot(&mut self, key: SessionKey, digest: Digest, now: UnixMillis) -> Result<(), CallFailure> {
        if !self.uploads.contains_key(&key) {
            if self.uploads.len() >= self.upload_slots {
                self.drop_idle_uploads(now);
            }
            if self.uploads.len() >= self.upload_slots {
                let problem = format!("all {} upload slots are taken", self.upload_slots);
                return Err(CallFailure::new(FailureKind::ResourceExhausted, problem));
            }
            self.get_mut(key).upload = Some(UploadBuffer::new(digest));
        }
        self.uploads.insert(key, now);
        Ok(())
    }

    fn drop_idle_uploads(&mut self, now: UnixMillis) {
        let idle = |(_, touched): &(&SessionKey, &UnixMillis)| now.since(**touched) >= UPLOAD_IDLE_MS_MAX;
        let idle: Vec<SessionKey> = self.uploads.iter().filter(idle).map(|(key, _)| *key).collect();
        idle.into_iter().for_each(|key| self.drop_upload(key));
    }

    fn drop_upload(&mut self, key: SessionKey) {
        self.uploads.remove(&key);
        if let Some(session) = self.by_key.get_mut(&key) {
            session.upload = None;
        }
    }
}

fn accept(upload: &mut UploadBuffer, request: &wire::WriteBlobChunkRequest) -> Result<u64, CallFailure> {
    if request.offset > upload.committed() {
        return Ok(upload.committed());
    }
    upload.accept(request.offset, &request.data, request.crc32c).map_err(|error| transfer_failure(&error))
}

/// Damage on the way is worth another try; everything else is the sender's mistake.
pub(super) fn transfer_failure(error: &TransferError) -> CallFailure {
    let kind = match error {
        TransferError::Damaged { .. } => FailureKind::DataLoss,
        TransferError::Offset { .. } | TransferError::Length { .. } | TransferError::Content { .. } => {
            FailureKind::InvalidArgument
        }
    };
    CallFailure::new(kind, error.to_string())
}

fn withdrawn() -> CallFailure {
    let problem = "session: closed by the result that the device reported";
    CallFailure::new(FailureKind::FailedPrecondition, problem)
}

fn other_bytes() -> CallFailure {
    CallFailure::new(FailureKind::AlreadyExists, "update: other bytes of this session were taken before")
}
