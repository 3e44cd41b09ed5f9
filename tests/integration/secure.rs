//! Secure aggregation as `fleetune-sim bench secagg` runs it: every device and the coordinator over wire
//! messages, with devices lost before each step.

use fleetune_sim::bench::{SecaggArgs, measure};

fn args(devices: u32, drop_step: usize) -> SecaggArgs {
    SecaggArgs {
        devices,
        dimension: 1_000,
        bits: 20,
        degree: None,
        threshold: None,
        drop: 0.15,
        drop_step,
        suite: "aes128_ctr".into(),
        seed: u64::from(devices),
        json: true,
    }
}

#[test]
fn the_sum_is_exact_whoever_vanishes_before_whichever_step() {
    for devices in [7, 20, 70] {
        for drop_step in 0..5 {
            let measured = measure(&args(devices, drop_step)).expect("a session that succeeds");
            let lost = if drop_step < 3 { measured.dropped } else { 0 };
            assert!(measured.exact, "{measured:?}");
            assert_eq!(measured.survivors, devices - lost, "{measured:?}");
        }
    }
}

#[test]
fn every_width_and_both_suites() {
    for bits in [8, 16, 17, 24, 31, 32] {
        for suite in ["aes128_ctr", "chacha20"] {
            let args = SecaggArgs { bits, suite: suite.into(), ..args(9, 2) };
            assert!(measure(&args).expect("a session that succeeds").exact, "{bits} {suite}");
        }
    }
}

/// A packed vector, one percent and 20 kB: Flower 1.41 sends eight bytes a value.
#[test]
fn an_upload_is_hardly_more_than_the_vector() {
    let args = SecaggArgs { devices: 100, dimension: 100_000, drop: 0.1, ..args(100, 2) };
    let measured = measure(&args).expect("a session that succeeds");
    let packed = 100_000.0 * 20.0 / 8.0;
    assert!(measured.upload_bytes <= packed * 1.01 + 20_000.0, "{measured:?}");
    // One vector and one upload, and what a hundred devices' shares take.
    assert!(measured.server_peak_bytes < 8_000_000, "{measured:?}");
}

#[test]
fn settings_that_cannot_be_are_named() {
    let error = |args: SecaggArgs| format!("{:#}", measure(&args).expect_err("an error"));
    assert!(error(SecaggArgs { devices: 1, ..args(1, 0) }).contains("--devices"));
    assert!(error(SecaggArgs { bits: 33, ..args(9, 0) }).contains("ring of 33 bits"));
    assert!(error(SecaggArgs { drop_step: 5, ..args(9, 0) }).contains("--drop-step"));
    let weak = SecaggArgs { degree: Some(8), threshold: Some(3), drop: 0.0, ..args(9, 0) };
    assert!(error(weak).contains("twice the threshold"), "a device refuses it");
}
