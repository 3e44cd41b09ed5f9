//! Scales by search: blocks that ggml's programs read, with less squared error than its plain quantizers make.
//!
//! A plain quantizer maps a block's outermost value to the outermost level. Here some scales around that are tried; for the
//! levels that one gives, the best scale (and minimum) follow from the normal equations, and from these the levels
//! again, until nothing changes. What counts is the error with the scale as it is stored, in half precision. The plain
//! block is tried as well, so no block is worse than ggml's.

use half::f16;

use super::dequantize::dequantize;
use super::quantize::{nibbles, outermost, quantize};
use super::{BLOCK, WeightFormat};

/// Rounds of levels and scales in turn.
const ROUNDS: usize = 4;
/// Step between tried scales, in levels at the end of the range.
const STEP: f32 = 0.125;
/// Parts of a block's range that are cut off, or added, at either end.
const TRIMS: [f32; 6] = [-0.02, 0.0, 0.03, 0.07, 0.12, 0.18];

/// The levels of a format that has one scale a block.
#[derive(Clone, Copy)]
struct Levels {
    least: f32,
    most: f32,
    /// The outermost value is tried at this many levels from zero, from fewest to most.
    reach: (f32, f32),
}

/// A scale and minimum (0 where the format has none) with their levels, and the error they make.
#[derive(Clone, Copy)]
struct Fit {
    scale: f32,
    minimum: f32,
    levels: [f32; BLOCK],
    error: f32,
}

/// Quantizes rows of whole blocks; the squared error of column c counts `importance[c]` times. The K formats
/// and those without blocks are as ggml makes them: a K quantizer searches by itself.
pub(super) fn search(values: &[f32], format: WeightFormat, importance: &[f32]) -> Vec<u8> {
    let write: fn(&[f32; BLOCK], &[f32; BLOCK], &mut Vec<u8>) = match format {
        WeightFormat::Q4_0 => |x, w, bytes| put_nibbles(&one_scale(x, w, NIBBLES, WeightFormat::Q4_0), bytes),
        WeightFormat::Q5_0 => {
            |x, w, bytes| put_five_bits(&one_scale(x, w, FIVE_BITS, WeightFormat::Q5_0), bytes)
        }
        WeightFormat::Q8_0 => |x, w, bytes| put_bytes(&one_scale(x, w, BYTES, WeightFormat::Q8_0), bytes),
        WeightFormat::Q4_1 => |x, w, bytes| put_nibbles_minimum(&with_minimum(x, w), bytes),
        WeightFormat::F32
        | WeightFormat::F16
        | WeightFormat::BF16
        | WeightFormat::Q4_K
        | WeightFormat::Q6_K => return quantize(values, format),
    };
    let (block_values, block_bytes) = format.block();
    let mut bytes = Vec::with_capacity(values.len() / block_values * block_bytes);
    for row in values.chunks_exact(importance.len()) {
        for (x, w) in row.as_chunks::<BLOCK>().0.iter().zip(importance.as_chunks::<BLOCK>().0) {
            write(x, w, &mut bytes);
        }
    }
    bytes
}

const NIBBLES: Levels = Levels { least: -8.0, most: 7.0, reach: (5.5, 9.5) };
const FIVE_BITS: Levels = Levels { least: -16.0, most: 15.0, reach: (13.0, 17.5) };
/// ggml never writes -128.
const BYTES: Levels = Levels { least: -127.0, most: 127.0, reach: (125.0, 128.0) };

/// The best scale of either sign: levels are not symmetric.
fn one_scale(x: &[f32; BLOCK], w: &[f32; BLOCK], range: Levels, format: WeightFormat) -> Fit {
    let mut best = plain(x, w, format);
    let outermost = outermost(x);
    if outermost == 0.0 {
        return best;
    }
    let mut reach = range.reach.0;
    while reach <= range.reach.1 {
        for sign in [-1.0, 1.0] {
            let fit = refine_scale(x, w, range, sign * outermost / reach);
            if fit.error < best.error {
                best = fit;
            }
        }
        reach += STEP;
    }
    best
}

