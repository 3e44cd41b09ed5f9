//! The frame of a plot: scales, ticks, grid, axis titles and legend, as SVG. What is drawn inside
//! comes from `lines.rs` and `bars.rs`. Colours and fonts are classes of `page.css`.

use super::text::escape;

/// Narrow on purpose: on a phone the drawing is shrunk little, so its texts stay readable.
pub(super) const WIDTH: f64 = 460.0;
pub(super) const HEIGHT: f64 = 316.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 48.0;
/// Room for a second axis above.
const UPPER_AXIS: f64 = 36.0;
/// Mean width of a character of the legend, in drawing units.
const CHARACTER: f64 = 7.3;

/// One axis: its span and its ticks, in data units.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Axis {
    pub(super) title: String,
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) ticks: Vec<(f64, String)>,
}

impl Axis {
    /// An axis over finite `values` with about `count` round ticks; its ends are ticks.
    pub(super) fn around(title: &str, values: impl Iterator<Item = f64>, count: usize) -> Self {
        let (low, high) = span(values);
        let step = round_step((high - low) / count as f64);
        let (first, last) = ((low / step).floor() as i64, (high / step).ceil() as i64);
        let ticks = (first..=last).map(|i| (i as f64 * step, tick_label(i as f64 * step, step))).collect();
        Self { title: title.into(), low: first as f64 * step, high: last as f64 * step, ticks }
    }

    /// The same, but the axis ends where the values end.
    pub(super) fn within(title: &str, values: impl Iterator<Item = f64>, count: usize) -> Self {
        let (low, high) = span(values);
        let mut axis = Self::around(title, [low, high].into_iter(), count);
        axis.ticks.retain(|(at, _)| (low..=high).contains(at));
        (axis.low, axis.high) = (low, high);
        axis
    }
}

/// A named mark of the legend: a fragment of SVG drawn in a 24 x 12 box, and its text.
pub(super) struct LegendEntry {
    pub(super) swatch: String,
    pub(super) text: String,
}

/// The frame: what is measured, and how.
pub(super) struct Plot {
    /// Unique on the page; names the title and description for screen readers.
    pub(super) id: &'static str,
    pub(super) title: String,
    pub(super) description: String,
    pub(super) x: Axis,
    /// A second reading of the x axis, drawn above: ticks at places of `x`.
    pub(super) upper: Option<Axis>,
    pub(super) y: Axis,
    pub(super) legend: Vec<LegendEntry>,
}

impl Plot {
    /// Drawing unit of a value on the x axis.
    pub(super) fn place_x(&self, value: f64) -> f64 {
        LEFT + (value - self.x.low) / (self.x.high - self.x.low) * (WIDTH - LEFT - RIGHT)
    }

    /// Drawing unit of a value on the y axis.
    pub(super) fn place_y(&self, value: f64) -> f64 {
        let bottom = HEIGHT - BOTTOM;
        bottom - (value - self.y.low) / (self.y.high - self.y.low) * (bottom - self.top())
    }

    /// The whole drawing around `marks`.
    pub(super) fn draw(&self, marks: &str) -> String {
        let parts = [legend(&self.legend), self.draw_y(), self.draw_x(), self.draw_upper(), marks.into()];
        drawing(self.id, HEIGHT, &self.title, &self.description, &parts.concat())
    }

    /// The same as a file of its own, with its title above and its colours inside.
    pub(super) fn draw_alone(&self, marks: &str, style: &str) -> String {
        let whole = self.draw(marks);
        let opening = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT:.0}\"");
        let (left, height) = (WIDTH / 2.0, HEIGHT + 28.0);
        let alone = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 -28 {WIDTH} {height:.0}\" width=\"{:.0}\" \
             height=\"{:.0}\" font-family=\"system-ui, sans-serif\"",
            WIDTH * 2.0,
            height * 2.0
        );
        let title = text(left, -10.0, "title", &self.title);
        let paper = format!(
            "<rect x=\"0\" y=\"-28\" width=\"{WIDTH}\" height=\"{height:.0}\" fill=\"var(--paper)\"/>"
        );
        let body = whole.replacen(&opening, &alone, 1);
        body.replacen("</desc>", &format!("</desc><style>{style}</style>{paper}{title}"), 1)
    }

    fn top(&self) -> f64 {
        if self.upper.is_some() { TOP + UPPER_AXIS } else { TOP }
    }

    fn draw_y(&self) -> String {
        let right = WIDTH - RIGHT;
        let tick = |(at, label): &(f64, String)| {
            let y = self.place_y(*at);
            format!(
                "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{right}\"/>{}",
                text(LEFT - 7.0, y + 4.5, "tick end", label)
            )
        };
        let ticks: String = self.y.ticks.iter().map(tick).collect();
        let middle = f64::midpoint(self.top(), HEIGHT - BOTTOM);
        let title = escape(&self.y.title);
        format!(
            "{ticks}<text class=\"axis\" transform=\"translate(14 {middle:.1}) rotate(-90)\">{title}</text>"
        )
    }

    fn draw_x(&self) -> String {
        let bottom = HEIGHT - BOTTOM;
        let tick = |(at, label): &(f64, String)| {
            let x = self.place_x(*at);
            format!(
                "<path class=\"rule\" d=\"M{x:.1} {bottom}v5\"/>{}",
                text(x, bottom + 19.0, "tick", label)
            )
        };
        let ticks: String = self.x.ticks.iter().map(tick).collect();
        let title = text(f64::midpoint(LEFT, WIDTH - RIGHT), HEIGHT - 8.0, "axis", &self.x.title);
        format!("<path class=\"rule\" d=\"M{LEFT} {bottom}H{}\"/>{ticks}{title}", WIDTH - RIGHT)
    }

    fn draw_upper(&self) -> String {
        let Some(axis) = &self.upper else { return String::new() };
        let top = self.top();
        let tick = |(at, label): &(f64, String)| {
            let x = self.place_x(*at);
            format!("<path class=\"rule\" d=\"M{x:.1} {top}v-5\"/>{}", text(x, top - 9.0, "tick", label))
        };
        let ticks: String = axis.ticks.iter().map(tick).collect();
        format!("{ticks}{}", text(LEFT - 7.0, top - 9.0, "tick end", &axis.title))
    }
}

