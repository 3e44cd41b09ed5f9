//! The core against the shipped device machine, in virtual time.
