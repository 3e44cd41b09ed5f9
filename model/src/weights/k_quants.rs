//! From values to the K formats, bit-equal to ggml's reference quantizers (`ggml-quants.c`,
//! `quantize_row_q4_K_ref`, `quantize_row_q6_K_ref`): the same operations in the same order in single
//! precision. A block of 256 values is cut into groups. Each group looks for the scale (and minimum) whose
//! weighted squared error is least; the block then stores these in units of their largest.

use half::f16;

use super::K_BLOCK;
use super::dequantize::{half_to_f32, six_bit_pair};
use super::quantize::outermost;

/// Groups whose values are all closer to zero than this become zeros.
const GROUP_MAX_MIN: f32 = 1e-15;

const Q4_GROUP: usize = 32;
const Q4_GROUPS: usize = K_BLOCK / Q4_GROUP;
const Q4_LEVEL_MAX: i32 = 15;
/// Scales tried for a group of Q4_K, and how they lie around the plain one: levels from 14 to 16.
const Q4_TRIES: i32 = 20;
const Q4_TRY_FIRST: f32 = -1.0;
const Q4_TRY_STEP: f32 = 0.1;

const Q6_GROUP: usize = 16;
const Q6_GROUPS: usize = K_BLOCK / Q6_GROUP;
/// Levels of Q6_K go from minus this to this less one, and are stored with this added.
const Q6_CENTRE: i32 = 32;
/// Scales tried for a group of Q6_K on either side of the plain one, in tenths of a level.
const Q6_TRIES: i32 = 9;

/// Appends one block: `x` is about `d * scale * level - dmin * minimum`, level 0 to 15.
pub(super) fn q4_k(block: &[f32], bytes: &mut Vec<u8>) {
    let mut levels = [0u8; K_BLOCK];
    let (mut scales, mut minima) = ([0f32; Q4_GROUPS], [0f32; Q4_GROUPS]);
    let groups = block.as_chunks::<Q4_GROUP>().0.iter().zip(levels.as_chunks_mut::<Q4_GROUP>().0);
    for (j, (group, levels)) in groups.enumerate() {
        (scales[j], minima[j]) = fit_scale_and_minimum(group, levels);
    }
    let (scale_max, minimum_max) = (largest(&scales), largest(&minima));
    let (d, d_min) = (f16::from_f32(scale_max / 63.0), f16::from_f32(minimum_max / 63.0));
    let packed = pack_six_bits(
        scales.map(|scale| six_bits(scale, scale_max)),
        minima.map(|minimum| six_bits(minimum, minimum_max)),
    );
    let (unit, unit_min) = (half_to_f32(d.to_bits()), half_to_f32(d_min.to_bits()));
    for (j, (group, levels)) in
        block.as_chunks::<Q4_GROUP>().0.iter().zip(levels.as_chunks_mut::<Q4_GROUP>().0).enumerate()
    {
        let (scale, minimum) = six_bit_pair(&packed, j);
        let (scale, minimum) = (unit * f32::from(scale), unit_min * f32::from(minimum));
        // A group without a scale keeps the levels it found, which then mean nothing.
        if scale != 0.0 {
            for (level, x) in levels.iter_mut().zip(group) {
                *level = nearest((x + minimum) / scale).clamp(0, Q4_LEVEL_MAX) as u8;
            }
        }
    }
    bytes.extend(d.to_le_bytes());
    bytes.extend(d_min.to_le_bytes());
    bytes.extend(packed);
    for pair in levels.as_chunks::<{ 2 * Q4_GROUP }>().0 {
        let (low, high) = pair.split_at(Q4_GROUP);
        bytes.extend(low.iter().zip(high).map(|(low, high)| low | high << 4));
    }
}

/// Appends one block: `x` is about `d * scale * level`, level -32 to 31.
pub(super) fn q6_k(block: &[f32], bytes: &mut Vec<u8>) {
    let mut levels = [0u8; K_BLOCK];
    let mut scales = [0f32; Q6_GROUPS];
    let groups = block.as_chunks::<Q6_GROUP>().0.iter().zip(levels.as_chunks_mut::<Q6_GROUP>().0);
    for (j, (group, levels)) in groups.enumerate() {
        scales[j] = fit_scale(group, levels);
    }
    let outermost = outermost(&scales);
    if outermost.abs() < GROUP_MAX_MIN {
        bytes.resize(bytes.len() + 210, 0);
        return;
    }
    let inverse = -128.0 / outermost;
    let d = f16::from_f32(1.0 / inverse);
    let scales = scales.map(|scale| nearest(inverse * scale).min(127) as i8);
    let unit = half_to_f32(d.to_bits());
    let groups = block.as_chunks::<Q6_GROUP>().0.iter().zip(levels.as_chunks_mut::<Q6_GROUP>().0);
    for ((group, levels), scale) in groups.zip(scales) {
        let scale = unit * f32::from(scale);
        if scale != 0.0 {
            for (level, x) in levels.iter_mut().zip(group) {
                *level = centred(x / scale);
            }
        }
    }
    pack_six_bit_levels(&levels, bytes);
    bytes.extend(scales.map(|scale| scale as u8));
    bytes.extend(d.to_le_bytes());
}

