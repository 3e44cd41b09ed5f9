//! The usual road to a coordinator: gRPC over TLS.
//!
//! A runtime of its own runs on the caller's thread while a call is out, so the client stays blocking and
//! needs no other thread. Connections are made when they are needed and again after they broke.

mod status;

use std::future::Future;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::time::Duration;

use fleetune_proto::device::{Request, Response};
use fleetune_proto::wire::{
    ReadBlobRequest, ReadBlobResponse, aggregation_service_client::AggregationServiceClient,
    blob_service_client::BlobServiceClient, release_service_client::ReleaseServiceClient,
    task_service_client::TaskServiceClient,
};
use fleetune_proto::{CallFailure, Digest, FailureKind};
use thiserror::Error;
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::transport::Transport;
use status::failure;

/// Until a connection stands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// From a call to its answer, and from one chunk of a stream to the next: a chunk of 1 MiB passes in it at
/// 20 kB/s.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Finds a dead peer behind a network that drops packets silently.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// Where the coordinator is and how it is trusted.
#[derive(Debug, Clone, Default)]
pub struct GrpcOptions {
    /// `https://HOST[:PORT]`, or `http://` to a loopback address.
    pub coordinator: String,
    /// PEM certificates that sign the coordinator's; none for the public web's.
    pub ca_pem: Option<Vec<u8>>,
    /// Also speaks `http://` to other machines: everybody on the way reads and changes what passes.
    pub insecure_plaintext_remote: bool,
}

/// Why there is no road.
#[derive(Debug, Error)]
pub enum GrpcError {
    /// The address is none.
    #[error("coordinator {coordinator}: {reason}")]
    Address {
        /// The address given.
        coordinator: String,
        /// What is wrong.
        reason: String,
    },
    /// Plaintext to another machine.
    #[error("coordinator {coordinator}: plaintext is only for loopback addresses; use https://")]
    Plaintext {
        /// The address given.
        coordinator: String,
    },
    /// No runtime from the system.
    #[error("no runtime: {0}")]
    Runtime(#[from] std::io::Error),
}

/// Calls a coordinator over gRPC; every call has a deadline.
pub struct GrpcTransport {
    runtime: Runtime,
    channel: Channel,
}

impl GrpcTransport {
    /// Prepares the road; the first call connects.
    ///
    /// # Errors
    /// [`GrpcError`] for an address or certificates that cannot be used.
    pub fn new(options: &GrpcOptions) -> Result<Self, GrpcError> {
        let endpoint = endpoint(options)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let entered = runtime.enter();
        let channel = endpoint.connect_lazy();
        drop(entered);
        Ok(Self { runtime, channel })
    }

    fn unary<M>(
        &self,
        call: impl Future<Output = Result<tonic::Response<M>, Status>>,
    ) -> Result<M, CallFailure> {
        let answer = self.runtime.block_on(async { within_deadline(call).await });
        Ok(answer?.into_inner())
    }
}

impl Transport for GrpcTransport {
    fn call(&mut self, request: Request) -> Result<Response, CallFailure> {
        let tasks = || TaskServiceClient::new(self.channel.clone());
        let aggregation = || AggregationServiceClient::new(self.channel.clone());
        match request {
            Request::CheckIn(r) => self.unary(async { tasks().check_in(r).await }).map(Response::CheckIn),
            Request::ReportTaskResult(r) => {
                self.unary(async { tasks().report_task_result(r).await }).map(|_| Response::ReportTaskResult)
            }
            Request::WriteBlobChunk(r) => {
                let mut blobs = BlobServiceClient::new(self.channel.clone());
                self.unary(blobs.write_blob_chunk(r)).map(Response::WriteBlobChunk)
            }
            Request::SubmitUpdate(r) => {
                self.unary(async { aggregation().submit_update(r).await }).map(Response::SubmitUpdate)
            }
            Request::AdvertiseKeys(r) => {
                self.unary(async { aggregation().advertise_keys(r).await }).map(Response::AdvertiseKeys)
            }
            Request::ShareKeys(r) => {
                self.unary(async { aggregation().share_keys(r).await }).map(Response::ShareKeys)
            }
            Request::SubmitMaskedUpdate(r) => self
                .unary(async { aggregation().submit_masked_update(r).await })
                .map(Response::SubmitMaskedUpdate),
            Request::ConfirmSurvivors(r) => {
                self.unary(async { aggregation().confirm_survivors(r).await }).map(Response::ConfirmSurvivors)
            }
            Request::RevealShares(r) => {
                self.unary(async { aggregation().reveal_shares(r).await }).map(Response::RevealShares)
            }
            Request::ReportRelease(r) => {
                let mut releases = ReleaseServiceClient::new(self.channel.clone());
                self.unary(releases.report_release(r)).map(|_| Response::ReportRelease)
            }
        }
    }

    fn read_blob(
        &mut self,
        digest: Digest,
        offset: u64,
        sink: &mut dyn FnMut(ReadBlobResponse) -> ControlFlow<()>,
    ) -> Result<(), CallFailure> {
        let mut blobs = BlobServiceClient::new(self.channel.clone());
        let request = ReadBlobRequest { digest: Some(digest.to_wire()), offset };
        self.runtime.block_on(async {
            let mut stream = within_deadline(blobs.read_blob(request)).await?.into_inner();
            while let Some(chunk) = within_deadline(stream.message()).await? {
                if sink(chunk).is_break() {
                    break;
                }
            }
            Ok(())
        })
    }
}

async fn within_deadline<M>(call: impl Future<Output = Result<M, Status>>) -> Result<M, CallFailure> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(|status| failure(&status)),
        Err(_) => {
            let message = format!("no answer within {} s", CALL_TIMEOUT.as_secs());
            Err(CallFailure::new(FailureKind::DeadlineExceeded, message))
        }
    }
}

fn endpoint(options: &GrpcOptions) -> Result<Endpoint, GrpcError> {
    let coordinator = &options.coordinator;
    let wrong = |reason: String| GrpcError::Address { coordinator: coordinator.clone(), reason };
    let endpoint = Endpoint::from_shared(coordinator.clone()).map_err(|e| wrong(causes(&e)))?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_INTERVAL);
    let host = endpoint.uri().host().map(str::to_owned).ok_or_else(|| wrong("no host in it".to_owned()))?;
    match endpoint.uri().scheme_str() {
        Some("https") => endpoint.tls_config(tls(options)).map_err(|e| wrong(causes(&e))),
        Some("http") if options.insecure_plaintext_remote || is_loopback(&host) => Ok(endpoint),
        Some("http") => Err(GrpcError::Plaintext { coordinator: coordinator.clone() }),
        Some(_) | None => Err(wrong("it must begin with https:// or http://".to_owned())),
    }
}

fn tls(options: &GrpcOptions) -> ClientTlsConfig {
    match &options.ca_pem {
        Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
        None => ClientTlsConfig::new().with_enabled_roots(),
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// An error and what caused it, in one line: tonic's own words are "transport error".
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
