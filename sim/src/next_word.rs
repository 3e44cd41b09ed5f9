//! The figures that keyboards are judged by: how often the next token, and the next whole word, is among a model's first
//! guesses (top-1 and top-3 recall; Hard et al. 2018, "Federated Learning for Mobile Keyboard Prediction", section 5).
//!
//! The vocabulary is of parts of words, so a word is offered by completing one of the three most likely first parts
//! greedily until the model's next guess no longer goes on with the word. That follows from the ranks along the true
//! text alone: the first part within the first three, each further part the first guess, and after the last one a guess
//! that ends the word.

mod ngram;

use crate::{
    experiment::Experiment,
    pool::{Pending, Pool},
};
use anyhow::Result;
use fleetune_model::{
    eval::{Guess, guesses},
    tokenizer::Tokenizer,
    trained::TrainedModel,
};
use ngram::Bigrams;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Suggestions that a keyboard shows.
const OFFERED: u32 = 3;

/// One model's figures on both groups.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NextWord {
    /// What predicts.
    pub model: String,
    /// On seen users' test text.
    pub seen: Recall,
    /// On held-out users' text.
    pub heldout: Recall,
}

/// Shares of places at which the right one was offered.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Recall {
    /// Mean negative log-likelihood, nats a token.
    pub nll: f64,
    /// Tokens that were the first guess.
    pub token_top1: f64,
    /// Tokens among the first three guesses.
    pub token_top3: f64,
    /// Words that were the first suggestion.
    pub word_top1: f64,
    /// Words among three suggestions.
    pub word_top3: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Whole words in them.
    pub words: u64,
}

/// The figures of trained values (the base without any), as one job.
pub fn of_values(
    pool: &Pool,
    experiment: &Experiment,
    name: &str,
    values: Option<Vec<f32>>,
) -> Pending<NextWord> {
    let (base, layout, name) = (Arc::clone(&experiment.base), experiment.layout.clone(), name.to_owned());
    let blocks = (Arc::clone(&experiment.eval_blocks), Arc::clone(&experiment.heldout_blocks));
    pool.submit(move |_| {
        let model = match values {
            Some(values) => layout.model(&base, values)?,
            None => TrainedModel { base, adapter: None },
        };
        let of = |blocks: &[Vec<u32>]| -> Result<Recall> {
            let guesses = guesses(&model.base, model.adapter.as_ref(), blocks)?;
            Ok(recall(&model.base.tokenizer, blocks, &guesses))
        };
        Ok(NextWord { model: name, seen: of(&blocks.0)?, heldout: of(&blocks.1)? })
    })
}

/// The figures of counting: how often each token comes, and with back-off how often after which, in the training
/// texts of all users together. As one job each.
pub fn of_counts(pool: &Pool, experiment: &Experiment) -> Vec<Pending<NextWord>> {
    let counted = experiment.users.iter().flat_map(|user| user.train.iter());
    let bigrams = Arc::new(Bigrams::count(experiment.base.config.vocab_size, counted));
    [("unigrams", false), ("bigrams", true)]
        .map(|(name, with_context)| {
            let (bigrams, base) = (Arc::clone(&bigrams), Arc::clone(&experiment.base));
            let blocks = (Arc::clone(&experiment.eval_blocks), Arc::clone(&experiment.heldout_blocks));
            pool.submit(move |_| {
                let of = |blocks: &[Vec<u32>]| {
                    let guess = |block: &Vec<u32>| bigrams.guesses(block, with_context);
                    recall(&base.tokenizer, blocks, &blocks.iter().map(guess).collect::<Vec<_>>())
                };
                Ok(NextWord { model: name.to_owned(), seen: of(&blocks.0), heldout: of(&blocks.1) })
            })
        })
        .into()
}

/// The figures of a model's guesses at the blocks' ids but the first.
fn recall(tokenizer: &Tokenizer, blocks: &[Vec<u32>], guesses: &[Vec<Guess>]) -> Recall {
    let mut sum = Recall::default();
    for (block, guesses) in blocks.iter().zip(guesses) {
        for guess in guesses {
            sum.tokens += 1;
            sum.nll += guess.nll;
            sum.token_top1 += f64::from(u8::from(guess.rank == 0));
            sum.token_top3 += f64::from(u8::from(guess.rank < OFFERED));
        }
        let pieces: Vec<Piece> = block.iter().map(|id| Piece::of(tokenizer, *id)).collect();
        for word in words(&pieces) {
            let [first, rest @ ..] = &guesses[word.start - 1..word.end - 1] else { continue };
            let ended = !Piece::of(tokenizer, guesses[word.end - 1].best).goes_on;
            let completed = ended && rest.iter().all(|guess| guess.rank == 0);
            sum.words += 1;
            sum.word_top1 += f64::from(u8::from(completed && first.rank == 0));
            sum.word_top3 += f64::from(u8::from(completed && first.rank < OFFERED));
        }
    }
    let (tokens, words) = (sum.tokens.max(1) as f64, sum.words.max(1) as f64);
    Recall {
        nll: sum.nll / tokens,
        token_top1: sum.token_top1 / tokens,
        token_top3: sum.token_top3 / tokens,
        word_top1: sum.word_top1 / words,
        word_top3: sum.word_top3 / words,
        ..sum
    }
}

