//! Tree aggregation: every node of a binary tree over the rounds holds the noisy sum of the rounds below it
//! (Kairouz, McMahan, Song, Thakkar, Thakurta and Xu 2021, "Practical and Private (Deep) Learning without
//! Sampling or Shuffling").
//!
//! Only complete subtrees hold a sum, so a run of n rounds is a forest: one tree for each bit of n, the
//! greatest first. A device that takes part in the rounds S moves a node by the number of those rounds below
//! it, hence sens^2 = max over S of the sum of these numbers squared.

use super::{MatrixSensitivity, Participation};
use crate::account::convert::AccountError;

/// The longest run whose patterns [`tree_sensitivity`] searches.
pub const TREE_STEPS_MAX: u32 = 1 << 16;

/// The most rounds of one device that [`tree_sensitivity`] searches.
pub const TREE_PARTICIPATIONS_MAX: u32 = 256;

/// Sensitivity where each device takes part once, in trees of `step_counts` rounds each: the height of the
/// greatest tree, since a device touches one node of each level and one tree only.
///
/// # Errors
/// [`AccountError::Parameter`] without any round.
pub fn tree_single_epoch_sensitivity(step_counts: &[u32]) -> Result<MatrixSensitivity, AccountError> {
    let steps = step_counts.iter().copied().max().unwrap_or(0);
    AccountError::check(steps > 0, "steps", 0.0, "positive")?;
    Ok(MatrixSensitivity::from_squared(f64::from(u32::BITS - steps.leading_zeros())))
}

/// Sensitivity where a device takes part many times in one tree without restart, exact: the maximum over all
/// patterns, by dynamic programming over subtrees.
///
/// # Errors
/// [`AccountError::Parameter`] beyond [`TREE_STEPS_MAX`] or [`TREE_PARTICIPATIONS_MAX`], which bound the search.
pub fn tree_sensitivity(participation: Participation) -> Result<MatrixSensitivity, AccountError> {
    let (steps, times) = (participation.steps(), participation.participations());
    AccountError::check(steps <= TREE_STEPS_MAX, "steps", f64::from(steps), "at most 2^16 for a tree")?;
    let few = times <= TREE_PARTICIPATIONS_MAX;
    AccountError::check(few, "max_participations", f64::from(times), "at most 256 for a tree")?;
    // A separation longer than the run says no more than one as long.
    let min_sep = participation.min_sep().min(steps) as usize;
    let mut subtrees = vec![leaf(min_sep)];
    while 2 << (subtrees.len() - 1) <= steps {
        subtrees.push(doubled(&subtrees[subtrees.len() - 1], 1 << (subtrees.len() - 1), times as usize));
    }
    let mut forest = vec![vec![State { value: 0, next: 0 }]];
    let mut offset = 0;
    for height in (0..subtrees.len()).rev().filter(|height| steps >> height & 1 == 1) {
        forest = joined(&forest, offset, &subtrees[height], times as usize, 0);
        offset += 1 << height;
    }
    let values = forest.iter().flatten().map(|state| state.value);
    Ok(MatrixSensitivity::from_squared(f64::from(values.max().unwrap_or(0))))
}

/// What a device may have done up to some round.
#[derive(Debug, Clone, Copy)]
struct State {
    /// The sum of squares so far.
    value: u32,
    /// The first round it may take part in again, counted from the start of the subtree.
    next: usize,
}

/// States none of which is both no greater in value and no earlier than another; by number of participations.
type Frontiers = Vec<Vec<State>>;

/// The frontiers of one complete subtree, by the first round that the device may take part in: below `min_sep`
/// always, since the round before lies to the left of the subtree.
type Subtree = Vec<Frontiers>;

fn leaf(min_sep: usize) -> Subtree {
    let none = |start| vec![State { value: 0, next: start }];
    let once = |start| if start == 0 { vec![State { value: 1, next: min_sep }] } else { Vec::new() };
    (0..min_sep).map(|start| vec![none(start), once(start)]).collect()
}

/// The subtree whose two children are `child`, of `size` leaves each.
fn doubled(child: &Subtree, size: usize, times: usize) -> Subtree {
    child.iter().map(|left| joined(left, size, child, times, 1)).collect()
}

