//! Line plots: NLL over trained tokens, and the norm of the mean update by round.

use super::{
    super::{Report, RoundReport, words},
    plot::{Axis, LegendEntry, Plot},
};

/// More points than this are drawn as a line alone.
const MARKED_POINTS_MAX: usize = 40;
/// Most ticks of the rounds' axis.
const ROUND_TICKS_MAX: u32 = 9;

/// Whose text is evaluated.
#[derive(Clone, Copy)]
pub(super) enum Scope {
    Seen,
    HeldOut,
}

impl Scope {
    /// NLL of a round; none where it was not evaluated.
    fn of_round(self, round: &RoundReport) -> Option<f64> {
        match self {
            Self::Seen => round.eval_nll,
            Self::HeldOut => round.heldout_nll,
        }
    }
}

/// A point with what is said about it.
struct Point {
    x: f64,
    y: f64,
    words: String,
}

/// NLL over trained tokens: federated, central, and the base as a level.
pub(super) fn nll_plot(report: &Report, scope: Scope) -> String {
    let (id, who) = match scope {
        Scope::Seen => ("nll-seen", "Seen users"),
        Scope::HeldOut => ("nll-heldout", "Held-out users"),
    };
    let (federated, central) = (federated_points(report, scope), central_points(report, scope));
    let base = base_nll(report, scope);
    let last = |points: &[Point]| words::nll(points.last().map_or(f64::NAN, |point| point.y));
    let points = || federated.iter().chain(&central);
    let plot = Plot {
        id,
        title: format!("{who}: NLL over trained tokens"),
        description: format!(
            "Federated training ends at {} nats a token, central training at {}; the base model is at {}.",
            last(&federated),
            last(&central),
            words::nll(base)
        ),
        x: Axis::within("trained tokens", points().map(|point| point.x), 5),
        upper: Some(round_ticks(report)),
        y: nll_axis(report),
        legend: vec![
            line_entry("federated", "dot", format!("federated {}", last(&federated))),
            line_entry("central", "square", format!("central {}", last(&central))),
            line_entry("base", "", format!("base {}", words::nll(base))),
        ],
    };
    let level = level(&plot, base);
    let marks = [level, line(&plot, &central, "central"), line(&plot, &federated, "federated")];
    plot.draw(&marks.concat())
}

/// L2 norm of the mean update, by round.
pub(super) fn update_norm_plot(rounds: &[RoundReport]) -> String {
    let points: Vec<Point> = rounds.iter().map(norm_point).collect();
    let norms = || rounds.iter().map(|round| round.update_norm);
    let plot = Plot {
        id: "update-norm",
        title: "Norm of the mean update by round".into(),
        description: format!(
            "It starts at {} and ends at {}.",
            words::nll_or_nothing(norms().next()),
            words::nll_or_nothing(norms().next_back())
        ),
        x: round_axis(rounds),
        upper: None,
        y: Axis::around("L2 norm", norms().chain([0.0]), 4),
        legend: vec![line_entry("federated", "dot", "norm of the mean of a round's updates".into())],
    };
    plot.draw(&line(&plot, &points, "federated"))
}

/// Epsilon after each round.
pub(super) fn epsilon_plot(epsilons: &[f64], label: &str) -> String {
    let (plot, points) = epsilon_lines(epsilons, label);
    plot.draw(&line(&plot, &points, "federated"))
}

/// The same as a drawing that stands alone.
pub(super) fn epsilon_drawing(epsilons: &[f64], label: &str, style: &str) -> String {
    let (plot, points) = epsilon_lines(epsilons, label);
    plot.draw_alone(&line(&plot, &points, "federated"), style)
}

fn epsilon_lines(epsilons: &[f64], label: &str) -> (Plot, Vec<Point>) {
    let point = |(round, epsilon): (u32, &f64)| {
        let words = format!("round {round}: epsilon {}", words::nll(*epsilon));
        Point { x: f64::from(round), y: *epsilon, words }
    };
    let points: Vec<Point> = (1..).zip(epsilons).map(point).collect();
    let last = words::nll_or_nothing(epsilons.last().copied());
    let plot = Plot {
        id: "epsilon",
        title: "Epsilon by round".into(),
        description: format!("After {} it is {last}.", words::plural(points.len() as u64, "round")),
        x: Axis::within("round", points.iter().map(|point| point.x), 8),
        upper: None,
        y: Axis::around("epsilon", epsilons.iter().copied().chain([0.0]), 5),
        legend: vec![line_entry("federated", "dot", label.to_owned())],
    };
    (plot, points)
}

/// The rounds as an x axis, half a round of room at both ends.
pub(super) fn round_axis(rounds: &[RoundReport]) -> Axis {
    let last = rounds.last().map_or(1, |round| round.round);
    let step = last.div_ceil(ROUND_TICKS_MAX).max(1);
    let ticks = (1..=last).filter(|round| step == 1 || round % step == 0);
    Axis {
        title: "round".into(),
        low: 0.5,
        high: f64::from(last) + 0.5,
        ticks: ticks.map(|round| (f64::from(round), round.to_string())).collect(),
    }
}

