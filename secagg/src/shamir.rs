//! Sharing a secret so that t shares rebuild it and t - 1 say nothing (Shamir 1979, "How to Share a
//! Secret"), byte by byte over GF(2^8) with the polynomial x^8 + x^4 + x^3 + x + 1.
//!
//! All bytes of a secret are handled side by side in 64-bit words, by shifts and masks: no table is indexed
//! by a secret and no branch depends on one. What is branched on and looked up are the shares' places, which
//! are public.

mod decode;
mod field;

use field::{Bytes, inverse, multiply};
use rand::{CryptoRng, RngExt};
use thiserror::Error;
use zeroize::{Zeroize, Zeroizing};

/// Bytes that are shared at once: the self-mask secret, then the mask key's secret half.
pub const SECRET_BYTES: usize = 64;
/// Most shares of a secret: places are one byte, and zero is where the secret is.
pub const SHARES_MAX: usize = 254;
/// Other sets of shares tried after decoding has failed: with one share more than the threshold, all of them.
const SUBSETS_TRIED_MAX: usize = 256;

/// One device's shares of a neighbour's two secrets.
#[derive(Clone, PartialEq, Eq)]
pub struct SharePair(Zeroizing<[u8; SECRET_BYTES]>);

/// A rebuilt secret.
pub struct Joined {
    /// The secret.
    pub secret: Zeroizing<[u8; 32]>,
    /// Places of the shares that are not on the secret's polynomial, ascending.
    pub bad: Vec<u8>,
}

/// Why a secret cannot be rebuilt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum JoinError {
    /// Too few shares with places of their own.
    #[error("{shares} shares of different places; {threshold} rebuild the secret")]
    TooFew {
        /// Shares there.
        shares: usize,
        /// Shares needed.
        threshold: usize,
    },
    /// The shares give no secret that passes its check.
    #[error("no {threshold} of the {shares} shares give the secret that was committed to")]
    Wrong {
        /// Shares there.
        shares: usize,
        /// Shares needed.
        threshold: usize,
    },
}

impl SharePair {
    /// Wraps both shares.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; SECRET_BYTES]) -> Self {
        Self(Zeroizing::new(*bytes))
    }

    /// Both shares.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }

    /// Share of the self-mask secret.
    #[must_use]
    pub fn self_mask(&self) -> &[u8; 32] {
        self.0.first_chunk().expect("64 bytes")
    }

    /// Share of the mask key's secret half.
    #[must_use]
    pub fn mask_key(&self) -> &[u8; 32] {
        self.0.last_chunk().expect("64 bytes")
    }
}

/// Cuts a secret into `shares` shares, any `threshold` of which rebuild it. The one at index i has place
/// i + 1.
///
/// # Panics
/// Unless 1 <= threshold <= shares <= [`SHARES_MAX`].
pub fn split(
    secret: &[u8; SECRET_BYTES],
    threshold: usize,
    shares: usize,
    rng: &mut impl CryptoRng,
) -> Vec<SharePair> {
    assert!((1..=shares).contains(&threshold), "a threshold between one and the number of shares");
    assert!(shares <= SHARES_MAX, "places are one byte");
    let mut coefficients: Vec<Bytes<8>> = (1..threshold).map(|_| Bytes::random(|| rng.random())).collect();
    let constant = Bytes::read(secret);
    let places = (1..=u8::MAX).take(shares);
    let evaluate = |place: u8| {
        // Horner's rule, from the highest coefficient down to the secret.
        let mut value = Bytes::zero();
        for coefficient in coefficients.iter().rev() {
            value = value.add(coefficient).times(place);
        }
        let mut value = value.add(&constant);
        let mut share = SharePair(Zeroizing::new([0; SECRET_BYTES]));
        value.write(share.0.as_mut());
        value.zeroize();
        share
    };
    let shares = places.map(evaluate).collect();
    coefficients.iter_mut().for_each(Zeroize::zeroize);
    shares
}

/// Rebuilds a secret from the first `threshold` shares of different places.
///
/// # Errors
/// [`JoinError::TooFew`].
pub fn join(threshold: usize, shares: &[(u8, &[u8; 32])]) -> Result<Zeroizing<[u8; 32]>, JoinError> {
    let shares = distinct(threshold, shares)?;
    Ok(interpolate(&shares[..threshold], 0))
}

/// Rebuilds a secret although some shares are wrong: `is_right` knows the secret when it sees it. First the
/// first `threshold` shares are taken at their word; then decoding finds up to half of the surplus of wrong
/// ones (`decode.rs`); then some other sets are tried. All the work is bounded.
///
/// # Errors
/// [`JoinError`].
pub fn join_checked(
    threshold: usize,
    shares: &[(u8, &[u8; 32])],
    is_right: &dyn Fn(&[u8; 32]) -> bool,
) -> Result<Joined, JoinError> {
    let shares = distinct(threshold, shares)?;
    let attempt = |chosen: &[(u8, &[u8; 32])]| {
        let secret = interpolate(chosen, 0);
        is_right(&secret).then_some(secret)
    };
    let first = &shares[..threshold];
    let joined = match attempt(first) {
        Some(secret) => Some((secret, first.to_vec())),
        None => rescue(threshold, &shares, &attempt),
    };
    let (secret, good) = joined.ok_or(JoinError::Wrong { shares: shares.len(), threshold })?;
    let polynomial = Interpolation::through(&good);
    let is_off = |(place, share): &&(u8, &[u8; 32])| {
        !good.iter().any(|(known, _)| known == place) && *polynomial.at(*place) != **share
    };
    let bad = shares.iter().filter(is_off).map(|(place, _)| *place).collect();
    Ok(Joined { secret, bad })
}

