//! The memory of check-ins: a repeated nonce gets its first answer, so that a lost answer does not cost a
//! round a participant.

use crate::limits::{ANSWER_KEEP_MS, ANSWERS_MAX};
use fleetune_proto::{UnixMillis, wire};
use std::collections::{BTreeMap, VecDeque};

/// 16 random bytes of one check-in.
pub(super) type Nonce = [u8; 16];

/// What a check-in led to.
#[derive(Clone)]
pub(super) enum Outcome {
    Policy,
    Assignment { assignment: Box<wire::TaskAssignment>, deadline: UnixMillis },
    NoAssignment,
}

/// An answer as far as it must not change when it is repeated.
#[derive(Clone)]
pub(super) struct Answer {
    pub(super) outcome: Outcome,
    pub(super) retry_window: wire::RetryWindow,
}

/// The latest answers; the oldest make room.
#[derive(Default)]
pub(super) struct Answers {
    by_nonce: BTreeMap<Nonce, Answer>,
    oldest_first: VecDeque<(UnixMillis, Nonce)>,
}

impl Answers {
    pub(super) fn recall(&self, nonce: &Nonce) -> Option<&Answer> {
        self.by_nonce.get(nonce)
    }

    pub(super) fn remember(&mut self, nonce: Nonce, answer: Answer, now: UnixMillis) {
        self.forget(now);
        self.by_nonce.insert(nonce, answer);
        self.oldest_first.push_back((now, nonce));
    }

    fn forget(&mut self, now: UnixMillis) {
        while let Some((at, nonce)) = self.oldest_first.front() {
            if self.oldest_first.len() < ANSWERS_MAX && now.since(*at) < ANSWER_KEEP_MS {
                return;
            }
            self.by_nonce.remove(nonce);
            self.oldest_first.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_forgotten_by_age() {
        let mut answers = Answers::default();
        let answer = Answer { outcome: Outcome::Policy, retry_window: wire::RetryWindow::default() };
        answers.remember([1; 16], answer.clone(), UnixMillis(0));
        answers.remember([2; 16], answer.clone(), UnixMillis(ANSWER_KEEP_MS - 1));
        assert!(answers.recall(&[1; 16]).is_some());
        answers.remember([3; 16], answer, UnixMillis(ANSWER_KEEP_MS));
        assert!(answers.recall(&[1; 16]).is_none() && answers.recall(&[2; 16]).is_some());
    }
}
