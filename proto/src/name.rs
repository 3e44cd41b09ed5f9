//! Names of populations and tasks.

use crate::{error::WireError, limits::NAME_BYTES_MAX};
use std::fmt;

/// A population's or task's name: 1 to 64 of `a-z 0-9 . _ -`, so that it is safe in a path, a
/// log line and a metric label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    /// Parses a name; `field` is named in the error.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, WireError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        if text.is_empty()
            || text.len() > NAME_BYTES_MAX
            || text.starts_with('.')
            || !text.bytes().all(allowed)
        {
            let problem = format!("{text:?} is not a name (1 to {NAME_BYTES_MAX} of a-z 0-9 . _ -)");
            return Err(WireError::invalid(field, problem));
        }
        Ok(Self(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_names_and_nothing_that_could_be_a_path() {
        for good in ["keyboard-en", "a", "2026.11", "x_y"] {
            assert_eq!(Name::parse("population", good).unwrap().as_str(), good);
        }
        for bad in ["", "..", ".hidden", "a/b", "A", "é", "a b", &"x".repeat(65)] {
            assert!(Name::parse("population", bad).is_err(), "{bad:?}");
        }
    }
}
