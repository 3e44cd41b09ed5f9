//! How a batch is cut into micro-batches. Their gradients, taken with the whole batch's denominator, sum up to
//! the batch's gradient, so the cut changes memory and time but nothing else than rounding.
//!
//! A sequence ends at its last target: what comes after it has no influence on the loss and is not computed.
//! Sequences of similar length go together, so that little is padded.

use crate::batch::Batch;

/// Most tokens that a sequence is padded with; more cost as much as a micro-batch of its own.
const PADDING_MAX: usize = 16;

/// Whole sequences of the batch in parts of at most `tokens_max` tokens, or of one sequence if that is longer.
/// The longest come first, those of one length in the batch's order. Sequences without a target are left out.
pub(super) fn micro_batches(batch: &Batch, tokens_max: usize) -> Vec<Batch> {
    let mut sequences: Vec<(usize, usize)> =
        (0..batch.sequences).map(|i| (i, used_length(batch, i))).filter(|(_, length)| *length > 0).collect();
    sequences.sort_by_key(|(_, length)| std::cmp::Reverse(*length));
    let (mut parts, mut rest) = (Vec::new(), sequences.as_slice());
    while let Some((_, longest)) = rest.first() {
        let similar = rest.partition_point(|(_, length)| longest - length <= PADDING_MAX);
        let (run, shorter) = rest.split_at(similar);
        parts.extend(cut(batch, run, tokens_max));
        rest = shorter;
    }
    parts
}

/// Evenly, so that threads get as much each.
fn cut<'a>(
    batch: &'a Batch,
    run: &'a [(usize, usize)],
    tokens_max: usize,
) -> impl Iterator<Item = Batch> + 'a {
    let longest = run[0].1;
    let parts = run.len().div_ceil((tokens_max / longest).max(1));
    (0..parts).map(move |i| gather(batch, &run[i * run.len() / parts..(i + 1) * run.len() / parts]))
}

fn used_length(batch: &Batch, sequence: usize) -> usize {
    let targets = &batch.targets[sequence * batch.length..][..batch.length];
    targets.iter().rposition(|target| *target >= 0).map_or(0, |last| last + 1)
}

fn gather(batch: &Batch, sequences: &[(usize, usize)]) -> Batch {
    let length = sequences[0].1;
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    for (index, used) in sequences {
        let from = index * batch.length;
        inputs.extend(&batch.inputs[from..from + used]);
        targets.extend(&batch.targets[from..from + used]);
        inputs.resize(inputs.len() + length - used, 0);
        targets.resize(targets.len() + length - used, -1);
    }
    Batch { sequences: sequences.len(), length, inputs, targets }
}
