//! Bounds on what the loader accepts, each with its reason.

/// Bounds on a data set. What passes one fails with the bound's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataLimits {
    /// Bytes of one file after decompression, and of all files of a folder together: the loader holds
    /// them in memory, and a gzip bomb must end somewhere.
    pub file_bytes_max: usize,
    /// Bytes of one JSONL line, so of one user: a lifetime of writing fits.
    pub line_bytes_max: usize,
    /// Users of one data set: more are a sign of a wrong file.
    pub users_max: usize,
    /// Texts of one user, over its splits.
    pub texts_max: usize,
    /// Bytes of a user's name, which stands in reports and error messages.
    pub user_name_bytes_max: usize,
    /// Bad lines collected before the loader gives up: enough to see a pattern.
    pub bad_lines_max: usize,
    /// Names of ignored keys and files that are kept for the report.
    pub ignored_max: usize,
}

impl Default for DataLimits {
    fn default() -> Self {
        Self {
            file_bytes_max: 512 << 20,
            line_bytes_max: 16 << 20,
            users_max: 1_000_000,
            texts_max: 1_000_000,
            user_name_bytes_max: 256,
            bad_lines_max: 20,
            ignored_max: 32,
        }
    }
}
