//! A session between two steps as bytes, for the device's own disk: secrets included, so the file is the
//! owner's alone and is removed with the session. A device that comes back from it repeats its last message
//! byte for byte; it never takes a step twice with different content.

use super::{
    Abort, Device, Held, Secrets, Step,
    roster::{Neighbour, Roster},
};
use crate::{
    Degrees, MEMBERS_MAX,
    identity::{Certificate, DeviceId},
    key_schedule::Binding,
    mask::MaskSuite,
    messages::{Advertisement, SurvivorSet},
    ring::RingBits,
    session_id::{SessionId, Terms},
    shamir::SharePair,
};
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

/// First byte; a record of another version is refused.
const VERSION: u8 = 1;

impl Device {
    /// The session as it stands.
    #[must_use]
    pub fn to_record(&self) -> Zeroizing<Vec<u8>> {
        let mut out = Writer(Zeroizing::new(vec![VERSION]));
        out.terms(&self.terms);
        for secret in [self.secrets.share_key.as_bytes(), self.secrets.mask_key.as_bytes()] {
            out.bytes(secret);
        }
        out.bytes(self.secrets.self_mask.as_ref());
        out.advertisement(&self.advertisement);
        match &self.step {
            Step::Advertised => out.bytes(&[0]),
            Step::Shared(roster) => {
                out.bytes(&[1]);
                out.roster(roster);
            }
            Step::Masked(roster, held) => {
                out.bytes(&[2]);
                out.roster(roster);
                out.held(held);
            }
            Step::Confirmed(roster, held, survivors) => {
                out.bytes(&[3]);
                out.roster(roster);
                out.held(held);
                out.bytes(survivors.as_bytes());
            }
            Step::Revealed => out.bytes(&[4]),
            Step::Aborted => out.bytes(&[5]),
        }
        out.0
    }

    /// Inverts [`Device::to_record`].
    ///
    /// # Errors
    /// [`Abort::Record`] for bytes that are no record.
    pub fn from_record(bytes: &[u8]) -> Result<Self, Abort> {
        let mut input = Reader(bytes);
        let device = input.device().ok_or(Abort::Record)?;
        if input.0.is_empty() { Ok(device) } else { Err(Abort::Record) }
    }
}

struct Writer(Zeroizing<Vec<u8>>);

impl Writer {
    /// Grows without leaving copies of secrets behind in freed memory.
    fn bytes(&mut self, bytes: &[u8]) {
        if self.0.capacity() < self.0.len() + bytes.len() {
            let mut larger = Vec::with_capacity((self.0.len() + bytes.len()) * 2);
            larger.extend_from_slice(&self.0);
            self.0 = Zeroizing::new(larger);
        }
        self.0.extend_from_slice(bytes);
    }

    fn number(&mut self, number: u32) {
        self.bytes(&number.to_le_bytes());
    }

    fn terms(&mut self, terms: &Terms) {
        self.bytes(terms.session.as_bytes());
        self.bytes(&terms.config_sha256);
        self.number(terms.suite.number());
        self.number(terms.bits.bits());
        self.bytes(&(terms.dimension as u64).to_le_bytes());
    }

    fn advertisement(&mut self, advertisement: &Advertisement) {
        self.bytes(&advertisement.certificate.to_bytes());
        for part in [&advertisement.share_key, &advertisement.mask_key, &advertisement.nonce] {
            self.bytes(part);
        }
        self.bytes(&advertisement.signature);
    }

    fn roster(&mut self, roster: &Roster) {
        self.bytes(&roster.binding.roster_root);
        let numbers = [roster.members, roster.degrees.degree, roster.degrees.threshold, roster.index];
        numbers.into_iter().for_each(|number| self.number(number));
        self.bytes(&roster.own_id.0);
        self.number(u32::try_from(roster.neighbours.len()).expect("bounded by the members"));
        for neighbour in &roster.neighbours {
            self.number(neighbour.index);
            self.bytes(&neighbour.id.0);
            self.bytes(&neighbour.public_key);
            self.bytes(&neighbour.mask_key);
            self.bytes(neighbour.key_out.as_ref());
            self.bytes(neighbour.key_in.as_ref());
        }
    }

