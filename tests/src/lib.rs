//! Nothing: the tests are in `integration/`, one crate and one binary, because Cargo links each test
//! file apart and every link takes in the whole system.
