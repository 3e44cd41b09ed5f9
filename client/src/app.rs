//! What an app brings: its user's text, when the device may work, and what the user agreed to.
//!
//! Closures of the same shape will do for each of the three.

use std::error::Error;

use fleetune_proto::TaskOffer;

/// Why an app's texts are not there; its words are logged, so they must not quote a text.
pub type ExampleError = Box<dyn Error + Send + Sync>;

/// The user's text. It stays on the device.
pub trait ExampleSource: Send {
    /// The texts to train on, oldest first. Asked once a training, so that new text counts.
    ///
    /// # Errors
    /// Whatever keeps the app from reading them; the device takes no part then.
    fn texts(&self) -> Result<Vec<String>, ExampleError>;
}

/// Whether the device may work now: on power, on an unmetered network, idle, cool.
pub trait Conditions: Send {
    /// Asked before the device offers itself, at every chunk of a download and twenty times a second of a
    /// training, so it must be cheap. What is under way ends within one layer of the model.
    ///
    /// # Errors
    /// Says in words which condition does not hold; they are logged.
    fn hold(&self) -> Result<(), String>;
}

/// What the user agreed to.
pub trait Consent: Send {
    /// True when the device may name this task to the coordinator and train for it.
    fn allows(&self, task: &TaskOffer) -> bool;
}

impl<F: Fn() -> Result<Vec<String>, ExampleError> + Send> ExampleSource for F {
    fn texts(&self) -> Result<Vec<String>, ExampleError> {
        self()
    }
}

impl<F: Fn() -> Result<(), String> + Send> Conditions for F {
    fn hold(&self) -> Result<(), String> {
        self()
    }
}

impl<F: Fn(&TaskOffer) -> bool + Send> Consent for F {
    fn allows(&self, task: &TaskOffer) -> bool {
        self(task)
    }
}

/// The three together; none has a default, for each is the app's to answer.
pub struct App {
    /// The user's text.
    pub examples: Box<dyn ExampleSource>,
    /// When the device may work.
    pub conditions: Box<dyn Conditions>,
    /// What the user agreed to.
    pub consent: Box<dyn Consent>,
}

impl App {
    /// An app of those parts.
    pub fn new(
        examples: impl ExampleSource + 'static,
        conditions: impl Conditions + 'static,
        consent: impl Consent + 'static,
    ) -> Self {
        Self { examples: Box::new(examples), conditions: Box::new(conditions), consent: Box::new(consent) }
    }
}
