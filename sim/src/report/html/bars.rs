//! Bar plots: what became of the selected devices by round, and what each sampled device gained
//! alone and from the fleet.

use super::{
    super::{LocalOnlyDevice, LocalOnlyReport, RoundReport, words},
    lines::round_axis,
    plot::{Axis, LegendEntry, Plot, WIDTH, drawing, legend, text},
    text::escape,
};

/// Devices drawn; the table under the plot holds all.
const DEVICES_DRAWN_MAX: usize = 16;
/// Height of one device: its name and two bars.
const DEVICE_HEIGHT: f64 = 56.0;
const BAR_HEIGHT: f64 = 14.0;
/// Left and right of the bars: room for their figures.
const MARGIN: f64 = 56.0;

/// Contributions, devices lost and devices not needed, stacked, by round.
pub(super) fn participation_plot(rounds: &[RoundReport]) -> String {
    let sum = |count: fn(&RoundReport) -> u32| {
        words::count(rounds.iter().map(|round| u64::from(count(round))).sum())
    };
    let plot = Plot {
        id: "participation",
        title: "Selected devices by round".into(),
        description: format!(
            "{} devices were selected in all; {} contributed and {} dropped out.",
            sum(|round| round.selected),
            sum(|round| round.completed),
            sum(|round| round.dropped)
        ),
        x: round_axis(rounds),
        upper: None,
        y: Axis::around("devices", rounds.iter().map(|round| f64::from(total(round))).chain([0.0, 4.0]), 5),
        legend: participation_legend(rounds),
    };
    let bars: String = rounds.iter().map(|round| stack(&plot, round)).collect();
    plot.draw(&bars)
}

/// Gain over the base model on a device's own test text: trained alone, and federated.
pub(super) fn local_only_plot(local: &LocalOnlyReport) -> String {
    let devices = &local.devices[..local.devices.len().min(DEVICES_DRAWN_MAX)];
    let gains = devices.iter().flat_map(|device| [alone(device), federated(device)]).chain([0.0]);
    let axis = Axis::around("", gains, 4);
    let height = 48.0 + DEVICE_HEIGHT * devices.len() as f64;
    let scale = |gain: f64| MARGIN + (gain - axis.low) / (axis.high - axis.low) * (WIDTH - 2.0 * MARGIN);
    let rows: String = devices
        .iter()
        .enumerate()
        .map(|(place, device)| device_rows(device, 38.0 + place as f64 * DEVICE_HEIGHT, &scale))
        .collect();
    let caption = text(scale(0.0), height - 3.0, "tick", "0 = base");
    let key = legend(&[
        bar_entry("local", &format!("alone, {} steps", local.steps)),
        bar_entry("federated", "federated"),
    ]);
    drawing(
        "local-only",
        height,
        "Gain over the base model on each device's own test text, nats a token",
        &format!(
            "Mean NLL: base {}, trained alone {}, federated {}.",
            words::nll(local.base_eval_nll),
            words::nll(local.eval_nll),
            words::nll(local.federated_eval_nll)
        ),
        &[key, rows, caption].concat(),
    )
}

fn participation_legend(rounds: &[RoundReport]) -> Vec<LegendEntry> {
    let mut legend =
        vec![bar_entry("completed", "contributed"), bar_entry("dropped", "dropped out or too late")];
    if rounds.iter().any(|round| total(round) > round.completed + round.dropped) {
        legend.push(bar_entry("unneeded", "not needed"));
    }
    legend
}

fn total(round: &RoundReport) -> u32 {
    round.selected.max(round.completed + round.dropped)
}

fn alone(device: &LocalOnlyDevice) -> f64 {
    device.base_nll - device.local_nll
}

fn federated(device: &LocalOnlyDevice) -> f64 {
    device.base_nll - device.federated_nll
}

fn stack(plot: &Plot, round: &RoundReport) -> String {
    let number = f64::from(round.round);
    let (left, width) =
        (plot.place_x(number - 0.36), plot.place_x(number + 0.36) - plot.place_x(number - 0.36));
    let tops = [round.completed, round.completed + round.dropped, total(round)];
    let classes = ["completed", "dropped", "unneeded"];
    let mut below = 0;
    let mut bars = String::new();
    for (class, top) in classes.into_iter().zip(tops) {
        let (y, height) =
            (plot.place_y(f64::from(top)), plot.place_y(f64::from(below)) - plot.place_y(f64::from(top)));
        if top > below {
            bars.push_str(&format!(
                "<rect class=\"bar {class}\" x=\"{left:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
            ));
        }
        below = top;
    }
    let RoundReport { round, selected, completed, dropped, .. } = round;
    format!(
        "<g><title>round {round}: {selected} selected, {completed} completed, {dropped} dropped</title>{bars}</g>"
    )
}

fn device_rows(device: &LocalOnlyDevice, top: f64, scale: &dyn Fn(f64) -> f64) -> String {
    let name = text(
        4.0,
        top + 12.0,
        "legend start",
        &format!("{}, base {}", device.user, words::nll(device.base_nll)),
    );
    let bars = [("local", alone(device), 18.0), ("federated", federated(device), 18.0 + BAR_HEIGHT + 2.0)];
    let bars: String =
        bars.into_iter().map(|(class, gain, down)| gain_bar(class, gain, top + down, scale)).collect();
    let (x, from, to) = (scale(0.0), top + 16.0, top + DEVICE_HEIGHT - 6.0);
    let zero = format!("<path class=\"rule\" d=\"M{x:.1} {from:.1}V{to:.1}\"/>");
    format!("<g><title>{}</title>{name}{bars}{zero}</g>", escape(&device.user))
}

/// A bar from the base model's place; a loss points to the left.
fn gain_bar(class: &str, gain: f64, y: f64, scale: &dyn Fn(f64) -> f64) -> String {
    if !gain.is_finite() {
        return String::new();
    }
    let (from, to) = (scale(gain.min(0.0)), scale(gain.max(0.0)));
    let (side, anchor) = if gain < 0.0 { (from - 5.0, "end") } else { (to + 5.0, "start") };
    let figure = text(side, y + 11.5, &format!("tick {anchor}"), &words::signed(gain));
    let width = to - from;
    format!(
        "<rect class=\"bar {class}\" x=\"{from:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR_HEIGHT}\"/>{figure}"
    )
}

fn bar_entry(class: &str, text: &str) -> LegendEntry {
    let swatch = format!("<rect class=\"bar {class}\" x=\"4\" y=\"0\" width=\"18\" height=\"12\"/>");
    LegendEntry { swatch, text: text.into() }
}

#[cfg(test)]
mod tests {
    use super::{super::super::sample, *};

    #[test]
    fn a_device_that_lost_by_training_alone_points_left() {
        let svg = local_only_plot(&sample::report().local_only);
        assert!(svg.contains("\u{2212}0.090") && svg.contains("+0.380"), "{svg}");
        assert_eq!(svg.matches("<rect class=\"bar federated\" x").count(), 6, "{svg}");
        assert!(!svg.contains("<b>"), "{svg}");
    }

    #[test]
    fn stacks_hold_all_selected_devices() {
        let svg = participation_plot(&sample::report().rounds);
        assert!(svg.contains("round 3: 10 selected, 8 completed, 2 dropped"), "{svg}");
        assert!(
            svg.contains("160 devices were selected in all; 128 contributed and 12 dropped out."),
            "{svg}"
        );
    }

    #[test]
    fn no_devices_and_no_rounds_draw_nothing_wrong() {
        let mut local = sample::report().local_only;
        local.devices.clear();
        let svg = local_only_plot(&local) + &participation_plot(&[]);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
