//! A device whose steps a test takes one by one: the shipped machine and transport, an update of zeros, and
//! no disk. While it holds a message back, its round stands still.

use super::fleet::{Site, wait_until};
use fleetune_client::{GrpcOptions, GrpcTransport, Transport};
use fleetune_privacy::NoiseOrigin;
use fleetune_proto::{
    AggregationProtocol, Name, TrustRoot, UnixMillis,
    device::{Action, Device, DeviceFloors, DeviceSetup, Event, Request},
};
use std::{fs, sync::Arc, time::SystemTime};

/// The messages of secure aggregation in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    Keys = 1,
    Shares,
    Masked,
    Confirm,
    Reveal,
}

pub(super) struct Scripted {
    device: Device,
    transport: GrpcTransport,
    held: Option<Request>,
    events: Vec<Event>,
}

impl Scripted {
    /// A registered device of the site's population.
    pub(super) fn new(site: &Site) -> Self {
        let address = fs::read_to_string(site.path("address")).expect("the coordinator listens");
        let coordinator = format!("http://{}", address.trim());
        let options = GrpcOptions { coordinator, ..GrpcOptions::default() };
        let trusted = hex::decode(site.public_key()).expect("a key");
        let setup = DeviceSetup {
            population: Name::parse("population", "test").expect("a name"),
            trust_root: TrustRoot::new(&[trusted.try_into().expect("32 bytes")], 1).expect("a trust root"),
            device_class: "scripted".into(),
            floors: DeviceFloors {
                protocols: vec![AggregationProtocol::SecaggPlus],
                ..DeviceFloors::default()
            },
            release_version: 0,
            release_version_max: 0,
            identity: Some(Arc::new(site.identity(99))),
            registrars: site.registrars(),
            noise: NoiseOrigin::operating_system(),
        };
        Self {
            device: Device::new(setup, [42; 32], now()),
            transport: GrpcTransport::new(&options).expect("a transport"),
            held: None,
            events: Vec::new(),
        }
    }

    /// Goes on until the message of `step` is to be sent, and holds it back.
    pub(super) fn run_to(&mut self, step: Step) {
        wait_until(&format!("the scripted device is at {step:?}"), || {
            self.send_held();
            while self.held.is_none() && self.act(Some(step)) {}
            self.held.is_some()
        });
    }

    /// Goes on until its contribution is in.
    pub(super) fn contribute(&mut self) {
        wait_until("the scripted device has contributed", || {
            self.send_held();
            while self.act(None) {}
            self.events.iter().any(|event| matches!(event, Event::Contributed { .. }))
        });
    }

    fn send_held(&mut self) {
        if let Some(request) = self.held.take() {
            self.send(request);
        }
    }

    fn send(&mut self, request: Request) {
        match self.transport.call(request) {
            Ok(response) => self.device.handle_response(response, now()),
            Err(failure) => self.device.handle_call_failed(&failure, now()),
        }
    }

    /// One action; false if there is none.
    fn act(&mut self, hold_at: Option<Step>) -> bool {
        let action = self.device.poll_action(now());
        let acted = action.is_some();
        match action {
            Some(Action::Call(request)) if hold_at.is_some() && step_of(&request) == hold_at => {
                self.held = Some(request);
            }
            Some(Action::Call(request)) => self.send(request),
            Some(Action::Keep(_)) => self.device.handle_kept(now()),
            Some(Action::Choose(policy)) => {
                let tasks = policy.tasks.into_iter().map(|offer| offer.task).collect();
                self.device.handle_choice(tasks, now());
            }
            Some(Action::Fetch(_)) => self.device.handle_fetched(now()),
            Some(Action::Train(order)) => {
                self.device.handle_trained(vec![0.0; order.plan.adapter.dimension], now());
            }
            Some(Action::Install(_)) => self.device.handle_installed(now()),
            None => {}
        }
        self.events.extend(self.device.poll_events());
        acted
    }
}

fn step_of(request: &Request) -> Option<Step> {
    match request {
        Request::AdvertiseKeys(_) => Some(Step::Keys),
        Request::ShareKeys(_) => Some(Step::Shares),
        Request::SubmitMaskedUpdate(_) => Some(Step::Masked),
        Request::ConfirmSurvivors(_) => Some(Step::Confirm),
        Request::RevealShares(_) => Some(Step::Reveal),
        Request::CheckIn(_)
        | Request::ReportTaskResult(_)
        | Request::WriteBlobChunk(_)
        | Request::SubmitUpdate(_)
        | Request::ReportRelease(_) => None,
    }
}

#[expect(clippy::disallowed_methods, reason = "real processes live in real time")]
fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    UnixMillis(u64::try_from(since.as_millis()).expect("this millennium"))
}