/// The frontiers of `left`, which is `size` rounds long, followed by a subtree; `nodes` over both of them are
/// moved by all participations together.
fn joined(left: &Frontiers, size: usize, right: &Subtree, times: usize, nodes: u32) -> Frontiers {
    let most = times.min(left.len() + right[0].len() - 2);
    let mut all: Frontiers = vec![Vec::new(); most + 1];
    for (in_left, states) in left.iter().enumerate() {
        for state in states {
            let follow = &right[state.next.saturating_sub(size)];
            for (in_right, after) in follow.iter().enumerate().take(times + 1 - in_left) {
                let together = in_left + in_right;
                #[expect(clippy::cast_possible_truncation, reason = "at most 256")]
                let value = state.value + nodes * (together * together) as u32;
                let with = after.iter().map(|a| State { value: value + a.value, next: size + a.next });
                all[together].extend(with);
            }
        }
    }
    all.into_iter().map(frontier).collect()
}

fn frontier(mut states: Vec<State>) -> Vec<State> {
    states.sort_unstable_by_key(|state| (state.next, u32::MAX - state.value));
    let mut best = None;
    states.retain(|state| {
        let better = best.is_none_or(|value| state.value > value);
        if better {
            best = Some(state.value);
        }
        better
    });
    states
}

#[cfg(test)]
mod tests {
    use super::{super::brute, *};
    use crate::account::{
        Delta,
        known::{close, number, rows},
    };

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole numbers")]
    fn whole(number: f64) -> u32 {
        number as u32
    }

    #[test]
    fn once_in_an_epoch_equals_the_reference() {
        for row in rows("tree_single_epoch") {
            let counts =
                row["step_counts"].as_array().cloned().unwrap_or_else(|| vec![row["step_counts"].clone()]);
            let counts: Vec<u32> = counts.iter().map(|count| whole(count.as_f64().unwrap())).collect();
            let sensitivity = tree_single_epoch_sensitivity(&counts).unwrap();
            assert_eq!(sensitivity.squared(), number(&row, "max_depth"), "{row}");
            let (z, delta) = (number(&row, "sigma"), Delta::new(number(&row, "delta")).unwrap());
            close(sensitivity.rho(z).unwrap(), number(&row, "rho_zcdp"), 1e-12, &row);
            close(sensitivity.epsilon(z, delta).unwrap(), number(&row, "eps_cks"), 1e-9, &row);
        }
    }

    #[test]
    fn many_times_without_restart_equals_the_reference() {
        for row in rows("tree_multi_participation_no_restart") {
            let of = |field| whole(number(&row, field));
            let participation =
                Participation::with_gap(of("steps"), of("min_separation_gap"), of("max_participation"));
            let sensitivity = tree_sensitivity(participation.unwrap()).unwrap();
            assert_eq!(sensitivity.squared(), number(&row, "sensitivity_sq"), "{row}");
            let rho = sensitivity.rho(number(&row, "noise_multiplier")).unwrap();
            close(rho, number(&row, "rho_zcdp"), 1e-12, &row);
        }
    }

    #[test]
    fn equals_every_pattern_tried() {
        for participation in brute::participations() {
            let best =
                brute::patterns(participation).into_iter().map(|set| squares(set, participation.steps()));
            let sensitivity = tree_sensitivity(participation).unwrap();
            assert_eq!(sensitivity.squared(), f64::from(best.max().unwrap()), "{participation:?}");
        }
    }

    /// The sum over all complete nodes below `steps` of the rounds of `set` below each, squared.
    fn squares(set: u32, steps: u32) -> u32 {
        let levels = (0..5).map(|height| 1u32 << height);
        let nodes = levels.flat_map(|size| (0..steps / size).map(move |at| (at * size, (1u64 << size) - 1)));
        nodes.map(|(from, mask)| (u64::from(set >> from) & mask).count_ones().pow(2)).sum()
    }

    #[test]
    fn once_in_one_tree_is_its_height_and_a_long_separation_changes_nothing() {
        for steps in [1, 2, 3, 63, 64, 1000, 2000] {
            let once = tree_single_epoch_sensitivity(&[steps]).unwrap();
            assert_eq!(tree_sensitivity(Participation::new(steps, 1, 1).unwrap()).unwrap(), once);
            assert_eq!(tree_sensitivity(Participation::new(steps, u32::MAX, 7).unwrap()).unwrap(), once);
        }
    }

    #[test]
    fn refuses_what_it_cannot_search() {
        assert!(tree_single_epoch_sensitivity(&[]).is_err() && tree_single_epoch_sensitivity(&[0]).is_err());
        assert!(tree_sensitivity(Participation::new(TREE_STEPS_MAX + 1, 10_000, 1).unwrap()).is_err());
        assert!(tree_sensitivity(Participation::new(1000, 1, 257).unwrap()).is_err());
    }
}