    fn held(&mut self, held: &[Held]) {
        for held in held {
            match held {
                Held::Nothing => self.bytes(&[0]),
                Held::MaskOnly => self.bytes(&[1]),
                Held::Shares(pair) => {
                    self.bytes(&[2]);
                    self.bytes(pair.as_bytes());
                }
            }
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn device(&mut self) -> Option<Device> {
        if self.byte()? != VERSION {
            return None;
        }
        let terms = self.terms()?;
        let share_key = StaticSecret::from(*Zeroizing::new(self.array()?));
        let mask_key = StaticSecret::from(*Zeroizing::new(self.array()?));
        let self_mask = Zeroizing::new(self.array()?);
        let advertisement = self.advertisement()?;
        let step = match self.byte()? {
            0 => Step::Advertised,
            1 => Step::Shared(self.roster(&terms)?),
            2 => {
                let roster = self.roster(&terms)?;
                let held = self.held(roster.neighbours.len())?;
                Step::Masked(roster, held)
            }
            3 => {
                let roster = self.roster(&terms)?;
                let held = self.held(roster.neighbours.len())?;
                let bitmap = self.take((roster.members as usize).div_ceil(8))?;
                let survivors = SurvivorSet::from_bytes(roster.members, bitmap).ok()?;
                Step::Confirmed(roster, held, survivors)
            }
            4 => Step::Revealed,
            5 => Step::Aborted,
            _ => return None,
        };
        let secrets = Secrets { share_key, mask_key, self_mask };
        Some(Device { terms, secrets, advertisement, step })
    }

    fn terms(&mut self) -> Option<Terms> {
        let session = SessionId::from_bytes(self.array()?);
        let config_sha256 = self.array()?;
        let suite = MaskSuite::try_from(self.number()?).ok()?;
        let bits = RingBits::new(self.number()?).ok()?;
        let dimension = usize::try_from(u64::from_le_bytes(self.array()?)).ok()?;
        Some(Terms { session, config_sha256, suite, bits, dimension })
    }

    fn advertisement(&mut self) -> Option<Advertisement> {
        Some(Advertisement {
            certificate: Certificate::from_bytes(self.take(104)?)?,
            share_key: self.array()?,
            mask_key: self.array()?,
            nonce: self.array()?,
            signature: self.array()?,
        })
    }

    fn roster(&mut self, terms: &Terms) -> Option<Roster> {
        let roster_root = self.array()?;
        let members = self.number().filter(|members| (1..=MEMBERS_MAX).contains(&(*members as usize)))?;
        let degrees = Degrees { degree: self.number()?, threshold: self.number()? };
        let index = self.number()?;
        let own_id = DeviceId(self.array()?);
        let count = self.number().filter(|count| *count < members)?;
        let neighbours = (0..count).map(|_| self.neighbour()).collect::<Option<_>>()?;
        let binding = Binding { session: terms.session, config_sha256: terms.config_sha256, roster_root };
        Some(Roster { binding, members, degrees, index, own_id, neighbours })
    }

    fn neighbour(&mut self) -> Option<Neighbour> {
        Some(Neighbour {
            index: self.number()?,
            id: DeviceId(self.array()?),
            public_key: self.array()?,
            mask_key: self.array()?,
            key_out: Zeroizing::new(self.array()?),
            key_in: Zeroizing::new(self.array()?),
        })
    }

    fn held(&mut self, count: usize) -> Option<Vec<Held>> {
        let one = |_| match self.byte()? {
            0 => Some(Held::Nothing),
            1 => Some(Held::MaskOnly),
            2 => Some(Held::Shares(SharePair::from_bytes(&self.array()?))),
            _ => None,
        };
        (0..count).map(one).collect()
    }

    fn byte(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    fn number(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    fn take(&mut self, count: usize) -> Option<&[u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }
}
