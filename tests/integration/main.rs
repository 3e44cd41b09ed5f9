//! The tests of the whole: one crate, one binary. Each module is one subject.

mod architecture;
mod disclosure;
mod documents;
mod fuzz;
mod privacy;
mod processes;
mod ratchet;
mod secure;
mod simulation;
mod support;