/// The scale and the negated minimum (at least 0) of one group of Q4_K, and its levels. Values far from zero
/// weigh more. For each of some scales around the plain one, scale and minimum that are best for the levels
/// it gives follow from the normal equations.
fn fit_scale_and_minimum(x: &[f32; Q4_GROUP], levels: &mut [u8; Q4_GROUP]) -> (f32, f32) {
    let mean_square = x.iter().fold(0.0, |sum: f32, x| sum + x * x) / Q4_GROUP as f32;
    let weights = x.map(|x| mean_square.sqrt() + x.abs());
    let least = x.iter().fold(x[0], |least, &x| if x < least { x } else { least });
    let most = x.iter().fold(x[0], |most, &x| if x > most { x } else { most });
    let least = if least > 0.0 { 0.0 } else { least };
    if most == least {
        *levels = [0; Q4_GROUP];
        return (0.0, -least);
    }
    let weight_sum = weights[1..].iter().fold(weights[0], |sum, w| sum + w);
    let x_sum = (1..Q4_GROUP).fold(weights[0] * x[0], |sum, i| sum + weights[i] * x[i]);
    let level =
        |inverse: f32, least: f32, x: f32| nearest(inverse * (x - least)).clamp(0, Q4_LEVEL_MAX) as u8;
    let inverse = Q4_LEVEL_MAX as f32 / (most - least);
    *levels = x.map(|x| level(inverse, least, x));
    let mut best = (1.0 / inverse, least);
    let mut best_error = squared_error(x, &weights, levels, best);
    for attempt in 0..=Q4_TRIES {
        let levels_wide = Q4_TRY_FIRST + Q4_TRY_STEP * attempt as f32 + Q4_LEVEL_MAX as f32;
        // From the best minimum so far, no longer from the least value: so it is in ggml.
        let inverse = levels_wide / (most - best.1);
        let tried = x.map(|x| level(inverse, best.1, x));
        let Some(fit) = solve(x, &weights, &tried, weight_sum, x_sum) else { continue };
        let error = squared_error(x, &weights, &tried, fit);
        if error < best_error {
            (*levels, best_error, best) = (tried, error, fit);
        }
    }
    (best.0, -best.1)
}

/// Scale and minimum with the least weighted squared error for given levels; the minimum is not above zero.
fn solve(
    x: &[f32; Q4_GROUP],
    weights: &[f32; Q4_GROUP],
    levels: &[u8; Q4_GROUP],
    weight_sum: f32,
    x_sum: f32,
) -> Option<(f32, f32)> {
    let (mut level_sum, mut square_sum, mut product_sum) = (0f32, 0f32, 0f32);
    for ((x, w), &level) in x.iter().zip(weights).zip(levels) {
        let level = f32::from(level);
        level_sum += w * level;
        square_sum += w * level * level;
        product_sum += w * level * x;
    }
    let determinant = weight_sum * square_sum - level_sum * level_sum;
    if determinant <= 0.0 {
        return None;
    }
    let scale = (weight_sum * product_sum - x_sum * level_sum) / determinant;
    let minimum = (square_sum * x_sum - level_sum * product_sum) / determinant;
    Some(if minimum > 0.0 { (product_sum / square_sum, 0.0) } else { (scale, minimum) })
}

fn squared_error(
    x: &[f32; Q4_GROUP],
    weights: &[f32; Q4_GROUP],
    levels: &[u8; Q4_GROUP],
    (scale, minimum): (f32, f32),
) -> f32 {
    x.iter().zip(weights).zip(levels).fold(0.0, |sum, ((x, w), &level)| {
        let difference = scale * f32::from(level) + minimum - x;
        sum + w * (difference * difference)
    })
}