/// An SVG with its title and description for those who do not see it.
pub(super) fn drawing(id: &str, height: f64, title: &str, description: &str, content: &str) -> String {
    let (title, description) = (escape(title), escape(description));
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-labelledby=\"{id}-title {id}-desc\">\
         <title id=\"{id}-title\">{title}</title><desc id=\"{id}-desc\">{description}</desc>{content}</svg>\n"
    )
}

/// A text; `class` holds its kind and, unless it is centred, `start` or `end`.
pub(super) fn text(x: f64, y: f64, class: &str, content: &str) -> String {
    format!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escape(content))
}

/// The legend, in one row at the top left.
pub(super) fn legend(entries: &[LegendEntry]) -> String {
    let mut x = 4.0;
    let mut row = String::new();
    for entry in entries {
        let swatch = &entry.swatch;
        row.push_str(&format!("<g transform=\"translate({x:.1} 6)\">{swatch}</g>"));
        row.push_str(&text(x + 30.0, 17.0, "legend start", &entry.text));
        x += 46.0 + CHARACTER * entry.text.chars().count() as f64;
    }
    row
}

/// Least and largest finite value, never equal; 0 to 1 when there is none.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let finite = values.filter(|value| value.is_finite());
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    match low < high {
        true => (low, high),
        false if low.is_finite() => (low - 0.5, low + 0.5),
        false => (0.0, 1.0),
    }
}

/// The smallest of 1, 2, 5 times a power of ten that is at least `step`.
fn round_step(step: f64) -> f64 {
    let power = 10_f64.powf(step.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    steps.into_iter().find(|candidate| *candidate >= step * 0.999_999).unwrap_or(10.0 * power)
}

/// A tick with as many decimals as its step has; thousands as "k", millions as "M".
fn tick_label(value: f64, step: f64) -> String {
    let (value, step, unit) = match step {
        1e6.. => (value / 1e6, step / 1e6, "M"),
        1e3.. => (value / 1e3, step / 1e3, "k"),
        _ => (value, step, ""),
    };
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    format!("{value:.decimals$}{}", if value == 0.0 { "" } else { unit })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        let axis = Axis::around("", [4.179, 4.782].into_iter(), 5);
        assert_eq!(labels(&axis), ["4.0", "4.2", "4.4", "4.6", "4.8"]);
        assert!((axis.low - 4.0).abs() < 1e-9 && (axis.high - 4.8).abs() < 1e-9, "{axis:?}");
        assert_eq!(labels(&Axis::around("", [0.0, 65_536.0].into_iter(), 4))[..3], ["0", "20k", "40k"]);
        assert_eq!(
            labels(&Axis::around("", [-0.09, 0.6].into_iter(), 4)),
            ["-0.2", "0.0", "0.2", "0.4", "0.6"]
        );
    }

    #[test]
    fn an_axis_within_ends_where_the_values_end() {
        let axis = Axis::within("", [0.0, 65_536.0].into_iter(), 4);
        assert_eq!((axis.low, axis.high), (0.0, 65_536.0));
        assert_eq!(labels(&axis), ["0", "20k", "40k", "60k"]);
    }

    #[test]
    fn odd_values_still_give_an_axis() {
        assert_eq!(span([f64::NAN, 2.0].into_iter()), (1.5, 2.5));
        assert_eq!(span(std::iter::empty()), (0.0, 1.0));
        assert!(Axis::around("", [f64::INFINITY].into_iter(), 5).ticks.len() < 10);
    }
}
