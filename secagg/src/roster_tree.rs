//! A Merkle tree over the roster: each device learns its own entry and its neighbours', and one root that
//! binds all of them to the same roster. Hashing and shape as in RFC 6962, section 2.1: 0x00 before a leaf,
//! 0x01 before an inner node, and the left subtree the largest power of two below the number of leaves.
//!
//! The root does not say how many leaves there are: many a path also fits a tree of one leaf more. Whoever
//! relies on the number must sign or hash it too, as the confirmation of the survivors does.

use sha2::{Digest, Sha256};

/// SHA-256 of a node.
type Hash = [u8; 32];

/// The tree, all levels of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RosterTree {
    /// From the leaves up; the last level is the root. A node without a sibling moves up as it is, which
    /// gives the shape of RFC 6962.
    levels: Vec<Vec<Hash>>,
}

/// The hash of an entry.
#[must_use]
pub fn leaf_hash(bytes: &[u8]) -> Hash {
    Sha256::new_with_prefix([0]).chain_update(bytes).finalize().into()
}

impl RosterTree {
    /// The tree over some leaves; over none, the hash of nothing.
    #[must_use]
    pub fn new(leaves: Vec<Hash>) -> Self {
        let mut levels = vec![leaves];
        while let Some(level) = levels.last().filter(|level| level.len() > 1) {
            let up = level.chunks(2).map(|pair| match pair {
                [left, right] => node_hash(left, right),
                single => single[0],
            });
            levels.push(up.collect());
        }
        Self { levels }
    }

    /// The root.
    #[must_use]
    pub fn root(&self) -> Hash {
        let top = self.levels.last().and_then(|level| level.first());
        top.copied().unwrap_or_else(|| Sha256::digest([]).into())
    }

    /// The siblings on the way from a leaf to the root.
    ///
    /// # Panics
    /// If there is no such leaf.
    #[must_use]
    pub fn path(&self, index: u32) -> Vec<Hash> {
        let mut at = index as usize;
        assert!(at < self.levels[0].len(), "a leaf of the tree");
        let mut path = Vec::new();
        for level in &self.levels {
            path.extend(level.get(at ^ 1));
            at /= 2;
        }
        path
    }
}

/// True if `leaf` is at `index` of the tree of `n` leaves that has this root. A path of any other length
/// than the one for `n` and `index` is refused: one entry has one place.
#[must_use]
pub fn verify_path(root: &Hash, n: u32, index: u32, leaf: &Hash, path: &[Hash]) -> bool {
    if index >= n {
        return false;
    }
    let (mut at, mut last, mut hash, mut path) = (index, n - 1, *leaf, path.iter());
    while last > 0 {
        let has_sibling = at % 2 == 1 || at < last;
        if has_sibling {
            let Some(sibling) = path.next() else { return false };
            hash = if at % 2 == 1 { node_hash(sibling, &hash) } else { node_hash(&hash, sibling) };
        }
        (at, last) = (at / 2, last / 2);
    }
    path.next().is_none() && hash == *root
}

fn node_hash(left: &Hash, right: &Hash) -> Hash {
    Sha256::new_with_prefix([1]).chain_update(left).chain_update(right).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Roots of the first 1 to 8 of the leaves below, as published with the reference implementation of
    /// Certificate Transparency (RFC 6962).
    const ROOTS: [&str; 8] = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ];
    const LEAVES: [&str; 8] =
        ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];

    fn leaves(n: usize) -> Vec<Hash> {
        LEAVES[..n].iter().map(|leaf| leaf_hash(&hex::decode(leaf).unwrap())).collect()
    }

    #[test]
    fn roots_are_those_of_certificate_transparency() {
        for n in 1..=8 {
            assert_eq!(hex::encode(RosterTree::new(leaves(n)).root()), ROOTS[n - 1], "{n} leaves");
        }
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(hex::encode(RosterTree::new(Vec::new()).root()), empty);
    }

    #[test]
    fn paths_are_those_of_certificate_transparency() {
        let two = "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e";
        let five = "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b";
        let zeros = "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7";
        let upper = "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4";
        let pair = "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0";
        let check = |index: u32, n: usize, expected: &[&str]| {
            let path = RosterTree::new(leaves(n)).path(index);
            assert_eq!(path.iter().map(hex::encode).collect::<Vec<_>>(), expected, "{index} of {n}");
        };
        check(0, 1, &[]);
        check(0, 8, &[zeros, two, upper]);
        check(5, 8, &[five, pair, ROOTS[3]]);
        check(2, 3, &[ROOTS[1]]);
        check(1, 5, &[ROOTS[0], two, five]);
    }

    /// Computed by the recursive definition of RFC 6962, section 2.1 (Python).
    #[test]
    fn a_larger_tree() {
        let tree = RosterTree::new((0..1000u32).map(|i| leaf_hash(&i.to_le_bytes())).collect());
        let root = "092174a4201b998bd263ae09fea0f0306b4d6434565b19350513ce5fae499dbe";
        assert_eq!(hex::encode(tree.root()), root);
        let path = "34743480da3f60cca867e1007b1d69ad8ed032c89b311d1832b02a61537ca51e";
        assert_eq!(hex::encode(Sha256::digest(tree.path(777).concat())), path);
    }

    #[test]
    fn every_leaf_has_its_path_and_only_its_own() {
        for n in 1u32..40 {
            let leaves: Vec<Hash> = (0..n).map(|i| leaf_hash(&i.to_le_bytes())).collect();
            let tree = RosterTree::new(leaves.clone());
            for (i, leaf) in (0..n).zip(&leaves) {
                let path = tree.path(i);
                assert!(verify_path(&tree.root(), n, i, leaf, &path), "{i} of {n}");
                for other in (0..n + 2).filter(|other| *other != i) {
                    assert!(!verify_path(&tree.root(), n, other, leaf, &path), "{i} of {n} as {other}");
                }
                let longer = [path.clone(), vec![[0; 32]]].concat();
                assert!(!verify_path(&tree.root(), n, i, leaf, &longer));
                assert!(path.is_empty() || !verify_path(&tree.root(), n, i, leaf, &path[1..]));
            }
        }
    }

    /// Second preimages: an inner node, or its two children as an entry, must not pass for a leaf.
    #[test]
    fn an_inner_node_is_no_leaf() {
        let (all, tree) = (leaves(8), RosterTree::new(leaves(8)));
        let path = tree.path(0);
        let inner = node_hash(&all[0], &all[1]);
        assert!(!verify_path(&tree.root(), 8, 0, &inner, &path[1..]));
        let children = leaf_hash(&[all[0], all[1]].concat());
        assert!(!verify_path(&tree.root(), 4, 0, &children, &path[1..]));
        assert!(!verify_path(&tree.root(), 0, 0, &all[0], &[]));
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let tree = RosterTree::new(leaves(7));
        for i in 0..7 {
            let (leaf, path) = (leaves(7)[i as usize], tree.path(i));
            for bit in 0..path.len() * 256 {
                let mut forged = path.clone();
                forged[bit / 256][bit / 8 % 32] ^= 1 << (bit % 8);
                assert!(!verify_path(&tree.root(), 7, i, &leaf, &forged));
            }
            for bit in 0..256 {
                let flipped = |hash: &Hash| {
                    let mut forged = *hash;
                    forged[bit / 8] ^= 1 << (bit % 8);
                    forged
                };
                assert!(!verify_path(&tree.root(), 7, i, &flipped(&leaf), &path));
                assert!(!verify_path(&flipped(&tree.root()), 7, i, &leaf, &path));
            }
        }
    }
}
