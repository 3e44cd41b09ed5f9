//! Numbers and sentences that the page (`html.rs`) and the terminal table (`table.rs`) share. Plain
//! text: the page escapes it.

use super::{GainReport, Report};

/// Stands where a figure is missing or not finite.
const NOTHING: &str = "\u{2013}";

/// What the run shows, in one sentence.
pub(super) fn headline(report: &Report) -> String {
    if report.rounds.is_empty() {
        return "No round was finished".into();
    }
    if report.base.eval_nll <= report.central.scores.eval_nll {
        return "Central training gained nothing over the base model: there is no gain to reach".into();
    }
    let GainReport { seen, .. } = report.gain;
    if seen <= 0.0 {
        return "Federated training did not improve on the base model".into();
    }
    format!("Federated training reached {} of the gain of central training", percent(seen))
}

/// How the federated model compares with devices that trained alone, in one sentence.
pub(super) fn against_local_only(report: &Report) -> String {
    let local = &report.local_only;
    let (own, federated) = (nll(local.eval_nll), nll(local.federated_eval_nll));
    let devices = plural(local.devices.len() as u64, "device");
    match local.federated_eval_nll.partial_cmp(&local.eval_nll) {
        None => "No device trained alone: there is nothing to compare with".into(),
        Some(std::cmp::Ordering::Less) => {
            format!(
                "It beats local-only training: {federated} against {own} nats a token on the texts of {devices}"
            )
        }
        Some(std::cmp::Ordering::Equal | std::cmp::Ordering::Greater) => {
            format!(
                "It does not beat local-only training: {federated} against {own} nats a token on the texts of {devices}"
            )
        }
    }
}

/// What was trained: "adapter of 92,160 values".
pub(super) fn trained(report: &Report) -> String {
    match report.model.trains.as_str() {
        "model" => "all of them trained".into(),
        _ => format!("adapter of {} values", count(report.model.trainable)),
    }
}

/// "65,536".
pub(super) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// "1 round", "16 rounds".
pub(super) fn plural(value: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(value), if value == 1 { "" } else { "s" })
}

/// Nats a token, to a thousandth.
pub(super) fn nll(value: f64) -> String {
    if value.is_finite() { format!("{value:.3}") } else { NOTHING.into() }
}

/// The same, where a figure may be missing.
pub(super) fn nll_or_nothing(value: Option<f64>) -> String {
    nll(value.unwrap_or(f64::NAN))
}

/// A difference with its sign, a true minus included.
pub(super) fn signed(value: f64) -> String {
    if !value.is_finite() {
        return NOTHING.into();
    }
    let sign = if value < 0.0 { "\u{2212}" } else { "+" };
    format!("{sign}{:.3}", value.abs())
}

/// A share as "95.2 %".
pub(super) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1}\u{a0}%", share * 100.0) } else { NOTHING.into() }
}

/// Bytes in decimal units.
pub(super) fn bytes(value: u64) -> String {
    const UNITS: [&str; 4] = ["bytes", "kB", "MB", "GB"];
    let unit = UNITS.len().min(1 + value.checked_ilog(1000).unwrap_or(0) as usize) - 1;
    if unit == 0 {
        return plural(value, "byte");
    }
    format!("{:.2}\u{a0}{}", value as f64 / 1000_f64.powi(unit as i32), UNITS[unit])
}

/// A span of time in the two largest units that fit.
pub(super) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return NOTHING.into();
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1}\u{a0}s"),
        60..3600 => format!("{}\u{a0}min\u{a0}{}\u{a0}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}\u{a0}h\u{a0}{}\u{a0}min", whole / 3600, whole % 3600 / 60),
        86_400.. => format!("{}\u{a0}d\u{a0}{}\u{a0}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::sample, *};

    #[test]
    fn numbers_read_as_people_write_them() {
        let check = |actual: String, expected: &str| assert_eq!(actual.replace('\u{a0}', " "), expected);
        check(count(0), "0");
        check(count(999), "999");
        check(count(1_048_576), "1,048,576");
        check(plural(1, "round"), "1 round");
        check(nll(4.2114), "4.211");
        check(nll(f64::NAN), "–");
        check(signed(-0.5714), "−0.571");
        check(percent(0.9523), "95.2 %");
        check(bytes(1), "1 byte");
        check(bytes(999), "999 bytes");
        check(bytes(2_306_867), "2.31 MB");
        check(bytes(u64::MAX), "18446744073.71 GB");
        check(duration(7.26), "7.3 s");
        check(duration(200.0), "3 min 20 s");
        check(duration(93_784.0), "1 d 2 h");
        check(duration(f64::INFINITY), "–");
    }

    #[test]
    fn the_headline_never_claims_more_than_the_figures() {
        let headline = |spoil: &dyn Fn(&mut Report)| {
            let mut report = sample::report();
            spoil(&mut report);
            headline(&report).replace('\u{a0}', " ")
        };
        assert_eq!(headline(&|_| ()), "Federated training reached 94.7 % of the gain of central training");
        assert!(
            headline(&|r| r.central.scores.eval_nll = 5.0).starts_with("Central training gained nothing")
        );
        assert!(headline(&|r| r.gain.seen = -0.1).contains("did not improve"));
        assert!(headline(&|r| r.rounds.clear()).contains("No round"));
    }

    #[test]
    fn local_only_may_win_or_be_absent() {
        let mut report = sample::report();
        assert!(against_local_only(&report).starts_with("It beats local-only"));
        report.local_only.federated_eval_nll = 9.0;
        assert!(against_local_only(&report).starts_with("It does not beat"));
        report.local_only.eval_nll = f64::NAN;
        assert!(against_local_only(&report).starts_with("No device trained alone"));
    }
}