fn refine_scale(x: &[f32; BLOCK], w: &[f32; BLOCK], range: Levels, start: f32) -> Fit {
    let level = |x: f32, inverse: f32| (x * inverse).round_ties_even().clamp(range.least, range.most);
    let mut scale = f16::from_f32(start).to_f32();
    let mut levels = [0.0; BLOCK];
    for _ in 0..ROUNDS {
        if scale == 0.0 {
            break;
        }
        let inverse = 1.0 / scale;
        levels = x.map(|x| level(x, inverse));
        let (mut products, mut squares) = (0.0, 0.0);
        for i in 0..BLOCK {
            products += w[i] * x[i] * levels[i];
            squares += w[i] * levels[i] * levels[i];
        }
        let next = f16::from_f32(if squares > 0.0 { products / squares } else { 0.0 }).to_f32();
        if next == scale {
            break;
        }
        scale = next;
    }
    Fit { scale, minimum: 0.0, levels, error: error(x, w, &levels, scale, 0.0) }
}

/// Scale and minimum, from some beginnings inside and outside the block's range.
fn with_minimum(x: &[f32; BLOCK], w: &[f32; BLOCK]) -> Fit {
    let mut best = plain(x, w, WeightFormat::Q4_1);
    let least = x.iter().copied().fold(f32::MAX, f32::min);
    let most = x.iter().copied().fold(f32::MIN, f32::max);
    let width = most - least;
    if width == 0.0 {
        return best;
    }
    for low in TRIMS {
        for high in TRIMS {
            let scale = width * (1.0 - low - high) / 15.0;
            let fit = refine_both(x, w, scale, least + low * width);
            if fit.error < best.error {
                best = fit;
            }
        }
    }
    best
}

fn refine_both(x: &[f32; BLOCK], w: &[f32; BLOCK], scale: f32, minimum: f32) -> Fit {
    let half = |x: f32| f16::from_f32(x).to_f32();
    let (mut scale, mut minimum) = (half(scale), half(minimum));
    let mut levels = [0.0; BLOCK];
    for _ in 0..ROUNDS {
        if scale == 0.0 {
            break;
        }
        let inverse = 1.0 / scale;
        levels = x.map(|x| ((x - minimum) * inverse).round_ties_even().clamp(0.0, 15.0));
        let (mut w_sum, mut l_sum, mut x_sum, mut ll_sum, mut lx_sum) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for i in 0..BLOCK {
            let (wl, wx) = (w[i] * levels[i], w[i] * x[i]);
            w_sum += w[i];
            l_sum += wl;
            x_sum += wx;
            ll_sum += wl * levels[i];
            lx_sum += wl * x[i];
        }
        let determinant = w_sum * ll_sum - l_sum * l_sum;
        if determinant <= 0.0 {
            break;
        }
        let next_scale = half((w_sum * lx_sum - l_sum * x_sum) / determinant);
        // The minimum that is best beside the scale as it is stored.
        let next_minimum = half((x_sum - next_scale * l_sum) / w_sum);
        if (next_scale, next_minimum) == (scale, minimum) {
            break;
        }
        (scale, minimum) = (next_scale, next_minimum);
    }
    Fit { scale, minimum, levels, error: error(x, w, &levels, scale, minimum) }
}

/// What ggml's plain quantizer makes of the block.
fn plain(x: &[f32; BLOCK], w: &[f32; BLOCK], format: WeightFormat) -> Fit {
    let bytes = quantize(x, format);
    let mut values = [0.0; BLOCK];
    dequantize(format, &bytes, &mut values);
    let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
    let minimum = if format == WeightFormat::Q4_1 { half(2) } else { 0.0 };
    let scale = half(0);
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let levels = values.map(|value| ((value - minimum) * inverse).round_ties_even());
    Fit { scale, minimum, levels, error: error(x, w, &levels, scale, minimum) }
}

fn error(x: &[f32; BLOCK], w: &[f32; BLOCK], levels: &[f32; BLOCK], scale: f32, minimum: f32) -> f32 {
    let mut sum = 0.0;
    for i in 0..BLOCK {
        let difference = scale * levels[i] + minimum - x[i];
        sum += w[i] * difference * difference;
    }
    // Beyond half precision's range nothing is stored.
    if (scale + minimum).is_finite() { sum } else { f32::INFINITY }
}

fn put_nibbles(fit: &Fit, bytes: &mut Vec<u8>) {
    bytes.extend(f16::from_f32(fit.scale).to_le_bytes());
    nibbles(&fit.levels, bytes, |level| level + 8.0);
}

