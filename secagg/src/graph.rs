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
        if degree.saturating_add(1) >= n {
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
    use sha2::{Digest, Sha256};

    // The frozen values were computed by another implementation of the rule above (Python, with OpenSSL's
    // ChaCha20).

    fn frozen_seed() -> [u8; 32] {
        std::array::from_fn(|i| i.to_le_bytes()[0])
    }

    #[test]
    fn frozen_rings() {
        let ring = permutation(10, &frozen_seed());
        assert_eq!(ring, [6, 1, 9, 7, 0, 2, 4, 5, 8, 3]);
        let bytes: Vec<u8> =
            permutation(1000, &frozen_seed()).into_iter().flat_map(u32::to_le_bytes).collect();
        let expected = "28ddd04059b08eb4024d193c186e50bddefef3caff37f67139097ded1b53ab09";
        assert_eq!(hex::encode(Sha256::digest(bytes)), expected);
    }

    #[test]
    fn frozen_neighbours() {
        let check = |n, degree, member, expected: &[u32]| {
            assert_eq!(Graph::new(n, degree, &frozen_seed()).neighbours(member), expected);
        };
        check(10, 4, 0, &[2, 4, 7, 9]);
        check(10, 4, 3, &[1, 5, 6, 8]);
        check(10, 9, 3, &[0, 1, 2, 4, 5, 6, 7, 8, 9]);
        check(1000, 8, 0, &[185, 283, 619, 745, 773, 876, 945, 953]);
        check(1000, 8, 999, &[198, 280, 294, 394, 466, 614, 677, 966]);
        check(65_536, 4, 65_535, &[21_289, 33_241, 52_213, 58_058]);
    }

    #[test]
    fn numbers_above_the_last_multiple_are_drawn_again() {
        let (mut all, mut below) = (Stream::new(&frozen_seed()), Stream::new(&frozen_seed()));
        let bound = 0x8000_0001;
        let expected: Vec<u32> = (0..200).map(|_| all.next()).filter(|drawn| *drawn < bound).collect();
        let found: Vec<u32> = expected.iter().map(|_| below.below(bound)).collect();
        assert_eq!(found, expected);
        assert_eq!(found[5..7], [1_283_312_818, 1_777_274_431]);
    }

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

    #[test]
    fn every_member_is_as_often_at_every_place() {
        let (n, draws) = (32, 8000u32);
        let mut counts = vec![0u32; n * n];
        for i in 0..draws {
            let mut seed = [7; 32];
            seed[..4].copy_from_slice(&i.to_le_bytes());
            let ring = permutation(u32::try_from(n).unwrap(), &seed);
            ring.iter().enumerate().for_each(|(at, member)| counts[at * n + *member as usize] += 1);
        }
        let expected = f64::from(draws) / n as f64;
        let chi: f64 = counts.iter().map(|c| (f64::from(*c) - expected).powi(2) / expected).sum();
        // Rows and columns have fixed sums; with the factor (n-1)/n the sum has (n-1)^2 degrees of freedom.
        let chi = chi * (n - 1) as f64 / n as f64;
        assert!(chi < 1100.0, "chi-square {chi} with 961 degrees of freedom; 1100 at 0.1 %");
    }

    #[test]
    fn sizes_that_make_no_graph_have_no_neighbours() {
        for (n, degree) in [(0, 0), (1, 0), (1, 5), (9, 0), (9, 1)] {
            let graph = Graph::new(n, degree, &[1; 32]);
            assert!((0..=n).all(|member| graph.neighbours(member).is_empty()), "{n} {degree}");
        }
        assert_eq!(Graph::new(9, u32::MAX, &[1; 32]).degree(), 8);
        assert_eq!(Graph::new(9, 5, &[1; 32]), Graph::new(9, 4, &[1; 32]));
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
