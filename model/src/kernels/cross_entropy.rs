//! Cross entropy of rows of logits. A negative target is ignored: it has no loss and no gradient.

use super::simd::{exp, max, simd_fn, sum};

simd_fn! {
    /// Replaces each row of logits by `(softmax - onehot(target)) * weight` and writes its negative
    /// log-likelihood in nats (0 for an ignored row).
    pub(crate) fn nll_and_gradient(logits: &mut [f32], targets: &[i32], weight: f32, nll: &mut [f32]) {
        let vocab = logits.len() / targets.len();
        for ((row, target), nll) in logits.chunks_exact_mut(vocab).zip(targets).zip(nll) {
            if *target < 0 {
                row.fill(0.0);
                *nll = 0.0;
                continue;
            }
            let target = *target as usize;
            let m = max(row);
            let target_logit = row[target];
            for x in row.iter_mut() {
                *x = exp(*x - m);
            }
            let total = sum(row);
            let factor = weight / total;
            for x in row.iter_mut() {
                *x *= factor;
            }
            row[target] -= weight;
            *nll = m + total.ln() - target_logit;
        }
    }
}

simd_fn! {
    /// Writes the negative log-likelihood of each row (0 if ignored) and returns how many rows give their
    /// target the largest logit. The logits are overwritten.
    pub(crate) fn nll_and_hits(logits: &mut [f32], targets: &[i32], nll: &mut [f32]) -> u64 {
        let vocab = logits.len() / targets.len();
        let mut hits = 0;
        for ((row, target), nll) in logits.chunks_exact_mut(vocab).zip(targets).zip(nll) {
            *nll = 0.0;
            if *target < 0 {
                continue;
            }
            let m = max(row);
            let target_logit = row[*target as usize];
            for x in row.iter_mut() {
                *x = exp(*x - m);
            }
            *nll = m + sum(row).ln() - target_logit;
            hits += u64::from(target_logit >= m);
        }
        hits
    }
}