fn put_nibbles_minimum(fit: &Fit, bytes: &mut Vec<u8>) {
    bytes.extend(f16::from_f32(fit.scale).to_le_bytes());
    bytes.extend(f16::from_f32(fit.minimum).to_le_bytes());
    nibbles(&fit.levels, bytes, |level| level);
}

fn put_five_bits(fit: &Fit, bytes: &mut Vec<u8>) {
    let levels = fit.levels.map(|level| (level + 16.0) as u8);
    let fifth = levels.iter().enumerate().fold(0, |bits, (at, level)| bits | u32::from(level >> 4) << at);
    bytes.extend(f16::from_f32(fit.scale).to_le_bytes());
    bytes.extend(fifth.to_le_bytes());
    let (low, high) = levels.split_at(BLOCK / 2);
    bytes.extend(low.iter().zip(high).map(|(low, high)| low & 15 | high << 4));
}

fn put_bytes(fit: &Fit, bytes: &mut Vec<u8>) {
    bytes.extend(f16::from_f32(fit.scale).to_le_bytes());
    bytes.extend(fit.levels.map(|level| level as i8 as u8));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::tests::noise;
    use proptest::prelude::*;

    const SEARCHED: [WeightFormat; 4] =
        [WeightFormat::Q4_0, WeightFormat::Q4_1, WeightFormat::Q5_0, WeightFormat::Q8_0];

    fn error_of(bytes: &[u8], x: &[f32], w: &[f32], format: WeightFormat) -> f64 {
        let mut back = vec![0.0; x.len()];
        dequantize(format, bytes, &mut back);
        let squares = x.iter().zip(&back).map(|(x, y)| f64::from(x - y).powi(2));
        squares.zip(w.iter().cycle()).map(|(square, w)| square * f64::from(*w)).sum()
    }

    /// Sums of many: nearly normal.
    fn bell(count: usize, seed: u32) -> Vec<f32> {
        let uniform = noise(6 * count, seed);
        uniform.chunks_exact(6).map(|six| six.iter().sum()).collect()
    }

    #[test]
    fn values_that_look_like_weights_lose_less_than_with_ggml() {
        let x = bell(64 * 256, 3);
        let ones = vec![1.0; 256];
        for (format, share) in [
            (WeightFormat::Q4_0, 0.90),
            (WeightFormat::Q4_1, 0.97),
            (WeightFormat::Q5_0, 0.98),
            (WeightFormat::Q8_0, 0.9999),
        ] {
            let found = error_of(&search(&x, format, &ones), &x, &ones, format);
            let plain = error_of(&quantize(&x, format), &x, &ones, format);
            assert!(found < share * plain, "{format:?}: {found} of {plain}, {}", found / plain);
        }
    }

    #[test]
    fn columns_that_matter_more_are_kept_better() {
        let x = bell(256 * 64, 9);
        let w: Vec<f32> = (0..64).map(|column| if column % 8 == 3 { 30.0 } else { 1.0 }).collect();
        let ones = vec![1.0; 64];
        for format in SEARCHED {
            let weighted = error_of(&search(&x, format, &w), &x, &w, format);
            let unweighted = error_of(&search(&x, format, &ones), &x, &w, format);
            assert!(weighted < unweighted, "{format:?}: {weighted} and {unweighted}");
        }
    }

    #[test]
    fn the_other_formats_are_those_of_ggml() {
        let x = noise(512, 4);
        for format in WeightFormat::ALL.into_iter().filter(|format| !SEARCHED.contains(format)) {
            assert_eq!(search(&x, format, &[1.0; 256]), quantize(&x, format), "{format:?}");
        }
    }

    proptest! {
        #[test]
        fn no_block_is_worse_than_ggmls(
            x in prop::collection::vec(-3f32..3.0, BLOCK), w in prop::collection::vec(0f32..5.0, BLOCK),
            power in -30i32..12,
        ) {
            let x: Vec<f32> = x.iter().map(|x| x * 2f32.powi(power)).collect();
            for format in SEARCHED {
                let bytes = search(&x, format, &w);
                prop_assert_eq!(bytes.len(), format.block().1);
                let (found, plain) = (
                    error_of(&bytes, &x, &w, format),
                    error_of(&quantize(&x, format), &x, &w, format),
                );
                prop_assert!(found <= plain * (1.0 + 1e-5) + 1e-30, "{format:?}: {found} and {plain}");
            }
        }
    }
}
