//! Which shares are wrong: a polynomial's values are a Reed-Solomon code word, and of m values up to
//! (m - t) / 2 wrong ones can be told (Welch and Berlekamp 1986, US patent 4,633,470).
//!
//! Only the coordinator decodes, and only shares that were revealed to it: nothing here is secret to it.

use super::field::{inverse, multiply};

/// The places of the wrong values among points of a polynomial of degree below `threshold`. None if they are
/// too many to tell.
///
/// With e errors there are polynomials E (degree e, leading coefficient 1, zero at the wrong places) and
/// Q = P E (degree below e + threshold) with Q(x) = y E(x) at every point: a linear system.
pub(super) fn wrong_places(threshold: usize, points: &[(u8, u8)]) -> Option<Vec<u8>> {
    let errors_max = points.len().checked_sub(threshold)? / 2;
    (0..=errors_max).rev().find_map(|errors| solve_for(threshold, points, errors))
}

fn solve_for(threshold: usize, points: &[(u8, u8)], errors: usize) -> Option<Vec<u8>> {
    let unknowns = errors + errors + threshold;
    let row = |(x, y): &(u8, u8)| {
        // q_0 + q_1 x + ... - y (e_0 + e_1 x + ...) = y x^errors
        let powers = powers(*x, errors + threshold);
        let locator = powers[..errors].iter().map(|power| multiply(*y, *power));
        let right = multiply(*y, power(*x, errors));
        powers.iter().copied().chain(locator).chain([right]).collect::<Vec<u8>>()
    };
    let solution = eliminate(points.iter().map(row).collect(), unknowns)?;
    let (quotient, locator) = solution.split_at(errors + threshold);
    let located = |x: u8| evaluate(locator, x) ^ power(x, errors);
    let mut wrong = Vec::new();
    for (x, _) in points {
        if located(*x) == 0 {
            wrong.push(*x);
        }
    }
    // The solution is one of a code word only if Q / E has no remainder at the points that are left.
    let left: Vec<_> = points.iter().filter(|(x, _)| !wrong.contains(x)).collect();
    let agrees = |(x, y): &&(u8, u8)| multiply(*y, located(*x)) == evaluate(quotient, *x);
    (left.len() >= threshold && left.iter().all(agrees) && divides(quotient, locator, errors))
        .then_some(wrong)
}

/// True if the locator (with its leading 1) divides the quotient.
fn divides(quotient: &[u8], locator: &[u8], errors: usize) -> bool {
    let mut rest = quotient.to_vec();
    while rest.len() > errors {
        let lead = rest.pop().unwrap_or(0);
        let offset = rest.len() - errors;
        for (i, coefficient) in locator.iter().enumerate() {
            rest[offset + i] ^= multiply(lead, *coefficient);
        }
    }
    rest.iter().all(|coefficient| *coefficient == 0)
}

/// Gauss and Jordan; free unknowns become zero. None if the system contradicts itself.
fn eliminate(mut rows: Vec<Vec<u8>>, unknowns: usize) -> Option<Vec<u8>> {
    let mut pivots = Vec::new();
    for column in 0..unknowns {
        let done = pivots.len();
        let Some(found) = (done..rows.len()).find(|row| rows[*row][column] != 0) else { continue };
        rows.swap(done, found);
        let scale = inverse(rows[done][column]);
        rows[done].iter_mut().for_each(|value| *value = multiply(*value, scale));
        let pivot = rows[done].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(i, row)| *i != done && row[column] != 0) {
            let factor = row[column];
            for (value, pivot) in row.iter_mut().zip(&pivot) {
                *value ^= multiply(factor, *pivot);
            }
        }
        pivots.push(column);
    }
    if rows[pivots.len()..].iter().any(|row| row[unknowns] != 0) {
        return None;
    }
    let mut solution = vec![0; unknowns];
    for (row, column) in rows.iter().zip(&pivots) {
        solution[*column] = row[unknowns];
    }
    Some(solution)
}

fn evaluate(coefficients: &[u8], x: u8) -> u8 {
    coefficients.iter().rev().fold(0, |value, coefficient| multiply(value, x) ^ coefficient)
}

fn powers(x: u8, count: usize) -> Vec<u8> {
    std::iter::successors(Some(1), |power| Some(multiply(*power, x))).take(count).collect()
}

fn power(x: u8, exponent: usize) -> u8 {
    (0..exponent).fold(1, |power, _| multiply(power, x))
}