type Share<'a> = (u8, &'a [u8; 32]);
/// A secret, and the shares that it was rebuilt from.
type Rescued<'a> = Option<(Zeroizing<[u8; 32]>, Vec<Share<'a>>)>;
/// Rebuilds the secret from some shares, if it is the right one.
type Attempt<'f, 'a> = dyn Fn(&[Share<'a>]) -> Option<Zeroizing<[u8; 32]>> + 'f;

fn rescue<'a>(threshold: usize, shares: &[Share<'a>], attempt: &Attempt<'_, 'a>) -> Rescued<'a> {
    let mut left = shares.to_vec();
    for byte in 0..32 {
        let column: Vec<(u8, u8)> = left.iter().map(|(place, share)| (*place, share[byte])).collect();
        let Some(wrong) = decode::wrong_places(threshold, &column) else { break };
        if wrong.is_empty() {
            continue;
        }
        left.retain(|(place, _)| !wrong.contains(place));
        if let Some(secret) = attempt(&left[..threshold]) {
            left.truncate(threshold);
            return Some((secret, left));
        }
    }
    // Beyond what decoding can tell: the first of the other sets in their order, then turns through all shares.
    let count = shares.len();
    let mut set: Vec<usize> = (0..threshold).collect();
    for _ in 0..SUBSETS_TRIED_MAX {
        if !next_set(&mut set, count) {
            return None;
        }
        let chosen: Vec<_> = set.iter().map(|i| shares[*i]).collect();
        if let Some(secret) = attempt(&chosen) {
            return Some((secret, chosen));
        }
    }
    (1..count.min(SUBSETS_TRIED_MAX)).find_map(|turn| {
        let stride = 1 + turn % 7;
        let mut order: Vec<usize> = (0..count).map(|i| (turn + i * stride) % count).collect();
        order.dedup();
        let mut seen = [false; 256];
        let fresh = |i: &usize| !std::mem::replace(&mut seen[*i], true);
        let chosen: Vec<_> = order.into_iter().filter(fresh).take(threshold).map(|i| shares[i]).collect();
        (chosen.len() == threshold).then(|| attempt(&chosen)).flatten().map(|secret| (secret, chosen))
    })
}

/// The next of all sets of `set.len()` numbers below `count` in lexicographic order; false after the last.
fn next_set(set: &mut [usize], count: usize) -> bool {
    let size = set.len();
    let Some(grows) = (0..size).rev().find(|i| set[*i] < count - size + i) else { return false };
    set[grows] += 1;
    for i in grows + 1..size {
        set[i] = set[i - 1] + 1;
    }
    true
}

/// The shares of the first of each place; zero is no place.
fn distinct<'a>(threshold: usize, shares: &[Share<'a>]) -> Result<Vec<Share<'a>>, JoinError> {
    let mut seen = [false; 256];
    seen[0] = true;
    let fresh = |(place, _): &&Share<'a>| !std::mem::replace(&mut seen[usize::from(*place)], true);
    let distinct: Vec<_> = shares.iter().filter(fresh).copied().collect();
    if threshold == 0 || distinct.len() < threshold {
        return Err(JoinError::TooFew { shares: distinct.len(), threshold });
    }
    Ok(distinct)
}

/// Lagrange's value at `at` of the polynomial through all of `shares`.
fn interpolate(shares: &[Share<'_>], at: u8) -> Zeroizing<[u8; 32]> {
    Interpolation::through(shares).at(at)
}

/// A polynomial by its values, in the barycentric form (Berrut and Trefethen 2004, equation 3.3): the weights
/// are computed once, each further value takes as many steps as there are shares.
struct Interpolation<'a> {
    /// Each share with its weight: the inverse of the product of its place's differences to the others.
    shares: Vec<(Share<'a>, u8)>,
}

impl<'a> Interpolation<'a> {
    fn through(shares: &[Share<'a>]) -> Self {
        let weigh = |share: &Share<'a>| {
            let others = shares.iter().filter(|other| other.0 != share.0);
            (*share, inverse(others.fold(1, |product, other| multiply(product, share.0 ^ other.0))))
        };
        Self { shares: shares.iter().map(weigh).collect() }
    }

    /// The value at a place that is none of the shares'.
    fn at(&self, place: u8) -> Zeroizing<[u8; 32]> {
        let all = self.shares.iter().fold(1, |product, ((other, _), _)| multiply(product, place ^ other));
        let mut sum = Bytes::<4>::zero();
        for ((at, share), weight) in &self.shares {
            let factor = multiply(multiply(all, *weight), inverse(place ^ at));
            sum = sum.add(&Bytes::read(*share).times(factor));
        }
        let mut value = Zeroizing::new([0; 32]);
        sum.write(value.as_mut());
        sum.zeroize();
        value
    }
}

#[cfg(test)]
mod tests;
