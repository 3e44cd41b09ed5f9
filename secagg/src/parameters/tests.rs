//! The tables of the design, exact values, and what is refused.

use super::*;

const SIZES: [u32; 6] = [50, 100, 200, 500, 1000, 5000];

/// Gamma and delta in thousandths, and (k, t) for each of [`SIZES`].
type Row = (u32, u32, [(u32, u32); 6]);

/// Sigma 40, eta 20, against a coordinator that lies.
const GOLDEN: [Row; 6] = [
    (50, 50, [(8, 6), (16, 11), (30, 21), (44, 31), (52, 37), (58, 41)]),
    (50, 100, [(14, 9), (26, 16), (42, 27), (66, 44), (78, 52), (92, 61)]),
    (100, 100, [(16, 11), (32, 22), (56, 39), (82, 57), (96, 67), (116, 81)]),
    (100, 200, [(26, 16), (52, 32), (88, 55), (154, 98), (196, 125), (260, 166)]),
    (200, 200, [(32, 22), (62, 42), (118, 80), (220, 150), (302, 206), (442, 301)]),
    (330, 100, [(28, 23), (54, 44), (98, 78), (168, 132), (218, 171), (292, 228)]),
];

/// The same against one that follows the protocol: t = c + 1.
const GOLDEN_SEMI_HONEST: [Row; 3] = [
    (50, 50, [(6, 3), (12, 6), (20, 11), (28, 16), (30, 17), (32, 19)]),
    (100, 100, [(12, 6), (22, 11), (34, 19), (42, 24), (48, 27), (52, 30)]),
    (200, 200, [(22, 11), (40, 21), (62, 34), (88, 48), (98, 54), (118, 64)]),
];

/// What the conditions come to for some members, gamma, delta, sigma and eta: k, t and c, and log2 of the
/// three probabilities (disconnected, n P[Hyp > c], n P[Hyp < t]). Computed with exact integers.
struct Exact(u32, [u32; 4], [u32; 3], [f64; 3]);

const NEVER: f64 = f64::NEG_INFINITY;
const EXACT: [Exact; 12] = [
    Exact(64, [100, 200, 40, 20], [32, 20, 6], [NEVER, NEVER, NEVER]),
    Exact(97, [50, 100, 40, 20], [24, 15, 4], [NEVER, NEVER, NEVER]),
    Exact(100, [200, 200, 40, 20], [62, 42, 20], [NEVER, NEVER, NEVER]),
    Exact(300, [100, 150, 40, 20], [92, 61, 28], [NEVER, -41.671_292_026, -21.191_518_607]),
    Exact(1000, [50, 50, 40, 20], [52, 37, 20], [-175.605_630_343, -41.428_351_933, -21.384_830_441]),
    Exact(1000, [100, 100, 40, 20], [96, 67, 37], [-237.234_265_446, -43.114_769_090, -20.632_547_731]),
    Exact(1000, [100, 200, 40, 20], [196, 125, 53], [-415.317_710_786, -41.419_312_672, -20.757_569_521]),
    Exact(1000, [100, 100, 80, 40], [152, 106, 59], [-436.214_065_869, -82.469_171_222, -40.511_671_588]),
    Exact(1000, [0, 100, 40, 20], [36, 19, 0], [-110.201_360_428, NEVER, -21.006_128_836]),
    Exact(5000, [50, 100, 60, 30], [122, 81, 39], [-323.256_754_307, -62.487_828_867, -30.908_260_341]),
    Exact(65_536, [50, 50, 40, 20], [68, 48, 26], [-195.369_747_300, -41.181_903_810, -20.761_475_309]),
    Exact(65_536, [100, 100, 40, 20], [134, 93, 50], [-280.947_002_802, -41.315_300_944, -20.762_926_650]),
];

#[test]
fn exact_values() {
    for Exact(n, [gamma, delta, sigma, eta], [degree, threshold, corrupted], expected) in EXACT {
        let assumptions = Assumptions::new(gamma, delta, sigma, eta).unwrap();
        let found = solve_sparse(n, &assumptions, u32::MAX).unwrap();
        assert_eq!(found, Degrees { degree, threshold }, "{n} {gamma} {delta}");
        let ((all, dropouts), table) = (assumptions.parts(n).unwrap(), Factorials::new(n));
        assert_eq!(table.corrupted_neighbours(n, degree, all, sigma), corrupted);
        let tail: f64 = (corrupted + 1..=degree).map(|x| table.hypergeometric(n - 1, all, degree, x)).sum();
        let logs = [
            table.log2_disconnected(n, degree, all + dropouts),
            f64::from(n).log2() + tail.log2(),
            table.log2_short_of_shares(n, degree, threshold, dropouts),
        ];
        for (log, expected) in logs.into_iter().zip(expected) {
            assert!(log == expected || (log - expected).abs() < 1e-6, "{n} {gamma}: {log} not {expected}");
        }
    }
}

