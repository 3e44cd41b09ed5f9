//! Masks: seeds expanded into vectors and added to a ring vector, tile by tile, so that the running sum and
//! the keystream stay in the nearest cache and a mask is never a vector of its own in memory.
//!
//! A mask is the keystream of a cipher under the seed, cut into one little-endian word a value: 4 bytes, or
//! 2 bytes where values have at most 16 bits. Words are reduced mod 2^b with the sum. Suites:
//!
//! - AES-128 in counter mode: key = seed bytes 0..16; the counter block is a 64-bit little-endian counter from
//!   0 followed by seed bytes 16..24 (the key and a nonce: a collision of keys alone gives nothing away).
//! - ChaCha20 (RFC 8439): key = the seed, nonce zero, counter from 0.

#[cfg(target_arch = "x86_64")]
mod vaes;

use crate::ring::RingVector;
use aes::Aes128;
use chacha20::ChaCha20;
use cipher::{KeyIvInit, StreamCipher, StreamCipherSeek};
use ctr::Ctr64LE;
use std::thread;
use thiserror::Error;
use zeroize::{Zeroize, Zeroizing};

/// Values in a tile: 16 KiB of sum and at most 16 KiB of keystream.
const TILE: usize = 4096;

/// The cipher that expands masks, the same for all devices of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MaskSuite {
    /// AES-128 in counter mode: fastest wherever AES instructions are.
    Aes128Ctr = 1,
    /// ChaCha20: for devices without them.
    ChaCha20 = 2,
}

/// The number names no suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("mask suite {0}: unknown")]
pub struct UnknownSuite(pub u32);

/// 32 secret bytes from which a mask is expanded.
#[derive(Clone)]
pub struct MaskSeed(Zeroizing<[u8; 32]>);

/// Whether a mask is added or taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// Added.
    Plus,
    /// Taken away.
    Minus,
}

impl MaskSuite {
    /// Its number in messages and records.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Aes128Ctr => 1,
            Self::ChaCha20 => 2,
        }
    }

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes128Ctr => "aes128-ctr",
            Self::ChaCha20 => "chacha20",
        }
    }
}

impl TryFrom<u32> for MaskSuite {
    type Error = UnknownSuite;

    fn try_from(number: u32) -> Result<Self, UnknownSuite> {
        match number {
            1 => Ok(Self::Aes128Ctr),
            2 => Ok(Self::ChaCha20),
            _ => Err(UnknownSuite(number)),
        }
    }
}

impl MaskSeed {
    /// Wraps the output of a key derivation.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }
}

/// Adds masks to a vector, mod 2^b.
pub fn add_masks(suite: MaskSuite, vector: &mut RingVector, masks: &[(MaskSeed, Sign)]) {
    add_masks_parallel(suite, vector, masks, 1);
}

/// The same on up to `threads` threads, each with its own stretch of the vector; the result is the same.
pub fn add_masks_parallel(
    suite: MaskSuite,
    vector: &mut RingVector,
    masks: &[(MaskSeed, Sign)],
    threads: usize,
) {
    let bits = vector.bits();
    let lanes = vector.lanes_mut();
    let tiles = lanes.len().div_ceil(TILE);
    let stretch = tiles.div_ceil(threads.max(1)).max(1) * TILE;
    let add = |(first, lanes): (usize, &mut [u32])| match (suite, bits.bits() <= 16) {
        (MaskSuite::Aes128Ctr, narrow) => add_aes(lanes, first, masks, narrow, bits.mask()),
        (MaskSuite::ChaCha20, narrow) => add_stretch::<ChaCha20>(lanes, first, masks, narrow, bits.mask()),
    };
    let mut stretches = lanes.chunks_mut(stretch).enumerate().map(|(i, lanes)| (i * stretch, lanes));
    if tiles <= 1 || threads <= 1 {
        stretches.for_each(add);
        return;
    }
    let first = stretches.next();
    thread::scope(|scope| {
        for stretch in stretches {
            scope.spawn(move || add(stretch));
        }
        first.into_iter().for_each(add);
    });
}

