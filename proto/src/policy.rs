//! The tasks of a population, as a device weighs them before it names one.

use crate::{
    error::{self, WireError},
    limits::TASKS_MAX,
    name::Name,
    plan::parse_protocol,
    wire::{self, AggregationProtocol},
};
use prost::Message;

/// What a device must know of a task before it names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskOffer {
    /// The task.
    pub task: Name,
    /// Fewest local training examples.
    pub examples_min: u32,
    /// Protocol that carries the update.
    pub protocol: AggregationProtocol,
}

/// The tasks on offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PopulationPolicy {
    /// Population the policy is for.
    pub population: Name,
    /// Its tasks.
    pub tasks: Vec<TaskOffer>,
}

impl PopulationPolicy {
    /// Parses bytes whose signature has been verified.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let wire: wire::PopulationPolicy = error::decode("PopulationPolicy", bytes)?;
        error::within("policy.tasks", wire.tasks.len(), 0..=TASKS_MAX)?;
        let population = Name::parse("policy.population", &wire.population)?;
        Ok(Self { population, tasks: wire.tasks.iter().map(parse_offer).collect::<Result<_, _>>()? })
    }

    /// The bytes to sign.
    pub fn to_bytes(&self) -> Vec<u8> {
        let offer = |offer: &TaskOffer| wire::TaskOffer {
            task: offer.task.as_str().into(),
            examples_min: offer.examples_min,
            aggregation_protocol: offer.protocol.into(),
        };
        let tasks = self.tasks.iter().map(offer).collect();
        wire::PopulationPolicy { population: self.population.as_str().into(), tasks }.encode_to_vec()
    }
}

fn parse_offer(wire: &wire::TaskOffer) -> Result<TaskOffer, WireError> {
    Ok(TaskOffer {
        task: Name::parse("policy.tasks.task", &wire.task)?,
        examples_min: wire.examples_min,
        protocol: parse_protocol("policy.tasks.aggregation_protocol", wire.aggregation_protocol)?,
    })
}