/// The scale of one group of Q6_K and its levels, with 32 added. Each value weighs its own square.
fn fit_scale(x: &[f32; Q6_GROUP], levels: &mut [u8; Q6_GROUP]) -> f32 {
    let outermost = outermost(x);
    if outermost.abs() < GROUP_MAX_MIN {
        *levels = [0; Q6_GROUP];
        return 0.0;
    }
    let plain = -Q6_CENTRE as f32 / outermost;
    let (product_sum, square_sum) = weighted_sums(x, plain);
    *levels = x.map(|x| centred(plain * x));
    let mut scale = if square_sum == 0.0 { 0.0 } else { product_sum / square_sum };
    let mut best = scale * product_sum;
    for attempt in (-Q6_TRIES..=Q6_TRIES).filter(|&attempt| attempt != 0) {
        let inverse = -(Q6_CENTRE as f32 + 0.1 * attempt as f32) / outermost;
        let (product_sum, square_sum) = weighted_sums(x, inverse);
        if square_sum > 0.0 && product_sum * product_sum > best * square_sum {
            *levels = x.map(|x| centred(inverse * x));
            scale = product_sum / square_sum;
            best = scale * product_sum;
        }
    }
    scale
}

/// Sums of weight * value * level and weight * level * level for the levels that the inverse scale gives.
fn weighted_sums(x: &[f32; Q6_GROUP], inverse: f32) -> (f32, f32) {
    x.iter().fold((0.0, 0.0), |(product_sum, square_sum), &x| {
        let level = f32::from(centred(inverse * x)) - Q6_CENTRE as f32;
        let weight = x * x;
        (product_sum + weight * x * level, square_sum + weight * level * level)
    })
}

/// The level of Q6_K nearest to a number, with 32 added.
fn centred(x: f32) -> u8 {
    (nearest(x).clamp(-Q6_CENTRE, Q6_CENTRE - 1) + Q6_CENTRE) as u8
}

/// The nearest whole number, ties to even, of a number below 2^22: there 12582912 (1.5 * 2^23) plus the number
/// has whole numbers as units, and its low bits are the result. Beyond, the bits wrap as they do in ggml.
fn nearest(x: f32) -> i32 {
    let bits = (x + 12_582_912.0).to_bits();
    (bits & 0x007f_ffff) as i32 - 0x0040_0000
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, &x| if x > most { x } else { most })
}

/// A number from 0 to `most` as a share of 63.
fn six_bits(value: f32, most: f32) -> u8 {
    let inverse = if most > 0.0 { 63.0 / most } else { 0.0 };
    (nearest(inverse * value) as u8).min(63)
}

/// The way back from [`six_bit_pair`].
fn pack_six_bits(scales: [u8; Q4_GROUPS], minima: [u8; Q4_GROUPS]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..4 {
        packed[j] = scales[j] | scales[j + 4] >> 4 << 6;
        packed[j + 4] = minima[j] | minima[j + 4] >> 4 << 6;
        packed[j + 8] = scales[j + 4] & 15 | minima[j + 4] << 4;
    }
    packed
}

/// All low 4 bits, then all high 2 bits, each half of the block by itself; the order is told in
/// `dequantize.rs`.
fn pack_six_bit_levels(levels: &[u8; K_BLOCK], bytes: &mut Vec<u8>) {
    let halves = levels.as_chunks::<128>().0;
    for half in halves {
        bytes.extend((0..64).map(|l| half[l] & 15 | half[l + 64] << 4));
    }
    for half in halves {
        let top = |l: usize, quarter: usize| half[l + 32 * quarter] >> 4 << (2 * quarter);
        bytes.extend((0..32).map(|l| top(l, 0) | top(l, 1) | top(l, 2) | top(l, 3)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_found_with_ties_to_even() {
        for x in [-4_194_303.0f32, -33.0, -2.5, -1.5, -0.5, -0.2, 0.0, 0.5, 0.7, 1.5, 2.5, 63.49, 4_194_303.0]
        {
            assert_eq!(nearest(x), x.round_ties_even() as i32, "{x}");
        }
    }

    #[test]
    fn packed_scales_come_back() {
        let scales = [1, 2, 3, 63, 16, 17, 47, 60];
        let minima = [63, 0, 9, 31, 62, 15, 16, 33];
        let packed = pack_six_bits(scales, minima);
        for j in 0..Q4_GROUPS {
            assert_eq!(six_bit_pair(&packed, j), (scales[j], minima[j]), "{j}");
        }
    }
}
