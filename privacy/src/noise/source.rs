//! Where noise comes from: ChaCha20 keyed by the operating system, and nothing else in a device's build.

use chacha20::ChaCha20;
use cipher::{KeyIvInit, StreamCipher};
use thiserror::Error;
use zeroize::Zeroize;

/// Words of one batch: signs of 64 draws, then the draws.
pub(super) const WORDS: usize = 65;
const BUFFER_BYTES: usize = 8 * WORDS * 8;

/// The operating system gave no randomness; without it nothing may leave.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the operating system gave no randomness for the noise: {0}")]
pub struct NoiseError(String);

/// Which source a device draws its noise from.
///
/// A device's build has one: the operating system. The feature `simulation`, which only the simulator and
/// tests turn on, adds seeds, so that a simulated fleet can be repeated; noise that a third party can repeat
/// protects nobody.
#[derive(Clone)]
pub struct NoiseOrigin(Origin);

#[derive(Clone)]
enum Origin {
    OperatingSystem,
    #[cfg(any(test, feature = "simulation"))]
    Simulated([u8; 32]),
}

impl NoiseOrigin {
    /// Fresh entropy for every source.
    #[must_use]
    pub fn operating_system() -> Self {
        Self(Origin::OperatingSystem)
    }

    /// Repeatable sources, for simulations.
    #[cfg(any(test, feature = "simulation"))]
    #[must_use]
    pub fn simulated(seed: [u8; 32]) -> Self {
        Self(Origin::Simulated(seed))
    }

    /// True if noise can be repeated by whoever knows a seed.
    #[must_use]
    pub fn is_simulated(&self) -> bool {
        match self.0 {
            Origin::OperatingSystem => false,
            #[cfg(any(test, feature = "simulation"))]
            Origin::Simulated(_) => true,
        }
    }

    /// A source for one update. `context` tells the sources of one simulated origin apart; it is not used
    /// otherwise.
    ///
    /// # Errors
    /// [`NoiseError`] if the operating system has no entropy.
    pub fn source(&self, context: &[u8]) -> Result<NoiseSource, NoiseError> {
        let _ = context;
        match &self.0 {
            Origin::OperatingSystem => {
                let mut key = [0; 32];
                getrandom::fill(&mut key).map_err(|error| NoiseError(error.to_string()))?;
                Ok(NoiseSource::keyed(key))
            }
            #[cfg(any(test, feature = "simulation"))]
            Origin::Simulated(seed) => {
                use sha2::{Digest, Sha256};
                let hash = Sha256::new().chain_update("fleetune simulated noise v1").chain_update(seed);
                Ok(NoiseSource::keyed(hash.chain_update(context).finalize().into()))
            }
        }
    }
}

/// A stream of uniform words for one update's rounding and noise. Not cloned, not printed, wiped on drop.
pub struct NoiseSource {
    cipher: ChaCha20,
    buffer: Box<[u8; BUFFER_BYTES]>,
    used: usize,
}

impl NoiseSource {
    fn keyed(mut key: [u8; 32]) -> Self {
        let cipher = ChaCha20::new(&key.into(), &[0; 12].into());
        key.zeroize();
        Self { cipher, buffer: Box::new([0; BUFFER_BYTES]), used: BUFFER_BYTES }
    }

    /// One uniform word.
    pub fn word(&mut self) -> u64 {
        if self.used + 8 > BUFFER_BYTES {
            self.refill();
        }
        let bytes = self.buffer[self.used..self.used + 8].try_into().expect("eight bytes");
        self.used += 8;
        u64::from_le_bytes(bytes)
    }

    /// Sign bits and `count` uniform words; at most 64.
    pub(super) fn fill<'a>(&mut self, words: &'a mut [u64; WORDS], count: usize) -> (u64, &'a [u64]) {
        let bytes = 8 * (count + 1);
        if self.used + bytes > BUFFER_BYTES {
            self.refill();
        }
        let from = self.buffer[self.used..self.used + bytes].chunks_exact(8);
        for (word, bytes) in words.iter_mut().zip(from) {
            *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        }
        self.used += bytes;
        (words[0], &words[1..=count])
    }

    /// Uniform bytes, for rounding.
    pub(crate) fn bytes(&mut self, bytes: &mut [u8]) {
        bytes.fill(0);
        self.cipher.apply_keystream(bytes);
    }

    fn refill(&mut self) {
        self.buffer.fill(0);
        self.cipher.apply_keystream(&mut self.buffer[..]);
        self.used = 0;
    }
}

impl Drop for NoiseSource {
    fn drop(&mut self) {
        self.buffer.zeroize();
    }
}
