//! What a message from outside can be wrong in.

use thiserror::Error;

/// A message that cannot be parsed into its typed value.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// The bytes are no message of the expected type.
    #[error("{message}: not a valid message ({reason})")]
    Decode {
        /// Message expected.
        message: &'static str,
        /// What the decoder said.
        reason: String,
    },
    /// A required field is absent.
    #[error("{0}: missing")]
    Missing(&'static str),
    /// A field has a value that is not allowed.
    #[error("{field}: {problem}")]
    Invalid {
        /// Message and field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl WireError {
    pub(crate) fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { field, problem: problem.into() }
    }
}

/// Decodes a message and names it when that fails.
pub(crate) fn decode<M: prost::Message + Default>(
    message: &'static str,
    bytes: &[u8],
) -> Result<M, WireError> {
    M::decode(bytes).map_err(|error| WireError::Decode { message, reason: error.to_string() })
}

/// Unwraps a required field.
pub(crate) fn required<T>(field: &'static str, value: Option<T>) -> Result<T, WireError> {
    value.ok_or(WireError::Missing(field))
}

/// Checks that a value lies in a range.
pub(crate) fn within<T: PartialOrd + std::fmt::Display>(
    field: &'static str,
    value: T,
    range: std::ops::RangeInclusive<T>,
) -> Result<T, WireError> {
    if range.contains(&value) {
        return Ok(value);
    }
    Err(WireError::invalid(field, format!("{value} is not in {}..={}", range.start(), range.end())))
}