/// One NLL axis for both scopes: the plots stand side by side and are compared.
fn nll_axis(report: &Report) -> Axis {
    let points = |scope| federated_points(report, scope).into_iter().chain(central_points(report, scope));
    let values = points(Scope::Seen).chain(points(Scope::HeldOut)).map(|point| point.y);
    Axis::around("NLL, nats a token", values, 5)
}

fn federated_points(report: &Report, scope: Scope) -> Vec<Point> {
    let start = Point { x: 0.0, y: base_nll(report, scope), words: "base".into() };
    let point = |round: &RoundReport| {
        let y = scope.of_round(round)?;
        let words =
            format!("round {}, {} tokens: {}", round.round, words::count(round.tokens), words::nll(y));
        Some(Point { x: round.tokens as f64, y, words })
    };
    [start]
        .into_iter()
        .chain(report.rounds.iter().filter_map(point))
        .filter(|point| point.y.is_finite())
        .collect()
}

fn central_points(report: &Report, scope: Scope) -> Vec<Point> {
    let start = Point { x: 0.0, y: base_nll(report, scope), words: "base".into() };
    let curve = report.central.curve.iter().map(|at| {
        let y = match scope {
            Scope::Seen => at.eval_nll,
            Scope::HeldOut => at.heldout_nll,
        };
        let words = format!("central, {} tokens: {}", words::count(at.tokens), words::nll(y));
        Point { x: at.tokens as f64, y, words }
    });
    [start].into_iter().chain(curve).filter(|point| point.y.is_finite()).collect()
}

fn base_nll(report: &Report, scope: Scope) -> f64 {
    match scope {
        Scope::Seen => report.base.eval_nll,
        Scope::HeldOut => report.base.heldout_nll,
    }
}

fn norm_point(round: &RoundReport) -> Point {
    let words = format!("round {}: {}", round.round, words::nll(round.update_norm));
    Point { x: f64::from(round.round), y: round.update_norm, words }
}

/// Round numbers at the tokens where those rounds ended.
fn round_ticks(report: &Report) -> Axis {
    let by_number = round_axis(&report.rounds);
    let ticks = by_number.ticks.into_iter().filter_map(|(number, label)| {
        let round = report.rounds.iter().find(|round| f64::from(round.round) == number)?;
        Some((round.tokens as f64, label))
    });
    Axis { ticks: ticks.collect(), ..by_number }
}

/// A horizontal line across the plot.
fn level(plot: &Plot, value: f64) -> String {
    if !value.is_finite() {
        return String::new();
    }
    let (left, right) = (plot.place_x(plot.x.low), plot.place_x(plot.x.high));
    format!("<path class=\"line base\" d=\"M{left:.1} {:.1}H{right:.1}\"/>", plot.place_y(value))
}

fn line(plot: &Plot, points: &[Point], class: &str) -> String {
    let placed = points.iter().filter(|point| point.y.is_finite());
    let path: Vec<String> = placed
        .clone()
        .map(|point| format!("{:.1} {:.1}", plot.place_x(point.x), plot.place_y(point.y)))
        .collect();
    if path.is_empty() {
        return String::new();
    }
    let marks: String = match points.len() {
        0..=MARKED_POINTS_MAX => placed.map(|point| mark(plot, point, class)).collect(),
        _ => String::new(),
    };
    format!("<path class=\"line {class}\" d=\"M{}\"/>{marks}", path.join("L"))
}

/// A circle for the federated model, a square for others: told apart without colour.
fn mark(plot: &Plot, point: &Point, class: &str) -> String {
    let (x, y) = (plot.place_x(point.x), plot.place_y(point.y));
    let words = super::text::escape(&point.words);
    match class {
        "federated" => format!(
            "<circle class=\"mark {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"><title>{words}</title></circle>"
        ),
        _ => {
            let (left, top) = (x - 3.0, y - 3.0);
            format!(
                "<rect class=\"mark {class}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"6\" height=\"6\"><title>{words}</title></rect>"
            )
        }
    }
}

fn line_entry(class: &str, shape: &str, text: String) -> LegendEntry {
    let mark = match shape {
        "dot" => format!("<circle class=\"mark {class}\" cx=\"12\" cy=\"6\" r=\"4\"/>"),
        "square" => format!("<rect class=\"mark {class}\" x=\"9\" y=\"3\" width=\"6\" height=\"6\"/>"),
        _ => String::new(),
    };
    LegendEntry { swatch: format!("<path class=\"line {class}\" d=\"M0 6H24\"/>{mark}"), text }
}

#[cfg(test)]
mod tests {
    use super::{super::super::sample, *};

    #[test]
    fn draws_a_mark_for_every_evaluated_round_and_the_base() {
        let report = sample::report();
        let svg = nll_plot(&report, Scope::Seen);
        let evaluated = report.rounds.iter().filter(|round| round.eval_nll.is_some()).count();
        assert_eq!(svg.matches("<circle class=\"mark federated\" cx").count(), evaluated + 2, "{svg}");
        assert!(svg.contains("round 16, 65,536 tokens"), "{svg}");
    }

    #[test]
    fn no_rounds_and_no_figures_draw_an_empty_frame() {
        let mut report = sample::report();
        report.rounds.clear();
        report.central.curve.clear();
        report.base.eval_nll = f64::NAN;
        let svg = nll_plot(&report, Scope::Seen) + &update_norm_plot(&report.rounds);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