/// What a token is to the word around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Begins a word, with the space before it.
    begins: bool,
    /// Goes on with the word before it: letters or an apostrophe without a space.
    goes_on: bool,
}

impl Piece {
    fn of(tokenizer: &Tokenizer, id: u32) -> Self {
        let bytes = tokenizer.token_bytes(id);
        // Beyond ASCII a letter's first byte is taken for a letter.
        let letter = |byte: &u8| byte.is_ascii_alphabetic() || *byte >= 0x80;
        match bytes.as_slice() {
            [b' ', first, ..] => Self { begins: letter(first), goes_on: false },
            [first, ..] => Self { begins: false, goes_on: letter(first) || *first == b'\'' },
            [] => Self { begins: false, goes_on: false },
        }
    }
}

/// The whole words of a block, as ranges of its ids: those whose token before and token after stand in it too.
fn words(pieces: &[Piece]) -> Vec<std::ops::Range<usize>> {
    let mut found = Vec::new();
    for start in (1..pieces.len()).filter(|at| pieces[*at].begins) {
        let length = 1 + pieces[start + 1..].iter().take_while(|piece| piece.goes_on).count();
        if start + length < pieces.len() {
            found.push(start..start + length);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleetune_model::tokenizer::{SpecialTokens, train_bpe};

    /// A tokenizer of bytes: each letter is a token, and so is the space with some letters.
    fn tokenizer() -> Tokenizer {
        let texts = vec![" a b c d a b c d".to_owned(); 50];
        train_bpe(texts.into_iter(), 270, &SpecialTokens::default()).unwrap()
    }

    fn guess(rank: u32, best: u32) -> Guess {
        Guess { best, rank, nll: 1.0 }
    }

    #[test]
    fn words_need_their_end_in_the_block() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode_ordinary(" ab, cd'e d");
        let pieces: Vec<Piece> = ids.iter().map(|id| Piece::of(&tokenizer, *id)).collect();
        let text = |range: &std::ops::Range<usize>| tokenizer.decode(&ids[range.clone()]);
        let found = words(&pieces);
        // The first has nothing before it, the last may go on after the block.
        assert_eq!(found.iter().map(text).collect::<Vec<_>>(), [" cd'e"]);
    }

    #[test]
    fn a_word_is_offered_if_its_parts_are_and_it_ends() {
        let tokenizer = tokenizer();
        let block = tokenizer.encode_ordinary(", ab d");
        let tokens: Vec<String> = block.iter().map(|id| tokenizer.decode(&[*id])).collect();
        assert_eq!(tokens, [",", " a", "b", " d"]);
        let (letter, space) = (block[2], block[1]);
        let check = |guesses: [Guess; 3], top1: f64, top3: f64| {
            let found = recall(&tokenizer, std::slice::from_ref(&block), &[guesses.to_vec()]);
            assert_eq!((found.words, found.tokens), (1, 3));
            assert_eq!((found.word_top1, found.word_top3), (top1, top3), "{guesses:?}");
        };
        check([guess(0, space), guess(0, letter), guess(5, space)], 1.0, 1.0);
        check([guess(2, space), guess(0, letter), guess(5, space)], 0.0, 1.0);
        check([guess(3, space), guess(0, letter), guess(5, space)], 0.0, 0.0);
        check([guess(0, space), guess(1, letter), guess(0, space)], 0.0, 0.0);
        check([guess(0, space), guess(0, letter), guess(5, letter)], 0.0, 0.0);
        let found =
            recall(&tokenizer, std::slice::from_ref(&block), &[vec![guess(0, 0), guess(2, 0), guess(3, 0)]]);
        assert!((found.token_top1 - 1.0 / 3.0).abs() < 1e-12 && (found.token_top3 - 2.0 / 3.0).abs() < 1e-12);
    }
}