#[test]
fn golden_table_of_an_honest_coordinator() {
    for (gamma, delta, row) in GOLDEN_SEMI_HONEST {
        let assumptions = Assumptions::new(gamma, delta, 40, 20).unwrap();
        for (n, (degree, threshold)) in SIZES.into_iter().zip(row) {
            let found = search(n, &assumptions, u32::MAX, |_, corrupted| corrupted + 1).unwrap();
            assert_eq!(found, Degrees { degree, threshold }, "{gamma} {delta} {n}");
        }
    }
}

#[test]
fn golden_table() {
    for (gamma, delta, row) in GOLDEN {
        let assumptions = Assumptions::new(gamma, delta, 40, 20).unwrap();
        for (n, (degree, threshold)) in SIZES.into_iter().zip(row) {
            let found = solve_sparse(n, &assumptions, u32::MAX).unwrap();
            assert_eq!(found, Degrees { degree, threshold }, "{gamma} {delta} {n}");
            if degree <= DEGREE_MAX {
                let dropouts = part(n, delta);
                assert_eq!(check(n, found, gamma, dropouts, 40), Ok(()));
                let lower = Degrees { threshold: threshold - 1, degree };
                let error = check(n, lower, gamma, dropouts, 40).unwrap_err();
                assert!(matches!(error, ParameterError::Equivocation { .. }), "{error}");
            }
        }
    }
}

#[test]
fn small_cohorts_are_fully_connected() {
    let assumptions = Assumptions::new(100, 200, 40, 20).unwrap();
    for n in 4..FULL_GRAPH_BELOW {
        let degrees = solve(n, &assumptions).unwrap();
        assert_eq!(degrees.degree, n - 1);
        assert_eq!(check(n, degrees, 100, part(n, 200), 40), Ok(()));
    }
    assert_eq!(solve(16, &assumptions).unwrap(), Degrees { degree: 15, threshold: 9 });
    assert_eq!(solve(64, &assumptions).unwrap().degree % 2, 0);
}

#[test]
fn refuses_what_cannot_be_and_says_why() {
    let says = |outcome: Result<Degrees, ParameterError>, expected: &str| {
        let error = outcome.unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    };
    assert!(Assumptions::new(100, 401, 40, 20).is_err());
    assert!(Assumptions::new(0, 0, 0, 20).is_err() && Assumptions::new(0, 0, 40, 129).is_err());
    let lossy = Assumptions::new(100, 400, 40, 20).unwrap();
    says(solve(10, &lossy), "10 devices, all neighbours: 6 shares must be there, 5 are left after 4");
    says(solve(1, &lossy), "1 devices make no cohort");
    let hard = Assumptions::new(200, 200, 40, 20).unwrap();
    let error = "1000 devices: no degree up to 254 satisfies all conditions; the last to fail was correctness, by 10 bits";
    says(solve(1000, &hard), error);
    says(
        solve_sparse(1000, &hard, 20),
        "1000 devices: no degree up to 20 satisfies all conditions; the last",
    );
    says(solve_sparse(2, &hard, 254), "2 devices: no degree up to 1 satisfies all conditions; the last");
    let unchecked = Assumptions { corrupted_permille: 1000, dropout_permille: 1000, sigma: 40, eta: 20 };
    says(solve(10, &unchecked), "1000 permille corrupted and 1000 permille dropouts");
    says(solve_sparse(1000, &Assumptions { sigma: u32::MAX, ..hard }, 254), "sigma 4294967295");
}

#[test]
fn a_device_refuses_degrees_that_do_not_protect_it() {
    let refused = |n, degree, threshold, expected: &str| {
        let error = check(n, Degrees { degree, threshold }, 100, n / 5, 40).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    };
    refused(100, 51, 40, "degree 51 among 100 devices: even");
    refused(100, 100, 60, "degree 100 among 100 devices");
    refused(1000, 256, 200, "degree 256 among 1000 devices");
    refused(100, 0, 0, "degree 0");
    refused(100, 52, 53, "threshold 53 with 52 neighbours");
    refused(1000, 10, 10, "degree 10 among 1000 devices: the honest survivors may not be connected");
    refused(100, 52, 27, "threshold 27 with 52 neighbours");
    let full = Degrees { degree: 9, threshold: 9 };
    assert_eq!(check(10, full, 100, u32::MAX, 40), Ok(()), "a full graph is connected whoever is missing");
    for all in [1000, u32::MAX] {
        let error = check(10, full, all, 0, 40).unwrap_err();
        assert_eq!(error, ParameterError::Equivocation { threshold: 9, degree: 9, corrupted: 9 });
    }
    assert!(check(1000, Degrees { degree: 96, threshold: 67 }, 100, 100, u32::MAX).is_err());
    assert!(check(1, Degrees { degree: 0, threshold: 0 }, 0, 0, 40).is_err());
    assert!(check(u32::MAX, Degrees { degree: u32::MAX - 1, threshold: 1 }, 0, 0, 1).is_err());
}
