//! From texts to training and evaluation blocks of token ids.

use fleetune_model::tokenizer::Tokenizer;

/// Stands between two texts of a user. The reference experiments join with one line break: their fixed
/// evaluation blocks are reproduced by it and by no other.
pub const TEXT_SEPARATOR: &str = "\n";

/// Blocks of `block_tokens + 1` ids: texts joined with [`TEXT_SEPARATOR`], tokenized as one stream, cut at
/// a stride of `block_tokens`, so each id is predicted once. What is left at the end is dropped, unless it
/// is all there is: then it is the one, shorter block. Fewer than two ids give none.
///
/// # Panics
/// When `block_tokens` is 0.
#[must_use]
pub fn blocks<S: AsRef<str>>(tokenizer: &Tokenizer, texts: &[S], block_tokens: usize) -> Vec<Vec<u32>> {
    let texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
    cut(&tokenizer.encode_ordinary(&texts.join(TEXT_SEPARATOR)), block_tokens)
}

fn cut(ids: &[u32], block_tokens: usize) -> Vec<Vec<u32>> {
    assert!(block_tokens > 0, "a block predicts at least one token");
    if ids.len() <= block_tokens {
        return if ids.len() < 2 { Vec::new() } else { vec![ids.to_vec()] };
    }
    ids.windows(block_tokens + 1).step_by(block_tokens).map(<[u32]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn blocks_overlap_by_the_id_that_is_predicted_and_then_read() {
        assert_eq!(cut(&[0, 1, 2, 3, 4, 5, 6], 3), [vec![0, 1, 2, 3], vec![3, 4, 5, 6]]);
        assert_eq!(cut(&[0, 1, 2, 3, 4, 5], 3), [vec![0, 1, 2, 3]]);
    }

    #[test]
    fn a_remainder_is_kept_only_when_it_is_all_there_is() {
        assert_eq!(cut(&[7, 8, 9], 3), [vec![7, 8, 9]]);
        assert_eq!(cut(&[7], 3), Vec::<Vec<u32>>::new());
        assert_eq!(cut(&[], 3), Vec::<Vec<u32>>::new());
    }
}
