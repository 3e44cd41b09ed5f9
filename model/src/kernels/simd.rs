//! Run-time choice of the instruction set for element-wise loops.
//!
//! `simd_fn!` compiles one safe loop three times (AVX-512, AVX2, the target's baseline) and picks once per
//! call. Sums keep 32 fixed lanes and nothing is fused, so all three versions give the same bits. [`limit_simd`]
//! holds every choice of this crate below a level.

use std::sync::atomic::{AtomicU8, Ordering};

/// Instruction sets that the kernels are written for, from the most portable to the widest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SimdLevel {
    /// What every processor of the target has.
    Portable,
    /// AVX2 and FMA; on ARM all of NEON, dot and matrix products among it.
    Avx2,
    /// AVX-512 with what goes with it (BW, VL, DQ; VNNI and BF16 where the processor has them).
    Avx512,
}

/// The widest level that kernels may use; all by default.
static WIDEST: AtomicU8 = AtomicU8::new(SimdLevel::Avx512 as u8);

/// Lets the kernels of this process use nothing wider than `level`: for measuring at equal instructions. What the
/// processor does not have stays unused. Call it before any work: an engine keeps what it chose.
pub fn limit_simd(level: SimdLevel) {
    WIDEST.store(level as u8, Ordering::Relaxed);
}

/// Whether kernels of that level may be used.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline]
fn allowed(level: SimdLevel) -> bool {
    WIDEST.load(Ordering::Relaxed) >= level as u8
}

/// Whether the processor has the AVX-512 subset the kernels are compiled for.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx512() -> bool {
    allowed(SimdLevel::Avx512)
        && std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512dq")
        && has_avx2()
}

/// Whether the processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx2() -> bool {
    allowed(SimdLevel::Avx2) && std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")
}

/// Whether the processor has NEON, and its kernels may be used.
#[cfg(target_arch = "aarch64")]
#[inline]
pub(crate) fn has_neon() -> bool {
    allowed(SimdLevel::Avx2) && std::arch::is_aarch64_feature_detected!("neon")
}

macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(unsafe_code, reason = "calls the version compiled for features that were just detected")]
        #[allow(clippy::too_many_arguments, reason = "a hot loop over slices")]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, reason = "a hot loop over slices")]
            fn portable($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments, reason = "a hot loop over slices")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { portable($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments, reason = "a hot loop over slices")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { portable($($arg),*) }
                if $crate::kernels::simd::has_avx512() {
                    // SAFETY: every feature the function is compiled for was detected on this processor.
                    return unsafe { avx512($($arg),*) };
                }
                if $crate::kernels::simd::has_avx2() {
                    // SAFETY: as above, for AVX2 and FMA.
                    return unsafe { avx2($($arg),*) };
                }
            }
            portable($($arg),*)
        }
    };
}
pub(crate) use simd_fn;

/// Lanes of the fixed summation order.
const LANES: usize = 32;

/// Sum of `a[i] * b[i]` in the fixed order all instruction sets share.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_tail, b_tail) = (a_blocks.remainder(), b_blocks.remainder());
    for (x, y) in a_blocks.zip(b_blocks) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(x, y)| x * y).sum();
    lanes.iter().sum::<f32>() + tail
}

/// Sum of `a[i] * b[i] * c[i]`, same order.
#[inline(always)]
pub(crate) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = a.len() / LANES * LANES;
    for ((x, y), z) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)).zip(c.chunks_exact(LANES)) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i] * z[i];
        }
    }
    let tail: f32 = (whole..a.len()).map(|i| a[i] * b[i] * c[i]).sum();
    lanes.iter().sum::<f32>() + tail
}

/// Sum of a slice, same order.
#[inline(always)]
pub(crate) fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let blocks = a.chunks_exact(LANES);
    let tail: f32 = blocks.remainder().iter().sum();
    for x in blocks {
        for i in 0..LANES {
            lanes[i] += x[i];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// Largest value of a slice; `f32::MIN` when it is empty.
#[inline(always)]
pub(crate) fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::MIN; LANES];
    let blocks = a.chunks_exact(LANES);
    let tail = blocks.remainder().iter().fold(f32::MIN, |m, x| m.max(*x));
    for x in blocks {
        for i in 0..LANES {
            lanes[i] = lanes[i].max(x[i]);
        }
    }
    lanes.iter().fold(tail, |m, x| m.max(*x))
}

/// e^x with a relative error below 2e-7 (Cephes' polynomial); arguments are clamped to [-87, 88].
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = x - n * 0.693_359_4;
    let r = r - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4_f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let y = p * r * r + r + 1.0;
    y * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) / expected - 1.0).abs() < 2e-7, "exp({x})");
        }
    }

    #[test]
    fn sums_take_every_element_once() {
        for n in [0usize, 1, 31, 32, 33, 100] {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let ones = vec![1f32; n];
            let expected = (n * n.saturating_sub(1) / 2) as f32;
            assert_eq!(sum(&a), expected);
            assert_eq!(dot(&a, &ones), expected);
            assert_eq!(dot3(&a, &ones, &ones), expected);
            assert_eq!(max(&a), if n == 0 { f32::MIN } else { n as f32 - 1.0 });
        }
    }
}
