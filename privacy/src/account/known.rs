//! Known answers by other people's code: dp-accounting 0.6.0, jax_privacy 2.0.0, mpmath and scipy
//! (`testdata/privacy.json`, whose `meta` says which field is the answer and to what tolerance).

use serde_json::Value;

/// The rows of a section.
pub(crate) fn rows(section: &str) -> Vec<Value> {
    let section = value(section);
    let rows = section.get("rows").unwrap_or(&section);
    rows.as_array().expect("rows").clone()
}

/// A section whole.
pub(crate) fn value(section: &str) -> Value {
    let text = include_str!("../../testdata/privacy.json");
    let all: Value = serde_json::from_str(text).expect("the known answers parse");
    all[section].clone()
}

/// A row's number.
pub(crate) fn number(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or_else(|| panic!("{field} is no number in {row}"))
}

/// Fails with the row unless `actual` is within a relative tolerance of `expected`.
#[track_caller]
pub(crate) fn close(actual: f64, expected: f64, tolerance: f64, row: &Value) {
    let error = (actual - expected).abs() / expected.abs().max(1e-300);
    assert!(error <= tolerance, "{actual} for {expected} ({error:e} off) in {row}");
}