/// AES by the fastest means at hand: whole groups by vector instructions, the rest portably.
fn add_aes(lanes: &mut [u32], first: usize, masks: &[(MaskSeed, Sign)], narrow: bool, reduce: u32) {
    #[cfg(target_arch = "x86_64")]
    if vaes::is_available() {
        let whole = lanes.len() / vaes::GROUP * vaes::GROUP;
        let (groups, rest) = lanes.split_at_mut(whole);
        let masks_of: Vec<_> = masks.iter().map(|(seed, sign)| vaes::Expanded::new(seed, *sign)).collect();
        for (tile, lanes) in groups.chunks_mut(TILE).enumerate() {
            masks_of.iter().for_each(|mask| mask.add(lanes, first + tile * TILE, narrow));
            lanes.iter_mut().for_each(|lane| *lane &= reduce);
        }
        if !rest.is_empty() {
            add_stretch::<Ctr64LE<Aes128>>(rest, first + whole, masks, narrow, reduce);
        }
        return;
    }
    add_stretch::<Ctr64LE<Aes128>>(lanes, first, masks, narrow, reduce);
}

/// A mask's cipher, positioned at a value.
trait Expand: StreamCipher + StreamCipherSeek {
    fn of(seed: &MaskSeed) -> Self;
}

impl Expand for Ctr64LE<Aes128> {
    fn of(seed: &MaskSeed) -> Self {
        let mut block = [0; 16];
        block[8..].copy_from_slice(&seed.0[16..24]);
        let key: &[u8; 16] = seed.0.first_chunk().expect("32 bytes");
        Self::new(key.into(), &block.into())
    }
}

impl Expand for ChaCha20 {
    fn of(seed: &MaskSeed) -> Self {
        Self::new((&*seed.0).into(), &[0; 12].into())
    }
}

/// Adds the masks to the values that begin at place `first` of the vector.
fn add_stretch<C: Expand>(
    lanes: &mut [u32],
    first: usize,
    masks: &[(MaskSeed, Sign)],
    narrow: bool,
    reduce: u32,
) {
    let width = if narrow { 2 } else { 4 };
    let expand = |(seed, sign): &(MaskSeed, Sign)| {
        let mut cipher = C::of(seed);
        cipher.seek(first as u64 * width as u64);
        (cipher, *sign)
    };
    let mut ciphers: Vec<(C, Sign)> = masks.iter().map(expand).collect();
    let mut keystream = vec![0; TILE * width];
    for tile in lanes.chunks_mut(TILE) {
        let keystream = &mut keystream[..tile.len() * width];
        for (cipher, sign) in &mut ciphers {
            cipher.write_keystream(keystream);
            match (narrow, *sign) {
                (false, Sign::Plus) => each_word(tile, keystream, u32::from_le_bytes, u32::wrapping_add),
                (false, Sign::Minus) => each_word(tile, keystream, u32::from_le_bytes, u32::wrapping_sub),
                (true, Sign::Plus) => each_word(tile, keystream, narrow_word, u32::wrapping_add),
                (true, Sign::Minus) => each_word(tile, keystream, narrow_word, u32::wrapping_sub),
            }
        }
        tile.iter_mut().for_each(|lane| *lane &= reduce);
    }
    keystream.zeroize();
}

fn narrow_word(bytes: [u8; 2]) -> u32 {
    u32::from(u16::from_le_bytes(bytes))
}

#[inline(always)]
fn each_word<const N: usize>(
    tile: &mut [u32],
    keystream: &[u8],
    read: impl Fn([u8; N]) -> u32,
    combine: impl Fn(u32, u32) -> u32,
) {
    let (words, _) = keystream.as_chunks::<N>();
    for (lane, word) in tile.iter_mut().zip(words) {
        *lane = combine(*lane, read(*word));
    }
}

#[cfg(test)]
mod tests;
