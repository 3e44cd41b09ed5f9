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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::config::Projection;
    use crate::fixtures::{adapter, base, blocks, layout};
    use crate::train::budget::Fit;
    use crate::train::{LoraTrainer, TrainerOptions};

    #[test]
    fn what_follows_the_last_target_is_left_out() {
        let mut batch = Batch::from_blocks(&[&[1, 2, 3, 4], &[5, 6], &[7, 8, 9], &[1, 2, 3, 9]]).unwrap();
        batch.targets[9..12].fill(-1);
        let parts = micro_batches(&batch, 6);
        assert_eq!(parts.len(), 2);
        assert_eq!((parts[0].sequences, parts[0].length), (1, 3));
        assert_eq!(parts[0].inputs, [1, 2, 3]);
        assert_eq!((parts[1].length, &parts[1].targets[..]), (2, &[8, 9, 6, -1][..]));
        batch.targets[6..9].copy_from_slice(&[8, -1, 9]);
        let whole = micro_batches(&batch, 100);
        assert_eq!((whole.len(), whole[0].sequences, whole[0].predicted()), (1, 3, 6));
    }

    #[test]
    fn long_and_short_sequences_do_not_meet() {
        let long: Vec<u32> = (0..200).collect();
        let batch = Batch::from_blocks(&[&long[..60], &long, &long[..55], &long[..190]]).unwrap();
        let parts = micro_batches(&batch, 4096);
        let shapes: Vec<_> = parts.iter().map(|part| (part.sequences, part.length)).collect();
        assert_eq!(shapes, [(2, 199), (2, 59)]);
    }

    fn trainer(micro_tokens: usize, threads: usize) -> (LoraTrainer, Vec<f32>) {
        let base = base();
        let layout = layout(&base.config, &Projection::ALL, false);
        let values = adapter(&layout).values;
        let config = base.config.clone();
        let mut trainer = LoraTrainer::new(base, Arc::clone(&layout), TrainerOptions::default()).unwrap();
        let fit = Fit::unbounded(&config, &TrainerOptions { threads, ..TrainerOptions::default() });
        trainer.take_on(Fit { micro_tokens, ..fit });
        (trainer, values)
    }

    fn gradient(batch: &Batch, micro_tokens: usize, threads: usize) -> (f32, Vec<f32>) {
        let (mut trainer, values) = trainer(micro_tokens, threads);
        let mut gradient = vec![f32::NAN; values.len()];
        let loss = trainer.loss_and_gradient(&values, batch, &mut gradient).unwrap();
        assert!((trainer.loss(&values, batch).unwrap() - loss).abs() < 1e-5 * loss.abs());
        (loss, gradient)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Sequences of any lengths with targets ignored anywhere: the padded batch, whole or in parts, has the
        /// loss and gradient of its sequences one by one, each with the weight of its targets.
        #[test]
        fn a_padded_batch_is_the_sum_of_its_sequences(
            lengths in prop::collection::vec(1usize..50, 1..7),
            ignored in prop::collection::vec(any::<bool>(), 300),
            micro_tokens in 1usize..200,
        ) {
            let base = base();
            let blocks: Vec<Vec<u32>> =
                blocks(&base.config, lengths.len(), 49).iter().zip(&lengths).map(|(b, l)| b[..=*l].to_vec()).collect();
            let mut batch = Batch::from_blocks(&blocks.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
            for (target, ignored) in batch.targets.iter_mut().zip(&ignored).skip(1) {
                *target = if *ignored { -1 } else { *target };
            }
            let (loss, found) = gradient(&batch, micro_tokens, 1);
            let (mut expected, mut expected_loss) = (vec![0f64; found.len()], 0f64);
            for (i, block) in blocks.iter().enumerate() {
                let mut single = Batch::from_blocks(&[block]).unwrap();
                single.targets.copy_from_slice(&batch.targets[i * batch.length..][..single.length]);
                if single.predicted() == 0 {
                    continue;
                }
                let weight = single.predicted() as f64 / batch.predicted() as f64;
                let (loss, gradient) = gradient(&single, usize::MAX, 1);
                expected_loss += weight * f64::from(loss);
                expected.iter_mut().zip(&gradient).for_each(|(e, g)| *e += weight * f64::from(*g));
            }
            prop_assert!((f64::from(loss) / expected_loss - 1.0).abs() < 1e-5, "{loss} {expected_loss}");
            let norm: f64 = expected.iter().map(|e| e * e).sum();
            let error: f64 = expected.iter().zip(&found).map(|(e, f)| (e - f64::from(*f)).powi(2)).sum();
            prop_assert!((error / norm).sqrt() < 1e-5, "{:e}", (error / norm).sqrt());
        }
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        let base = base();
        let mut blocks = blocks(&base.config, 7, 40);
        blocks[2].truncate(20);
        let batch = Batch::from_blocks(&blocks.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
        let expected = gradient(&batch, 80, 1);
        for threads in [2, 3, 8] {
            for _ in 0..3 {
                assert_eq!(gradient(&batch, 80, threads), expected, "{threads}");
            }
        }
        assert_ne!(gradient(&batch, 40, 1).1, expected.1, "the cut decides the last bits");
    }
}
