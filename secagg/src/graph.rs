//! Who is whose neighbour: a Harary graph on a random ring (Bell et al. 2020, section 4.1).
//!
//! The members are put on a ring in a random order; each is the neighbour of the k/2 before and the k/2
//! after it. Every device draws the same ring from the same seed, so the order is part of the protocol:
//! start with the places 0..n in order; for i from n-1 down to 1 swap the places at i and at a number drawn
//! uniformly from 0..=i (Fisher and Yates). Numbers come from the ChaCha20 keystream (RFC 8439, zero nonce)
//! under the seed as key, read as little-endian u32; a number u is turned into u mod (i+1), and is drawn
//! again if it is at or above the largest multiple of i+1 that fits 2^32.

use chacha20::{
    ChaCha20,
    cipher::{KeyIvInit, StreamCipher},
};

/// The neighbours of every member of a cohort.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graph {
    degree: u32,
    /// Member at each place of the ring; empty for a full graph.
    ring: Vec<u32>,
    /// Place of each member on the ring; empty for a full graph.
    place: Vec<u32>,
    members: u32,
}

impl Graph {
    /// The graph of `n` members with `degree` neighbours each. A degree of n-1 or more gives the full graph;
    /// below it an odd degree counts as the even one beneath.
    #[must_use]
    pub fn new(n: u32, degree: u32, seed: &[u8; 32]) -> Self {
        if degree + 1 >= n {
            return Self { degree: n.saturating_sub(1), ring: Vec::new(), place: Vec::new(), members: n };
        }
        let ring = permutation(n, seed);
        let mut place = vec![0; ring.len()];
        for (at, member) in (0..).zip(&ring) {
            place[*member as usize] = at;
        }
        Self { degree: degree / 2 * 2, ring, place, members: n }
    }

    /// Members.
    #[must_use]
    pub fn n(&self) -> u32 {
        self.members
    }

    /// Neighbours of each.
    #[must_use]
    pub fn degree(&self) -> u32 {
        self.degree
    }

    /// The neighbours of a member, in the order of their numbers; none for a number that is no member.
    #[must_use]
    pub fn neighbours(&self, member: u32) -> Vec<u32> {
        if member >= self.members {
            return Vec::new();
        }
        if self.ring.is_empty() {
            return (0..self.members).filter(|other| *other != member).collect();
        }
        let (at, n) = (u64::from(self.place[member as usize]), u64::from(self.members));
        let steps = 1..=u64::from(self.degree / 2);
        let around = steps.flat_map(|step| [(at + step) % n, (at + n - step) % n]);
        let mut neighbours: Vec<u32> =
            around.map(|at| self.ring[usize::try_from(at).expect("below n")]).collect();
        neighbours.sort_unstable();
        neighbours
    }
}

/// A uniformly random order of 0..n.
fn permutation(n: u32, seed: &[u8; 32]) -> Vec<u32> {
    let mut stream = Stream::new(seed);
    let mut order: Vec<u32> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i as usize, stream.below(i + 1) as usize);
    }
    order
}

struct Stream {
    cipher: ChaCha20,
    buffer: [u8; 256],
    used: usize,
}

impl Stream {
    fn new(seed: &[u8; 32]) -> Self {
        Self { cipher: ChaCha20::new(seed.into(), &[0; 12].into()), buffer: [0; 256], used: 256 }
    }

    fn below(&mut self, bound: u32) -> u32 {
        let limit = (1 << 32) / u64::from(bound) * u64::from(bound);
        loop {
            let drawn = self.next();
            if u64::from(drawn) < limit {
                return drawn % bound;
            }
        }
    }

    fn next(&mut self) -> u32 {
        if self.used == self.buffer.len() {
            self.buffer = [0; 256];
            self.cipher.apply_keystream(&mut self.buffer);
            self.used = 0;
        }
        let word = self.buffer[self.used..self.used + 4].try_into().expect("four bytes");
        self.used += 4;
        u32::from_le_bytes(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frozen_ring() {
        let mut seed = [0; 32];
        for (byte, value) in seed.iter_mut().zip(0..) {
            *byte = value;
        }
        // Computed by an independent implementation of the rule above (Python, RFC 8439 ChaCha20).
        assert_eq!(permutation(10, &seed), FROZEN);
    }

    const FROZEN: [u32; 10] = [6, 1, 9, 7, 0, 2, 4, 5, 8, 3];

    #[test]
    fn every_order_is_as_likely_as_any_other() {
        let mut counts = std::collections::BTreeMap::new();
        let draws = 24_000u32;
        for i in 0..draws {
            let mut seed = [0; 32];
            seed[..4].copy_from_slice(&i.to_le_bytes());
            *counts.entry(permutation(4, &seed)).or_insert(0u32) += 1;
        }
        let expected = f64::from(draws) / 24.0;
        let chi: f64 = counts.values().map(|c| (f64::from(*c) - expected).powi(2) / expected).sum();
        assert_eq!(counts.len(), 24);
        assert!(chi < 49.7, "chi-square {chi} with 23 degrees of freedom; 49.7 at 0.1 %");
    }

    proptest! {
        #[test]
        fn symmetric_regular_and_without_loops(n in 2u32..200, half in 1u32..40, seed: [u8; 32]) {
            let graph = Graph::new(n, half * 2, &seed);
            let degree = (half * 2).min(n - 1);
            for i in 0..n {
                let neighbours = graph.neighbours(i);
                prop_assert_eq!(neighbours.len(), degree as usize);
                prop_assert!(neighbours.windows(2).all(|pair| pair[0] < pair[1]));
                for j in neighbours {
                    prop_assert!(j != i && graph.neighbours(j).binary_search(&i).is_ok());
                }
            }
            prop_assert!(graph.neighbours(n).is_empty());
        }
    }
}
